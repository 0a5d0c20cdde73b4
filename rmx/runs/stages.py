"""The stages of a run, each declared once: commands, records, resumption and the plan are made from this."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage of a run. The method of ``Run`` with this name after an underscore does the work."""

    name: str  # also of its command
    help: str  # of that
    settings: tuple[str, ...]  # parts of the configuration that it depends on, beside those of the stages before it
    output: str  # a file that is there when the stage is done
    beside: tuple[str, ...] = ()  # further files and directories that it writes
    partial: tuple[str, ...] = ()  # what it leaves behind when it is killed, and takes up again
    spent: tuple[str, ...] = ()  # of these, what has no use once the stage is done


_SIDES = ("evaluation.base", "evaluation.tuned")

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "problems",
            "Collect the training problems and the held-out problems.",
            ("seed", "problems"),
            "problems.jsonl",
        ),
        Stage(
            "rollouts",
            "Sample completions of the training problems with the base model.",
            ("seed", "model", "prompt", "rollouts"),
            "rollouts.jsonl",
            partial=("rollouts.journal.jsonl",),
            spent=("rollouts.journal.jsonl",),
        ),
        Stage(
            "verify",
            "Compare the answer of each completion with the true answer: reward 1 or 0.",
            ("verify",),
            "verdicts.jsonl",
        ),
        Stage(
            "score",
            "Compute the base model's entropy, log-prob and top-k at every completion token.",
            ("score",),
            "scores/index.json",
            partial=("scores",),
        ),
        Stage(
            "select",
            "Select problems with right and wrong completions, and their decision tokens, for training.",
            ("seed", "training_seed", "select"),
            "training_set.jsonl",
            beside=("gate.json", "gate.png"),
        ),
        Stage(
            "train",
            "Train the adapter on the selected completions.",
            ("seed", "training_seed", "lora", "train"),
            "adapter/adapter_model.safetensors",
            beside=("metrics.jsonl", "candidates"),
            partial=("checkpoint.safetensors",),
            spent=("checkpoint.safetensors",),
        ),
        Stage(
            "choose",
            "Choose the best of the adapters kept by train.candidates, on problems reserved for this choice.",
            ("seed", "evaluate"),
            "choice.json",
            beside=("adapter",),
            partial=("choosing",),
            spent=("choosing",),
        ),
        Stage(
            "evaluate",
            "Measure accuracy on the held-out problems, without and with the adapter.",
            ("seed", "evaluate"),
            "evaluation.json",
            beside=tuple(f"{side}.jsonl" for side in _SIDES),
            partial=tuple(f"{side}{kind}.jsonl" for side in _SIDES for kind in ("", ".journal")),
            spent=tuple(f"{side}.journal.jsonl" for side in _SIDES),
        ),
        Stage(
            "report",
            "Write report.html and report.png from the files of the run.",
            (),
            "report.html",
            beside=("report.png",),
        ),
    )
}
