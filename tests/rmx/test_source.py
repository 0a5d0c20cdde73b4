"""Where a model is looked for: a path is never a question to the hub, and the hub is asked once."""

import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from rmx import digests
from rmx.config import Config, ModelConfig
from rmx.errors import RmxError
from rmx.models import model, source
from rmx.models.source import ModelError
from rmx.runs.pipeline import Run


def config(name: object, **more: object) -> ModelConfig:
    return ModelConfig.model_validate({"name": str(name), "dtype": "float32", "device": "cpu", **more})


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("./mine", r"no such directory; .* \(the name is a path\)"),
        ("../mine", "the name is a path"),
        ("~/no/such/model", "the name is a path"),
        ("/no/such/model", r"no such directory; the nearest existing one is '/' \(the name is a path\)"),
        ("mine.gguf", r"no such file \(a name that ends in .gguf is a path\)"),
        ("folder/mine.safetensors", r"no such file \(a name that ends in .safetensors is a path\)"),
        ("runs/mine", r"no such directory; the nearest existing one is '.*runs' \('runs' is a directory here"),
        ("runs/mine/merged", "cannot be a name on the Hugging Face hub"),
        ("my model", "cannot be a name on the Hugging Face hub"),
        ("weights.safetensors", "expected a directory or a .gguf file, got another file"),
        ("notes", "expected a directory or a .gguf file, got another file"),
    ],
)
def test_what_looks_like_a_path_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reason: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for file in ("weights.safetensors", "notes"):
        (tmp_path / file).touch()
    monkeypatch.setattr(source, "_ask_hub", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(ModelError, match=reason) as caught:
        source.locate(config(name))
    assert repr(name) in str(caught.value)
    with pytest.raises(ModelError, match=reason):
        model.load(config(name))


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-1.5B", "gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_other_names_are_those_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert source.locate(config(name, gguf_file="x.gguf")) == (name, "x.gguf")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty local cache of the hub; nothing is remembered of what was asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("NO_PROXY", "*")
    huggingface_hub.close_session()
    source._ask_hub.cache_clear()
    yield tmp_path / "hub"
    huggingface_hub.close_session()
    source._ask_hub.cache_clear()


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> str:
    """No one listens there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    return url


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[socket.socket]]:
    """Takes connections, and never answers."""
    taken: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    taken.append(server.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(source, "HUB_SECONDS", 0.5)
        yield taken
        server.shutdown(socket.SHUT_RDWR)
    for connection in taken:
        connection.close()


def answering(status: int, error: str) -> tuple[http.server.HTTPServer, list[str]]:
    asked: list[str] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.send_header("X-Error-Code", error)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, asked


def test_a_hub_that_refuses(hub_cache: Path, refusing: str) -> None:
    with pytest.raises(ModelError, match=rf"no directory of this name is here, .*{refusing} cannot be reached \(.+\)"):
        model.load(config("owner/typo"))
    with pytest.raises(ModelError, match="cannot be reached"):
        model.load_vocabulary(config("owner/typo"))


def test_a_hub_that_hangs_is_asked_once(hub_cache: Path, hanging: list[socket.socket]) -> None:
    for load in (model.load, model.load_vocabulary):
        with pytest.raises(ModelError, match=r"cannot be reached \((no answer in 0.5 s|.*timed out)"):
            load(config("owner/typo"))
    assert len(hanging) == 1


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        (404, "RepoNotFound", "no directory of this name is here, and the hub has no such model"),
        (404, "RevisionNotFound", "the hub's model has no revision 'old'"),
        (403, "GatedRepo", "log in with `hf auth login`, or set HF_TOKEN"),
    ],
)
def test_what_the_hub_says_no_to(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch, status: int, error: str, said: str
) -> None:
    server, asked = answering(status, error)
    try:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(ModelError, match=said):
            model.load(config("owner/typo", revision="old"))
        models = [path for path in asked if path.startswith("/api/models/")]  # the client asks for its own news as well
        assert len(models) == 1 and "owner/typo" in models[0]
    finally:
        server.shutdown()
        server.server_close()


@torch.no_grad()
def test_a_model_of_the_hubs_cache_needs_no_network(
    hub_cache: Path, hanging: list[socket.socket], tiny_path: Path
) -> None:
    commit = "0" * 40
    folder = hub_cache / "models--owner--tiny"
    shutil.copytree(tiny_path, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    settings = config("owner/tiny")
    lm, expected = model.load(settings), model.load(config(tiny_path))
    assert torch.equal(lm.weight, expected.weight)
    assert lm.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
    assert model.load_vocabulary(settings).size == 21
    assert lm.tokenizer.name_or_path == lm.model.name_or_path == "owner/tiny"
    assert source.fingerprint(settings) is None and source.commit(settings) == commit
    assert source.commit(config(tiny_path)) is None
    assert len(hanging) == 1


def test_a_run_goes_on_with_the_commit_that_it_began_with(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch, tiny_path: Path, tiny_config: Config
) -> None:
    """A branch of the hub moves on: a name without a revision then stands for another model."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    first, second = "a" * 40, "b" * 40
    folder = hub_cache / "models--owner--tiny"
    for commit in (first, second):
        shutil.copytree(tiny_path, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(first)

    def run(**change: str) -> Run:
        source._ask_hub.cache_clear()
        model = tiny_config.model.model_copy(update={"name": "owner/tiny", **change})
        return Run(tiny_config.model_copy(update={"model": model}))

    begun = run()
    with begun.locked():
        begun.execute("problems")
        begun.execute("rollouts")
    assert json.loads((begun.dir / "stages.json").read_text())["rollouts"]["settings"]["commit"] == first
    assert run().is_done("rollouts")
    (folder / "refs" / "main").write_text(second)
    with pytest.raises(
        RmxError, match=f"'rollouts' was run with other settings: commit was '{first}', is now '{second}'"
    ):
        run().is_done("rollouts")
    with pytest.raises(RmxError, match="commit was"):
        run(revision=second).is_done("rollouts")
    assert run(revision=first).is_done("rollouts")  # the way on: the same commit, now by its name
    shutil.rmtree(folder)  # nobody tells what the name stands for
    assert run().commit is None and run().is_done("rollouts")


def test_offline_mode_asks_nobody(
    hub_cache: Path, hanging: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set, but the hub's local cache does not have this model"):
        model.load(config("owner/typo"))
    assert hanging == []


# ---- errors before anything heavy is imported ---------------------------------------------------------------------

QUICK = """
import sys
from rmx import cli

sys.argv = ["rmx", *sys.argv[1:]]
try:
    cli.main()
except SystemExit as end:
    status = end.code
heavy = ("torch", "transformers", "matplotlib", "numpy", "safetensors", "tokenizers", "huggingface_hub")
print("loaded:", *(name for name in heavy if name in sys.modules))
sys.exit(status)
"""
GOOD = "run_dir: {folder}/run\nmodel: {{name: {model}}}\nproblems: {{sources: [{{jsonl: p.jsonl}}]}}\n"
COMMANDS = [
    *(["run"], ["train"], ["report"], ["problems"], ["rollouts"], ["compare"], ["coverage"], ["ablate"], ["intervene"]),
    *(["benchmark", "gsm8k"], ["merge", "out"], ["export", "out"], ["import", "there"]),
]


def quick(folder: Path, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = folder / "run.yaml"
    path.write_text(text)
    line = [sys.executable, "-c", QUICK, arguments[0], str(path), *arguments[1:]]
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=folder)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
def test_an_error_of_the_configuration_comes_before_heavy_imports(tmp_path: Path, command: list[str]) -> None:
    done = quick(tmp_path, GOOD.format(folder=tmp_path, model="m") + "trian: {epochs: 2}\n", *command)
    assert (done.returncode, done.stdout) == (1, "loaded:\n")
    assert done.stderr == f"rmx: error: {tmp_path / 'run.yaml'}: trian: unknown key; did you mean 'train'?\n"


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] in ("run", "merge", "compare")], ids=lambda c: c[0])
def test_an_error_of_the_models_path_too(tmp_path: Path, command: list[str]) -> None:
    done = quick(tmp_path, GOOD.format(folder=tmp_path, model="/no/such/model"), *command)
    assert (done.returncode, done.stdout) == (1, "loaded:\n")
    assert done.stderr == (
        "rmx: error: model.name='/no/such/model': no such directory; the nearest existing one is '/' "
        "(the name is a path)\n"
    )


