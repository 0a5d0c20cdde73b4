"""batch_size=auto: what a sequence takes, what fits a GPU, and that a run goes on where another size was chosen."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from test_pipeline import changed

from rmx.config import Config, ConfigError, PromptConfig, RolloutsConfig
from rmx.config_file import load_config
from rmx.models.model import CausalLM
from rmx.models.prompts import Renderer
from rmx.records import Problem, Rollout
from rmx.runs.pipeline import Run
from rmx.runs.rundir import RunError
from rmx.sampling import batching, engines
from rmx.sampling.batching import batch_size, cache_bytes, sequence_bytes, settled
from rmx.sampling.engines import Decoder, EngineError
from rmx.sampling.rollouts import generate_rollouts


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "deepseek_v3", "gpt2"])
def test_the_count_is_what_the_cache_holds(kind: str) -> None:
    lm = zoo.wrapped(kind)
    length = 40  # more than Gemma 2's window of 16
    with torch.no_grad():
        decoder = Decoder(lm, [[3 + i % 7 for i in range(length)]], 3)
    held = sum(x.untyped_storage().nbytes() for layer in decoder.cache.layers for x in (layer.keys, layer.values))
    counted = 3 * cache_bytes(lm.model.config, lm.weight.dtype, length)
    if kind == "deepseek_v3":  # the latents alone, or written out by heads, by the version of transformers
        assert held <= counted
    elif kind == "gemma2":  # of a window transformers keeps a token less than it is long
        assert held == counted - 3 * 2 * 2 * 8 * lm.weight.itemsize
    else:
        assert held == counted


def on_gpu(lm: CausalLM, free: float, monkeypatch: pytest.MonkeyPatch, graphs: bool = True) -> Any:
    """Its configuration on a GPU with so much memory left."""
    monkeypatch.setattr(batching, "free_memory", lambda _: int(free))
    weight = SimpleNamespace(dtype=torch.bfloat16)
    return SimpleNamespace(device=torch.device("cuda"), model=lm.model, weight=weight, graphs=graphs)


def test_a_gpu_gets_what_fits_its_memory_and_its_work(tiny: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = RolloutsConfig(max_new_tokens=100)
    plain = sequence_bytes(tiny.model.config, torch.bfloat16, 120)
    layers = 2 * 2 * 2 * 8 * 2  # layers, K and V, heads, width, bytes
    assert plain == 9 * (120 * layers) // 8 + 2 * 120 * 32 * 2 + 8 * 21
    own = sequence_bytes(tiny.model.config, torch.bfloat16, 120, graphs=True)
    assert own == 9 * (120 * layers) // 8 + 2 * 128 * 32 * 2 + 8 * 21
    assert sequence_bytes(tiny.model.config, torch.bfloat16, 5, graphs=True) == 64 * (layers + 2 * 32 * 2) + 8 * 21
    without = on_gpu(tiny, 64 * plain / 0.8 + 1, monkeypatch, graphs=False)
    assert batch_size(without, sampling, 20, 10_000).size == 64
    sizes = {}
    for sequences in (0.5, 1, 3, 64, 127, 128, 10_000):
        lm = on_gpu(tiny, sequences * own / 0.8 + 1, monkeypatch)
        sizes[sequences] = batch_size(lm, sampling, 20, 1_000_000).size
    assert sizes == {0.5: 1, 1: 1, 3: 2, 64: 64, 127: 64, 128: 128, 10_000: 2048}
    lm = on_gpu(tiny, 1e12, monkeypatch)
    assert [batch_size(lm, sampling, 20, count).size for count in (1, 5, 256, 257)] == [1, 8, 256, 512]
    both = on_gpu(tiny, 128 * own / 0.8 + 1, monkeypatch)
    assert batch_size(both, sampling, 20, 10_000, models=2).size == 64
    assert batch_size(lm, RolloutsConfig(batch_size=77), 20, 1).size == 77


def test_a_cpu_and_a_server_keep_128(tiny: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert batch_size(tiny, RolloutsConfig(), 20, 5).size == 128
    served = RolloutsConfig(engine="openai", base_url="http://localhost/v1")
    assert batch_size(on_gpu(tiny, 1e12, monkeypatch), served, 20, 100_000).size == 128


def test_the_choice_for_a_gpu_is_said(
    tiny: CausalLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = on_gpu(tiny, 2**30, monkeypatch)
    found = settled(lm, RolloutsConfig(max_new_tokens=100), [[1] * 20] * 50, "rollouts.")
    assert found.batch == 1024  # of 50 x 20 completions
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("rollouts.batch_size=auto: 1024 (1.0 GiB free, ") and "of 120 tokens)" in said
    assert settled(tiny, RolloutsConfig(), [[1]], "rollouts.").batch == 128
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("value", ["0", "-3", "1.5", "true", "many", "null"])
def test_other_sizes_are_named(tmp_path: Path, value: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("run_dir: r\nmodel: {name: m}\nproblems: {sources: [{jsonl: p.jsonl}]}\n")
    with pytest.raises(ConfigError, match=r"rollouts.batch_size: .*expected auto or a whole number of at least 1, got"):
        load_config(path, [f"rollouts.batch_size={value}"])
    assert load_config(path, ["rollouts.batch_size=7"]).rollouts.batch == 7


@pytest.mark.thorough
def test_a_run_goes_on_where_auto_is_another_size(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop's samples have random streams of their own: ids are the same, what was sampled is not sampled again."""
    whole = Run(changed(tiny_config, rollouts={"batch_size": 12}))
    for stage in ("problems", "rollouts"):
        whole.execute(stage)
    expected = [(r.problem_id, r.sample, r.completion_ids) for r in whole.rollouts()]
    run = Run(tiny_config.model_copy(update={"run_dir": str(Path(tiny_config.run_dir).with_name("moved"))}))
    run.execute("problems")
    monkeypatch.setattr(batching, "CPU", 24)
    decoded: list[int] = []
    decode = engines.decode

    def stops(*args: Any) -> Any:
        decoded.append(args[2])
        if len(decoded) == 3:
            raise KeyboardInterrupt
        return decode(*args)

    monkeypatch.setattr(engines, "decode", stops)
    with pytest.raises(KeyboardInterrupt):
        run.execute("rollouts")
    monkeypatch.setattr(batching, "CPU", 48)
    again = Run(run.config)
    again.execute("rollouts")
    assert decoded == [24, 24, 24, 48, 48, 48, 48]  # the first 48 were known
    assert [(r.problem_id, r.sample, r.completion_ids) for r in again.rollouts()] == expected
    monkeypatch.setattr(batching, "CPU", 6)
    assert Run(run.config).is_done("rollouts")


