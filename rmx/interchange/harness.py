"""A run's own problems as a task of lm-evaluation-harness (lm_eval), scored by rmx's verifier."""

import functools
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from rmx.artefacts import replacing
from rmx.config import Sampling
from rmx.errors import RmxError, close_to
from rmx.grading.rewards import PythonReward
from rmx.grading.verify import Worker, verify
from rmx.models.prompts import CHAT, Renderer
from rmx.records import Problem, Rollout, Split
from rmx.runs.rundir import RunDirectory, RunError

METRIC = "pass@1"
SCORER = '''"""What the task {name} asks for and how it is scored: by rmx's verifier, as in the run."""

from rmx.interchange.harness import score


def prompt(doc):
    return doc["prompt"]


def process_results(doc, results):
    return score(doc, results, timeout_s={timeout_s!r}, reward={reward!r}, chat={chat!r})
'''


class TaskError(RmxError):
    """The task cannot be written as lm_eval would have to read it."""


@dataclass(frozen=True)
class Task:
    """A task that was written."""

    name: str
    files: list[Path]
    problems: int
    command: str  # that runs it


def score(
    doc: Mapping[str, Any], results: Sequence[Any], *, timeout_s: float, reward: str = "", chat: bool = False
) -> dict[str, float]:
    """pass@1 of one problem's completions, and the share of them that the verifier could not judge.

    Without ``pass@1`` where it could judge none, so that lm_eval leaves the problem out of the mean, as rmx does.

    Args:
        doc: a row of the task. results: of lm_eval: one completion, or a list with all of them.
        reward: the run's ``verify.reward``, if any. chat: see :class:`rmx.grading.rewards.PythonReward`.
    """
    texts = [text for found in results for text in ([found] if isinstance(found, str) else found)]
    entry = json.loads(doc["entry"])
    problem = Problem(doc["problem_id"], doc["question"], doc["answer"], doc["category"], "evaluate", entry)
    rollouts = [Rollout(problem.problem_id, n, [], [], "stop", text) for n, text in enumerate(texts)]
    options: dict[str, Any] = {"judge": PythonReward(reward, chat=chat)} if reward else {}
    kept = _workers(reward, chat, problem.category.partition(":")[0])
    rewards = [v.reward for v in verify([problem], rollouts, workers=1, timeout_s=timeout_s, kept=kept, **options)]
    known = [value for value in rewards if value is not None]
    found = {"unverified": 1 - len(known) / len(rewards)}
    return {METRIC: sum(known) / len(known), **found} if known else found


@functools.cache
def _workers(*_: object) -> list[Worker]:
    """Those of one judge and kind of problems: lm_eval asks for one problem at a time. They end with this process."""
    return []


def export_task(run: RunDirectory, out: Path, split: str = "evaluate", name: str = "") -> Task:
    """Write NAME.yaml, NAME.jsonl with the rendered prompts, and NAME_score.py into ``out``.

    Args:
        name: of the task; default: rmx_ and the name of the run directory.

    Raises:
        TaskError: no such split, it has no problem, or a name that lm_eval cannot take; or lm_eval, which reads prompts
            as text, would read a prompt as other tokens. RunError: the run has no problems yet.
    """
    if split not in get_args(Split):
        expected = ", ".join(get_args(Split))
        raise TaskError(f"--split {split}: expected {expected}{close_to(split, get_args(Split))}")
    name = name or "rmx_" + re.sub(r"\W", "_", run.dir.resolve().name)
    if not name.isidentifier():
        near = re.sub(r"\W", "_", name)
        raise TaskError(f"--name {name}: expected letters, digits and _; did you mean {near!r}?")
    run.need("problems")
    problems = run.problems(split)
    if not problems:
        raise TaskError(f"--split {split}: this run has no such problems; expected problems.{split}_count > 0")
    renderer = run.renderer
    if run.path("rollouts.jsonl").exists() and run.meta()["prompt"] != renderer.fingerprint:
        raise RunError(f"{run.dir}: was made with other prompts than this model and style render now")
    bos = _adds_tokens(renderer, problems)
    out = out.expanduser().resolve()
    rows = [_row(problem, renderer) for problem in problems]
    files = {
        f"{name}.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        f"{name}_score.py": SCORER.format(
            name=name,
            timeout_s=run.config.verify.timeout_s,
            reward=run.reward_name,
            chat=renderer.style in CHAT,
        ),
        f"{name}.yaml": yaml.dump(
            _settings(name, out / f"{name}.jsonl", run.config.evaluate), Dumper=_Dumper, sort_keys=False
        ),
    }
    for file, text in files.items():  # the YAML last: with it the task is there
        with replacing(out / file) as aside:
            aside.write_text(text, encoding="utf-8")
    adapter = run.path("adapter").resolve()
    given = [f"pretrained={run.config.located_model.name}", f"dtype={run.dtype[0]}"]
    given += [f"peft={adapter}"] if adapter.is_dir() else []
    given += [] if bos is None else [f"add_bos_token={bos}"]
    command = ["lm_eval", "--model", "hf", "--model_args", ",".join(given), "--include_path", str(out), "--tasks", name]
    return Task(name, [out / file for file in files], len(problems), shlex.join(command))


