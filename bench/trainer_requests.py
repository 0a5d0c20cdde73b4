"""What trainers ask for, ours against eager PyTorch: `python bench/trainer_requests.py [--rows 256] [--only KL]`.

    cross-entropy       linear_cross_entropy                          cross_entropy(linear(hidden, W))
    the same, smoothed  ... label_smoothing=0.1, z_loss=1e-4          the same
    policy loss         linear_policy_loss, clip and k3               log_softmax, gather, the entropy, the same formula
    64 given ids        linear_entropy_topk, target [N, 64]           log_softmax, gather
    kept set of 64      linear_kept_logprobs                          logits of all tokens, masked, log_softmax
    temperature a row   linear_entropy_topk, temperature [N]          logits / temperature[:, None], log_softmax, gather
    divergences         linear_divergence, a teacher 896 wide         F.kl_div of log_softmaxes; for the JSD as TRL

Forward and backward to the hidden states, float32, a frozen head of 49152 x 576, on the CPU with torch's threads. Times
are medians of rounds in which the two take turns; the values of both are compared first. The memory is the peak of
resident memory above what was held before, in a process of its own, results and gradients included.
"""

import argparse
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from measure import extra_peak_bytes
from torch import Tensor

from rmx_kernels import (
    PolicyOptions,
    linear_cross_entropy,
    linear_divergence,
    linear_entropy_topk,
    linear_kept_logprobs,
    linear_policy_loss,
)

V, H, K, SEQUENCES = 49152, 576, 64, 8
TEACHER_H, BETA = 896, 0.5
Way = Callable[[], Tensor]


def ways(rows: int) -> tuple[Tensor, dict[str, tuple[Way, Way]]]:
    """(the hidden states, (ours, eager) of each request)."""
    torch.manual_seed(0)
    hidden = torch.randn(SEQUENCES, rows // SEQUENCES, H).requires_grad_()
    weight = torch.randn(V, H) * (3 / H**0.5)
    target = torch.randint(V, hidden.shape[:-1])
    ids = torch.randint(V, (*hidden.shape[:-1], 4 * K)).sort(-1).values
    ids = torch.stack([row.unique()[:K] for row in ids.flatten(0, 1)]).view(*hidden.shape[:-1], K)
    target = torch.where(torch.rand(target.shape) < 0.5, target, ids[..., 0])
    old = linear_entropy_topk(hidden.detach(), weight, target).logprob
    assert old is not None
    old = old + 0.1 * torch.randn_like(old)
    advantage = torch.randn(SEQUENCES)
    temperature = torch.linspace(0.6, 1.4, SEQUENCES)[:, None].expand(target.shape)

    def log_p() -> Tensor:
        return F.linear(hidden, weight).log_softmax(-1)

    def cross_entropy(**options: Any) -> Tensor:
        logits = F.linear(hidden, weight).flatten(0, 1)
        loss = F.cross_entropy(logits, target.flatten(), **options)
        return loss + 1e-4 * logits.logsumexp(-1).square().mean() if options else loss

    def policy() -> Tensor:
        every = log_p()
        with torch.no_grad():
            _ = -(every.exp() * every).sum(-1)  # the entropy, which trainers log
        logprob = every.gather(-1, target[..., None])[..., 0]
        ratio, d = (logprob - old).exp(), old - logprob
        A = advantage[:, None]
        terms = -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A) + 0.1 * (d.exp() - d - 1)
        return terms.mean(-1).mean()

    def kept() -> Tensor:
        logits = F.linear(hidden, weight)
        outside = torch.ones(logits.shape, dtype=torch.bool).scatter(-1, ids, False)
        return logits.masked_fill(outside, -torch.inf).log_softmax(-1).gather(-1, ids).mean()

    def at_temperatures() -> Tensor:
        logits = F.linear(hidden, weight) / temperature[..., None]
        return logits.log_softmax(-1).gather(-1, target[..., None]).mean()

    teacher = torch.randn(*hidden.shape[:-1], TEACHER_H), torch.randn(V, TEACHER_H) * (3 / TEACHER_H**0.5)

    def distilled(kind: str) -> tuple[Way, Way]:
        def eager() -> Tensor:
            own = log_p()
            with torch.no_grad():
                theirs = F.linear(*teacher).log_softmax(-1)
            if kind == "forward_kl":
                return F.kl_div(own, theirs, reduction="none", log_target=True).sum(-1).mean()
            if kind == "reverse_kl":
                return F.kl_div(theirs, own, reduction="none", log_target=True).sum(-1).mean()
            if kind == "alpha":
                power = (BETA * theirs + (1 - BETA) * own).exp().sum(-1)
                return ((1 - power) / (BETA * (1 - BETA))).mean()
            mixture = torch.logsumexp(torch.stack([own + math.log(1 - BETA), theirs + math.log(BETA)]), 0)
            parts = [F.kl_div(mixture, x, reduction="none", log_target=True) for x in (theirs, own)]
            return (BETA * parts[0] + (1 - BETA) * parts[1]).sum(-1).mean()

        return lambda: linear_divergence(hidden, weight, *teacher, kind=kind, beta=BETA).divergence.mean(), eager

    found: dict[str, tuple[Way, Way]] = {
        "cross-entropy": (lambda: linear_cross_entropy(hidden, weight, target), cross_entropy),
        "the same, smoothed": (
            lambda: linear_cross_entropy(hidden, weight, target, label_smoothing=0.1, z_loss=1e-4),
            lambda: cross_entropy(label_smoothing=0.1),
        ),
        "policy loss": (
            lambda: (
                linear_policy_loss(
                    hidden, weight, target, advantage, old, ref_logprob=old, options=PolicyOptions(kl_coef=0.1)
                ).loss
            ),
            policy,
        ),
        f"{K} given ids": (
            lambda: linear_entropy_topk(hidden, weight, ids).logprob.mean(),  # type: ignore[union-attr]
            lambda: log_p().gather(-1, ids).mean(),
        ),
        "temperature a row": (
            lambda: linear_entropy_topk(hidden, weight, target, temperature=temperature).logprob.mean(),  # type: ignore[union-attr]
            at_temperatures,
        ),
        f"kept set of {K}": (lambda: linear_kept_logprobs(hidden, weight, ids).logprobs.mean(), kept),
        "forward KL": distilled("forward_kl"),
        "reverse KL": distilled("reverse_kl"),
        "JSD": distilled("jsd"),
        "alpha": distilled("alpha"),
    }
    return hidden, found


