"""Fused operators over the vocabulary: entropy, top-k, log-probs, and the gated contrastive loss.

Every operator takes ``impl=None`` (best available), ``"reference"``, ``"cpu"`` or ``"triton"``;
:func:`backends` says which of them run here and why the others do not.
"""

from rmx_kernels.causal_lm import CausalLMHead, head_of, token_logprobs
from rmx_kernels.dispatch import Backend, BackendUnavailable, backends
from rmx_kernels.divergences.api import linear_divergence
from rmx_kernels.head.configs import set_logits_dtype, set_scratch_bytes
from rmx_kernels.losses.api import gated_contrastive_loss, linear_gated_contrastive_loss, linear_logprob_kl
from rmx_kernels.losses.cross_entropy import LinearCrossEntropyLoss, linear_cross_entropy
from rmx_kernels.losses.policy import PolicyOptions, linear_policy_loss
from rmx_kernels.results import (
    ContrastiveLoss,
    CrossEntropy,
    DivergenceStats,
    KeptStats,
    LogprobKL,
    PolicyLoss,
    VocabStats,
)
from rmx_kernels.statistics.api import entropy_topk, linear_entropy_topk
from rmx_kernels.statistics.kept import kept_set, linear_kept_logprobs
from rmx_kernels.version import __version__
from rmx_kernels.wrappers import gathered, in_forward

__all__ = [
    "Backend",
    "BackendUnavailable",
    "CausalLMHead",
    "ContrastiveLoss",
    "CrossEntropy",
    "DivergenceStats",
    "KeptStats",
    "LinearCrossEntropyLoss",
    "LogprobKL",
    "PolicyLoss",
    "PolicyOptions",
    "VocabStats",
    "__version__",
    "backends",
    "entropy_topk",
    "gated_contrastive_loss",
    "gathered",
    "head_of",
    "in_forward",
    "kept_set",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_entropy_topk",
    "linear_gated_contrastive_loss",
    "linear_kept_logprobs",
    "linear_logprob_kl",
    "linear_policy_loss",
    "set_logits_dtype",
    "set_scratch_bytes",
    "token_logprobs",
]
