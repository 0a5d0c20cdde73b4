"""The engine vllm against a stand-in of vLLM's interface: what it is given, what becomes of its answers, how it fails.

The stand-in takes the arguments that vLLM's classes take and no others, and decodes with transformers and PEFT.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftModel
from test_pipeline import changed
from transformers import AutoModelForCausalLM

from rmx.config import Config, LoraConfig, ModelConfig, PromptConfig, RolloutsConfig
from rmx.models import lora, model
from rmx.models.model import CausalLM
from rmx.models.prompts import Renderer
from rmx.records import Problem, Rollout
from rmx.runs.pipeline import Run
from rmx.sampling import vllm_engine
from rmx.sampling.engines import EngineError
from rmx.sampling.rollouts import generate_rollouts

PROBLEMS = [Problem(f"p{i}", "sum of " + " and ".join("123456789"[: i + 1]), "1") for i in range(3)]


@dataclass(kw_only=True)
class SamplingParams:
    """Of vLLM's, those that rmx may use."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True

    def __post_init__(self) -> None:
        assert self.temperature >= 0 and 0 < self.top_p <= 1 and self.top_k >= -1
        assert self.seed is None or 0 <= self.seed < 2**63


class TokensPrompt(dict[str, Any]):
    def __init__(self, *, prompt_token_ids: list[int]) -> None:
        super().__init__(prompt_token_ids=prompt_token_ids)


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class LLM:
    made: ClassVar[list[dict[str, Any]]] = []
    calls: ClassVar[list[tuple[list[TokensPrompt], list[SamplingParams], LoRARequest | None]]] = []
    answer: Any = None  # to be given instead

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        trust_remote_code: bool = False,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        gpu_memory_utilization: float = 0.9,
        max_model_len: int | None = None,
        generation_config: str = "auto",
        enable_lora: bool = False,
        max_loras: int = 1,
        max_lora_rank: int = 16,
    ) -> None:
        assert max_lora_rank in (1, 8, 16, 32, 64, 128, 256, 320, 512) and 0 < gpu_memory_utilization <= 1
        given = locals()
        LLM.made.append({key: given[key] for key in given if key not in ("self", "__class__")})
        self.enable_lora, self.most, self.rank = enable_lora, max_model_len or 0, max_lora_rank
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self.base, self.path = self.model, ""

    @torch.no_grad()
    def generate(
        self,
        prompts: list[TokensPrompt],
        sampling_params: list[SamplingParams],
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
    ) -> list[Any]:
        LLM.calls.append((prompts, sampling_params, lora_request))
        if LLM.answer is not None:
            if isinstance(LLM.answer, Exception):
                raise LLM.answer
            kept = prompts[getattr(LLM.answer, "lost", 0) :]
            return [SimpleNamespace(outputs=[LLM.answer]) for _ in kept]
        if lora_request is not None:
            assert self.enable_lora
            self.model = PeftModel.from_pretrained(self.base, lora_request.lora_path)
            assert self.model.peft_config["default"].r <= self.rank
        return [self._one(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]

    def _one(self, prompt: list[int], params: SamplingParams) -> Any:
        assert params.max_tokens and len(prompt) + params.max_tokens <= self.most
        generator, ids = torch.Generator().manual_seed(params.seed or 0), list(prompt)
        for _ in range(params.max_tokens):
            logits = self.model(torch.tensor([ids])).logits[0, -1].float()
            if params.temperature == 0:
                token = int(logits.argmax())
            else:
                p = (logits / params.temperature).softmax(-1)
                token = int(torch.multinomial(p, 1, generator=generator))
            ids.append(token)
            if token in (params.stop_token_ids or []):
                break
        said = ids[len(prompt) :]
        ended = said[-1] in (params.stop_token_ids or [])
        return SimpleNamespace(outputs=[choice(said, "stop" if ended else "length", said[-1] if ended else None)])


def choice(ids: list[int], reason: str, stop: int | None = None, **more: Any) -> Any:
    return SimpleNamespace(token_ids=tuple(ids), finish_reason=reason, stop_reason=stop, text="", **more)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module, of_lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    module.LLM, module.SamplingParams, module.TokensPrompt = LLM, SamplingParams, TokensPrompt  # type: ignore[attr-defined]
    request.LoRARequest = LoRARequest  # type: ignore[attr-defined]
    for name, found in {"vllm": module, "vllm.lora": of_lora, "vllm.lora.request": request}.items():
        monkeypatch.setitem(sys.modules, name, found)
    monkeypatch.setattr(vllm_engine, "_on_gpu", lambda _: True)
    monkeypatch.setattr(vllm_engine, "_memory", lambda _: (60 * 2**30, 80 * 2**30))
    for name, empty in {"made": [], "calls": [], "answer": None}.items():
        monkeypatch.setattr(LLM, name, empty)


def sampled(lm: CausalLM, engine: str = "vllm", adapter: Path | None = None, **more: Any) -> list[Rollout]:
    settings = {"samples": 3, "temperature": 1.3, "max_new_tokens": 8, "engine": engine, **more}
    renderer = Renderer(lm.tokenizer, PromptConfig())
    return generate_rollouts(lm, renderer, PROBLEMS, RolloutsConfig.model_validate(settings), 3, adapter=adapter)


def plain(rollouts: list[Rollout]) -> list[Rollout]:
    return [dataclasses.replace(rollout, logprobs=None) for rollout in rollouts]


@pytest.mark.thorough
def test_greedy_samples_are_those_of_the_loop(tiny: CausalLM, tmp_path: Path) -> None:
    ours = plain(sampled(tiny, "loop", temperature=0.0))
    assert sampled(tiny, temperature=0.0) == ours
    adapter = lora.attach(tiny.model, LoraConfig(r=3, alpha=12), 0)
    for parameter in adapter.parameters():
        parameter.data.normal_()
    lora.save_adapter(adapter, tmp_path / "adapter", str(tiny.model.name_or_path))
    tuned = plain(sampled(tiny, "loop", temperature=0.0))
    assert sampled(tiny, temperature=0.0, adapter=tmp_path / "adapter") == tuned != ours
    assert sampled(tiny, temperature=0.0) == ours  # the base, whatever the model here wears
    ranks = [(made["enable_lora"], made["max_lora_rank"]) for made in LLM.made]
    assert ranks == [(False, 16), (True, 8), (False, 16)]
    assert LLM.calls[1][2] == LoRARequest("tuned", 1, str(tmp_path / "adapter"))


@pytest.mark.thorough
def test_every_sample_has_a_seed_of_its_own(tiny: CausalLM) -> None:
    whole = sampled(tiny, top_k=5, top_p=0.9)
    ((prompts, params, request),) = LLM.calls
    assert request is None and len(prompts) == 9 and len({p.seed for p in params}) == 9
    assert [p["prompt_token_ids"] for p in prompts] == [r.prompt_ids for r in whole]
    said = {(p.temperature, p.top_p, p.top_k, p.max_tokens, p.n, p.logprobs) for p in params}
    assert said == {(1.3, 0.9, 5, 8, 1, None)}
    assert all(p.stop_token_ids == [2] and not p.detokenize for p in params)
    assert len({tuple(r.completion_ids) for r in whole}) > 5 and whole[0].logprobs is None
    assert sampled(tiny, top_k=5, top_p=0.9, batch_size=3) == whole  # cut otherwise: the same seeds
    assert [len(prompts) for prompts, *_ in LLM.calls] == [9, 3, 3, 3]
    (first, second) = LLM.made
    assert first == second and first["dtype"] == "float32" and first["generation_config"] == "vllm"
    assert first["gpu_memory_utilization"] == 0.675  # 90 % of 60 of 80 GiB
    assert first["max_model_len"] == max(len(r.prompt_ids) for r in whole) + 8
    assert first["model"] == first["tokenizer"] == tiny.model.name_or_path


def test_a_run_evaluates_base_and_adapter_with_it(finished: Run) -> None:
    run = Run(changed(finished.config, evaluate={"engine": "vllm", "samples": 1}))
    run.execute("evaluate", again=True)
    assert [made["enable_lora"] for made in LLM.made] == [False, True]
    assert [len(prompts) for prompts, *_ in LLM.calls] == [20, 20]
    assert [request and request.lora_path for *_, request in LLM.calls] == [None, str(run.path("adapter"))]
    seeds = [[p.seed for p in params] for _, params, _ in LLM.calls]
    assert seeds[0] == seeds[1]  # common random numbers
    assert Run(run.config).is_done("evaluate")


@pytest.mark.thorough
def test_a_run_samples_with_it(tiny_config: Config) -> None:
    run = Run(changed(tiny_config, rollouts={"engine": "vllm", "samples": 2, "batch_size": 8}))
    run.execute("problems")
    run.execute("rollouts")
    whole = run.rollouts()
    assert len(whole) == 40 and [len(prompts) for prompts, *_ in LLM.calls] == [8] * 5
    assert {r.finish_reason for r in whole} == {"stop", "length"}
    assert Run(run.config).is_done("rollouts")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (choice([5, 6], "abort"), "expected up to 8 tokens that end by stop or length, got 2 that end by 'abort'"),
        (choice([5] * 9, "length"), "got 9 that end by 'length'"),
        (choice([5, 21], "stop"), "token id 21, but the vocabulary has 21 tokens: another model"),
        (choice([5], "length", lost=1), "8 answers to 9 prompts"),
        (ValueError("prompt is too long"), "engine=vllm: prompt is too long"),
        (RuntimeError("engine core died"), "engine=vllm: engine core died"),
    ],
)
def test_what_does_not_fit_is_an_error(
    tiny: CausalLM, monkeypatch: pytest.MonkeyPatch, answer: Any, message: str
) -> None:
    monkeypatch.setattr(LLM, "answer", answer)
    with pytest.raises(EngineError, match=message):
        sampled(tiny)


