"""Files and settings that are wrong in ways a new user meets: named with their place, and before any work."""

import json
import subprocess
import sys
import unicodedata
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors import SafetensorError
from test_config import MINIMAL
from test_converted import write_gguf

from rmx.artefacts import ArtefactError, replacing
from rmx.cli import app
from rmx.config import Config, ConfigError, ModelConfig, ProblemsConfig
from rmx.config_file import load_config
from rmx.grading.problems import ProblemsError, build_problems, folded, generate, read_jsonl
from rmx.models import model, source
from rmx.models.source import ModelError
from rmx.records import Problem
from rmx.runs.pipeline import Run
from rmx.runs.rundir import RunError

DEEP = 20_000  # other packages may have raised Python's limit
GOOD = '{"question": "q", "answer": "1"}'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"question": "q", "answer": NaN}', "NaN is not a number"),
        ('{"question": "q", "answer": Infinity}', "Infinity is not a number"),
        ('{"question": "q", "answer": -Infinity}', "-Infinity is not a number"),
        ('{"question": "q", "answer": 1e400}', "1e400 is beyond the range of a float; write it as text in quotes"),
        ('{"question": "q", "answer": -1e999}', "beyond the range of a float"),
        (f'{{"question": "q", "answer": {"1" * 5000}}}', "not a JSON value: .*4300"),
        ("[" * 100_000, "nested too deeply"),
        ('{"question": "q", "answer": "1", "x": ' + "[" * 50_000 + "]" * 50_000 + "}", "nested too deeply"),
        (r'{"question": "\ud800", "answer": "1"}', "half of a surrogate pair"),
        (r'{"question": "q", "answer": "1", "category": "\udfff"}', "half of a surrogate pair"),
        ('{"question": "q", "answer": "1", "answer": "2"}', "duplicate key 'answer'"),
        ('{"question": "q", "answer": null}', "answer: expected text or a number, got None"),
        ('{"question": "q", "answer": [1]}', "answer: expected text or a number"),
        ('{"question": "q", "answer": "1", "category": "reasoning_gym:x"}', "category: the prefix reasoning_gym:"),
        ("\x00", "not a JSON value"),
        ("{'question': 'q'}", "not a JSON value"),
        ('{"question": "q", "answer": "1"', "not a JSON value"),
    ],
)
def test_a_line_that_is_no_problem_is_named_with_file_and_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"question": "other", "answer": "1"}}\n{line}\n')
    with pytest.raises(ArtefactError, match=rf"p\.jsonl:2: .*{said}") as caught:
        read_jsonl(path)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [b"", b"\n", b"\r\n\r\n"])
def test_files_of_windows_are_read(tmp_path: Path, ending: bytes, mark: bytes, last: bytes) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(
        mark + ending.join([b'{"question": "q 1", "answer": 1}', b'{"question": "q 2", "answer": 2}']) + last
    )
    assert [(p.question, p.answer) for p in read_jsonl(path)] == [("q 1", "1"), ("q 2", "2")]


@pytest.mark.parametrize(
    "other",
    [
        unicodedata.normalize("NFD", "Où est le café à 3 €?"),
        unicodedata.normalize("NFKD", "Où est le café à 3 €?"),
        "Où est le café à\u00a03 €?",
        "Où est  le café\nà 3 €?",
        "Où est le ca\u200bfé à 3 €?",
        "Où est le ca\u00adfé à 3 €?",
        "Où est le café à ３ €?",
    ],
)
def test_unicode_forms_of_a_question_are_one(other: str) -> None:
    question = "Où est le café à 3 €?"
    assert folded(Problem("a", question, "1")) == folded(Problem("b", other, "1"))


@pytest.mark.parametrize(("one", "other"), [("x²", "x2"), ("½", "12"), ("3 − 4", "3 4"), ("10⁵", "105"), ("a", "A")])
def test_other_questions_stay_apart(one: str, other: str) -> None:
    assert folded(Problem("a", one, "1")) != folded(Problem("b", other, "1"))


