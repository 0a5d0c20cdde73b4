"""Decoding by replayed steps gives what plain steps give; without a GPU a replay calls the function again."""

import inspect
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as hf
import zoo
from test_pipeline import changed
from torch import Tensor

from rmx.config import LoraConfig, ModelConfig, PromptConfig, RolloutsConfig
from rmx.models import lora
from rmx.models.model import CausalLM, load, wrap
from rmx.models.prompts import Renderer
from rmx.records import Problem, Rollout
from rmx.runs.pipeline import Run
from rmx.sampling import decode_graphs, engines
from rmx.sampling.decode_graphs import MARK, Graph, capacity, plain
from rmx.sampling.engines import Decoder, EngineError, check_decoding
from rmx.sampling.rollouts import generate_rollouts

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
FULL: dict[str, Any] = {
    "vocab_size": 21,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
SERVED: dict[str, hf.PretrainedConfig] = {
    "grouped heads": hf.LlamaConfig(**FULL),
    "a tied head": hf.Qwen2Config(**FULL, tie_word_embeddings=True),
    "YaRN": hf.Qwen3Config(
        **FULL,
        head_dim=8,
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
    ),
}
QUESTIONS = [Problem(f"p{i}", "sum of " + " and ".join("1234567"[: i + 1]), "1") for i in range(3)]


class Again:
    """In place of :class:`Graph`: a capture runs nothing, and a replay calls the function."""

    captured: int
    fault: Callable[[], None] | None

    def __init__(self, device: torch.device, pool: object) -> None:
        self.pool = pool

    @staticmethod
    def serves(device: torch.device) -> bool:
        return True

    new_pool = staticmethod(object)

    @staticmethod
    def first(device: torch.device, function: Callable[[], None]) -> None:
        function()

    def capture(self, function: Callable[[], None]) -> None:
        if Again.fault is not None:
            Again.fault()
        Again.captured += 1
        self.function = weakref.WeakMethod(function)  # kernels know no Python object

    def replay(self) -> None:
        function = self.function()
        assert function is not None
        function()


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Again]]:
    monkeypatch.setattr(decode_graphs, "Graph", Again)
    Again.captured, Again.fault = 0, None
    with torch.no_grad():
        yield Again


def raising(kind: type[BaseException], said: str, before: type[BaseException] | None = None) -> Callable[[], None]:
    """``before``: of a fault on whose way out the other one came."""

    def fault() -> None:
        try:
            if before is not None:
                raise before("none left")
        finally:
            raise kind(said)

    return fault


def made(config: hf.PretrainedConfig, tiny: CausalLM, dtype: torch.dtype = torch.float32) -> CausalLM:
    torch.manual_seed(0)
    return wrap(hf.AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False), tiny.tokenizer)


def sampled(lm: CausalLM, **more: Any) -> list[Rollout]:
    settings = {"samples": 12, "temperature": 1.5, "top_p": 1.0, "max_new_tokens": 75, "engine": "loop", **more}
    renderer = Renderer(lm.tokenizer, PromptConfig())
    return generate_rollouts(lm, renderer, QUESTIONS, RolloutsConfig.model_validate(settings), 3)


