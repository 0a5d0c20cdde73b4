"""The released reference code's JSON: literal files both ways, a whole run both ways, every fault named."""

import copy
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rmx.artefacts import ArtefactError
from rmx.config import Config
from rmx.errors import Interrupted
from rmx.interchange.files import (
    ScoredRollouts,
    export_records,
    export_rollouts,
    export_training_set,
    import_records,
    import_rollouts,
    import_training_set,
)
from rmx.interchange.transfer import export_run, import_run
from rmx.records import Problem, Rollout, TrainingSequence, Verdict
from rmx.runs.pipeline import Run
from rmx.runs.rundir import RunError
from rmx.runs.stages import STAGES
from rmx.training import score

RECORDS = """{"records": [
    {"problem_id": "MATH/train/7", "problem_text": "sum of 1 and 2", "ground_truth": "3", "category": "Algebra"},
    {"problem_id": "g-0", "problem_text": "sum of 4 and 5", "ground_truth": "\\\\frac{9}{1}", "category": ""}
]}"""

ROLLOUTS = """{"meta": {"dataset": "math500", "temperature": 0.6}, "rollouts": [
    {"problem_id": "MATH/train/7", "gen_index": 0, "tokens": [1, 3, 6, 4, 8, 2], "prompt_length": 4,
     "completion_tokens": 2, "entropies": [1.7000000476837158, 0.1], "correct": true, "truncated": false},
    {"problem_id": "MATH/train/7", "gen_index": 5, "tokens": [1, 3, 6, 4, 9], "prompt_length": 4,
     "completion_tokens": 1, "entropies": [1e-07], "correct": false, "truncated": true},
    {"problem_id": "g-0", "gen_index": 0, "tokens": [1], "prompt_length": 1,
     "completion_tokens": 0, "entropies": [], "correct": false, "truncated": false}
]}"""

TRAINING_SET = """{"rollouts": [
    {"problem_id": "MATH/train/7", "gen_index": 0, "input_ids": [1, 3, 6, 4, 8, 7, 2], "prompt_length": 4,
     "completion_length": 3, "correct": true, "advantage": 0.30000000000000004, "entropies": [1.5, 0.2, 2.25],
     "decision_positions": [3, 5]},
    {"problem_id": "MATH/train/7", "gen_index": 5, "input_ids": [1, 3, 6, 4, 9], "prompt_length": 4,
     "completion_length": 1, "correct": false, "advantage": -2.5, "entropies": [1.4],
     "decision_positions": []}
], "config": {"tau": 1.4, "source_meta": {"dataset": "math500"}}}"""


