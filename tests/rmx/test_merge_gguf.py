"""`rmx merge --gguf`: what llama.cpp's converter is called with, and what is left where it is missing or fails."""

import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from rmx.cli import app
from rmx.errors import RmxError
from rmx.interchange import gguf
from rmx.runs.pipeline import Run

# Takes the arguments of convert_hf_to_gguf.py, refuses others, and writes what it was called with by the real package.
STAND_IN = """
    import argparse, json, pathlib
    import gguf, safetensors.numpy
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--outfile", type=pathlib.Path)
    parser.add_argument("--outtype", choices=["f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0", "auto"])
    given = parser.parse_args()
    assert json.loads((given.model / "config.json").read_text())["model_type"] == "llama"
    writer = gguf.GGUFWriter(given.outfile, "llama")
    writer.add_string("test.outtype", given.outtype)
    for name, tensor in safetensors.numpy.load_file(given.model / "model.safetensors").items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
"""
FAILS = """
    import sys
    given = sys.argv[sys.argv.index("--outfile") + 1]
    open(given, "wb").write(b"GGUF half")
    for n in range(40):
        print("line", n, flush=True)
    sys.exit("Model LlamaForNothing is not supported")
"""
HALF = FAILS.replace('sys.exit("Model LlamaForNothing is not supported")', "")
SILENT = "pass"


@pytest.fixture
def config_file(finished: Run, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(finished.config.model_dump(mode="json")))
    return path


@pytest.fixture(autouse=True)
def _none_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(gguf.VARIABLE, raising=False)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def llama_cpp(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(exist_ok=True)
    (folder / gguf.SCRIPT).write_text(textwrap.dedent(script))
    monkeypatch.setenv(gguf.VARIABLE, str(folder))


def merge(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["merge", *map(str, arguments)])


def read(path: Path) -> tuple[str, set[str]]:
    """(the type that was asked for, names of the tensors)"""
    from gguf import GGUFReader

    found = GGUFReader(path)
    return str(found.fields["test.outtype"].contents()), {tensor.name for tensor in found.tensors}


def test_a_type_goes_into_the_merged_directory(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama_cpp(tmp_path / "a folder; with $(signs)", STAND_IN, monkeypatch)
    done = merge(config_file, tmp_path / "merged", "--gguf", "Q8_0")
    assert done.exit_code == 0, (done.output, done.exception)
    kind, names = read(tmp_path / "merged" / "merged-q8_0.gguf")
    assert kind == "q8_0" and "model.norm.weight" in names
    assert not list(tmp_path.rglob("*.partial"))


def test_a_file_with_its_type_from_path(config_file: Path, tmp_path: Path) -> None:
    script = tmp_path / "bin" / gguf.SCRIPT
    script.write_text(f"#!{sys.executable}\n{textwrap.dedent(STAND_IN)}")
    script.chmod(0o755)
    done = merge(config_file, tmp_path / "merged", "--gguf", tmp_path / "new" / "m-f16.gguf")
    assert done.exit_code == 0, (done.output, done.exception)
    assert read(tmp_path / "new" / "m-f16.gguf")[0] == "f16"
    assert gguf.wanted("plain.gguf", tmp_path).type == "auto"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (FAILS, "ended with code 1:"),
        (HALF, "succeeded, but its file is damaged"),
        (SILENT, "succeeded but wrote no file"),
    ],
)
def test_a_converter_that_fails(
    script: str, words: str, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama_cpp(tmp_path / "llama.cpp", script, monkeypatch)
    fault = merge(config_file, tmp_path / "merged", "--gguf", "f16").exception
    assert isinstance(fault, RmxError) and words in str(fault)
    if script == FAILS:
        assert "Model LlamaForNothing is not supported" in str(fault)
        assert "line 39" in str(fault) and "line 20" not in str(fault)
    assert not list(tmp_path.rglob("*.gguf")) and not list(tmp_path.rglob("*.partial"))
    assert (tmp_path / "merged" / "model.safetensors").is_file()  # whole, as the message says
    assert f"merged model is complete in {tmp_path / 'merged'}; to try again: {sys.executable}" in str(fault)


def test_mistakes_come_before_the_merge(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(kind: object) -> str:
        fault = merge(config_file, tmp_path / "merged", "--gguf", kind).exception
        assert isinstance(fault, RmxError) and not (tmp_path / "merged").exists()
        return str(fault)

    assert "convert_hf_to_gguf.py is not installed; get llama.cpp (git clone" in said("q8_0")
    monkeypatch.setenv(gguf.VARIABLE, str(tmp_path))
    assert f"RMX_LLAMA_CPP={tmp_path}: contains no convert_hf_to_gguf.py" in said("q8_0")
    assert "did you mean 'bf16'?" in said("bfp16")
    assert "llama-quantize converts an f16 file to this type" in said("Q4_K_M")
    (tmp_path / "there.gguf").write_text("")
    assert "already exists" in said(tmp_path / "there.gguf")
    llama_cpp(tmp_path / "llama.cpp", STAND_IN, monkeypatch)
    assert "is a file" in said(tmp_path / "there.gguf" / "m.gguf")


def test_a_dry_run_names_the_file(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama_cpp(tmp_path / "llama.cpp", FAILS, monkeypatch)
    done = merge(config_file, tmp_path / "merged", "--gguf", "bf16", "--dry-run")
    assert done.exit_code == 0 and f"{tmp_path / 'merged' / 'merged-bf16.gguf'} in bf16" in done.output.replace(
        "\n", ""
    )
    assert not (tmp_path / "merged").exists()
