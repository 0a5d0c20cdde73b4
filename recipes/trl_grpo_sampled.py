"""GRPO of TRL over the distribution that was sampled: what top-k, top-p or min-p left, renormalised.

GRPOTrainer samples with its ``top_k``, ``top_p`` and ``min_p``, and trains log-probs of the whole softmax: its ratios
are those of another policy. Here the tokens that were left are kept with the rollout, as the sampling mask of
DeepSeek-V3.2 (arXiv 2512.02556) is. All log-probs are over them: the policy's, the old policy's and the reference's.
"""

import torch
import trl_grpo
from trl import GRPOTrainer

from rmx_kernels import head_of, in_forward, kept_set, linear_entropy_topk, linear_kept_logprobs


class SampledGRPOTrainer(GRPOTrainer):
    """For text models; ``top_k`` must be set, and bounds the tokens that are kept for each position."""

    kept = None  # ids [B, T, top_k + 1] of the batch under way, -1 for none; None while it is sampled

    def _generate_and_score_completions(self, inputs):
        steps, every = self.args.gradient_accumulation_steps, self.args.steps_per_generation * self.num_iterations
        if self.beta and steps % every == 0:  # then TRL asks for the reference alone, and not for the sampler
            raise ValueError(
                "beta: expected 0 where each rollout is used for one step: set num_iterations to 2 or more"
            )
        self.kept = None
        output = super()._generate_and_score_completions(inputs)
        return output if self.kept is None else output | {"kept": self.kept}  # shuffled and split with the rest

    def _compute_loss(self, model, inputs):
        self.kept = inputs.get("kept")  # None where the rollouts are used for one step: then the sampler is this model
        return super()._compute_loss(model, inputs)

    def _sets(self, hidden, head, target):
        """The sampler's set of each token, and the token itself: rounding may have moved it over the set's edge."""
        stats = linear_entropy_topk(hidden, k=self.top_k, **head)
        sampled = kept_set(stats, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p or 0.0)
        known = (sampled == target[..., None]).any(-1, keepdim=True)
        return torch.cat([sampled, target[..., None].masked_fill(known, -1)], -1)

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **other
    ):
        if any(value is not None and value is not False for value in other.values()) or not self.top_k:
            raise ValueError("expected a text model and a top_k: use GRPOTrainer itself")
        target = input_ids[:, -logits_to_keep:]

        def scored(inner):
            head = head_of(inner)
            options = head.kwargs(self.temperature)
            with self.accelerator.autocast():
                hidden = head.hidden(input_ids, attention_mask)[:, -logits_to_keep - 1 : -1]
                if self.kept is None:
                    self.kept = self._sets(hidden.detach(), options, target)
                return tuple(linear_kept_logprobs(hidden, kept=self.kept, target=target, **options)[:2])

        logprobs, entropies = in_forward(model, scored)
        return logprobs, entropies if compute_entropy else None, None


def main(argv=None):
    sampling = {"top_k": 16, "top_p": 0.9, "temperature": 1.0, "num_iterations": 2}
    return trl_grpo.main(argv, __doc__, trainer=SampledGRPOTrainer, **sampling)


if __name__ == "__main__":
    main()
