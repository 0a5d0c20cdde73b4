"""A reward function in Python, named by ``verify.reward``; it runs in the workers of :mod:`rmx.grading.verify`."""

import functools
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmx.errors import RmxError
from rmx.records import Outcome, Problem

FORMS = "expected `package.module:function` or `FILE.py:function`"
NAMES = ("prompts", "completions", "question", "answer", "category", "problem_id")  # of TRL's form, each a list of one


class RewardError(RmxError):
    """verify.reward does not name a function, or the function returns an invalid result."""


@dataclass(frozen=True)
class PythonReward:
    """Judges a completion with the function ``name``, which has one of two forms.

    ``function(question, completion, answer)`` returns a number in [0, 1], or such a number and a reason. A function
    with a parameter ``completions`` is called as in TRL, with lists as keyword arguments, and returns a list of
    numbers. A completion is right if the reward is 1.
    """

    name: str
    chat: bool = False  # prompts and completions are chats, as TRL has them where prompts are; else texts

    def prepare(self) -> None:
        """Import the function before the time limit starts.

        Raises:
            RewardError: there is no such function.
        """
        _function(self.name)

    def __call__(self, problem: Problem, text: str) -> tuple[Outcome, str | None, str, float | None]:
        found = _called(_function(self.name), problem, text, self.chat)
        reason = ""
        if isinstance(found, tuple):
            if len(found) != 2 or not isinstance(found[1], str):
                raise RewardError(f"verify.reward={self.name}: expected (reward, reason), got {found!r}")
            found, reason = found
        if found is None:  # as TRL has it: the function does not apply
            return "crash", None, reason or f"{self.name} gave no reward", None
        try:
            reward = float(found)
        except (TypeError, ValueError) as fault:
            raise RewardError(f"verify.reward={self.name}: expected a number from 0 to 1, got {found!r}") from fault
        if not 0 <= reward <= 1:  # NaN is not
            raise RewardError(f"verify.reward={self.name}: expected a number from 0 to 1, got {reward}")
        right = math.isclose(reward, 1.0)
        return ("right" if right else "wrong"), None, reason or ("" if right else f"reward {reward:g}"), reward


def split_name(name: str) -> tuple[str, str]:
    """(module or file, function). Raises RewardError if the name has another form."""
    where, colon, function = name.rpartition(":")
    if not colon or not where or not function.isidentifier():
        raise RewardError(f"verify.reward={name}: {FORMS}")
    return where, function


@functools.cache
def _function(name: str) -> Callable[..., Any]:
    where, called = split_name(name)
    try:
        module = _from_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
        function = getattr(module, called)
    except Exception as fault:  # whatever the user's module raises when it is imported
        raise RewardError(f"verify.reward={name}: {type(fault).__name__}: {fault}; {FORMS}") from fault
    if not callable(function):
        raise RewardError(f"verify.reward={name}: {called} is not a function")
    checked: Callable[..., Any] = function
    return checked


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _called(function: Callable[..., Any], problem: Problem, text: str, chat: bool) -> Any:
    parameters = inspect.signature(function).parameters
    if "completions" not in parameters:
        return function(problem.question, text, problem.answer)
    everything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    prompt: Any = [{"role": "user", "content": problem.question}] if chat else problem.question
    completion: Any = [{"role": "assistant", "content": text}] if chat else text
    values = (prompt, completion, problem.question, problem.answer, problem.category, problem.problem_id)
    given = {key: [value] for key, value in zip(NAMES, values, strict=True) if everything or key in parameters}
    found = function(**given)
    if not isinstance(found, list) or len(found) != 1:
        raise RewardError(f"verify.reward: expected a list with a reward for each completion, got {found!r}")
    return found[0]