def test_the_same_question_with_another_answer_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"question": "q", "answer": "1"}\n{"question": " q ", "answer": "2"}\n')
    with pytest.raises(
        ArtefactError, match=r"p\.jsonl:2: the question of line 1 has another answer: '1' there, '2' here"
    ):
        read_jsonl(path, consistent=True)
    path.write_text('{"question": "q", "answer": "1/2"}\n{"question": "q", "answer": 0.5}\n')
    assert len(read_jsonl(path, consistent=True)) == 2
    files = []
    for name, answer in (("a", 1), ("b", 2)):
        files.append(tmp_path / f"{name}.jsonl")
        lines = [{"question": "q", "answer": answer}, *({"question": f"{name} {i}", "answer": 1} for i in range(4))]
        files[-1].write_text("\n".join(map(json.dumps, lines)))
    settings = {"sources": [{"jsonl": str(f)} for f in files], "train_count": 2, "evaluate_count": 2}
    with pytest.raises(ProblemsError, match=r"'a-1' and 'b-1' ask the same question and give the answers '1' and '2'"):
        build_problems(ProblemsConfig.model_validate(settings), 0)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (f"seed: {2**64}", "seed: .*less than"),
        (f"seed: {2**63}", "seed: .*less than"),
        (f"training_seed: {2**64}", "training_seed: .*less than"),
        ("verify: {timeout_s: .inf}", "verify.timeout_s: .*finite"),
        ("verify: {timeout_s: 1e300}", "verify.timeout_s: .*86400"),
        ("train: {epochs: .inf}", "train.epochs: .*finite"),
        ("train: {epochs: .nan}", "train.epochs: .*finite"),
        ("train: {epochs: 1e300}", "train.epochs: .*10000"),
        ("train: {learning_rate: .inf}", "train.learning_rate: .*finite"),
        ("select: {tau: .inf}", "select.tau: .*finite"),
        ("lora: {alpha: .nan}", "lora.alpha: .*finite"),
        ("rollouts: {temperature: .inf}", "rollouts.temperature: .*finite"),
        ("rollouts: {temperature: 1e-300}", "rollouts.temperature: .*at least 0.001"),
        ("evaluate: {bootstrap: 1}", "evaluate.bootstrap: .*40"),
        ("select: {min_pass_rate: 0.5, max_pass_rate: 0.5}", "select: .*min_pass_rate < max_pass_rate"),
        ("cost: {per_hour: .inf}", "cost.per_hour: .*finite"),
        ("train: {epohcs: 2}", "train.epohcs: unknown key; did you mean 'epochs'?"),
        ("trian: {epochs: 2}", "trian: unknown key; did you mean 'train'?"),
        ("rollouts: {temprature: 1}", "rollouts.temprature: unknown key; did you mean 'temperature'?"),
        ("rollouts: {xyzzy: 1}", "rollouts.xyzzy: unknown key$"),
        ("problems: {sources: [{jsnol: a}]}", "jsnol: unknown key; did you mean 'jsonl'?"),
        ("seed: " + "1" * 5000, "not YAML: .*4300"),
        ("cost: {currency: 2026-13-45}", "not YAML: month"),
        (r'cost: {currency: "\ud800"}', "not YAML: .*surrogates"),
        ("x: " + "[" * DEEP, "not YAML: nested too deeply"),
        ("x: &a [*a]", "not YAML: an alias is inside the value that it stands for"),
        ("x: &a {b: *a}", "not YAML: an alias is inside the value that it stands for"),
    ],
)
def test_wrong_settings_are_named_before_any_work(tmp_path: Path, extra: str, named: str) -> None:
    path = tmp_path / "run.yaml"
    text = MINIMAL.replace("problems: {sources: [{jsonl: p.jsonl}]}\n", "") if extra.startswith("problems") else MINIMAL
    path.write_text(text + extra + "\n")
    with pytest.raises(ConfigError, match=rf"run\.yaml: .*{named}") as caught:
        load_config(path)
    assert len(str(caught.value)) < 900