def test_an_end_that_is_not_told_is_put_back(tiny: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LLM, "answer", choice([5, 6], "stop", 2))
    assert {tuple(r.completion_ids) for r in sampled(tiny)} == {(5, 6, 2)}


def test_why_it_cannot_run_here_is_said(tiny: CausalLM, monkeypatch: pytest.MonkeyPatch, tiny_config: Config) -> None:
    with pytest.raises(EngineError, match="not loaded from files"):
        sampled(dataclasses.replace(tiny, settings=None))
    with pytest.raises(EngineError, match="the weights of this GGUF file"):
        sampled(dataclasses.replace(tiny, gguf=True))
    monkeypatch.setattr(vllm_engine, "_on_gpu", lambda lm: lm.device.type == "cuda")
    with pytest.raises(EngineError, match="needs a CUDA GPU, and the model is on the CPU"):
        sampled(tiny)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(EngineError, match=r"vLLM cannot be imported .*pip install 'rmx\[vllm\]'"):
        sampled(tiny)
    run = Run(changed(tiny_config, evaluate={"engine": "vllm"}))  # found before the rollouts
    run.execute("problems")
    with pytest.raises(EngineError, match="cannot be imported"):
        run.execute("rollouts")
    assert not run.path("rollouts.journal.jsonl").exists()


def test_a_rank_beyond_its_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 33}')
    assert vllm_engine._rank(tmp_path) == 64
    (tmp_path / "adapter_config.json").write_text('{"r": 513}')
    with pytest.raises(EngineError, match="has rank 513, vLLM supports at most 512"):
        vllm_engine._rank(tmp_path)


def test_a_model_remembers_how_it_was_loaded(tiny_path: Path) -> None:
    settings = ModelConfig(name=str(tiny_path), dtype="float32", device="cpu")
    lm = model.load(settings)
    assert (lm.settings, lm.gguf) == (settings, False)
