"""A temperature for each row: what calls for all rows at each of the temperatures give, row by row; and refusals."""

from typing import Any

import cases
import oracles
import pytest
import torch
from cases import assert_same_bits, forward_backward, temperatures, tiny_tiles, unless_interpreted
from test_every_operator import row_results, scattered
from torch import Tensor

import rmx_kernels
from rmx_kernels import PolicyOptions, checks, linear_cross_entropy, linear_kept_logprobs, linear_policy_loss
from rmx_kernels.dispatch import OPERATORS as ALL

OPERATORS = ALL
STATISTICS = [op for op in ALL if op.endswith("entropy_topk")]
LOSSES = [op for op in ALL if op.endswith("loss")]
SCALINGS = [{}, {"softcap": 5.0}]
BAD = [0.0, -1.0, torch.nan, torch.inf, -torch.inf]


def lora_too(op: str, arguments: cases.Arguments) -> cases.Arguments:
    return cases.with_lora(arguments) if op.startswith("linear") else arguments


def assert_as_by_a_number(impl: str, got: list[Tensor], expected: list[Tensor]) -> None:
    """The same bits; on a GPU but for eager PyTorch, which multiplies by the reciprocal of a number there."""
    if impl == "reference" and got[0].is_cuda:
        torch.testing.assert_close(got, expected, equal_nan=True)
    else:
        assert_same_bits(got, expected)


def names_of_rows(op: str) -> str:
    return cases.DIFFERENTIABLE[op][0]


@pytest.mark.parametrize("scaling", SCALINGS, ids=["plain", "softcap"])
def test_as_good_as_eager(op: str, device: str, impl: str, dtype: torch.dtype, scaling: Any) -> None:
    """Every value and every gradient, those of the bias and of the LoRA pair among them."""
    arguments = lora_too(op, cases.make(op, (2, 3), 1031, 17, dtype, device))
    cases.check(op, arguments, impl, temperature=temperatures(2, 3, device=device), **scaling)


@pytest.mark.thorough
@pytest.mark.parametrize("scaling", SCALINGS, ids=["plain", "softcap"])
def test_gradcheck(op: str, device: str, impl: str, fp64: torch.dtype, scaling: Any) -> None:
    arguments = lora_too(op, cases.make(op, (5,), V=9, H=4, dtype=fp64, device=device))
    fresh, inputs = cases.leaves(op, arguments)
    inputs = inputs[:1] + inputs[3:] if "base_hidden" in fresh else inputs  # the head of the base is a constant
    t = temperatures(5, device=device).double()

    def function(*_: Tensor) -> tuple[Tensor, ...]:
        return tuple(cases.differentiable(cases.call(op, fresh, impl=impl, temperature=t, **scaling)))

    with tiny_tiles():
        assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("scaling", SCALINGS, ids=["plain", "softcap"])
def test_a_tensor_of_one_number(op: str, device: str, impl: str, dtype: torch.dtype, scaling: Any) -> None:
    """The bits of every result and every gradient."""
    arguments = lora_too(op, cases.make(op, dtype=dtype, device=device))
    t = torch.full((6,), 0.7, device=device)
    expected = forward_backward(op, arguments, impl=impl, temperature=t[0].item(), **scaling)
    assert_as_by_a_number(impl, forward_backward(op, arguments, impl=impl, temperature=t, **scaling), expected)


def masked(op: str, arguments: cases.Arguments) -> cases.Arguments:
    """With rows of -inf, of the lowest number, of NaN and +inf; by way of the bias where there is a head."""
    found = arguments | {n: v.clone() for n, v in arguments.items() if isinstance(v, Tensor)}
    if "bias" in found:
        found["bias"][::3], found["bias"][1] = -torch.inf, torch.finfo(found["bias"].dtype).min
        found["hidden"][5] = torch.nan
        return found
    lowest = torch.finfo(found["logits"].dtype).min
    for x in (v for n, v in found.items() if "logits" in n):
        x[0, ::3], x[1, 1::2], x[2, 2:], x[2, 0] = -torch.inf, lowest, lowest, -torch.inf
    found["logits"][4, 3], found["logits"][5, 2] = torch.inf, torch.nan
    return found