def same(ours: list[Rollout], theirs: list[Rollout], tolerance: float = 2e-5) -> None:
    assert [r.completion_ids for r in ours] == [r.completion_ids for r in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.logprobs == pytest.approx(other.logprobs, abs=tolerance)


@pytest.mark.parametrize("small", [1024, 64])
@pytest.mark.parametrize("name", SERVED)
def test_completions_are_those_of_plain_steps(
    name: str, small: int, tiny: CausalLM, again: type[Again], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of several lengths, rows that leave early, attention that widens at 64 tokens, buffers that grow."""
    monkeypatch.setattr(decode_graphs, "SMALL", small)
    grown: list[int] = []
    grow = decode_graphs.Steps._grow
    monkeypatch.setattr(decode_graphs.Steps, "_grow", lambda self: (grow(self), grown.append(self.room))[0])
    lm = made(SERVED[name], tiny)
    ours = sampled(lm)
    assert lm.model.__dict__[MARK] and again.captured
    monkeypatch.setattr(decode_graphs, "Graph", Graph)
    same(ours, sampled(lm))
    lengths = [len(r.completion_ids) for r in ours]
    assert min(lengths) < 30 and max(lengths) > 60
    assert grown == ([] if small == 1024 else [128])


def test_states_after_rows_left_are_those_of_whole_sequences(tiny: CausalLM, again: type[Again]) -> None:
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13]]
    decoder = Decoder(tiny, prompts, 2, new=80, graphs=True)
    steps = torch.arange(4 * 70).reshape(70, 4) % 17 + 3
    for step, tokens in enumerate(steps):
        if step == 5:
            decoder.keep(torch.tensor([0, 3]))
        decoder.read(tokens if step < 5 else tokens[[0, 3]])
    assert decoder.steps is not None and decoder.steady
    assert again.captured == decoder.steps.captured == 3  # four rows; two; two beyond 64 tokens
    whole = [tiny.hidden(torch.tensor([p + steps[:, i].tolist()]))[0, -1] for p, i in zip(prompts, (0, 3), strict=True)]
    torch.testing.assert_close(decoder.hidden, torch.stack(whole), rtol=1e-4, atol=1e-5)


def test_what_a_mask_hides_stays_hidden(tiny: CausalLM, again: type[Again]) -> None:
    """Padding and the room behind the tokens: other keys and values there change no bit."""
    found = []
    for filled in (0.0, 1e3):
        decoder = Decoder(tiny, [[5, 6], [8, 9, 10, 11]], 1, new=8, graphs=True)
        decoder.read(torch.tensor([3, 4]))
        for layer in decoder.cache.layers:
            for states in (layer.keys, layer.values):
                states[0, :, :2] = filled
                states[:, :, 5:] = filled
        decoder.read(torch.tensor([6, 7]))
        found.append(decoder.hidden.clone())
    assert torch.equal(*found)


def test_graphs_and_buffers_go_with_the_decoder(tiny: CausalLM, again: type[Again]) -> None:
    """At once: their memory is wanted for the next batch, and nobody waits for the garbage collector."""
    decoder = Decoder(tiny, [[5, 6, 7]], 2, new=5)
    for token in (3, 4, 5):
        decoder.read(torch.tensor([token, token]))
    assert decoder.steps is not None and decoder.steps.graph is not None
    left = [weakref.ref(x) for x in (decoder.steps, decoder.steps.graph, decoder.steps.cache.layers[0].keys)]
    del decoder
    assert [ref() for ref in left] == [None] * 3


def test_an_adapter_is_on_or_off_as_it_was_when_the_step_was_recorded(tiny: CausalLM, again: type[Again]) -> None:
    adapter = lora.attach(tiny.model, LoraConfig(r=2, alpha=64), 0)
    for parameter in adapter.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(1))

    def states(graphs: bool) -> list[Tensor]:
        both = [Decoder(tiny, [[5, 6, 7]], 2, within, 5, graphs) for within in (adapter.off, engines.nullcontext)]
        for token in (3, 4, 5, 6):
            for decoder in both:
                decoder.read(torch.tensor([token, token + 1]))
        return [decoder.hidden for decoder in both]

    (base, tuned), expected = states(True), states(False)
    torch.testing.assert_close([base, tuned], expected, rtol=1e-5, atol=1e-6)
    assert (base - tuned).abs().max() > 0.1


def test_a_capture_that_fails_is_said_once_and_decoding_goes_on(
    tiny: CausalLM, again: type[Again], capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.no_grad():
        begun = Decoder(tiny, [[5, 6, 7]], 2, new=5)
        expected = Decoder(tiny, [[5, 6, 7]], 2, new=5, graphs=False)
        assert begun.replays
        again.fault = raising(RuntimeError, "operation not permitted when stream is capturing\nmore")
        for token in (3, 4, 5):
            for decoder in (begun, expected):
                decoder.read(torch.tensor([token, token]))
    torch.testing.assert_close(begun.hidden, expected.hidden)
    said = " ".join(capsys.readouterr().err.split())
    assert said == "LlamaForCausalLM: decodes without CUDA graphs: operation not permitted when stream is capturing"
    assert not Decoder(tiny, [[5, 6, 7]], 2).replays
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("where", ["itself", "before the end", "of the driver"])
def test_full_memory_is_never_taken_for_another_fault(where: str, tiny: CausalLM, again: type[Again]) -> None:
    assert Decoder(tiny, [[5]], 1).replays
    again.fault = {
        "itself": raising(torch.OutOfMemoryError, "none left"),
        "before the end": raising(RuntimeError, "the capture was invalidated", torch.OutOfMemoryError),
        "of the driver": raising(RuntimeError, "CUDA error: out of memory"),
    }[where]
    with pytest.raises(EngineError, match="no memory for 1 sequences at a time"):
        sampled(tiny, samples=1)
    assert tiny.model.__dict__[MARK]
    del tiny.model.__dict__[MARK], tiny.model.__dict__["_rmx_decodes"]
    with pytest.raises(torch.OutOfMemoryError):  # in the trial, which is made again
        check_decoding(tiny, padded=False)
    again.fault = None
    assert MARK not in tiny.model.__dict__ and Decoder(tiny, [[5]], 1).replays


@pytest.mark.parametrize("fault", ["another state", "an error"])
def test_a_model_that_the_trial_refuses_is_named_and_decoded_plainly(
    fault: str, tiny: CausalLM, again: type[Again], capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tiny.model.model.forward

    def forward(*args: Any, attention_mask: Tensor, **more: Any) -> Any:
        if attention_mask.ndim == 4 and fault == "an error":
            raise ValueError("expected two dimensions")
        return theirs(*args, attention_mask=attention_mask if attention_mask.ndim == 2 else None, **more)

    forward.__signature__ = inspect.signature(theirs)  # type: ignore[attr-defined]
    tiny.model.model.forward = forward
    assert not Decoder(tiny, [[5, 6, 7]], 2).replays
    said = " ".join(capsys.readouterr().err.split())
    reason = r"its states would differ by" if fault == "another state" else r"ValueError\('expected two"
    assert said.startswith("LlamaForCausalLM: decodes without CUDA graphs: ")
    assert re.search(reason, said)
    assert again.captured == (fault == "another state")


def test_which_models_are_plain(tiny: CausalLM) -> None:
    found = {kind: plain(zoo.wrapped(kind)) for kind in ("llama", "qwen2", "qwen3", "mixtral", "gemma2", "qwen3_moe")}
    assert found == {"llama": True, "qwen2": True, "qwen3": True, "mixtral": False, "gemma2": False, "qwen3_moe": False}
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    assert not plain(made(hf.LlamaConfig(**FULL, rope_parameters=rope), tiny))
    tiny.model.config._attn_implementation = "eager"
    assert not plain(tiny)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "opt", "phi", "olmo2", "cohere", "stablelm", "minicpm3"])
def test_models_of_other_makes_pass_the_trial(kind: str, again: type[Again]) -> None:
    assert Decoder(zoo.wrapped(kind), [[5, 6, 7]], 1).replays
    assert again.captured == 1


def test_others_decode_as_before(tiny: CausalLM, again: type[Again], capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("gemma2", "mixtral", "mamba"):
        lm = zoo.wrapped(kind)
        assert not Decoder(lm, [[5, 6, 7]], 1).replays
        check_decoding(lm, padded=False)
    assert (capsys.readouterr().err, again.captured) == ("", 0)
    with torch.enable_grad():
        assert not Decoder(tiny, [[5]], 1).replays


def test_the_setting_reaches_the_model(tiny: CausalLM, again: type[Again]) -> None:
    settings = tiny.settings
    assert settings is not None and settings.cuda_graphs and tiny.graphs
    without = load(settings.model_copy(update={"cuda_graphs": False}))
    assert not without.graphs and not Decoder(without, [[5]], 1).replays
    assert Decoder(tiny, [[5]], 1).replays


def test_a_run_goes_on_with_the_other_value(finished: Run) -> None:
    for cuda_graphs in (True, False):
        run = Run(changed(finished.config, model={"cuda_graphs": cuda_graphs}))
        assert run.config.model.cuda_graphs == cuda_graphs
        assert run.is_done("rollouts") and run.is_done("evaluate")
    assert "cuda_graphs" not in finished.path("stages.json").read_text()


def test_rows_leave_less_often_where_each_size_is_recorded(tiny: CausalLM, again: type[Again]) -> None:
    """Of eight rows one ends a step: the batch is cut at three left of eight, and at one of three."""

    def sizes(graphs: bool) -> list[int]:
        decoder = Decoder(tiny, [[5, 6, 7]], 8, new=9, graphs=graphs)
        found = []

        def pick(step: int, rows: list[int]) -> tuple[Tensor, Tensor]:
            found.append(len(rows))
            return torch.tensor([2 if row == step else 5 for row in rows]), torch.zeros(len(rows), dtype=torch.float64)

        with torch.no_grad():
            completions = engines.decode([decoder], pick, 8, 9, frozenset({2}))
        assert [len(c.ids) for c in completions] == list(range(1, 9))
        return found

    assert sizes(False) == [8, 8, 8, 5, 5, 3, 2, 1]
    assert sizes(True) == [8, 8, 8, 8, 8, 3, 3, 1]


def test_room() -> None:
    """All at once where it is little, else twice as much at a time; never less than there is."""
    assert [capacity(n, 100) for n in (1, 65, 100)] == [128, 128, 128]
    assert [capacity(n, 5000) for n in (10, 1024, 1025, 2049, 4100)] == [1024, 1024, 2048, 4096, 5056]
    assert capacity(130, 100) == 192


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
def test_graphs_of_a_gpu(
    device: str, name: str, dtype: str, tiny: CausalLM, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """States of 70 steps with graphs and without; a graph for each batch size and width, and no more."""
    lm = made(SERVED[name], tiny, getattr(torch, dtype))
    lm = wrap(lm.model.to(device), tiny.tokenizer)
    steps = torch.arange(4 * 70, device=device).reshape(70, 4) % 17 + 3
    rows = torch.tensor([0, 3], device=device)
    with torch.no_grad():
        auto = Decoder(lm, [[5, 6, 7], [8, 9, 10, 11, 12, 13]], 2, new=80)
        theirs = Decoder(lm, [[5, 6, 7], [8, 9, 10, 11, 12, 13]], 2, new=80, graphs=False)
        assert auto.replays
        for step, tokens in enumerate(steps):
            for decoder in (auto, theirs):
                if step == 5:
                    decoder.keep(rows)
                decoder.read(tokens if step < 5 else tokens[rows])
            error = (auto.hidden.double() - theirs.hidden.double()).norm() / theirs.hidden.double().norm()
            assert error < (1e-4 if dtype == "float32" else 5e-2), step
    assert auto.steps is not None and auto.steps.captured == 3
    assert "CUDA graphs" not in capsys.readouterr().err
    if dtype == "float32":
        ours = sampled(lm)
        monkeypatch.setattr(Graph, "serves", staticmethod(lambda _: False))
        theirs_ = sampled(lm)
        assert sum(a.completion_ids == b.completion_ids for a, b in zip(ours, theirs_, strict=True)) >= 34


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_that_waits_for_the_host_is_not_recorded(tiny: CausalLM, tiny_path: Any, capsys: Any) -> None:
    """The stream, the decoder and the random numbers go on as they were."""
    lm = load(ModelConfig(name=str(tiny_path), dtype="float32", device="cuda"))
    stream = torch.cuda.current_stream()
    lm.model.model.norm.register_forward_hook(lambda *args: args[-1] if bool((args[-1] == args[-1]).all()) else None)
    with torch.no_grad():
        decoder = Decoder(lm, [[5, 6, 7]], 2, new=5)
        expected = Decoder(tiny, [[5, 6, 7]], 2, new=5)
        for token in (3, 4, 5):
            decoder.read(torch.tensor([token, token], device="cuda"))
            expected.read(torch.tensor([token, token]))
    assert torch.cuda.current_stream() == stream and not decoder.replays
    assert 0 <= float(torch.rand(1, device="cuda")) < 1
    torch.testing.assert_close(decoder.hidden.cpu(), expected.hidden, rtol=1e-4, atol=1e-4)
    assert "decodes without CUDA graphs" in " ".join(capsys.readouterr().err.split())