def _row(problem: Problem, renderer: Renderer) -> dict[str, str]:
    return {
        "problem_id": problem.problem_id,
        "question": problem.question,
        "answer": problem.answer,
        "category": problem.category,
        "entry": json.dumps(problem.entry),  # as text: entries of different tasks have different fields
        "prompt": renderer.text(problem.question),
    }


def _adds_tokens(renderer: Renderer, problems: Sequence[Problem]) -> bool | None:
    """What ``add_bos_token`` has to be for lm_eval to read the prompts as rmx does; None: its default does.

    Raises:
        TaskError: no choice does for all prompts.
    """
    tokenizer = renderer.tokenizer
    begin: str = getattr(tokenizer, "bos_token", None) or ""
    prompts = [
        (problem.problem_id, renderer.text(problem.question), renderer(problem.question)) for problem in problems
    ]
    has_begin = begin != "" and all(text.startswith(begin) for _, text, _ in prompts)  # then lm_eval adds none
    for choice in (None, False, True):
        options = (
            {"add_special_tokens": False} if has_begin else {} if choice is None else {"add_special_tokens": choice}
        )
        odd = next((i for i, text, ids in prompts if list(tokenizer(text, **options)["input_ids"]) != ids), None)
        if odd is None:
            return choice
    raise TaskError(
        f"export-task: the prompt of {odd!r} cannot be written as text: the tokenizer reads part of its question as a "
        "control token; reword it"
    )


class _Function(str):
    """The name of a function in a YAML file of lm_eval."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(_Function, lambda dumper, value: dumper.represent_scalar("!function", str(value)))


def _settings(name: str, data: Path, sampling: Sampling) -> dict[str, Any]:
    """Of the task, which samples as ``evaluate`` does."""
    generation: dict[str, Any] = {"until": [], "max_gen_toks": sampling.max_new_tokens}
    if sampling.temperature == 0:
        generation |= {"do_sample": False, "temperature": 0.0}
    else:  # 0: no such cut, where transformers would take 50
        generation |= {"do_sample": True, "temperature": sampling.temperature}
        generation |= {"top_p": sampling.top_p, "top_k": sampling.top_k or 0}
    every = [{"function": "take_first_k", "k": sampling.samples}]
    mean = {"aggregation": "mean"}
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "num_fewshot": 0,
        "doc_to_text": _Function(f"{name}_score.prompt"),
        "doc_to_target": "answer",
        "target_delimiter": "",
        "process_results": _Function(f"{name}_score.process_results"),
        "repeats": sampling.samples,
        "filter_list": [{"name": "all_samples", "filter": every}],
        "generation_kwargs": generation,
        "metric_list": [
            {"metric": METRIC, **mean, "higher_is_better": True},
            {"metric": "unverified", **mean, "higher_is_better": False},
        ],
        "metadata": {"version": 1.0},
    }