@pytest.mark.parametrize("what", ["plain", "masked"])
@pytest.mark.parametrize("scaling", SCALINGS, ids=["plain", "softcap"])
def test_each_row_has_the_bits_of_its_own_temperature(op: str, device: str, impl: str, scaling: Any, what: str) -> None:
    arguments = cases.make(op, device=device)
    arguments = masked(op, arguments) if what == "masked" else lora_too(op, arguments)
    t, name = temperatures(6, device=device), names_of_rows(op)
    with tiny_tiles():
        got = row_results(op, arguments | {"temperature": t} | scaling, name, impl)
        for row in range(0, 6, unless_interpreted(1, 2)):
            alone = row_results(op, arguments | {"temperature": t[row].item()} | scaling, name, impl)
            for field, value in got.items():
                assert_as_by_a_number(impl, [value[row]], [alone[field][row]])


@pytest.mark.parametrize("chosen", cases.available("cpu"))
@pytest.mark.parametrize("of", STATISTICS)
def test_several_targets_a_row(of: str, chosen: str) -> None:
    arguments = cases.make(of) | {"target": cases.randint(23, 6, 4)}
    t = temperatures(6)
    got = row_results(of, arguments | {"temperature": t}, names_of_rows(of), chosen)
    for row in range(6):
        alone = row_results(of, arguments | {"temperature": t[row].item()}, names_of_rows(of), chosen)
        assert_same_bits([value[row] for value in got.values()], [value[row] for value in alone.values()])


@pytest.mark.parametrize("chosen", cases.available("cpu"))
@pytest.mark.parametrize("of", STATISTICS)
def test_a_top_k_that_is_sorted(of: str, chosen: str) -> None:
    """Above 128 tokens the Triton implementation sorts the rows."""
    cases.check(of, cases.make(of, (4,), V=300) | {"k": 130}, chosen, temperature=temperatures(4))


def test_leading_dimensions_layout_and_dtype_do_not_matter(op: str, device: str, impl: str) -> None:
    arguments, t = cases.make(op, (2, 3), device=device), torch.tensor([[0.5], [2.0]], device=device).expand(2, 3)
    expected = forward_backward(op, arguments, impl=impl, temperature=t.contiguous())
    for same in (t, scattered(t, 1), t.bfloat16(), t.half(), t.double()):
        assert_same_bits(forward_backward(op, arguments, impl=impl, temperature=same), expected)
    flat = {n: v.flatten(0, 1) if n in cases.PER_ROW else v for n, v in arguments.items()}
    got = cases.call(op, flat, impl=impl, temperature=t.flatten())
    for a, b in zip(got, cases.call(op, arguments, impl=impl, temperature=t), strict=True):
        assert_same_bits([a], [b.flatten(0, 1) if b.dim() else b])


def test_no_rows_and_one_row(op: str, device: str, impl: str) -> None:
    none, one = (cases.make(op, lead, device=device) for lead in ((0,), ()))
    forward_backward(op, none, impl=impl, temperature=torch.ones(0, device=device))
    t = torch.tensor(0.5, device=device)
    expected = forward_backward(op, one, impl=impl, temperature=0.5)
    assert_as_by_a_number(impl, forward_backward(op, one, impl=impl, temperature=t), expected)


@pytest.mark.parametrize("bad", BAD)
def test_no_plausible_number_at_an_impossible_temperature(
    monkeypatch: pytest.MonkeyPatch, op: str, device: str, impl: str, bad: float
) -> None:
    """On a CPU an error; on a GPU, where values are not looked at, NaN in that row, and the bits of the others."""
    arguments, name, t = cases.make(op, device=device), names_of_rows(op), temperatures(6, device=device)
    clean = row_results(op, arguments | {"temperature": t}, name, impl)
    spoilt = t.clone()
    spoilt[0] = bad
    if device == "cpu":
        with pytest.raises(ValueError, match=r"^temperature: expected finite numbers above 0, got "):
            cases.call(op, arguments, impl=impl, temperature=spoilt)
    if impl == "cpu":
        return
    monkeypatch.setattr(checks, "temperature_range", lambda *_, **__: None)
    got = row_results(op, arguments | {"temperature": spoilt}, name, impl)
    for field, value in got.items():
        assert_same_bits([value[1:]], [clean[field][1:]])
        assert field == "topk_ids" or value[0].isnan().all(), field


