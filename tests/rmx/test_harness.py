"""A run's problems as a task of lm-evaluation-harness: what is written, how it scores, and that lm_eval agrees."""

import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from rmx.artefacts import read_records, write_records
from rmx.cli import app
from rmx.config import Config
from rmx.errors import RmxError
from rmx.grading.verify import Worker, verify
from rmx.interchange import harness
from rmx.models.prompts import Renderer
from rmx.records import Problem, Rollout
from rmx.runs.pipeline import Run

HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None


def config_file(run: Run, folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(run.config.model_dump(mode="json")))
    return path


def export(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["export-task", *map(str, arguments)])


class Loader(yaml.SafeLoader):
    pass


Loader.add_constructor("!function", lambda loader, node: ("function", loader.construct_scalar(node)))  # type: ignore[arg-type]


def scorer(path: Path) -> ModuleType:
    """The file that the task names, imported as lm_eval imports it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_files_of_a_task(finished: Run, tmp_path: Path) -> None:
    done = export(config_file(finished, tmp_path), tmp_path / "tasks")
    assert done.exit_code == 0, (done.output, done.exception)
    folder, sampling = tmp_path / "tasks", finished.config.evaluate
    assert {path.name for path in folder.iterdir()} == {"rmx_run.yaml", "rmx_run.jsonl", "rmx_run_score.py"}
    task = yaml.load((folder / "rmx_run.yaml").read_text(), Loader)
    assert task["task"] == "rmx_run" and task["repeats"] == sampling.samples == task["filter_list"][0]["filter"][0]["k"]
    assert task["generation_kwargs"] == {
        "until": [],
        "max_gen_toks": sampling.max_new_tokens,
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 0.95,
        "top_k": 0,
    }
    rows = [json.loads(line) for line in Path(task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()]
    problems = finished.problems("evaluate")
    assert [row["problem_id"] for row in rows] == [p.problem_id for p in problems]
    module = scorer(folder / "rmx_run_score.py")
    for key in ("doc_to_text", "process_results"):
        kind, name = task[key]
        assert kind == "function" and name.partition(".")[0] == "rmx_run_score"
        assert callable(getattr(module, name.partition(".")[2]))
    tokenizer = finished.vocabulary.tokenizer
    for row, problem in zip(rows, problems, strict=True):  # the prompts are those of the run, to the token
        assert tokenizer(module.prompt(row), add_special_tokens=False)["input_ids"] == finished.renderer(
            problem.question
        )
    arguments = shlex.split(done.stdout.splitlines()[-1])
    assert arguments[0] == "lm_eval" and f"peft={finished.path('adapter')}" in arguments[4]
    assert arguments[-4:] == ["--include_path", str(folder), "--tasks", "rmx_run"]


def test_greedy_settings_and_names(finished: Run, tmp_path: Path) -> None:
    config = config_file(finished, tmp_path)
    given = ("--name", "mine", "--split", "train", "--set", "evaluate.temperature=0")
    assert export(config, tmp_path / "tasks", *given).exit_code == 0
    task = yaml.load((tmp_path / "tasks" / "mine.yaml").read_text(), Loader)
    assert task["generation_kwargs"] | {"max_gen_toks": 0, "until": 0} == {
        "max_gen_toks": 0,
        "until": 0,
        "do_sample": False,
        "temperature": 0.0,
    }
    assert len((tmp_path / "tasks" / "mine.jsonl").read_text().splitlines()) == 20


def test_the_score_is_the_verifiers(tmp_path: Path) -> None:
    doc = {"problem_id": "p", "question": "1/2?", "answer": "1/2", "category": "", "entry": "{}", "prompt": "1/2?"}
    right, wrong = "so \\boxed{0.5}", "so \\boxed{0.4}"
    assert harness.score(doc, [[right, wrong, "nothing", right]], timeout_s=10) == {"pass@1": 0.5, "unverified": 0}
    assert harness.score(doc, [right], timeout_s=10) == {"pass@1": 1.0, "unverified": 0}
    (tmp_path / "rewards.py").write_text(
        "def reward(question, completion, answer):\n"
        "    if completion == 'none':\n        return None\n    return 0.25 if answer == '1/2' else 1.0\n"
    )
    reward = f"{tmp_path / 'rewards.py'}:reward"
    assert harness.score(doc, [["a", "none"]], timeout_s=10, reward=reward) == {"pass@1": 0.25, "unverified": 0.5}
    assert harness.score(doc, [["none"]], timeout_s=10, reward=reward) == {"unverified": 1.0}  # left out of the mean


def test_workers_are_kept_between_problems() -> None:
    """lm_eval asks for one problem at a time; a worker that an error left busy is not used again."""
    kept: list[Worker] = []
    problem, rollouts = Problem("p", "q", "5"), [Rollout("p", n, [], [], "stop", text) for n, text in enumerate("56")]

    def outcomes(**options: Any) -> list[str]:
        return [v.outcome for v in verify([problem], rollouts, workers=1, kept=kept, **options)]

    assert outcomes() == ["right", "wrong"]
    (first,) = kept
    assert outcomes() == ["right", "wrong"] and kept == [first] and first.process.is_alive()

    def fail(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        outcomes(on_done=fail)
    assert kept == [] and not first.process.is_alive()
    assert outcomes() == ["right", "wrong"]
    kept.pop().stop()


def test_entries_of_reasoning_gym_reach_its_scorer(finished: Run, tmp_path: Path) -> None:
    import reasoning_gym

    entry = reasoning_gym.create_dataset("gcd", seed=0, size=1)[0]
    problem = Problem("g", entry["question"], str(entry["answer"]), "reasoning_gym:gcd", "evaluate", entry)
    row = harness._row(problem, finished.renderer)
    assert harness.score(row, [f"\\boxed{{{entry['answer']}}}"], timeout_s=20)["pass@1"] == 1.0
    assert harness.score(row, ["\\boxed{-1}"], timeout_s=20)["pass@1"] == 0.0


def test_wrong_inputs(finished: Run, tmp_path: Path) -> None:
    config, out = config_file(finished, tmp_path), tmp_path / "tasks"

    def said(*arguments: object) -> str:
        fault = export(config, out, *arguments).exception
        assert isinstance(fault, RmxError) and not out.exists(), fault
        return str(fault)

    assert "--split evaluat: expected train, choose, evaluate; did you mean 'evaluate'?" in said("--split", "evaluat")
    assert "expected problems.choose_count > 0" in said("--split", "choose")
    assert "did you mean 'my_task'?" in said("--name", "my-task")
    assert "run `rmx problems` first" in said("--set", f"run_dir={tmp_path / 'other'}")
    assert "other prompts" in said("--set", "prompt.style=qa")
    meta, problems = read_records(finished.path("problems.jsonl"), Problem)
    changed = [replace(p, question=f"{p.question} </s>") if p.split == "evaluate" else p for p in problems]
    write_records(finished.path("problems.jsonl"), changed, meta)
    assert "cannot be written as text" in said()


@pytest.mark.parametrize(
    ("begin", "style", "expected"),
    [(True, "chat", None), (False, "chat", False), (True, "qa", None), (False, "qa", None)],
)
def test_tokens_that_lm_eval_would_add(begin: bool, style: str, expected: bool | None, finished: Run) -> None:
    """A tokenizer that puts <s> before each text; chat prompts have it already, or must not have it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = finished.vocabulary.tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    if not begin:
        tokenizer.chat_template = tokenizer.chat_template.replace("<s> ", "")
    prompt = finished.config.prompt.model_copy(update={"style": style})
    renderer = Renderer(tokenizer, prompt, "", "llama")
    assert harness._adds_tokens(renderer, finished.problems("evaluate")) is expected


