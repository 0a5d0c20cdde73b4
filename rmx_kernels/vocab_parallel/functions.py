"""The autograd functions of the vocabulary-parallel operators: this rank's kernels, and what ranks tell each other."""

from typing import Any

import torch
from torch import Tensor

from rmx_kernels.logits import TENSORS, Gradients, Logits
from rmx_kernels.once import differentiable_once
from rmx_kernels.vocab_parallel import merge
from rmx_kernels.vocab_parallel.agreement import MAX_VOCAB
from rmx_kernels.vocab_parallel.shard import NEG_INF, Shard

OPERANDS = slice(1, 1 + len(TENSORS))  # of the arguments of a function, after the shard


def _over_ranks(gradients: Gradients, shard: Shard) -> Gradients:
    """The gradients of hidden and lora_hidden summed over ranks; the others belong to this rank's rows."""
    found = list(gradients)
    if not shard.reduce_hidden_grad:
        return found
    parts = {i: part for i, part in enumerate(found) if i in (0, 3) and part is not None}
    if parts:
        for i, total in zip(parts, merge.summed(list(parts.values()), shard.group), strict=True):
            found[i] = total
    return found


class Replicated(torch.autograd.Function):
    """A tensor that every rank has, and of whose gradient each has a part: they are summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @differentiable_once("vocab_parallel")
    def backward(ctx: Any, _: Any, gradient: Tensor) -> Any:
        return merge.summed([gradient], ctx.group)[0], None


class Statistics(torch.autograd.Function):
    """(lse, entropy, logprob, topk_logprobs, topk_ids) of N rows over the whole vocabulary."""

    @staticmethod
    def forward(ctx: Any, shard: Shard, *inputs: Any) -> tuple[Tensor, ...]:
        *operands, target, k = inputs
        z = Logits(*operands)
        local, own = (None, None) if target is None else shard.local(target, z.V)
        _, entropy, logprob, values, ids, m, log_d = shard.statistics(z, local, min(k, z.V))
        logprob = torch.full_like(m, NEG_INF) if own is None else torch.where(own, logprob, NEG_INF)
        empty = shard.massless(z)
        if empty is not None:  # no sync: whether it is so stays on the device
            m, logprob, values = (torch.where(empty, NEG_INF, x) for x in (m, logprob, values))
            log_d, entropy = (torch.where(empty, 0, x) for x in (log_d, entropy))
            ids = torch.where(empty, torch.arange(ids.shape[1], device=ids.device), ids)
        values = torch.nn.functional.pad(values, (0, k - values.shape[1]), value=NEG_INF)
        ids = torch.nn.functional.pad(ids + shard.start, (0, k - ids.shape[1]), value=MAX_VOCAB)
        rows = torch.stack([m, log_d, entropy, logprob], -1)
        parts = merge.gather(torch.cat([rows, values, merge.packed_ids(ids, m.dtype)], -1), shard.group)
        whole = merge.shares(parts[..., 0], parts[..., 1])
        entropy = merge.entropy(whole, parts[..., 2]).to(m.dtype)
        found = merge.logprob(whole, parts[..., 3])
        values, ids = merge.top_k(whole, parts[..., 4 : 4 + k], merge.unpacked_ids(parts[..., 4 + k :]), k, MAX_VOCAB)
        ctx.shard, ctx.scaling = shard, (z.temperature, z.softcap)
        norms = whole.m.to(m.dtype), whole.log_d.to(m.dtype), entropy
        ctx.save_for_backward(*z.tensors, z.row_temperature, target, ids, *norms)
        ctx.mark_non_differentiable(ids)
        ctx.set_materialize_grads(False)
        return whole.lse.to(m.dtype), entropy, found.to(m.dtype), values.to(m.dtype), ids

    @staticmethod
    @differentiable_once("vocab_parallel_entropy_topk")
    def backward(ctx: Any, saved: Any, *upstream: Tensor | None) -> Any:
        *tensors, row_temperature = saved[: len(TENSORS) + 1]
        of_rows, needs = saved[len(TENSORS) + 1 :], ctx.needs_input_grad[OPERANDS]
        g_lse, g_entropy, g_logprob, g_topk, _ = upstream
        given = g_lse, g_entropy, None if of_rows[0] is None else g_logprob, g_topk
        z = Logits(*tensors, *ctx.scaling)._replace(row_temperature=row_temperature)
        found = ctx.shard.statistics_gradient(z, of_rows, given, needs)
        return None, *_over_ranks(found, ctx.shard), *[None] * 5


class Divergence(torch.autograd.Function):
    """(logprob, KL(base || student)) of N rows over the whole vocabulary, of which the KL is differentiable."""

    @staticmethod
    def forward(ctx: Any, shard: Shard, *inputs: Any) -> tuple[Tensor, Tensor]:
        *operands, base_hidden, target = inputs
        z = Logits(*operands)
        local, own = shard.local(target, z.V)
        logprob, kl, norms = shard.divergence(z, base_hidden, local)
        rows = torch.stack([torch.where(own, logprob, NEG_INF), kl, *norms])
        empty = shard.massless(z)
        if empty is not None:
            without = rows.new_tensor([NEG_INF, 0, NEG_INF, 0, NEG_INF, 0])
            rows = torch.where(empty, without[:, None], rows)
        parts = merge.gather(rows, shard.group).movedim(1, 0)
        whole, base = merge.shares(*parts[2:4]), merge.shares(*parts[4:6])
        ctx.shard, ctx.scaling = shard, (z.temperature, z.softcap)
        norms = torch.stack([whole.m, whole.log_d, base.m, base.log_d]).to(kl.dtype)
        ctx.save_for_backward(*z.tensors, z.row_temperature, base_hidden, norms)
        logprob = merge.logprob(whole, parts[0]).to(kl.dtype)
        ctx.mark_non_differentiable(logprob)
        return logprob, merge.divergence(whole, base, parts[1]).to(kl.dtype)

    @staticmethod
    @differentiable_once("vocab_parallel_gated_contrastive_loss")
    def backward(ctx: Any, saved: Any, _: Tensor, g_kl: Tensor) -> Any:
        *tensors, row_temperature, base_hidden, norms = saved
        z = Logits(*tensors, *ctx.scaling)._replace(row_temperature=row_temperature)
        needs = ctx.needs_input_grad[OPERANDS]
        found = ctx.shard.divergence_gradient(z, base_hidden, norms, g_kl.contiguous(), needs)
        return None, *_over_ranks(found, ctx.shard), *[None] * 5
