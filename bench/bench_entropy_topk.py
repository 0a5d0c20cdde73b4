"""entropy_topk: entropy, log-prob and top-8 of logits. The floor is one read of them."""

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

OPERATOR = "entropy_topk"
NAMES = ("entropy", "logprob", "topk_logprobs", "topk_ids")


def build(case: shapes.Case) -> Work:
    rows = max(case.N, oracle.LEAST_ROWS)
    logits = oracle.normal(rows, case.V, case.dtype, oracle.SPREAD, seed=0)
    target = oracle.targets(rows, case.V)

    def compute(run: providers.Run, part: slice | Tensor) -> Outputs:
        return dict(zip(NAMES, run(logits[part], target[part], case.K), strict=True))

    checked = oracle.checked_rows(rows, case.V, oracle.gated(rows))
    eager = compute(providers.eager_stats, checked)
    exact = oracle.statistics_oracle(logits[checked].double(), target, case.K, checked, eager)
    read = case.N * case.V * case.dtype.itemsize
    return Work(case, compute, exact, roofline.copy_floor(read, "1 read"))


@pytest.mark.parametrize(("case", "provider"), shapes.selection(OPERATOR), ids=str)
def bench_entropy_topk(benchmark: Any, report: Report, case: shapes.Case, provider: str) -> None:
    compare(benchmark, report, prepare(build, case), provider)