def test_an_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + "\n".join(lines))
    with pytest.raises(ConfigError, match="more than 100,000 values, counting what aliases stand for"):
        load_config(path)
    path.write_text(MINIMAL + "\n".join(lines[:12]))  # small enough to be written out, and cut where it is shown
    with pytest.raises(ConfigError, match=r"a11: unknown key"):
        load_config(path)
    path.write_text(MINIMAL.replace("run_dir: r", "run_dir: &a [[[[1, 2, 3], 4], 5], 6]"))
    with pytest.raises(ConfigError, match=r"run_dir: .*got "):
        load_config(path)
    with pytest.raises(ConfigError, match=r"--set seed=.*: not a YAML value: nested too deeply"):
        load_config(path, ["seed=" + "[" * DEEP])


def test_aliases_that_are_meant_are_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + "rollouts: {top_p: &p 0.5}\nevaluate: {top_p: *p}\n")
    assert load_config(path).evaluate.top_p == 0.5


def test_an_unknown_task_has_a_suggestion() -> None:
    with pytest.raises(ProblemsError, match="no task 'chainsum'; did you mean 'chain_sum'"):
        generate("chainsum", {}, 5, 0)


def test_top_k_above_the_vocabulary_stops_before_sampling(tiny_config: Config) -> None:
    tree = tiny_config.model_dump()
    tree["score"]["top_k"] = 22
    with pytest.raises(RunError, match=r"score.top_k: expected at most the vocabulary's 21, got 22"):
        Run(Config.model_validate(tree)).run()


def test_a_full_disk_under_safetensors_is_named_as_one(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device: '.*weights'"), replacing(tmp_path / "weights"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def whole_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf").read_bytes()


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (0.0, "expected a GGUF file, got one without the GGUF header"),
        (0.0005, "is truncated in its metadata"),
        (0.01, "is truncated in its metadata"),
        (0.05, "is truncated in its metadata"),
        (0.5, r"is truncated: it has [\d,]+ of [\d,]+ bytes: download it again"),
        (0.999, r"is truncated: it has [\d,]+ of [\d,]+ bytes: download it again"),
    ],
)
def test_a_cut_gguf_file_is_named_as_one(whole_gguf: bytes, tmp_path: Path, share: float, said: str) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole_gguf[: int(len(whole_gguf) * share)])
    with pytest.raises(ModelError, match=said):
        model.load(ModelConfig(name=str(path), dtype="float32", device="cpu"))


@pytest.mark.parametrize("place", range(4, 200, 7))
def test_damaged_metadata_is_an_error_of_the_model(whole_gguf: bytes, tmp_path: Path, place: int) -> None:
    """And no other one; a byte that changes a value alone may pass."""
    content = bytearray(whole_gguf)
    content[place] ^= 0xFF
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    with suppress(ModelError):
        model.gguf_header.check(path)


def test_a_run_directory_that_is_a_file_is_named(tiny_config: Config, tmp_path: Path) -> None:
    tree = {**tiny_config.model_dump(), "run_dir": str(tmp_path / "notes")}
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(RunError, match=r"run_dir: .*notes is a file; expected a directory"):
        Run(Config.model_validate(tree)).run()


def test_a_model_that_may_not_be_read_is_said_to_be_so(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source.os, "access", lambda *_: False)  # a superuser may read anything
    with pytest.raises(ModelError, match="the directory cannot be read: permission denied"):
        source.locate(ModelConfig(name=str(tiny_path)))


def test_version_and_short_help() -> None:
    from typer.testing import CliRunner

    said = CliRunner().invoke(app, ["--version"])
    assert said.exit_code == 0 and said.output.startswith("rmx 0.")
    for arguments in (["-h"], ["run", "-h"], ["merge", "--help"]):
        said = CliRunner().invoke(app, arguments)
        assert said.exit_code == 0 and "Usage" in said.output


def test_the_version_needs_no_torch() -> None:
    script = """import sys; sys.argv = ["rmx", "--version"]
try:
    import rmx.cli; rmx.cli.main()
finally:
    assert "torch" not in sys.modules"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0
