"""Reward of each rollout: extract an answer, compare it with the ground truth in worker processes that can be killed.

math-verify and reasoning-gym parse what a model wrote, which can take forever, crash or run out of memory. Each of
these is an outcome of its own, never "wrong". Workers import neither torch nor the model. On Linux each may take
MEMORY_BYTES beyond what its imports took, and dies with the process that started it.
"""

import ctypes
import importlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait

from rmx.errors import RmxError
from rmx.grading.answers import HASHES, extract_answer, same_answer
from rmx.grading.memory import MEMORY_BYTES, let_memory_errors_pass, limit_memory
from rmx.grading.rewards import PythonReward, RewardError
from rmx.records import Outcome, Problem, Rollout, Verdict


class VerifierError(RmxError):
    """The verifier itself cannot run."""


# (verdict outcome, extracted answer, reason), and the reward where a function gave one
Judgement = tuple[Outcome, str | None, str] | tuple[Outcome, str | None, str, float | None]
LONGEST_ANSWER = 1000  # characters, where the truth is shorter
PR_SET_PDEATHSIG = 1  # linux/prctl.h
START_LIMIT_S = 120.0  # a worker's imports; not counted against its first answer


def _is_gym(problem: Problem) -> bool:
    return problem.category.startswith("reasoning_gym:")


def judge(problem: Problem, text: str) -> Judgement:
    """Compare in this process. It may never return, so :func:`verify` runs it in a worker."""
    answer = extract_answer(text, words=not _is_gym(problem))
    if answer is None:
        return "no_answer", None, "no boxed answer, answer phrase or number"
    if answer == problem.answer.strip():
        return "right", answer, ""
    if len(answer) > max(LONGEST_ANSWER, 4 * len(problem.answer)):  # a loop; to parse it could take for ever
        return "wrong", answer, f"an answer of {len(answer)} characters where {len(problem.answer)} are expected"
    if _is_gym(problem):
        import reasoning_gym

        score = reasoning_gym.get_score_answer_fn(problem.category.split(":", 1)[1])(answer, problem.entry)
        right = score == 1.0  # the task's own score gives partial credit
        return ("right" if right else "wrong"), answer, "" if right else f"expected {problem.answer}, score {score:g}"
    truth = problem.answer
    if "\\boxed" in truth or HASHES.search(truth):  # a worked solution
        truth = extract_answer(truth) or truth
    right = same_answer(truth, answer)
    return ("right" if right else "wrong"), answer, "" if right else f"expected {problem.answer}"


def verify(
    problems: Sequence[Problem],
    rollouts: Sequence[Rollout],
    *,
    workers: int = 2,
    timeout_s: float = 10.0,
    judge: Callable[[Problem, str], Judgement] = judge,
    on_done: Callable[[int], None] = lambda _: None,
    kept: "list[Worker] | None" = None,
) -> list[Verdict]:
    """One verdict per rollout, in their order. A worker must be able to import ``judge``.

    Args:
        kept: workers that an earlier call with the same judge and kind of problems left here, an empty list at first.
            This call uses them and leaves its own there; :meth:`Worker.stop` ends one. None: they end with this call.
    """
    by_id = {problem.problem_id: problem for problem in problems}
    # Short answers repeat: the same text for the same problem is judged once.
    jobs = list(dict.fromkeys((rollout.problem_id, rollout.text) for rollout in rollouts))
    found: dict[tuple[str, str], Judgement] = {}
    todo = iter(jobs)
    modules: tuple[str, ...] = ()
    if not isinstance(judge, PythonReward):
        modules = tuple({"reasoning_gym" if _is_gym(problem) else "math_verify" for problem in problems})
    pool = [] if kept is None else kept
    idle = list(pool)
    try:
        while len(pool) < min(workers, len(jobs)):
            pool.append(Worker(judge, modules))
            idle.append(pool[-1])
        while len(found) < len(jobs):
            while idle and (job := next(todo, None)) is not None:
                idle.pop().start(job, by_id[job[0]], timeout_s)
            busy = [worker for worker in pool if worker.job is not None]
            nearest = min(worker.deadline for worker in busy)
            ready = wait([worker.pipe for worker in busy], timeout=max(0.0, nearest - time.monotonic()))
            for worker in busy:
                if worker.pipe in ready or time.monotonic() >= worker.deadline:
                    job = worker.job
                    assert job is not None
                    found[job] = worker.finish()
                    idle.append(worker)
                    on_done(len(found))
    except BaseException:
        kept = None
        raise
    finally:
        if kept is None:
            while pool:
                pool.pop().stop()
    return [
        Verdict(rollout.problem_id, rollout.sample, *found[rollout.problem_id, rollout.text]) for rollout in rollouts
    ]


