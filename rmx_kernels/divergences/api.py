"""linear_divergence: a student against a teacher with a head of its own, with no tensor of tokens x vocabulary."""

from torch import Tensor

from rmx_kernels import checks, choice
from rmx_kernels.divergences.op import ALPHA, FORWARD_KL, JSD, KINDS, REVERSE_KL, HeadPair, divergence
from rmx_kernels.logits import LoRA, linear
from rmx_kernels.results import DivergenceStats

ENDS = {JSD: (FORWARD_KL, REVERSE_KL), ALPHA: (REVERSE_KL, FORWARD_KL)}  # what they are at a beta of 0 and of 1


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    kind: str = FORWARD_KL,
    beta: float = 0.5,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    teacher_temperature: float | Tensor | None = None,
    teacher_softcap: float | None = None,
    impl: str | None = None,
) -> DivergenceStats:
    r"""The divergence of a student from a teacher over the whole vocabulary, row by row, for distillation.

    With p of the teacher and q of the student,

    .. math::
        \mathrm{forward\_kl} = \mathrm{KL}(p \,\|\, q) = \sum_v p \, (\log p - \log q), \qquad
        \mathrm{reverse\_kl} = \mathrm{KL}(q \,\|\, p)

        \mathrm{jsd} = \beta \, \mathrm{KL}(p \,\|\, m) + (1 - \beta) \, \mathrm{KL}(q \,\|\, m), \qquad
        m = \beta p + (1 - \beta) q

        \mathrm{alpha} = \frac{1 - \sum_v p^\beta q^{1 - \beta}}{\beta (1 - \beta)}

        z_{q,n} = \mathrm{cap}(h_n (W + \mathrm{scale} \, B A)^\top + b) / \mathrm{temperature}_n, \qquad
        z_{p,n} = \mathrm{cap}_t(h_{t,n} W_t^\top + b_t) / \mathrm{temperature}_{t,n}

    Weights of rows and means are the caller's. Values are sums of terms that are never negative: exactly 0 for equal
    logits, and accurate where they are nearly so. The limits of the formulas hold for logits of -inf: a token that
    neither distribution has adds nothing, forward_kl is +inf where the student lacks a token of the teacher,
    reverse_kl where the teacher lacks one of the student (and has no gradient there: NaN), and jsd and alpha stay
    finite. The Renyi divergence of order beta is -log(1 - beta (1 - beta) alpha) / (1 - beta).

    Args:
        hidden: the student's final hidden states [..., H], bfloat16, float16, float32 or float64. Differentiable.
        weight, bias: its output head [V, H], and [V] or None. Differentiable.
        teacher_hidden: the teacher's [..., H2], of the same leading shape and device; a constant, so it may not
            require a gradient.
        teacher_weight, teacher_bias: its head [V, H2], and [V] or None, of the same vocabulary; constants. Dtypes may
            differ, and autocast acts, as in :func:`linear_entropy_topk`, for each of the two models by itself.
        kind: "forward_kl", "reverse_kl", "jsd" or "alpha".
        beta: of jsd, in [0, 1], the teacher's share of m. As in TRL's ``GKDTrainer``, 0 is forward_kl and 1 is
            reverse_kl, the limits of jsd / beta and of jsd / (1 - beta). (The formula itself is 0 there.) Of alpha the
            order, in [0, 1]: its limits are reverse_kl at 0 and forward_kl at 1. Values lose digits near both ends: the
            relative error grows as 1 / (beta (1 - beta)).
        lora: (A [r, H], B [V, r], scale) of the student, as in :func:`linear_logprob_kl`. Differentiable.
        temperature, softcap: of the student, as in :func:`entropy_topk`, one of each row too.
        teacher_temperature, teacher_softcap: of the teacher, alike; None for the student's temperature, and for no
            softcap.
        impl: None (best available), "reference", "cpu" or "triton".

    Returns:
        :class:`DivergenceStats` of float32 (float64 for float64 inputs), in nats. The gradient of hidden is made with
        the value: 3 products with frozen heads. A gradient of the entropy or of the head makes the logits again. Rows
        with a NaN or +inf are NaN. Scratch memory does not grow with N x V.

    Raises:
        TypeError, ValueError: a wrong argument, by name. BackendUnavailable: ``impl`` cannot run here.

    Source: generalised JSD of GKD (arXiv 2306.13649, section 2), whose convention of beta TRL 1.16 has too; alpha
    divergence: T. Minka, Divergence measures and message passing (MSR-TR-2005-173), section 3.

    >>> import torch
    >>> h, weight = torch.zeros(1, 3), torch.ones(4, 3)
    >>> linear_divergence(h, weight, torch.zeros(1, 5), torch.ones(4, 5), kind="jsd")
    DivergenceStats(divergence=tensor([0.]), entropy=tensor([1.3863]))
    """
    checks.operand(hidden, weight, bias, lora, temperature, softcap)
    _check_teacher(teacher_hidden, teacher_weight, teacher_bias, hidden, weight)
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    checks.scaling(teacher_temperature, teacher_softcap, hidden, "teacher_")
    _check_kind(kind, beta)
    if kind in ENDS and beta in (0, 1):
        kind = ENDS[kind][int(beta)]
    chosen = choice.chosen("linear_divergence", impl, hidden)
    student = linear(hidden, weight, bias, lora, temperature, softcap)
    constants = (
        teacher_hidden.detach(),
        teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
    )
    teacher = linear(*constants, None, teacher_temperature, teacher_softcap)
    return divergence(HeadPair(student, teacher, kind, float(beta)), chosen)


def _check_teacher(hidden: object, weight: object, bias: object, student: Tensor, student_weight: Tensor) -> None:
    """Rows and head of a teacher, of the student's leading shape, vocabulary and device."""
    checks.floating("teacher_hidden", hidden, 1)
    assert isinstance(hidden, Tensor)
    if hidden.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"teacher_hidden: expected the leading shape of hidden, {tuple(student.shape[:-1])}, got "
            f"{tuple(hidden.shape[:-1])}"
        )
    checks.mixable("teacher_hidden", hidden, "hidden", student)
    checks.same_device("teacher_hidden", hidden, "hidden", student)
    checks.head(hidden, weight, bias, "teacher_")
    assert isinstance(weight, Tensor)
    if weight.shape[0] != student_weight.shape[0]:
        raise ValueError(
            f"teacher_weight: expected the vocabulary of weight, {student_weight.shape[0]} tokens, got "
            f"{weight.shape[0]}"
        )
    for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if isinstance(value, Tensor):
            checks.frozen(f"teacher_{name}", value, "the teacher is a constant")


def _check_kind(kind: object, beta: object) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if isinstance(beta, bool) or not isinstance(beta, int | float):
        raise TypeError(f"beta: expected a number, got {type(beta).__name__}")
    if not 0 <= beta <= 1:  # refuses NaN too
        raise ValueError(f"beta: expected a number in [0, 1], got {beta}")
