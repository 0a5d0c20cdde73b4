"""Benchmarks in the fields of their own files; limits, resuming, adapters, errors, the table and the picture."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import command
from PIL import Image
from rich.console import Console
from test_pipeline import changed, write_yaml
from tiny import save_tiny_model

from rmx.analyses.benchmarks import BENCHMARKS, BenchmarkError, Result, plot, read_benchmark, run_benchmarks, table
from rmx.artefacts import ArtefactError
from rmx.config import Config, LoraConfig, ModelConfig
from rmx.errors import Interrupted
from rmx.grading.problems import ProblemsError
from rmx.models import lora, model
from rmx.models.lora import AdapterError
from rmx.records import Accuracy, Interval, Rollout
from rmx.reports import report
from rmx.runs.pipeline import Run
from rmx.runs.rundir import RunError
from rmx.sampling import rollouts

# A row of each benchmark as its data set on the hub has it, and the ground truth in it.
ROWS: dict[str, tuple[dict[str, object], str]] = {
    "gsm8k": ({"question": "How many?", "answer": "6 * 201 = <<6*201=1206>>1206\n#### 1,206"}, "1206"),
    "math500": (
        {
            "problem": "Convert $(0,3)$ to polar coordinates.",
            "solution": "... \\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}",
            "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
            "subject": "Precalculus",
            "level": 2,
            "unique_id": "test/precalculus/807.json",
        },
        "\\left( 3, \\frac{\\pi}{2} \\right)",
    ),
    "aime24": (
        {"id": 60, "problem": "Every morning Aya ...", "solution": "...", "answer": "204", "url": "", "year": "2024"},
        "204",
    ),
    "amc23": ({"id": 0, "question": "Cities A and B ...", "answer": "27", "url": ""}, "27"),
    "minerva": ({"question": "Each of the two Magellan telescopes ...", "answer": "1.6e-19"}, "1.6e-19"),
    "olympiadbench": (
        {
            "id": 1606,
            "question": "Let $T=\\frac{1}{4}$.",
            "solution": ["..."],
            "final_answer": ["$\\frac{1}{2}$", "2"],
            "context": None,
            "is_multiple_answer": True,
            "unit": None,
            "answer_type": "Numerical",
            "error": None,
        },
        "$\\frac{1}{2}$, 2",
    ),
}


def write_lines(path: Path, rows: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a short file of every benchmark."""
    for name, (row, _) in ROWS.items():
        source = BENCHMARKS[name]
        rows = [{**row, source.question: f"sum of {i} and 1"} for i in range(3)]
        write_lines(tmp_path / "data" / f"{name}.jsonl", rows)  # type: ignore[arg-type]
    return tmp_path / "data"


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Twelve questions that the tiny model now and then gets right."""
    rows = [{"question": f"sum of {i % 10} and {i // 10}", "answer": i % 10} for i in range(12)]
    return write_lines(tmp_path / "digits.jsonl", rows)  # type: ignore[arg-type]


def save_adapter(tiny_path: Path, out: Path, **notes: str) -> Path:
    lm = model.load(ModelConfig(name=str(tiny_path), dtype="float32", device="cpu"))
    adapter = lora.attach(lm.model, LoraConfig(r=2, alpha=4), seed=0)
    for layer in adapter.layers.values():
        layer.lora_B.data.fill_(0.3)
    lora.save_adapter(adapter, out, str(tiny_path), **notes)
    return out


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of what is sampled."""
    generate, made = Run.generate, []

    def watched(self: Run, name: str, *rest: object) -> list[Rollout]:
        made.append(name)
        return generate(self, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Run, "generate", watched)
    return made


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_read_in_its_own_fields(name: str, data: Path, tiny_config: Config) -> None:
    row, truth = ROWS[name]
    write_lines(data / f"{name}.jsonl", [row] * 2)
    found = read_benchmark(name, data=data)
    assert [p.question for p in found.problems] == [row[BENCHMARKS[name].question]] * 2
    assert {(p.answer, p.category) for p in found.problems} == {(truth, name)}
    assert len({p.problem_id for p in found.problems}) == 2
    (result,) = run_benchmarks(Run(tiny_config), [name], data=data)
    samples = 8 if name in ("aime24", "amc23") else 1
    assert (result.name, result.base.problems, result.base.samples, result.tuned) == (name, 2, samples, None)
    assert json.loads((Path(tiny_config.run_dir) / "benchmarks" / f"{name}.json").read_text())["name"] == name


