"""Every arm against a naive decoding with full logits; counts, controls, resuming, refusals, the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import command
from rich.console import Console
from test_compare import adapter_path  # noqa: F401  a fixture
from test_pipeline import changed, write_yaml

from rmx.analyses import intervene as module
from rmx.analyses.intervene import ARMS, Arm, Gate, Intervened, Intervention, intervene, summarise, table
from rmx.analyses.pair import paired
from rmx.config import Config
from rmx.errors import AnalysisError
from rmx.models import lora
from rmx.models.model import CausalLM
from rmx.records import Interval, Rollout
from rmx.runs.pipeline import Run
from rmx.sampling.engines import stream_key
from rmx.training.text_scores import TOP


@pytest.fixture
def run(tiny_config: Config) -> Run:
    evaluate = {"samples": 3, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 6, "batch_size": 18}
    run = Run(changed(tiny_config, evaluate=evaluate))
    run.execute("problems")
    return run


def stream(seed: int, key: tuple[str, int], length: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(stream_key(seed, *key))).random(length)


def naive(run: Run, adapter: lora.Adapter, key: tuple[str, int], prompt: list[int], arm: str, tau: float | None,
          planned: set[int]) -> tuple[list[int], list[int], list[int]]:  # fmt: skip
    """(ids, taken, changed) of one completion, one token at a time."""
    lm, temperature = run.lm, run.config.evaluate.temperature
    u, dice = stream(1, key, 6), stream(1 + module.TOKENS, key, 6)
    ids: list[int] = []
    taken, changed_, owed = [], [], 0

    def draw(logits: torch.Tensor, u: float) -> int:
        if temperature == 0:
            return int(logits.argmax())
        p, order = (logits.double() / temperature).softmax(-1).sort(descending=True, stable=True)
        return int(order[int((p.cumsum(-1) <= u * p.sum()).sum())])

    for step in range(6):
        text = torch.tensor([prompt + ids])
        other = lm.model(text).logits[0, -1].double()
        with adapter.off():
            base = lm.model(text).logits[0, -1].double()
        token, theirs = draw(base, u[step]), draw(other, u[step])
        top = base.topk(TOP).indices.tolist()
        logp = base.log_softmax(-1)
        opened = float(-(logp.exp() * logp).sum()) > tau if tau is not None else int(other.argmax()) != top[0]
        if arm == "random positions":
            owed += step in planned
            opened = owed > 0
        proposed = top[int(dice[step] * TOP)] if arm == "random tokens" else theirs
        if arm == "other":
            token = theirs
        elif arm != "base" and opened and proposed in top:
            taken.append(step)
            owed -= 1
            changed_ += [step] if proposed != token else []
            token = proposed
        ids.append(token)
        if token in lm.eos_ids:
            break
    return ids, taken, changed_


@pytest.mark.thorough
@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize(("gate", "tau"), [("disagreement", None), ("entropy", 2.2)])
def test_every_arm_is_that_of_a_naive_decoding(
    run: Run,
    adapter_path: Path,  # noqa: F811
    gate: Gate,
    tau: float | None,
    temperature: float,
) -> None:
    run = Run(changed(run.config, evaluate={"temperature": temperature}))
    with paired(run.lm, adapter_path, run.config.model, "") as pair, torch.no_grad():
        result = intervene(run, pair, run.path("intervene"), gate, tau)
        assert pair.adapter is not None
        experiment = module._Experiment(run, pair, run.path("intervene"), gate, tau)
        found = {}
        for name in ARMS:
            random = name == "random positions"
            planned = module._random_positions(found["gated"], found["base"], 0) if random else {}
            found[name] = experiment.arm(name, planned)  # from the journals
            for c in found[name]:
                mine = naive(run, pair.adapter, c.key, c.rollout.prompt_ids, name, tau, planned.get(c.key, set()))
                assert (c.rollout.completion_ids, c.taken, c.changed) == mine
    for c, plain in zip(found["gated"], found["base"], strict=True):  # as many random positions as taken ones
        places = module._random_positions([c], [plain], 0)[c.key]
        assert len(places) == min(len(c.taken), len(plain.rollout.completion_ids))
        assert max(places, default=0) < len(plain.rollout.completion_ids)
    for name in ("gated", "random tokens", "random positions"):
        assert any(c.changed for c in found[name])
    assert result.problems == 20 and list(result.arms) == list(ARMS)
    assert result.arms["base"].taken == result.arms["other"].changed == 0
    tokens = sum(len(c.rollout.completion_ids) for c in found["gated"])
    assert result.arms["gated"].taken == sum(len(c.taken) for c in found["gated"]) / tokens


@pytest.mark.thorough
def test_base_and_other_are_what_the_evaluation_samples(run: Run) -> None:
    run.run()
    with paired(run.lm, run.path("adapter"), run.config.model, run.renderer.fingerprint) as pair:
        intervene(run, pair, run.path("intervene"))
    for arm, side in (("base", "base"), ("other", "tuned")):
        lines = run.path(f"intervene/{arm}.jsonl").read_text().splitlines()[1:]
        own = [completion["rollout"] for line in lines for completion in json.loads(line)]
        mine = {(r["problem_id"], r["sample"]): r for r in own}
        theirs = [json.loads(line) for line in run.path(f"evaluation.{side}.jsonl").read_text().splitlines()[1:]]
        assert len(theirs) == len(mine) == 60
        for rollout in theirs:
            assert mine[rollout["problem_id"], rollout["sample"]]["completion_ids"] == rollout["completion_ids"]


@pytest.mark.thorough
def test_a_killed_start_goes_on_at_its_unit(run: Run, adapter_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    with paired(run.lm, adapter_path, run.config.model, "") as pair:
        whole = intervene(run, pair, run.path("whole"))
        decode, made = module.decode, [0]

        def killed(*args: object) -> object:
            made[0] += 1
            if made[0] == 6:
                raise KeyboardInterrupt
            return decode(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(module, "decode", killed)
        with pytest.raises(KeyboardInterrupt):
            intervene(run, pair, run.path("intervene"))
        assert intervene(run, pair, run.path("intervene")) == whole
        units = -(-20 // 6)
        assert made[0] == 1 + len(ARMS) * units  # the one that was interrupted, and every unit once
        assert intervene(run, pair, run.path("intervene"), "entropy", 2.2).arms["base"] == whole.arms["base"]
        assert made[0] == 1 + len(ARMS) * units + 3 * units  # base and other are the same


@pytest.mark.thorough
def test_another_model_may_choose_too_and_its_eos_ends_a_completion(run: Run, tmp_path: Path) -> None:
    from tiny import save_tiny_model

    other = save_tiny_model(tmp_path / "other", initializer_range=0.6)
    generation = other / "generation_config.json"
    generation.write_text(json.dumps({**json.loads(generation.read_text()), "eos_token_id": 7}))
    with paired(run.lm, str(other), run.config.model, "") as pair:
        assert (pair.base.eos_ids, pair.other.eos_ids) == ({2}, {2, 7})  # the other tokenizer's own as well
        result = intervene(run, pair, run.path("intervene"))
        found = module._Experiment(run, pair, run.path("intervene"), "disagreement", None).arm("gated", {})
    assert result.arms["gated"].changed > 0
    ended = [c.rollout for c in found if c.rollout.finish_reason == "stop"]
    assert {r.completion_ids[-1] for r in ended} == {2, 7}
    for c in found:
        assert not {2, 7} & set(c.rollout.completion_ids[:-1])


def test_shares_of_a_gap_by_hand() -> None:
    rates = {
        "base": np.zeros(40),
        "gated": np.full(40, 0.3),
        "random positions": np.full(40, 0.1),
        "random tokens": np.full(40, -0.1),
        "other": np.full(40, 0.4),
    }
    one = [Intervened(Rollout("p", 0, [1], [3, 4, 5, 6], "length", ""), [0, 2], [2])]
    arms = summarise(dict.fromkeys(rates, one), rates, 200, 0)
    recovered = arms["gated"].recovered
    assert recovered is not None and recovered.mean == pytest.approx(0.75) == recovered.low == recovered.high
    behind = arms["random positions"].behind_gated
    assert behind is not None and behind.mean == pytest.approx(0.2)
    assert arms["gated"].behind_gated is arms["base"].recovered is None
    assert (arms["gated"].taken, arms["gated"].changed, arms["gated"].tokens) == (0.5, 0.25, 4)
    unclear = {**rates, "other": np.array([0.5, -0.5] * 20)}
    assert summarise(dict.fromkeys(rates, one), unclear, 200, 0)["gated"].recovered is None


def test_the_table_fits_a_terminal() -> None:
    interval = Interval(-1.234, -2.345, -0.123)
    arm = Arm(interval, interval, interval, interval, 0.519, 0.125, 28.4)
    result = Intervention("entropy", 2.55, 200, 3, interval, dict.fromkeys(ARMS, arm), "")
    console = Console(width=80, record=True)
    console.print(table(result))
    assert "…" not in (text := console.export_text()) and text.count("51.9%/12.5%") == 3


def test_what_cannot_be_done_is_refused(run: Run, adapter_path: Path, tiny: CausalLM) -> None:  # noqa: F811
    with paired(run.lm, adapter_path, run.config.model, "") as pair:
        with pytest.raises(AnalysisError, match=r"expected tau \(nats\) with gate entropy.* got None"):
            intervene(run, pair, run.path("intervene"), "entropy")
        with pytest.raises(AnalysisError, match=r"none with disagreement, got 1\.0"):
            intervene(run, pair, run.path("intervene"), "disagreement", 1.0)


@pytest.mark.thorough
def test_the_command_writes_table_json_and_picture(run: Run, tmp_path: Path) -> None:
    path = write_yaml(run.config, tmp_path / "run.yaml")
    early = command("intervene", path)
    assert early.returncode == 1 and "stage 'rollouts' is not done: run `rmx rollouts` first" in early.stderr
    run.run()
    for settings, words in (
        ("prompt.suffix=x", "prompt.suffix was '', is now 'x'"),
        ("select={tau: 2.0}", "select.tau was None, is now 2.0"),
    ):
        stale = command("intervene", path, "--gate", "entropy", "--set", settings)
        assert stale.returncode == 1 and words in stale.stderr
    for more in ((), ("--gate", "entropy")):
        done = command("intervene", path, *more)
        assert done.returncode == 0, done.stderr
        for words in ("gated", "random positions", "random tokens", "other", "of the gap"):
            assert words in done.stdout
    for gate in ("disagreement", "entropy"):
        found = json.loads(run.path(f"intervene/{gate}/intervene.json").read_text())
        assert found["prompt"] == run.meta()["prompt"] and found["gate"] == gate
        assert (found["tau"] is None) == (gate == "disagreement")
        assert run.path(f"intervene/{gate}/intervene.png").read_bytes()[:4] == b"\x89PNG"
    wrong = command("intervene", path, "--gate", "oracle")
    assert wrong.returncode == 1 and "--gate oracle: expected disagreement or entropy" in wrong.stderr