def put(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def changed(config: Config, **sections: Any) -> Config:
    tree = config.model_dump()
    for name, values in sections.items():
        tree[name] = {**tree[name], **values} if isinstance(values, dict) else values
    return Config.model_validate(tree)


def test_records_come_and_go_by_value(tmp_path: Path) -> None:
    problems = import_records(put(tmp_path / "in.json", RECORDS))
    assert problems == [
        Problem("MATH/train/7", "sum of 1 and 2", "3", "Algebra"),
        Problem("g-0", "sum of 4 and 5", "\\frac{9}{1}"),
    ]
    assert {p.split for p in import_records(tmp_path / "in.json", "evaluate")} == {"evaluate"}
    export_records(tmp_path / "out.json", problems)
    assert read(tmp_path / "out.json") == json.loads(RECORDS)


def test_a_reasoning_gym_problem_keeps_what_its_scorer_needs(tmp_path: Path) -> None:
    problem = Problem("chain_sum-0", "1 + 1", "2", "reasoning_gym:chain_sum", entry={"metadata": {"num_terms": 2}})
    export_records(tmp_path / "gym.json", [problem])
    assert import_records(tmp_path / "gym.json") == [problem]
    broken = read(tmp_path / "gym.json")
    del broken["records"][0]["extra_info"]
    with pytest.raises(ArtefactError, match=r"records\[0\]: extra_info: expected the reasoning-gym entry"):
        import_records(put(tmp_path / "gym.json", json.dumps(broken)))


def test_numbers_that_stand_for_text_become_text(tmp_path: Path) -> None:
    record = {"problem_id": 7, "problem_text": "1 + 1.5", "ground_truth": 2.5, "category": "x", "level": "ignored"}
    [problem] = import_records(put(tmp_path / "in.json", json.dumps({"records": [record], "split": "ignored"})))
    assert problem == Problem("7", "1 + 1.5", "2.5", "x")


def test_scored_rollouts_come_and_go_by_value(tmp_path: Path) -> None:
    scored = import_rollouts(put(tmp_path / "in.json", ROLLOUTS), lambda ids: f"<{len(ids)}>")
    assert scored.rollouts == [
        Rollout("MATH/train/7", 0, [1, 3, 6, 4], [8, 2], "stop", "<2>"),
        Rollout("MATH/train/7", 5, [1, 3, 6, 4], [9], "length", "<1>"),
        Rollout("g-0", 0, [1], [], "stop", "<0>"),
    ]
    assert [v.outcome for v in scored.verdicts] == ["right", "wrong", "wrong"]
    assert [(v.problem_id, v.sample) for v in scored.verdicts] == [("MATH/train/7", 0), ("MATH/train/7", 5), ("g-0", 0)]
    assert scored.entropies == [[1.7000000476837158, 0.1], [1e-07], []]
    export_rollouts(tmp_path / "out.json", scored)
    assert read(tmp_path / "out.json") == json.loads(ROLLOUTS)


def test_completion_tokens_may_be_the_ids_themselves(tmp_path: Path) -> None:
    listed = json.loads(ROLLOUTS)
    for entry in listed["rollouts"]:
        entry["completion_tokens"] = entry["tokens"][entry["prompt_length"] :]
    count, ids = tmp_path / "count.json", tmp_path / "ids.json"
    assert import_rollouts(put(ids, json.dumps(listed))) == import_rollouts(put(count, ROLLOUTS))


def test_what_the_verifier_could_not_judge_is_not_called_wrong(tmp_path: Path) -> None:
    scored = import_rollouts(put(tmp_path / "in.json", ROLLOUTS))
    outcomes = ("no_answer", "timeout", "crash")
    verdicts = [Verdict(v.problem_id, v.sample, o, None) for v, o in zip(scored.verdicts, outcomes, strict=True)]
    export_rollouts(tmp_path / "out.json", ScoredRollouts(scored.rollouts, verdicts, scored.entropies, {}))
    [only] = read(tmp_path / "out.json")["rollouts"]
    assert (only["gen_index"], only["correct"]) == (0, False)


def test_a_training_set_comes_and_goes_by_value(tmp_path: Path) -> None:
    training = import_training_set(put(tmp_path / "in.json", TRAINING_SET))
    first, second = training.sequences
    assert all(math.isnan(x) for s in training.sequences for x in s.base_logprob)
    assert [len(s.base_logprob) for s in training.sequences] == [3, 1]
    # position 3 is the last of the prompt: it predicts completion token 0
    expected = TrainingSequence("MATH/train/7", 0, [1, 3, 6, 4], [8, 7, 2], 1.0, 0.30000000000000004, [0, 2], [])
    assert replace(first, base_logprob=[]) == expected
    assert (second.reward, second.advantage, second.decision_tokens) == (0.0, -2.5, [])
    assert training.entropies == [[1.5, 0.2, 2.25], [1.4]]
    export_training_set(tmp_path / "out.json", training)
    assert read(tmp_path / "out.json") == json.loads(TRAINING_SET)


RECORD_FAULTS = [
    ("problem_id", None, r"records\[1\]: problem_id: Value error, expected text or a number, got None"),
    ("problem_id", "MATH/train/7", r"records\[1\]: problem_id: the same as in records\[0\]"),
    ("problem_text", " ", r"records\[1\]: problem_text: .*expected text"),
    ("ground_truth", True, r"records\[1\]: ground_truth: .*expected text or a number, got True"),
    ("ground_truth", math.nan, r"records\[1\]: ground_truth: .*expected text or a number, got nan"),
    ("category", 3, r"records\[1\]: category: .*valid string, got 3"),
]
ROLLOUT_FAULTS = [
    ("problem_id", "", r"rollouts\[1\]: problem_id: .*expected text"),
    ("gen_index", 0, r"rollouts\[1\]: problem_id and gen_index: the same as in rollouts\[0\]"),
    ("gen_index", -1, r"rollouts\[1\]: gen_index: .*greater than or equal to 0, got -1"),
    ("gen_index", True, r"rollouts\[1\]: gen_index: .*valid integer, got True"),
    ("tokens", [1, 3, 6, 4, -9], r"rollouts\[1\]: tokens.4: .*greater than or equal to 0, got -9"),
    ("tokens", [1, 3, 6, 4, 9.0], r"rollouts\[1\]: tokens.4: .*valid integer, got 9.0"),
    ("tokens", [1, 3], r"rollouts\[1\]: prompt_length: expected 1 to 2 of 2 tokens, got 4"),
    ("prompt_length", 0, r"rollouts\[1\]: prompt_length: expected 1 to 5 of 5 tokens, got 0"),
    ("completion_tokens", 2, r"rollouts\[1\]: completion_tokens: expected 1, or the ids .*, got 2"),
    ("completion_tokens", True, r"rollouts\[1\]: completion_tokens: expected 1, or the ids .*, got True"),
    ("completion_tokens", [8], r"rollouts\[1\]: completion_tokens: expected 1, or the ids .*, got a list of 1"),
    ("entropies", [0.1, 0.2], r"rollouts\[1\]: entropies: expected 1 values, one a completion token, got 2"),
    ("entropies", [math.nan], r"rollouts\[1\]: entropies.0: .*finite number, got nan"),
    ("entropies", [math.inf], r"rollouts\[1\]: entropies.0: .*finite number, got inf"),
    ("entropies", ["1"], r"rollouts\[1\]: entropies.0: .*valid number, got '1'"),
    ("correct", 1, r"rollouts\[1\]: correct: .*valid boolean, got 1"),
    ("truncated", None, r"rollouts\[1\]: truncated: .*valid boolean, got None"),
]
TRAINING_FAULTS = [
    ("gen_index", 5, r"rollouts\[1\]: problem_id and gen_index: the same as in rollouts\[0\]"),
    ("input_ids", [1, 3, 6, 4], r"rollouts\[0\]: prompt_length: expected 1 to 3 of 4 tokens, got 4"),
    ("input_ids", [1, 3, 6, 4, 8, -7, 2], r"rollouts\[0\]: input_ids.5: .*greater than or equal to 0"),
    ("completion_length", 2, r"rollouts\[0\]: completion_length: expected 3, the input_ids after prompt_length, got 2"),
    ("correct", "true", r"rollouts\[0\]: correct: .*valid boolean"),
    ("advantage", math.nan, r"rollouts\[0\]: advantage: .*finite number, got nan"),
    ("entropies", [1.5, 0.2], r"rollouts\[0\]: entropies: expected 3 values"),
    ("decision_positions", [2], r"rollouts\[0\]: decision_positions.0: expected ascending .* 3 to 5, got 2"),
    ("decision_positions", [3, 6], r"rollouts\[0\]: decision_positions.1: expected ascending .* 3 to 5, got 6"),
    ("decision_positions", [4, 4], r"rollouts\[0\]: decision_positions.1: expected ascending .*, got 4"),
    ("decision_positions", [5, 3], r"rollouts\[0\]: decision_positions.1: expected ascending .*, got 3"),
    ("decision_positions", [3.0], r"rollouts\[0\]: decision_positions.0: .*valid integer, got 3.0"),
]
KINDS = [
    (import_records, RECORDS, "records", 1, RECORD_FAULTS),
    (import_rollouts, ROLLOUTS, "rollouts", 1, ROLLOUT_FAULTS),
    (import_training_set, TRAINING_SET, "rollouts", 0, TRAINING_FAULTS),
]


@pytest.mark.parametrize(
    ("reader", "text", "name", "index", "field", "value", "message"),
    [(*kind[:4], *fault) for kind in KINDS for fault in kind[4]],
)
def test_a_wrong_field_is_named(
    tmp_path: Path, reader: Any, text: str, name: str, index: int, field: str, value: Any, message: str
) -> None:
    broken = json.loads(text)
    broken[name][index][field] = value
    with pytest.raises(ArtefactError, match=re.escape(f"{tmp_path / 'x.json'}: ") + message):
        reader(put(tmp_path / "x.json", json.dumps(broken)))


@pytest.mark.parametrize(("reader", "text", "name", "index"), [kind[:4] for kind in KINDS])
def test_a_missing_field_is_named(tmp_path: Path, reader: Any, text: str, name: str, index: int) -> None:
    whole = json.loads(text)
    for field in whole[name][index]:
        broken = copy.deepcopy(whole)
        del broken[name][index][field]
        with pytest.raises(ArtefactError, match=rf"x.json: {name}\[{index}\]: {field}: missing"):
            reader(put(tmp_path / "x.json", json.dumps(broken)))
    for key in whole:
        broken = {k: v for k, v in whole.items() if k != key}
        with pytest.raises(ArtefactError, match=rf"x.json: {key}: expected a (list|dict), it is missing"):
            reader(put(tmp_path / "x.json", json.dumps(broken)))


@pytest.mark.parametrize(("reader", "name"), [(kind[0], kind[2]) for kind in KINDS])
def test_a_file_of_another_form_is_refused(tmp_path: Path, reader: Any, name: str) -> None:
    path, about = tmp_path / "x.json", {"meta": {}, "config": {}}
    with pytest.raises(ArtefactError, match=r"x.json: cannot be read: No such file"):
        reader(path)
    for content, message in [
        ("[", "not JSON"),
        ("[]", "expected a JSON object, got list"),
        (json.dumps({**about, name: {}}), f"{name}: expected a list, got dict"),
        (json.dumps({**about, name: []}), f"{name}: is empty"),
        (json.dumps({**about, name: [3]}), rf"{name}\[0\]: value: .*valid dictionary.*, got 3"),
    ]:
        with pytest.raises(ArtefactError, match=f"x.json: {message}"):
            reader(put(path, content))


@pytest.fixture
def released(finished: Run, tmp_path: Path) -> Path:
    """The files of a finished run."""
    assert [p.name for p in export_run(finished, tmp_path / "released")] == [
        "records.json",
        "held_out.json",
        "rollouts.json",
        "training_set.json",
    ]
    return tmp_path / "released"


def elsewhere(run: Run, name: str, **sections: Any) -> Run:
    return Run(changed(run.config, run_dir=str(Path(run.config.run_dir).with_name(name)), **sections))


@pytest.mark.thorough
def test_a_run_exported_and_imported_trains_the_same_adapter(finished: Run, released: Path) -> None:
    again = elsewhere(finished, "again")
    import_run(again, released)
    assert list(again.stages()) == list(STAGES)[:5]
    assert again.training_set() == finished.training_set()
    assert again.tau() == finished.tau()
    assert again.problems("evaluate") == finished.problems("evaluate")
    assert [r.text for r in again.to_score()] == [r.text for r in finished.to_score()]
    assert again.run() == finished.evaluation()
    weights = "adapter/adapter_model.safetensors"
    assert again.path(weights).read_bytes() == finished.path(weights).read_bytes()
    for path in export_run(again, released.with_name("twice")):
        assert read(path) == read(released / path.name)


@pytest.mark.thorough
def test_rollouts_without_a_training_set_are_scored_and_selected_anew(finished: Run, released: Path) -> None:
    (released / "training_set.json").unlink()
    again = elsewhere(finished, "again")
    import_run(again, released)
    assert list(again.stages()) == list(STAGES)[:3]
    assert again.run() == finished.evaluation()
    assert again.training_set() == finished.training_set()


@pytest.mark.thorough
def test_a_training_set_alone_is_scored_for_its_base_states(finished: Run, released: Path) -> None:
    (released / "rollouts.json").unlink()
    flipped = read(released / "training_set.json")
    for entry in flipped["rollouts"]:  # what no selection of ours would give stays as it is
        entry["decision_positions"] = [entry["prompt_length"] - 1]
        entry["advantage"] = 0.25 if entry["correct"] else -0.5
    flipped["config"] = {}
    put(released / "training_set.json", json.dumps(flipped))
    again = elsewhere(finished, "again")
    import_run(again, released)
    known = {(s.problem_id, s.sample): s for s in finished.training_set()}
    assert len(again.training_set()) == len(known) == len(again.rollouts())
    for s in again.training_set():
        own = known[s.problem_id, s.sample]
        assert s.base_logprob == pytest.approx(own.base_logprob, abs=1e-5)
        advantage = 0.25 if own.reward else -0.5
        assert replace(s, base_logprob=own.base_logprob) == replace(own, decision_tokens=[0], advantage=advantage)
    below = [h for e in flipped["rollouts"] for h in e["entropies"][1:]]
    assert again.tau() == max(below)
    assert again.base_source()[0] is not None
    assert again.run().problems == 20


def test_records_alone_are_problems_to_sample(finished: Run, released: Path) -> None:
    for name in ("rollouts.json", "training_set.json"):
        (released / name).unlink()
    again = elsewhere(finished, "again")
    import_run(again, released)
    assert list(again.stages()) == ["problems"]
    assert again.problems("train") == finished.problems("train")
    again.execute("rollouts")
    assert again.rollouts() == finished.rollouts()


def test_held_out_problems_come_from_the_configuration_where_no_file_gives_them(finished: Run, released: Path) -> None:
    (released / "held_out.json").rename(released / "spare.json")
    import_run(elsewhere(finished, "again"), released)
    assert elsewhere(finished, "again").problems("evaluate") == finished.problems("evaluate")
    everything = {"records": [*read(released / "records.json")["records"], *read(released / "spare.json")["records"]]}
    put(released / "records.json", json.dumps(everything))
    with pytest.raises(ArtefactError, match="no problem to evaluate on"):
        import_run(elsewhere(finished, "none"), released)
    (released / "spare.json").rename(released / "held_out.json")
    with pytest.raises(ArtefactError, match=r"held_out.json: records\[0\]: problem_text: is also in records.json"):
        import_run(elsewhere(finished, "none"), released)


def test_files_that_do_not_agree_are_refused(finished: Run, released: Path) -> None:
    def refused(file: str, message: str, list_name: str = "rollouts", **fields: Any) -> None:
        whole = (released / file).read_text()
        broken = json.loads(whole)
        broken[list_name][0] |= fields
        put(released / file, json.dumps(broken))
        with pytest.raises(ArtefactError, match=message):
            import_run(elsewhere(finished, "again"), released)
        assert not elsewhere(finished, "again").stages()
        put(released / file, whole)

    first = read(released / "training_set.json")["rollouts"][0]
    scored = read(released / "rollouts.json")["rollouts"][0]
    del first["problem_id"], scored["problem_id"]
    refused("training_set.json", r"training_set.json: rollouts\[0\]: .* is not in rollouts.json", gen_index=99)
    ids = [*first["input_ids"][:-1], 5]
    refused("training_set.json", r"rollouts\[0\]: input_ids, prompt_length: differ from this", input_ids=ids)
    refused(
        "training_set.json",
        r"rollouts\[0\]: correct: differs from this rollout in rollouts",
        correct=not first["correct"],
    )
    (released / "training_set.json").unlink()
    refused("rollouts.json", r"rollouts.json: rollouts\[0\]: problem_id: 'x' is not in records.json", problem_id="x")
    large = [*scored["tokens"][:-1], 777]
    refused("rollouts.json", r"rollouts\[0\]: tokens: 777 is not among the 21 tokens of", tokens=large)


@pytest.mark.thorough
def test_other_prompts_are_refused_unless_they_are_asked_for(finished: Run, released: Path) -> None:
    other = {"style": "qa"}
    with pytest.raises(ArtefactError, match=r"rollouts\[0\]: tokens.0: the prompt continues with '<s>.*set `prompt`"):
        import_run(elsewhere(finished, "again", prompt=other), released)
    again = elsewhere(finished, "again", prompt=other)
    import_run(again, released, any_prompt=True)
    assert again.training_set() == finished.training_set()
    assert again.run().problems == 20


def test_a_sequence_that_would_not_be_scored_is_named(finished: Run, released: Path) -> None:
    """A training set of right answers alone."""
    (released / "rollouts.json").unlink()
    given = read(released / "training_set.json")
    given["rollouts"] = [entry for entry in given["rollouts"] if entry["correct"]]
    put(released / "training_set.json", json.dumps(given))
    with pytest.raises(ArtefactError, match=r"rollouts\[0\]: score.problems=mixed excludes it: set score.problems="):
        import_run(elsewhere(finished, "again"), released)
    again = elsewhere(finished, "again", score={"problems": "all"})
    import_run(again, released)
    assert len(again.training_set()) == len(given["rollouts"])


def test_a_run_directory_in_use_and_an_unfinished_run_are_refused(finished: Run, released: Path) -> None:
    with pytest.raises(RunError, match=r"stages are done already \(problems, rollouts, .*another run_dir"):
        import_run(finished, released)
    with pytest.raises(RunError, match="export needs stage 'problems': run `rmx problems` first"):
        export_run(elsewhere(finished, "again"), released)


def test_an_import_that_was_killed_leaves_no_stage_done(
    finished: Run, released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(score, "score_rollouts", stopped)
        with pytest.raises(Interrupted):
            import_run(elsewhere(finished, "again"), released)
    assert not elsewhere(finished, "again").stages()
    again = elsewhere(finished, "again")
    import_run(again, released)
    assert again.training_set() == finished.training_set()