@pytest.mark.parametrize("chosen", cases.available("cpu"))
@pytest.mark.parametrize("of", LOSSES)
def test_rows_without_a_weight_need_no_temperature(of: str, chosen: str) -> None:
    arguments, t = cases.make(of), temperatures(6)
    expected = forward_backward(of, arguments, impl=chosen, temperature=t)
    for bad in BAD:
        t[3] = bad  # whose weights are both zero
        assert_same_bits(forward_backward(of, arguments, impl=chosen, temperature=t.clone()), expected)


@pytest.mark.parametrize("own", [0.7, None], ids=["one of the student", "one a row of the student"])
@pytest.mark.parametrize("chosen", cases.available("cpu"))
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_the_teachers_temperatures(kind: str, chosen: str, own: float | None) -> None:
    """Of its own: against the oracle, and row by row the bits of a call at that row's temperature."""
    of = "linear_divergence"
    arguments, t = cases.with_lora(cases.make(of)) | {"kind": kind}, temperatures(6).flip(0)
    scaling = {"temperature": temperatures(6) if own is None else own, "softcap": 5.0}
    cases.check(of, arguments, chosen, teacher_temperature=t, teacher_softcap=9.0, **scaling)
    if own is None:
        return
    got = row_results(of, arguments | {"teacher_temperature": t} | scaling, "hidden", chosen)
    for row in range(0, 6, unless_interpreted(1, 3)):
        alone = row_results(of, arguments | {"teacher_temperature": t[row].item()} | scaling, "hidden", chosen)
        assert_same_bits([value[row] for value in got.values()], [value[row] for value in alone.values()])


def test_an_impossible_temperature_of_a_teacher() -> None:
    for bad in BAD:
        with pytest.raises(ValueError, match=r"^teacher_temperature: expected finite numbers above 0, got "):
            cases.call("linear_divergence", cases.make("linear_divergence"), teacher_temperature=torch.full((6,), bad))


@pytest.mark.parametrize("chosen", cases.available("cpu"))
def test_a_known_base_lse(chosen: str) -> None:
    of = "linear_gated_contrastive_loss"
    arguments, t = cases.make(of), temperatures(6)
    head = {n: arguments[n] for n in ("weight", "bias")}
    lse = rmx_kernels.linear_entropy_topk(arguments["base_hidden"], **head, temperature=t, impl=chosen).lse
    given = arguments | {"base_lse": lse}
    results = [cases.call(of, a, impl=chosen, temperature=t).loss for a in (given, arguments)]
    torch.testing.assert_close(*results)
    assert cases.call(of, given, impl=chosen, temperature=2 * t).loss.isnan()  # of another temperature


def test_a_temperature_that_was_changed_is_no_longer_that_of_the_graph() -> None:
    t = temperatures(6)
    fresh, _ = cases.leaves("entropy_topk", cases.make("entropy_topk"))
    result = cases.call("entropy_topk", fresh, temperature=t)
    t.fill_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.lse.sum().backward()


# ---- what is made of the operators ---------------------------------------------------------------------------------


def trained(op: str = "linear_entropy_topk") -> tuple[cases.Arguments, list[Tensor]]:
    """Of 2 x 3 rows in float64, with a LoRA pair."""
    return cases.leaves(op, cases.with_lora(cases.make(op, (2, 3), dtype=torch.float64)))


def of_full_logits(a: cases.Arguments, t: Tensor, x: str = "hidden") -> Tensor:
    return oracles.linear(a[x], a["weight"], a["bias"], lora=a["lora"]) / t[..., None]


def assert_same(value: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    got, right = ([x, *torch.autograd.grad(x, inputs)] for x in (value, expected))
    torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-11)


