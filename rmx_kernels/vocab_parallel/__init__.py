"""Operators for a head that is sharded over the processes of a torch.distributed group by rows of the vocabulary."""

from rmx_kernels.vocab_parallel.api import vocab_parallel_entropy_topk, vocab_parallel_gated_contrastive_loss

__all__ = ["vocab_parallel_entropy_topk", "vocab_parallel_gated_contrastive_loss"]
