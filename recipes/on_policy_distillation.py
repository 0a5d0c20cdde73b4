"""On-policy distillation (arXiv 2306.13649): the student samples, the teacher's whole distribution corrects each token.

The loss is the reverse KL, KL(student || teacher), of the sampled tokens, by ``linear_divergence``: no logits are
made. The teacher may be wider and deeper; student and teacher have one tokenizer.
"""

import torch
from distillation import arguments, distillation_loss

from rmx.models.model import pad
from rmx_kernels import in_forward


@torch.no_grad()
def completions(student, tokenizer, prompts, count, length, temperature):
    """Token ids of prompts with ``count`` sampled completions each, their mask, and which tokens were sampled."""
    rows, starts = [], []
    stops = {tokenizer.eos_token_id}
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt).input_ids], device=student.device)
        found = student.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=temperature,
            top_k=0,
            num_return_sequences=count,
            max_new_tokens=length,
            pad_token_id=tokenizer.eos_token_id,
        )
        for row in found.tolist():
            new = row[ids.shape[1] :]
            end = next((i + 1 for i, token in enumerate(new) if token in stops), len(new))  # the stop counts
            rows.append(row[: ids.shape[1] + end])
            starts.append(ids.shape[1])
    ids, mask = pad(rows, student.device)
    positions = torch.arange(ids.shape[1], device=ids.device)
    return ids, mask, mask * (positions >= torch.tensor(starts, device=ids.device)[:, None])


def main(argv=None):
    args, lm, student, trained = arguments(argv, __doc__, "reverse_kl")
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    prompts = [f"The sum of {i} and {i + 1} is" for i in range(4)]
    losses = []
    for step in range(args.steps):
        batch = completions(student, lm.tokenizer, prompts, count=2, length=16, temperature=1.0)
        loss = in_forward(student, lambda inner, b=batch: distillation_loss(inner, lm.model, *b, kind=args.kind))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step + 1}: {args.kind} {losses[-1]:.4f} nats a sampled token")
    return losses


if __name__ == "__main__":
    main()
