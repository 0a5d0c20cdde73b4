"""One renderer of prompts for every stage. Its fingerprint goes into every artefact, so that a mismatch is an error.

Styles: ``chat`` (the model's own chat template), ``boxed`` (plain text that asks for \\boxed{}, Qwen2.5 base models),
``qa`` (question, answer, let's think step by step: Mistral and Llama base models).
"""

import json
from typing import Any

import jinja2

from rmx.artefacts import fingerprint
from rmx.config import PromptConfig
from rmx.errors import RmxError

PLAIN = {
    "boxed": "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}.\n",
    "qa": "Question: {question}\nAnswer: Let's think step by step.",
}
PROBE = "What is 1 + 1?"


class PromptError(RmxError):
    """The prompt style does not fit the model."""


class Renderer:
    def __init__(self, tokenizer: Any, config: PromptConfig) -> None:
        if config.style == "chat" and not getattr(tokenizer, "chat_template", None):
            raise PromptError("prompt.style=chat: this model has no chat template; use boxed or qa")
        if config.style != "chat" and config.system is not None:
            raise PromptError(f"prompt.system: the style {config.style!r} has no system turn")
        self.tokenizer, self.config = tokenizer, config
        probe = json.dumps([config.model_dump(), self(PROBE)], sort_keys=True)
        self.fingerprint = fingerprint(probe.encode())

    def __call__(self, question: str) -> list[int]:
        """Token ids of the prompt, special tokens of the template or tokenizer included exactly once."""
        question += self.config.suffix
        if self.config.style != "chat":
            return list(self.tokenizer(PLAIN[self.config.style].format(question=question))["input_ids"])
        turns = [{"role": "system", "content": self.config.system}] if self.config.system is not None else []
        turns.append({"role": "user", "content": question})
        # the template writes BOS itself, so the rendered string is tokenised without special tokens
        try:
            text = self.tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=False, **self.config.template
            )
        except jinja2.TemplateError as fault:
            raise PromptError(f"prompt: the model's chat template refuses these turns: {fault}") from fault
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
