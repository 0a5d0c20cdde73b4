"""linear_gated_contrastive_loss, forward and backward with a frozen head; and its cross-entropy alone.

3 % of the rows are decision tokens, the rest are anchored. The floor is five bare products: both logits for the
normalisers, both again for the gradient, and the gradient itself; an implementation may need fewer.

``linear_cross_entropy`` is the same call with ce = 1 and kl = 0 in every row, next to other libraries. Its floor is two
products: logits and gradient.
"""

from typing import Any

import oracle
import providers
import pytest
import roofline
import shapes
import torch
from measure import Work, compare, prepare
from oracle import Outputs
from report import Report

OPERATOR = "linear_gated_contrastive_loss"
SHIFT = 0.05  # standard deviation of the student's hidden states from the base's


def build(case: shapes.Case) -> Work:
    ce_only = case.operator == providers.CE_ONLY
    rows = max(case.N, oracle.LEAST_ROWS)
    hidden = oracle.normal(rows, case.H, case.dtype, 1.0, seed=0)
    base = oracle.normal(rows, case.H, case.dtype, SHIFT, seed=3).add_(hidden)
    weight, target = oracle.head(case.V, case.H, case.dtype), oracle.targets(rows, case.V)
    gate = oracle.gated(rows) | ce_only
    ce, kl = gate.float(), (~gate).float()

    def compute(run: providers.Run, part: slice) -> Outputs:
        h = hidden[part].detach().requires_grad_()
        rest = (weight, target[part]) if ce_only else (base[part], weight, target[part], ce[part], kl[part])
        loss = run(h, *rest)
        (gradient,) = torch.autograd.grad(loss, h)
        return {"loss": loss.detach()[None], "gradient": gradient}

    exact = oracle.loss_oracle(
        *(hidden, base, target, ce, kl, oracle.checked_rows(rows, case.V, gate)),
        logits=lambda x: x @ weight.T,
        exact_logits=lambda x: oracle.exact_logits(x, weight),
        exact_back=lambda dz: oracle.exact_back(dz, weight),
    )
    forward = 1 if ce_only else 4
    return Work(case, compute, exact, roofline.gemm_floor(hidden[: case.N], weight, forward, backward=1))


@pytest.mark.parametrize(("case", "provider"), shapes.selection(OPERATOR), ids=str)
def bench_linear_gated_contrastive_loss(benchmark: Any, report: Report, case: shapes.Case, provider: str) -> None:
    compare(benchmark, report, prepare(build, case), provider)


@pytest.mark.parametrize(("case", "provider"), shapes.selection(providers.CE_ONLY), ids=str)
def bench_linear_cross_entropy(benchmark: Any, report: Report, case: shapes.Case, provider: str) -> None:
    compare(benchmark, report, prepare(build, case), provider)
