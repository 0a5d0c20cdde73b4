"""Inputs, float64 oracles and error measures. Oracles see CHECKED rows at most, so that their time is bounded.

Errors are relative, in the 2-norm over the checked rows.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import providers
import torch
from providers import DEVICE
from torch import Tensor

Outputs = dict[str, Tensor]  # name -> [rows, ...]
CHECKED = 1 << 22  # logits that the oracle sees, but 16 rows at least
CHUNK = 1 << 24  # elements made or upcast at a time
LEAST_ROWS = 16  # error statistics of fewer are luck: cases of fewer rows are checked in several calls
UNIT_ROUNDOFF = 2.0**-24  # of the float32 in which every result is returned: no error below it counts
SPREAD = 3.0  # standard deviation of the logits: entropies of about log V - 4.5, between a confident and an idle model


def normal(rows: int, columns: int, dtype: torch.dtype, scale: float, seed: int) -> Tensor:
    """[rows, columns] of normal numbers, without a float32 copy of the whole."""
    g = torch.Generator(DEVICE).manual_seed(seed)
    out = torch.empty(rows, columns, dtype=dtype, device=DEVICE)
    for part in out.split(max(1, CHUNK // columns)):
        part.copy_(torch.randn(part.shape, generator=g, device=DEVICE) * scale)
    return out


@functools.lru_cache(maxsize=1)  # heads of up to 0.6 GB, used by case after case
def head(V: int, H: int, dtype: torch.dtype) -> Tensor:
    return normal(V, H, dtype, SPREAD / H**0.5, seed=1)


def targets(rows: int, V: int) -> Tensor:
    return torch.randint(0, V, (rows,), generator=torch.Generator().manual_seed(2)).to(DEVICE)


def gated(rows: int) -> Tensor:
    """3 % of the rows are decision tokens, and one row at least."""
    return torch.arange(rows, device=DEVICE) % 33 == 0


def checked_rows(rows: int, V: int, gate: Tensor) -> Tensor:
    """Ascending indices of rows spread over all, of both kinds where there are both."""
    count = max(LEAST_ROWS, CHECKED // V)
    chosen = []
    for kind in (gate.nonzero()[:, 0], (~gate).nonzero()[:, 0]):
        chosen.append(kind[torch.linspace(0, len(kind) - 1, min(len(kind), count // 2)).long().to(kind.device)])
    return torch.cat(chosen).sort().values if rows > count else torch.arange(rows, device=gate.device)


def exact_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in float64 [rows, V], upcasting the head in parts."""
    return torch.cat([x.double() @ part.double().T for part in weight.split(max(1, CHUNK // weight.shape[1]))], dim=1)


def exact_back(dz: Tensor, weight: Tensor) -> Tensor:
    """dz @ weight in float64 [rows, H]."""
    size = max(1, CHUNK // weight.shape[1])
    parts = zip(dz.split(size, dim=1), weight.split(size), strict=True)
    return torch.stack([d @ part.double() for d, part in parts]).sum(0)


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@dataclass
class Oracle:
    """``errors`` of outputs over all rows, and those of eager PyTorch in the same precision."""

    errors: Callable[[Outputs], dict[str, float]]
    eager: dict[str, float]

    def check(self, outputs: Outputs) -> dict[str, float]:
        """The errors.

        Raises:
            AssertionError: one of them is over twice that of eager.
        """
        errors = self.errors(outputs)
        for name, error in errors.items():
            eager = max(self.eager[name], UNIT_ROUNDOFF)
            if not error <= 2 * eager:
                raise AssertionError(f"{name}: relative error {error:.2e}, eager's is {eager:.2e}")
        return errors


def statistics_oracle(logits: Tensor, target: Tensor, K: int, checked: Tensor, eager: Outputs) -> Oracle:
    """``logits`` in float64 and ``eager``'s results are of the checked rows. Ids are judged by their log-probs."""
    log_p = torch.log_softmax(logits, dim=-1)
    entropy, logprob, top, _ = providers.eager_stats(logits, target[checked], K)

    def errors(outputs: Outputs) -> dict[str, float]:
        named = {"entropy": entropy, "logprob": logprob, "topk_logprobs": top}
        found = {name: relative(outputs[name], exact) for name, exact in named.items() if exact is not None}
        assert top is not None
        return found | {"topk_ids": relative(log_p.gather(1, outputs["topk_ids"]), top)}

    return Oracle(lambda outputs: errors({name: x[checked] for name, x in outputs.items()}), errors(eager))


def loss_oracle(
    x: Tensor,
    base: Tensor,
    target: Tensor,
    ce: Tensor,
    kl: Tensor,
    checked: Tensor,
    logits: Callable[[Tensor], Tensor] = lambda x: x,
    exact_logits: Callable[[Tensor], Tensor] = Tensor.double,
    exact_back: Callable[[Tensor], Tensor] = lambda dz: dz,
) -> Oracle:
    """Gradients of rows of either kind by themselves, for those of decision tokens are far larger; and the loss.

    Of a sum over rows, errors cancel by luck. So the loss is compared with eager's, and may be as far from it as eager
    can be from the truth plus twice that: three times the mean absolute error of eager's row terms, in every row.

    Args:
        x, base: of the student and the base, all rows: logits, or hidden states with the three functions that make
            logits in the same precision, logits in float64, and d x in float64 from d logits.
        checked: the rows that the oracle sees.
    """

    def terms(z: Tensor, z_base: Tensor, rows: Tensor | slice) -> tuple[tuple[Tensor, Tensor], Tensor]:
        decision, anchor = providers.eager_row_terms(z, z_base, target[rows])
        return (decision, anchor), (ce[rows] * decision + kl[rows] * anchor).sum()

    z = exact_logits(x[checked]).requires_grad_()
    exact_terms, loss = terms(z, exact_logits(base[checked]), checked)
    gradient = exact_back(torch.autograd.grad(loss, z)[0])
    low = x[checked].detach().requires_grad_()
    eager_terms, loss = terms(logits(low), logits(base[checked]), checked)
    (eager_gradient,) = torch.autograd.grad(loss, low)
    with torch.no_grad():
        parts = [slice(i, i + max(1, CHUNK // z.shape[1])) for i in range(0, len(x), max(1, CHUNK // z.shape[1]))]
        eager_loss = sum(float(terms(logits(x[part]), logits(base[part]), part)[1]) for part in parts)
        off = [float((low - exact).abs().mean()) for low, exact in zip(eager_terms, exact_terms, strict=True)]
    bound = off[0] * float(ce.abs().sum()) + off[1] * float(kl.abs().sum())
    kinds = {"gradient of decisions": ce[checked] != 0, "gradient of anchors": ce[checked] == 0}

    def gradient_errors(got: Tensor) -> dict[str, float]:
        return {name: relative(got[kind], gradient[kind]) for name, kind in kinds.items() if kind.any()}

    def errors(outputs: Outputs) -> dict[str, float]:
        loss = float(outputs["loss"].double().sum())
        return gradient_errors(outputs["gradient"][checked]) | {"loss": abs(loss - eager_loss) / abs(eager_loss)}

    return Oracle(errors, gradient_errors(eager_gradient) | {"loss": 1.5 * bound / abs(eager_loss)})