class Worker:
    """A process that judges one job at a time; killed and replaced when it is late or dies."""

    def __init__(self, judge: Callable[[Problem, str], Judgement], modules: tuple[str, ...]) -> None:
        self.judge, self.modules = judge, modules
        self.spawn()

    def spawn(self) -> None:
        # A server that has imported the parsers once forks every worker, in milliseconds, also one to replace another.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["rmx.grading.verify_server", *self.modules])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.judge, self.modules, os.getpid()), daemon=True)
        self.process.start()
        theirs.close()
        self.job: tuple[str, str] | None = None
        try:
            ready = self.pipe.poll(START_LIMIT_S) and self.pipe.recv()
        except EOFError:
            ready = False
        if isinstance(ready, RewardError):
            raise ready
        if not ready:
            self.process.kill()
            raise VerifierError("verify: a verifier process did not start; its own message is above")

    def start(self, job: tuple[str, str], problem: Problem, timeout_s: float) -> None:
        try:
            self.pipe.send((problem, job[1]))
        except OSError:  # it died while idle, which no job is to blame for
            self.stop()
            self.spawn()
            self.pipe.send((problem, job[1]))
        self.job, self.timeout_s = job, timeout_s
        self.deadline = time.monotonic() + timeout_s

    def finish(self) -> Judgement:
        self.job = None
        if not self.pipe.poll():
            self.stop()
            self.spawn()
            return "timeout", None, f"no verdict within {self.timeout_s:g} s"
        try:
            judgement: Judgement | RewardError = self.pipe.recv()
            if isinstance(judgement, RewardError):
                raise judgement
            return judgement
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            self.stop()
            self.spawn()
            return "crash", None, f"the verifier process died with exit code {code}"

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection, judge: Callable[[Problem, str], Judgement], modules: tuple[str, ...], parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    _die_with(parent)
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns at each call that its own timeout is off
    for module in modules:  # imported before the first job's clock starts
        importlib.import_module(module)
    if isinstance(judge, PythonReward):
        try:
            judge.prepare()
        except RewardError as fault:
            pipe.send(fault)
            return
    elif "math_verify" in modules:
        let_memory_errors_pass()
    limit_memory()
    pipe.send("ready")
    while True:
        try:
            problem, text = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(judge(problem, text))
        except RewardError as fault:  # the function is wrong, not what it judged
            pipe.send(fault)
        except MemoryError:
            pipe.send(("crash", None, f"no verdict within {MEMORY_BYTES >> 20} MiB of memory"))
        except Exception as fault:  # whatever a parser throws at model output is this rollout's outcome, kept in full
            pipe.send(("crash", None, f"{type(fault).__name__}: {fault}"))


def die_with_parent() -> None:
    """On Linux, end this process when the thread that started it ends, in the middle of a computation too."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _die_with(run: int) -> None:
    """End this worker when the process that runs the verifier ends; on Linux their server ends then, and it with it."""
    die_with_parent()
    server = os.getppid()

    def watch() -> None:  # for other systems, and where one of them ended before the line above
        while os.getppid() == server and _runs(run):
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
