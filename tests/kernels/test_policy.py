"""linear_policy_loss against its formulas on full logits in float64, and against TRL's own loss."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import cases
import oracles
import pytest
import torch
from torch import Tensor

from rmx_kernels import PolicyLoss, PolicyOptions, linear_policy_loss

B, T, V, H = 3, 5, 23, 7


def given(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    a = cases.with_lora(cases.make("linear_logprob_kl", (B, T), V, H, dtype))
    names = ("hidden", "weight", "bias")
    A, lora_B, scale = a["lora"]
    rows = {name: a[name].requires_grad_() for name in names} | {"target": a["target"]}
    rows |= {"lora": (A.requires_grad_(), lora_B.requires_grad_(), scale)}
    mask = torch.ones(B, T)
    mask[0, 3:], mask[2, 1:] = 0, 0
    present = logits_of(rows).log_softmax(-1).gather(-1, rows["target"][..., None])[..., 0].detach()
    near = [present + 0.4 * cases.randn(B, T, seed=20 + i, dtype=torch.float64).to(present.dtype) for i in (0, 1)]
    advantage = torch.tensor([1.3, -0.7, 0.4], dtype=near[0].dtype)
    return rows | {"advantage": advantage, "mask": mask, "old_logprob": near[0], "ref_logprob": near[1]}


def logits_of(a: dict[str, Any]) -> Tensor:
    return oracles.linear(a["hidden"], a["weight"], a["bias"], lora=a["lora"])


def trained(a: dict[str, Any]) -> list[Tensor]:
    return [a["hidden"], a["weight"], a["bias"], *a["lora"][:2]]


def eager(a: dict[str, Any], o: PolicyOptions) -> Tensor:
    """As a trainer writes it."""
    log_p = logits_of(a).log_softmax(-1)
    logprob = log_p.gather(-1, a["target"][..., None])[..., 0]
    entropy, mask, A = -(log_p.exp() * log_p).sum(-1), a["mask"].to(log_p.dtype), a["advantage"]
    A = A[:, None] if A.dim() == 1 else A
    old = a.get("old_logprob")
    difference = logprob - (logprob.detach() if old is None else old)
    if o.ratio == "sequence":
        difference = (difference * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    ratio = difference.exp()
    if o.objective == "cispo":
        terms = -ratio.clamp(max=o.clip_high).detach() * A * logprob
    else:
        first = ratio if o.delta is None else ratio.clamp(max=o.delta)
        terms = -torch.minimum(first * A, ratio.clamp(1 - o.clip_low, 1 + o.clip_high) * A)
    if o.kl_coef:
        if o.kl == "full":
            base = oracles.linear(a["base_hidden"], a["weight"].detach(), a["bias"].detach()).log_softmax(-1)
            kl = (base.exp() * (base - log_p)).sum(-1)
        else:
            d = a["ref_logprob"] - logprob
            kl = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[o.kl]
        terms = terms + o.kl_coef * kl
    loss = {
        "token-mean": lambda: (terms * mask).sum() / mask.sum(),
        "seq-mean-token-mean": lambda: ((terms * mask).sum(1) / mask.sum(1)).mean(),
        "seq-mean-token-sum": lambda: (terms * mask).sum(1).mean(),
        7.0: lambda: (terms * mask).sum() / 7,
    }[o.aggregation]()
    return loss - o.entropy_coef * (entropy * mask).sum() / mask.sum()


OPTIONS = [
    PolicyOptions(),
    PolicyOptions(clip_low=0.1, clip_high=0.28, aggregation="token-mean"),
    PolicyOptions(delta=1.5, aggregation=7.0, kl="k1", kl_coef=0.3),
    PolicyOptions(ratio="sequence", clip_low=0.05, clip_high=0.05, kl="k2", kl_coef=0.1),
    PolicyOptions(objective="cispo", clip_high=1.2, aggregation="token-mean", kl_coef=0.2),
    PolicyOptions(kl="full", kl_coef=0.5, entropy_coef=0.1, aggregation="seq-mean-token-sum"),
    PolicyOptions(objective="cispo", ratio="sequence", clip_high=1.01, entropy_coef=-0.2),
]


@pytest.mark.parametrize("chosen", [name for name in cases.available("cpu") if name != "triton"])
@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_value_and_gradients(options: PolicyOptions, chosen: str) -> None:
    a = given()
    base = {"base_hidden": a["hidden"].detach() + 0.1} if options.kl == "full" else {}
    results = []
    for loss in (linear_policy_loss(**a, **base, options=options, impl=chosen).loss, eager(a | base, options)):
        results.append([loss, *torch.autograd.grad(loss, trained(a))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_one_advantage_a_token_and_no_old_log_probs() -> None:
    a = given()
    whole = a["advantage"][:, None].expand(B, T)
    assert torch.equal(linear_policy_loss(**a).loss, linear_policy_loss(**a | {"advantage": whole}).loss)
    del a["old_logprob"]
    result = linear_policy_loss(**a)
    assert (result.ratio[a["mask"] > 0] == 1).all() and result.clipped == 0
    torch.testing.assert_close(result.loss, eager(a, PolicyOptions()))


def test_a_base_in_the_place_of_reference_log_probs() -> None:
    a = given()
    base = a["hidden"].detach() * 0.9
    log_p = oracles.linear(base, a["weight"], a["bias"]).log_softmax(-1).detach()
    a["ref_logprob"] = log_p.gather(-1, a["target"][..., None])[..., 0]
    options = PolicyOptions(kl_coef=0.3)
    expected = linear_policy_loss(**a, options=options)
    del a["ref_logprob"]
    torch.testing.assert_close(linear_policy_loss(**a, base_hidden=base, options=options), expected, equal_nan=True)


def test_parts() -> None:
    a = given()
    result = linear_policy_loss(**a, options=PolicyOptions(kl_coef=0.1))
    assert isinstance(result, PolicyLoss)
    live, log_p = a["mask"] > 0, logits_of(a).log_softmax(-1).detach()
    logprob = log_p.gather(-1, a["target"][..., None])[..., 0]
    ratio = (logprob - a["old_logprob"]).exp()
    up = a["advantage"][:, None] > 0
    clipped = torch.where(up, ratio > 1.2, ratio < 0.8) & live
    for part, expected in (
        (result.logprob, logprob),
        (result.ratio, ratio),
        (result.entropy, -(log_p.exp() * log_p).sum(-1)),
    ):
        torch.testing.assert_close(part[live], expected[live])
        assert part[~live].isnan().all() and not part.requires_grad
    torch.testing.assert_close(result.clipped, clipped.sum() / live.sum().double())
    assert linear_policy_loss(**a).kl.isnan().all()


def test_rows_that_do_not_count_are_not_read() -> None:
    a = given(torch.float32)
    expected = linear_policy_loss(**a).loss
    dead = a["mask"] == 0
    hidden = a["hidden"].detach().clone()
    hidden[dead] = torch.nan
    a["old_logprob"] = a["old_logprob"].masked_fill(dead, torch.nan)
    a["target"] = a["target"].masked_fill(dead, -100)
    lora = {"lora": None}  # whose gradient is a sum over all rows
    plain = linear_policy_loss(**given(torch.float32) | lora).loss
    loss = linear_policy_loss(**a | lora | {"hidden": hidden.requires_grad_()}).loss
    assert loss == plain and expected.isfinite()
    (gradient,) = torch.autograd.grad(loss, [hidden])
    assert gradient.isfinite().all() and (gradient[dead] == 0).all()
    assert linear_policy_loss(**a | lora | {"mask": torch.zeros(B, T), "hidden": hidden}).loss == 0


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_numbers_of_trl(loss_type: str, level: str) -> None:
    """GRPOTrainer's own _compute_loss, given the same log-probs and entropies."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    a = given()
    log_p = logits_of(a).log_softmax(-1)
    logprob = log_p.gather(-1, a["target"][..., None])[..., 0]
    high = 1.3 if loss_type == "cispo" else 0.28
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprob, -(log_p.exp() * log_p).sum(-1), None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=0.1,
        epsilon_low=0.2,
        epsilon_high=high,
        loss_type=loss_type,
        use_vllm=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=T,
        accelerator=SimpleNamespace(
            num_processes=1, reduce=lambda x, **_: x, gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        aux_loss_enabled=False,
        _entropy_bonus_enabled=True,
        use_adaptive_entropy=False,
        entropy_coef=0.05,
        _metrics=defaultdict(lambda: defaultdict(list)),
        args=SimpleNamespace(delta=1.6, use_bias_correction_kl=False, steps_per_generation=1),
    )
    stub.accelerator.sync_gradients = True
    inputs = {
        "prompt_ids": torch.zeros(B, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(B, 1),
        "completion_ids": a["target"],
        "completion_mask": a["mask"],
        "advantages": a["advantage"],
        "old_per_token_logps": a["old_logprob"],
        "ref_per_token_logps": a["ref_logprob"],
        "num_items_in_batch": a["mask"].sum(),
    }
    theirs = trainer._compute_loss(stub, None, inputs)
    aggregation: dict[str, str | float] = {"grpo": "seq-mean-token-mean", "dr_grpo": float(B * T)}
    options = PolicyOptions(
        objective="cispo" if loss_type == "cispo" else "clip",
        ratio=level,
        clip_high=high,
        delta=1.6,
        kl_coef=0.1,
        entropy_coef=0.05,
        aggregation=aggregation.get(loss_type, "token-mean"),
    )
    torch.testing.assert_close(linear_policy_loss(**a, options=options).loss, theirs)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"hidden": torch.zeros(B, H)}, ValueError, "hidden: expected at least 3 dimension"),
    ({"advantage": torch.ones(B + 1)}, ValueError, "advantage: expected one weight per row"),
    (
        {"advantage": torch.ones(B, requires_grad=True)},
        ValueError,
        "advantage: expected a tensor that requires no gradient",
    ),
    ({"mask": torch.ones(B)}, ValueError, r"mask: expected shape \(3, 5\)"),
    ({"old_logprob": torch.zeros(B, 1)}, ValueError, "old_logprob: expected one weight per row"),
    ({"options": PolicyOptions(objective="ppo")}, ValueError, "objective: expected one of clip, cispo, got 'ppo'"),
    ({"options": PolicyOptions(ratio="batch")}, ValueError, "ratio: expected one of token, sequence"),
    ({"options": PolicyOptions(kl="k4")}, ValueError, "kl: expected one of k1, k2, k3, full"),
    ({"options": PolicyOptions(aggregation="mean")}, ValueError, "aggregation: expected one of token-mean"),
    ({"options": PolicyOptions(aggregation=0.0)}, ValueError, "aggregation: expected one of token-mean"),
    ({"options": PolicyOptions(kl="full", kl_coef=1)}, ValueError, "base_hidden: expected one for kl='full'"),
    (
        {"options": PolicyOptions(kl_coef=1), "ref_logprob": None},
        ValueError,
        "ref_logprob or base_hidden: expected one",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[m[:22] for _, _, m in WRONG])
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        linear_policy_loss(**given(torch.float32) | change)