def test_a_result_says_how_it_came_about(tiny_config: Config, digits: Path, tmp_path: Path) -> None:
    run = Run(tiny_config)
    (result,) = run_benchmarks(run, [str(digits)], samples=4, limit=6, out=tmp_path / "out")
    assert (result.base.problems, result.base.samples) == (6, 4)
    assert list(result.base.pass_at_k) == [1, 2, 4]
    assert result.settings["prompt"] == run.renderer.fingerprint
    assert result.settings["model"]["name"] == tiny_config.model.name
    assert result.settings["sampling"]["temperature"] == tiny_config.evaluate.temperature
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".lock",
        "benchmarks.png",
        "digits.base.jsonl",
        "digits.json",
        "pass_at_k.png",
    ]


def test_a_limit_takes_the_same_problems_every_time(digits: Path) -> None:
    few, more = (read_benchmark(str(digits), limit).problems for limit in (3, 5))
    assert few == more[:3] != read_benchmark(str(digits)).problems[:3]
    assert len(read_benchmark(str(digits), 100).problems) == 12


@pytest.mark.thorough
def test_a_task_of_reasoning_gym(tiny_config: Config) -> None:
    (result,) = run_benchmarks(Run(tiny_config), ["gym:chain_sum"], limit=3)
    assert (result.name, result.base.problems, result.base.samples) == ("gym-chain_sum", 3, 2)
    assert read_benchmark("gym:chain_sum", 3) == read_benchmark("gym:chain_sum", 3)
    with pytest.raises(ProblemsError, match="task 'chain_sums'"):
        read_benchmark("gym:chain_sums")


@pytest.mark.thorough
def test_an_adapter_is_compared_with_its_base(
    tiny_config: Config, tiny_path: Path, digits: Path, tmp_path: Path, sampled: list[str]
) -> None:
    adapter = save_adapter(tiny_path, tmp_path / "adapter")
    (alone,) = run_benchmarks(Run(tiny_config), [str(digits)])
    (both,) = run_benchmarks(Run(tiny_config), [str(digits)], adapter=adapter)
    assert sampled == ["digits.base", "digits.tuned"]  # the base was there already
    assert both.base == alone.base
    assert both.tuned is not None and both.gain is not None
    assert both.gain.mean == pytest.approx(both.tuned.pass_at_1.mean - both.base.pass_at_1.mean)
    folder = Path(tiny_config.run_dir) / "benchmarks"
    assert (folder / "digits.base.jsonl").read_text() != (folder / "digits.tuned.jsonl").read_text()
    run = Run(tiny_config)
    with pytest.raises(AdapterError, match="belongs to another model"):
        run_benchmarks(run, [str(digits)], adapter=save_adapter(other_model(tmp_path), tmp_path / "foreign"))
    with pytest.raises(AdapterError, match="was trained with other prompts"):
        run_benchmarks(run, [str(digits)], adapter=save_adapter(tiny_path, tmp_path / "chatty", prompt="another"))
    assert sampled == ["digits.base", "digits.tuned"]


def other_model(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "other", num_hidden_layers=3)


@pytest.mark.thorough
def test_the_runs_own_adapter(tiny_config: Config, digits: Path) -> None:
    run = Run(tiny_config)
    with pytest.raises(RunError, match=r"stage 'problems' is not done: run `rmx problems` first, or name an adapter"):
        run_benchmarks(run, [str(digits)], tuned=True)
    run.run()
    (result,) = run_benchmarks(run, [str(digits)], tuned=True)
    trained = {p.question for p in run.problems("train")}
    assert result.tuned is not None
    assert result.trained_on == sum(f"sum of {i % 10} and {i // 10}" in trained for i in range(12)) > 0


@pytest.mark.thorough
def test_a_finished_benchmark_is_not_sampled_again(tiny_config: Config, digits: Path, sampled: list[str]) -> None:
    names = [str(digits)]
    first = run_benchmarks(Run(tiny_config), names)
    assert run_benchmarks(Run(tiny_config), names) == first
    assert sampled == ["digits.base"]
    narrower = run_benchmarks(Run(changed(tiny_config, evaluate={"bootstrap": 100})), names)
    assert sampled == ["digits.base"]  # other intervals of the same samples
    assert narrower[0].base.pass_at_1.mean == first[0].base.pass_at_1.mean
    assert run_benchmarks(Run(tiny_config), names, samples=3)[0].base.samples == 3
    run_benchmarks(Run(changed(tiny_config, evaluate={"temperature": 0.5})), names)
    digits.write_text(digits.read_text().replace("sum of 9", "sum of 8"))
    run_benchmarks(Run(tiny_config), names)
    assert sampled == ["digits.base"] * 4
    (Path(tiny_config.run_dir) / "benchmarks/digits.json").write_text("{}")
    with pytest.raises(ArtefactError, match=r"digits.json: cannot be read: .*delete it to evaluate again"):
        run_benchmarks(Run(tiny_config), names)