def step(way: Way, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The value and the gradient of the hidden states."""
    value = way()
    (gradient,) = torch.autograd.grad(value, [hidden])
    return value.detach(), gradient


def peak(name: str, which: int, rows: int, queue: Any) -> None:
    hidden, found = ways(rows)
    queue.put(extra_peak_bytes(lambda: step(found[name][which], hidden)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="the requests whose name has this in it")
    options = parser.parse_args()
    hidden, found = ways(options.rows)
    found = {name: pair for name, pair in found.items() if options.only in name}
    context = multiprocessing.get_context("spawn")
    print(f"{options.rows} rows, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':20}{'ours':>10}{'eager':>10}{'ratio':>8}{'ours':>12}{'eager':>12}{'ratio':>8}")
    for name, pair in found.items():
        ours, theirs = (step(way, hidden) for way in pair)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-5 * float(b.abs().max()))
        times: list[list[float]] = [[], []]
        for _ in range(options.rounds):
            for way, taken in zip(pair, times, strict=True):
                start = time.perf_counter()
                step(way, hidden)
                taken.append(time.perf_counter() - start)
        seconds = [statistics.median(taken) for taken in times]
        peaks = []
        for which in range(2):
            queue = context.Queue()
            process = context.Process(target=peak, args=(name, which, options.rows, queue))
            process.start()
            peaks.append((queue.get() or 0) / 2**20)
            process.join()
        print(
            f"{name:20}{seconds[0] * 1e3:7.0f} ms{seconds[1] * 1e3:7.0f} ms{seconds[1] / seconds[0]:7.1f}x"
            f"{peaks[0]:8.0f} MiB{peaks[1]:8.0f} MiB{peaks[1] / max(peaks[0], 1):7.1f}x",
            flush=True,
        )


if __name__ == "__main__":
    main()
