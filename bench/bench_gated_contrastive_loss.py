"""gated_contrastive_loss, forward and backward: 3 % of the rows are decision tokens, the rest are anchored.

The floor is two reads of the logits forward (student and base), and two reads and one write backward.
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

OPERATOR = "gated_contrastive_loss"
SHIFT = 0.15  # standard deviation of the student's logits from the base's


def build(case: shapes.Case) -> Work:
    rows = max(case.N, oracle.LEAST_ROWS)
    logits = oracle.normal(rows, case.V, case.dtype, oracle.SPREAD, seed=0)
    base = oracle.normal(rows, case.V, case.dtype, SHIFT, seed=3).add_(logits)
    target, gate = oracle.targets(rows, case.V), oracle.gated(rows)
    ce, kl = gate.float(), (~gate).float()

    def compute(run: providers.Run, part: slice) -> Outputs:
        z = logits[part].detach().requires_grad_()
        loss = run(z, base[part], target[part], ce[part], kl[part])
        (gradient,) = torch.autograd.grad(loss, z)
        return {"loss": loss.detach()[None], "gradient": gradient}

    checked = oracle.checked_rows(rows, case.V, gate)
    exact = oracle.loss_oracle(logits, base, target, ce, kl, checked)
    moved = 5 * case.N * case.V * case.dtype.itemsize
    return Work(case, compute, exact, roofline.copy_floor(moved, "4 reads + 1 write"))


@pytest.mark.parametrize(("case", "provider"), shapes.selection(OPERATOR), ids=str)
def bench_gated_contrastive_loss(benchmark: Any, report: Report, case: shapes.Case, provider: str) -> None:
    compare(benchmark, report, prepare(build, case), provider)