def test_kept_tokens() -> None:
    a, inputs = trained()
    t = temperatures(2, 3)
    kept = torch.arange(4).expand(2, 3, 4)
    head = {n: a[n] for n in ("hidden", "weight", "bias", "lora")}
    stats = linear_kept_logprobs(**head, kept=kept, target=kept[..., 1], temperature=t)
    expected = of_full_logits(a, t)[..., :4].log_softmax(-1)
    assert_same(stats.logprob.sum(), expected[..., 1].sum(), inputs)
    with pytest.raises(ValueError, match=r"^temperature: expected finite numbers above 0, got 0\.0"):
        linear_kept_logprobs(**head, kept=kept, temperature=t * 0)
    with pytest.raises(ValueError, match=r"^temperature: expected one temperature per row, shape \(2, 3\), got \(3,\)"):
        linear_kept_logprobs(**head, kept=kept, temperature=t[0])


@pytest.mark.parametrize("kl", ["k3", "full"])
def test_policy_loss(kl: str) -> None:
    """Rows that the mask leaves out need no temperature; the base is divided by that of the row as well."""
    a, inputs = trained("linear_logprob_kl")
    mask, t = torch.tensor([[1, 1, 0], [0, 1, 1]]), temperatures(2, 3)
    log_p, base = of_full_logits(a, t).log_softmax(-1), oracles.linear(a["base_hidden"], a["weight"], a["bias"])
    base = (base / t[..., None]).log_softmax(-1).detach()
    logprob, ref = (x.gather(-1, a["target"][..., None])[..., 0] for x in (log_p, base))
    advantage, d = torch.tensor([[1.5], [-0.5]], dtype=torch.float64), ref - logprob
    penalty = d.exp() - d - 1 if kl == "k3" else (base.exp() * (base - log_p)).sum(-1)
    terms = -(logprob - logprob.detach()).exp() * advantage + 0.3 * penalty
    spoilt = torch.where(mask > 0, t, 0.0)
    options = PolicyOptions(kl=kl, kl_coef=0.3, aggregation="token-mean")
    given = {n: a[n] for n in ("hidden", "weight", "target", "bias", "lora", "base_hidden")}
    result = linear_policy_loss(**given, advantage=advantage[:, 0], mask=mask, options=options, temperature=spoilt)
    assert_same(result.loss, (terms * mask).sum() / mask.sum(), inputs)
    with pytest.raises(ValueError, match=r"^temperature: expected one temperature per row, shape \(2, 3\), got \(2,\)"):
        linear_policy_loss(**given, advantage=advantage[:, 0], temperature=t[:, 0])


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "z_loss": 0.1}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("shift", [False, True])
def test_cross_entropy(shift: bool, options: dict[str, Any]) -> None:
    """Of rows that are ignored, and of the last where it predicts nothing, the temperature is not looked at."""
    a, inputs = trained()
    t, target, smoothing = temperatures(2, 3), a["target"].clone(), options.get("label_smoothing", 0.0)
    target[0, 1] = -100
    logits, ids = of_full_logits(a, t), target
    if shift:
        logits, ids = logits[:, :-1], target[:, 1:]
    live = ids != -100
    z = logits[live]
    terms = torch.nn.functional.cross_entropy(z, ids[live], reduction="none", label_smoothing=smoothing)
    terms = terms + options.get("z_loss", 0.0) * z.logsumexp(-1).square()
    spoilt = t.clone()
    spoilt[0, 0 if shift else 1] = torch.nan
    spoilt[:, 2 if shift else 3 :] = -1
    head = {"linear_weight": a["weight"], "linear_bias": a["bias"], "lora": a["lora"]}
    value = linear_cross_entropy(a["hidden"], **head, target=target, shift=shift, temperature=spoilt, **options)
    up = cases.randn(*live.shape, dtype=torch.float64) if value.dim() else None
    expected = terms.mean() if up is None else (terms * up[live]).sum()
    assert_same(value if up is None else (value * up).sum(), expected, inputs)
