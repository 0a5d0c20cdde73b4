"""linear_entropy_topk: the same statistics from hidden states. The floor is one bare product with the head."""

from typing import Any

import oracle
import providers
import pytest
import roofline
import shapes
from measure import Work, compare, prepare
from oracle import Outputs
from report import Report
from torch import Tensor

OPERATOR = "linear_entropy_topk"
NAMES = ("entropy", "logprob", "topk_logprobs", "topk_ids")


def build(case: shapes.Case) -> Work:
    rows = max(case.N, oracle.LEAST_ROWS)
    hidden = oracle.normal(rows, case.H, case.dtype, 1.0, seed=0)
    weight, target = oracle.head(case.V, case.H, case.dtype), oracle.targets(rows, case.V)

    def compute(run: providers.Run, part: slice | Tensor) -> Outputs:
        return dict(zip(NAMES, run(hidden[part], weight, target[part], case.K), strict=True))

    checked = oracle.checked_rows(rows, case.V, oracle.gated(rows))
    eager = compute(providers.eager_linear_stats, checked)
    logits = oracle.exact_logits(hidden[checked], weight)
    exact = oracle.statistics_oracle(logits, target, case.K, checked, eager)
    return Work(case, compute, exact, roofline.gemm_floor(hidden[: case.N], weight, forward=1))


@pytest.mark.parametrize(("case", "provider"), shapes.selection(OPERATOR), ids=str)
def bench_linear_entropy_topk(benchmark: Any, report: Report, case: shapes.Case, provider: str) -> None:
    compare(benchmark, report, prepare(build, case), provider)