def test_a_stage_whose_turn_it_is_not_says_so_without_torch(tmp_path: Path) -> None:
    done = quick(tmp_path, GOOD.format(folder=tmp_path, model="m"), "train")
    assert done.returncode == 1 and "stage 'train' needs stage 'problems'" in done.stderr
    assert not {"torch", "transformers", "matplotlib"} & set(done.stdout.split())


@pytest.fixture
def large(tiny_path: Path, tmp_path: Path) -> Path:
    """A model whose weights are longer than what a look at their ends would see."""
    folder = tmp_path / "large"
    shutil.copytree(tiny_path, folder)
    (folder / "model.safetensors").write_bytes(bytes(3 << 20))
    return folder


def test_the_fingerprint_follows_every_byte_of_the_weights(large: Path) -> None:
    """A fine-tune in place of another one: the same name, size, ends and time."""
    weights = large / "model.safetensors"
    before, times = source.fingerprint(config(large)), weights.stat()
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert source.fingerprint(config(large)) != before
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert source.fingerprint(config(large)) == before


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]
)
def test_the_fingerprint_follows_configuration_and_tokenizer(large: Path, name: str) -> None:
    before = source.fingerprint(config(large))
    path = large / name
    path.write_text((path.read_text() if path.exists() else "") + " ")
    assert source.fingerprint(config(large)) != before


def test_files_that_no_model_is_made_of_do_not_count(large: Path) -> None:
    before = source.fingerprint(config(large))
    (large / "trainer_state.json").write_text("{}")
    (large / "README.md").write_text("mine")
    assert source.fingerprint(config(large)) == before
    (large / "modeling_mine.py").write_text("")
    assert source.fingerprint(config(large)) == before
    assert source.fingerprint(config(large, trust_remote_code=True)) != before


def test_an_untouched_file_is_read_once(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RMX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "SETTLED_S", -1.0)
    before = source.fingerprint(config(large))
    with monkeypatch.context() as patch:
        patch.setattr(digests.hashlib, "file_digest", lambda *_: pytest.fail("a file was read again"))
        assert source.fingerprint(config(large)) == before
    (tmp_path / "cache" / digests.KEPT).write_text("torn")
    assert source.fingerprint(config(large)) == before
    monkeypatch.setenv("RMX_CACHE", "off")
    assert source.fingerprint(config(large)) == before


def test_a_file_that_has_just_changed_is_read_again(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RMX_CACHE", str(tmp_path / "cache"))
    source.fingerprint(config(large))
    kept = tmp_path / "cache" / digests.KEPT
    assert not kept.exists() or "model.safetensors" not in kept.read_text()