@pytest.mark.thorough
def test_an_interrupted_benchmark_goes_on_where_it_was(
    tiny_config: Config, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(tiny_config, evaluate={"batch_size": 6})
    whole = run_benchmarks(Run(config), [str(digits)], out=tmp_path / "whole")
    loop, units = rollouts.ENGINES["loop"], []

    def counted(*arguments: object, stop_after: int = 99) -> object:
        for n, found in enumerate(loop(*arguments)):  # type: ignore[arg-type]
            if n == stop_after:
                raise KeyboardInterrupt
            units.append(n)
            yield found

    monkeypatch.setitem(rollouts.ENGINES, "loop", lambda *a: counted(*a, stop_after=2))  # type: ignore[arg-type]
    with pytest.raises(Interrupted):
        run_benchmarks(Run(config), [str(digits)])
    assert len(units) == 2
    monkeypatch.setitem(rollouts.ENGINES, "loop", counted)  # type: ignore[arg-type]
    assert run_benchmarks(Run(config), [str(digits)]) == whole
    assert len(units) == 4
    assert not list(Path(config.run_dir).rglob("*.journal.jsonl"))


@pytest.mark.thorough
def test_a_data_set_in_a_folder_is_loaded_as_from_the_hub(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By datasets.load_dataset, with and without the configuration's name; and what a hub out of reach says."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    data, path = tmp_path / "data", write_yaml(tiny_config, tmp_path / "run.yaml")
    write_lines(data / "gsm8k/test.jsonl", [ROWS["gsm8k"][0]])
    write_lines(data / "olympiadbench/all/part.jsonl", [ROWS["olympiadbench"][0]])
    card = "configs:\n- config_name: OE_TO_maths_en_COMP\n  data_files:\n  - {split: train, path: all/*.jsonl}\n"
    (data / "olympiadbench/README.md").write_text(f"---\n{card}---\n")
    done = command("benchmark", path, "gsm8k", "olympiadbench", "--data", data)
    assert done.returncode == 0, done.stderr
    rows = {" ".join(line.split()) for line in done.stdout.splitlines()}
    assert {"gsm8k 1 problems x 1", "olympiadbench 1 problems x 1"} <= rows
    write_lines(data / "gsm8k/test.jsonl", [{"question": "Why?", "reply": "42"}])
    failed = command("benchmark", path, "gsm8k", "--data", data)
    assert "gsm8k test:1: no field 'answer'; fields: 'question', 'reply'" in failed.stderr
    absent = command("benchmark", path, "gsm8k")
    assert absent.returncode == 1
    assert "openai/gsm8k: cannot be loaded" in absent.stderr
    assert "--data DIR reads the problems from files" in absent.stderr
    assert "Traceback" not in failed.stderr + absent.stderr


def test_without_the_package_the_hub_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        BenchmarkError, match=r"pip install 'rmx\[benchmarks\]'; --data DIR reads the problems from files"
    ):
        read_benchmark("gsm8k")


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        (
            "math500",
            {"question": "Q", "answer": "1"},
            r"math500.jsonl:2: no field 'problem'; fields: 'question', 'answ",
        ),
        ("math500", {"problem": " ", "answer": "1"}, r":2: problem: expected text or a number, got ' '"),
        ("amc23", {"question": "Q", "answer": True}, r":2: answer: expected text or a number, got True"),
        (
            "gsm8k",
            {"question": "Q", "answer": "42"},
            r":2: answer: expected a solution that ends with #### .*, got '42'",
        ),
        ("gsm8k", {"question": "Q", "answer": 42}, r":2: answer: expected a solution that ends with #### .*, got 42"),
        ("olympiadbench", {"question": "Q", "final_answer": []}, r":2: final_answer: expected a list .*, got \[\]"),
        ("olympiadbench", {"question": "Q", "final_answer": "1"}, r":2: final_answer: expected a list .*, got '1'"),
        ("minerva", ["Q", "1"], r"minerva.jsonl:2: expected a JSON object, got list"),
    ],
)
def test_a_broken_row_is_named(name: str, row: object, words: str, data: Path) -> None:
    write_lines(data / f"{name}.jsonl", [ROWS[name][0], row])
    with pytest.raises(BenchmarkError, match=words):
        read_benchmark(name, data=data)


