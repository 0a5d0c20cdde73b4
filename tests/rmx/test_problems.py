"""Problem sources: files, reasoning-gym, and a split in which no question is on both sides."""

import json
from pathlib import Path

import pytest

from rmx.artefacts import ArtefactError
from rmx.config import ProblemsConfig
from rmx.grading.problems import ProblemsError, build_problems, generate, read_jsonl

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def config(*sources: dict[str, object], train: int = 10, evaluate: int = 10) -> ProblemsConfig:
    return ProblemsConfig.model_validate({"sources": list(sources), "train_count": train, "evaluate_count": evaluate})


def write(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_train_and_held_out_questions_are_disjoint_and_balanced() -> None:
    gcd = {"min_numbers": 2, "max_numbers": 2, "min_value": 2, "max_value": 9}
    sources = {"task": "chain_sum", "params": SUMS}, {"task": "gcd", "params": gcd}
    problems = build_problems(config(*sources, train=30, evaluate=20), seed=1)
    sides = [{p.question for p in problems if p.split == split} for split in ("train", "evaluate")]
    assert [len(side) for side in sides] == [30, 20]
    assert not sides[0] & sides[1]
    assert {p.category for p in problems} == {"reasoning_gym:chain_sum", "reasoning_gym:gcd"}
    for split, count in (("train", 15), ("evaluate", 10)):
        assert sum(p.split == split and p.category.endswith("gcd") for p in problems) == count
    assert problems == build_problems(config(*sources, train=30, evaluate=20), seed=1)
    assert problems != build_problems(config(*sources, train=30, evaluate=20), seed=2)


def test_a_small_task_is_exhausted_and_says_so() -> None:
    assert 150 <= len(generate("chain_sum", SUMS, 500, 0)) <= 200  # ten digits, two operators, ten digits
    with pytest.raises(ProblemsError, match=r"500 train problems needed, but .* only \d+ distinct"):
        build_problems(config({"task": "chain_sum", "params": SUMS}, train=500), seed=0)


def test_problems_to_choose_on_are_neither_trained_nor_reported_on(tmp_path: Path) -> None:
    lines = [json.dumps({"question": f"q {i}", "answer": i}) for i in range(60)]
    source = {"jsonl": write(tmp_path / "p.jsonl", lines)}
    counts = {"train_count": 25, "choose_count": 15, "evaluate_count": 20}
    problems = build_problems(ProblemsConfig.model_validate({"sources": [source], **counts}), seed=0)
    splits = {split: {p.question for p in problems if p.split == split} for split in ("train", "choose", "evaluate")}
    assert {split: len(own) for split, own in splits.items()} == {"train": 25, "choose": 15, "evaluate": 20}
    assert len(set.union(*splits.values())) == 60


@pytest.mark.parametrize(("task", "params"), [("no_such_task", {}), ("chain_sum", {"no_such_setting": 1})])
def test_a_wrong_task_or_setting_is_named(task: str, params: dict[str, object]) -> None:
    with pytest.raises(ProblemsError, match=f"{task}"):
        generate(task, params, 5, 0)


def test_a_file_for_each_split_keeps_its_questions_apart(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [json.dumps({"question": f"q {i}", "answer": i}) for i in range(12)])
    held = write(tmp_path / "b.jsonl", [json.dumps({"question": f"q  {i}", "answer": i}) for i in range(8, 20)])
    problems = build_problems(
        config({"jsonl": train, "split": "train"}, {"jsonl": held, "split": "evaluate"}, evaluate=8), seed=0
    )
    assert not {p.question.split()[1] for p in problems if p.split == "train"} & {
        p.question.split()[1] for p in problems if p.split == "evaluate"
    }


def test_sources_of_one_task_or_file_name_do_not_collide(tmp_path: Path) -> None:
    other = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}
    tasks = {"task": "chain_sum", "params": SUMS}, {"task": "chain_sum", "params": other}
    assert len({p.problem_id for p in build_problems(config(*tasks), seed=0)}) == 20
    splits = ({"task": "chain_sum", "params": other, "split": s} for s in ("train", "evaluate"))
    assert len({p.question for p in build_problems(config(*splits), seed=0)}) == 20
    files = []
    for n, split in enumerate(("train", "evaluate")):
        (tmp_path / split).mkdir()
        lines = [json.dumps({"question": f"q {n} {i}", "answer": i}) for i in range(10)]
        files.append({"jsonl": write(tmp_path / split / "p.jsonl", lines), "split": split})
    assert len({p.problem_id for p in build_problems(config(*files), seed=0)}) == 20


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"question": "q", "answer"', "not a JSON value"),
        ('["q", 1]', "expected a JSON object, got list"),
        ('{"question": "q"}', "no field 'answer'; fields: 'question'"),
        ('{"question": "", "answer": 1}', "question: expected text or a number, got ''"),
        ('{"question": "q", "answer": true}', "answer: expected text or a number, got True"),
    ],
)
def test_a_broken_line_names_file_and_line(tmp_path: Path, line: str, fault: str) -> None:
    path = write(tmp_path / "p.jsonl", ['{"question": "a", "answer": 1}', "", line])
    with pytest.raises(ArtefactError, match=f"p.jsonl:3: {fault}".replace("[", r"\[")):
        read_jsonl(Path(path))


def test_no_file_and_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no such file"):
        read_jsonl(tmp_path / "absent.jsonl")
    with pytest.raises(ArtefactError, match="contains no problems"):
        read_jsonl(Path(write(tmp_path / "e.jsonl", [""])))
    latin = tmp_path / "l.jsonl"
    latin.write_bytes('{"question": "é", "answer": 1}'.encode("latin-1"))
    with pytest.raises(ArtefactError, match=r"l.jsonl:1: not a JSON value"):
        read_jsonl(latin)