def verl_loss(a: dict[str, Any], objective: str, aggregation: str, kl: str) -> Tensor:
    """The terms as verl 0.9 writes them: losses, not gains, a bound of its own for the dual clip, GSPO by token."""
    log_p = logits_of(a).log_softmax(-1).gather(-1, a["target"][..., None])[..., 0]
    mask, A = a["mask"].to(log_p.dtype), a["advantage"][:, None].expand(B, T)
    log_ratio = (log_p - a["old_logprob"]).clamp(-20, 20)
    if objective == "gspo":
        of_sequence = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
        ratio = (log_p - log_p.detach() + of_sequence.detach()).exp()
        terms = torch.maximum(-A * ratio, -A * ratio.clamp(0.95, 1.05))
    elif objective == "cispo":
        terms = -log_ratio.exp().clamp(0, 1.2).detach() * A * log_p
    else:
        upper = torch.maximum(-A * log_ratio.exp(), -A * log_ratio.exp().clamp(0.9, 1.28))
        terms = torch.where(A < 0, torch.minimum(-A * 1.5, upper), upper)
    d = (a["ref_logprob"] - log_p).clamp(-20, 20)
    terms = terms + 0.3 * {"kl": -d, "mse": 0.5 * d.square(), "low_var_kl": (d.exp() - d - 1).clamp(-10, 10)}[kl]
    if aggregation == "token-mean":
        return (terms * mask).sum() / mask.sum()
    sums = (terms * mask).sum(-1)
    return (sums if aggregation == "seq-mean-token-sum" else sums / mask.sum(-1)).mean()


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize(("kl", "theirs"), [("k1", "kl"), ("k2", "mse"), ("k3", "low_var_kl")])
@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        ("vanilla", {"clip_low": 0.1, "clip_high": 0.28, "delta": 1.5}),
        ("gspo", {"ratio": "sequence", "clip_low": 0.05, "clip_high": 0.05}),
        ("cispo", {"objective": "cispo", "clip_high": 1.2}),
    ],
)
def test_as_verl(objective: str, settings: dict[str, Any], kl: str, theirs: str, aggregation: str) -> None:
    a = given()
    options = PolicyOptions(**settings, aggregation=aggregation, kl=kl, kl_coef=0.3)
    losses = linear_policy_loss(**a, options=options).loss, verl_loss(a, objective, aggregation, theirs)
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(*(torch.autograd.grad(x, trained(a)) for x in losses), rtol=1e-9, atol=1e-11)