def test_what_cannot_be_evaluated_says_so(tiny_config: Config, data: Path, digits: Path) -> None:
    run = Run(tiny_config)
    with pytest.raises(BenchmarkError, match=r"unknown benchmark 'gsm9k'; expected gsm8k, .* gym:TASK or a path"):
        run_benchmarks(run, ["gsm9k"])
    with pytest.raises(BenchmarkError, match=r"--limit: expected at least 1, got 0"):
        run_benchmarks(run, ["gsm8k"], limit=0)
    with pytest.raises(BenchmarkError, match=r"--samples: expected at least 1, got 0"):
        run_benchmarks(run, ["gsm8k"], samples=0)
    with pytest.raises(BenchmarkError, match="expected --tuned or --adapter, got both"):
        run_benchmarks(run, ["gsm8k"], tuned=True, adapter=data)
    with pytest.raises(BenchmarkError, match="2 benchmarks are called 'digits'"):
        run_benchmarks(run, [str(digits)] * 2)
    with pytest.raises(AdapterError, match="cannot be read as an adapter"):
        run_benchmarks(run, [str(digits)], adapter=data)
    (data / "gsm8k.jsonl").write_text("\n")
    with pytest.raises(BenchmarkError, match="gsm8k: contains no problems"):
        read_benchmark("gsm8k", data=data)
    (data / "gsm8k.jsonl").unlink()
    with pytest.raises(BenchmarkError, match=r"data: contains neither gsm8k.jsonl nor a directory gsm8k"):
        read_benchmark("gsm8k", data=data)
    with pytest.raises(ArtefactError, match="no such file"):
        read_benchmark(str(data / "absent.jsonl"))
    write_lines(digits, [{"question": "Q", "answer": "1", "problem_id": "same"}] * 2)  # type: ignore[list-item]
    with pytest.raises(BenchmarkError, match="two problems share a problem_id"):
        read_benchmark(str(digits))


@pytest.mark.thorough
def test_the_command(tiny_config: Config, tiny_path: Path, data: Path, tmp_path: Path) -> None:
    path, adapter = write_yaml(tiny_config, tmp_path / "run.yaml"), save_adapter(tiny_path, tmp_path / "adapter")
    options = ("--adapter", adapter, "--data", data, "--limit", 2, "--samples", 2, "--out", tmp_path / "out")
    done = command("benchmark", path, "minerva", "amc23", *options, "--set", "evaluate.bootstrap=50")
    assert done.returncode == 0, done.stderr
    for words in ("minerva", "amc23", "2 problems x 2", "base", "tuned", "gain"):
        assert words in done.stdout
    assert {"minerva.json", "amc23.json", "benchmarks.png"} <= {p.name for p in (tmp_path / "out").iterdir()}
    wrong = command("benchmark", path, "amc24")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("rmx: error: unknown benchmark 'amc24'; expected gsm8k, math500")


def results(tuned: bool) -> list[Result]:
    found = []
    for i, (name, n) in enumerate({"gsm8k": 1, "olympiadbench": 8, "aime24": 8}.items()):
        base, more = (Interval(m, m - 0.08, m + 0.08) for m in (0.3 + 0.1 * i, 0.4 + 0.1 * i))
        one, two = (Accuracy(1319, n, v, 0.021, {1: v, n: v}, {1: v, n: v}, 1234.5, 0.1, 1, i) for v in (base, more))
        found.append(Result(name, {}, one, *((two, Interval(0.1, 0.05, 0.15)) if tuned else ())))  # type: ignore[arg-type]
    return found


def test_the_table_fits_a_terminal() -> None:
    out = Console(width=80, file=io.StringIO())
    out.print(table(results(tuned=True)))
    lines = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
    rows = [" ".join(line.split()) for line in lines]
    assert {"gsm8k 1319 problems x 1", "olympiadbench 1319 problems x 8", "2 not verified"} <= set(rows)
    assert "gain 0.100 [0.050, 0.150]" in rows
    assert "base 0.300 [0.220, 0.380] 0.021 - - 100% 1234 10%" in rows
    assert "tuned 0.600 [0.520, 0.680] 0.021 0.600 0.600 100% 1234 10%" in rows


@pytest.mark.parametrize("tuned", [False, True])
def test_the_picture_shows_both_sides(tuned: bool, tmp_path: Path) -> None:
    plot(results(tuned), tmp_path / "benchmarks.png")
    image = np.asarray(Image.open(tmp_path / "benchmarks.png").convert("RGB"))
    shown = [(image == [int(c[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).sum() for c in (report.BASE, report.TUNED)]
    assert [count > 100 for count in shown] == [True, tuned]