@pytest.mark.skipif(not HAS_LM_EVAL, reason="needs lm_eval: pip install lm_eval")
@pytest.mark.thorough
def test_lm_eval_gives_the_numbers_of_the_run(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy, base and tuned: the same completions, so the same pass@1; by the command that rmx prints."""
    sampling = tiny_config.evaluate.model_copy(update={"temperature": 0.0, "samples": 2, "max_new_tokens": 12})
    run = Run(tiny_config.model_copy(update={"evaluate": sampling}))
    run.run()
    done = export(config_file(run, tmp_path), tmp_path / "tasks")
    assert done.exit_code == 0, done.exception
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    program = [sys.executable, "-m", "lm_eval", *shlex.split(done.stdout.splitlines()[-1])[1:]]
    for side in ("tuned", "base"):
        out = tmp_path / side
        peft = next(part for part in program if part.startswith("pretrained="))
        command = [peft.partition(",peft=")[0] if part == peft and side == "base" else part for part in program]
        more = ["--device", "cpu", "--batch_size", "8", "--output_path", str(out), "--log_samples"]
        subprocess.run([*command, *more], check=True, cwd=tmp_path)
        (results,) = out.rglob("results_*.json")
        found = json.loads(results.read_text())["results"]["rmx_run"]
        expected = getattr(run.evaluation(), side).pass_at_1.mean
        assert found["pass@1,all_samples"] == pytest.approx(expected, abs=1e-9) and found["unverified,all_samples"] == 0
        (rows,) = out.rglob("samples_*.jsonl")
        sampled = [json.loads(line) for line in rows.read_text().splitlines()]
        texts = {row["doc"]["problem_id"]: row["resps"][0][0].split() for row in sampled}
        ours = {r.problem_id: r.text.split() for r in run.evaluated(side)[0]}
        assert texts == ours
        shutil.rmtree(out)