def test_an_earlier_run_with_a_number_is_done_under_auto_and_not_under_another(finished: Run) -> None:
    record = finished.stages()
    for stage, section in (("rollouts", "rollouts"), ("evaluate", "evaluate"), ("choose", "evaluate")):
        if section in record[stage]["settings"]:
            record[stage]["settings"][section]["batch_size"] = 128
    (finished.dir / "stages.json").write_text(json.dumps(record))
    assert Run(finished.config).is_done("rollouts") and Run(finished.config).is_done("evaluate")
    with pytest.raises(RunError, match=r"rollouts.batch_size was 128, is now 64"):
        Run(changed(finished.config, rollouts={"batch_size": 64})).is_done("rollouts")


def test_a_batch_that_does_not_fit_is_halved(
    tiny: CausalLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The samples are those of a memory without end; what was sampled before is not sampled again."""
    problems = [Problem(f"p{i}", f"sum of {i} and 1", "1") for i in range(4)]
    sampling = RolloutsConfig(samples=6, temperature=1.3, max_new_tokens=5, batch_size=12, engine="loop")
    renderer = Renderer(tiny.tokenizer, PromptConfig())
    whole = generate_rollouts(tiny, renderer, problems, sampling, 3)
    decode, fits, decoded = engines.decode, 12, list[int]()

    def bounded(*args: Any) -> Any:
        decoded.append(args[2])
        if args[2] > (fits if len(decoded) == 1 else 3):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return decode(*args)

    monkeypatch.setattr(engines, "decode", bounded)
    units: list[list[Rollout]] = []
    found = generate_rollouts(tiny, renderer, problems, sampling, 3, on_unit=units.append)
    assert [(r.problem_id, r.sample, r.completion_ids) for r in found] == [
        (r.problem_id, r.sample, r.completion_ids) for r in whole
    ]
    assert decoded == [12, 12, 6, 3, 3, 3, 3]
    assert sorted((r.problem_id, r.sample) for unit in units for r in unit) == [
        (p.problem_id, n) for p in problems for n in range(6)
    ]
    said = " ".join(capsys.readouterr().err.split())
    assert "12 sequences at a time do not fit the memory; goes on with batch_size=6" in said
    fits = 0
    monkeypatch.setattr(engines, "decode", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none left")))
    with pytest.raises(EngineError, match=r"no memory for 1 sequences at a time: set batch_size to fewer \(none left"):
        generate_rollouts(tiny, renderer, problems, sampling, 3)
