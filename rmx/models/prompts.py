"""One renderer of prompts for every stage. Its fingerprint goes into every artefact, so that a mismatch is an error.

The styles and their sources are listed in docs/prompts.md. ``auto`` becomes one of them by the model's name, its
``model_type`` and whether its tokenizer has a chat template.
"""

import json
import re
from pathlib import Path
from typing import Any

import jinja2

from rmx.artefacts import fingerprint
from rmx.config import Config, PromptConfig
from rmx.errors import RmxError
from rmx.progress import console

STEPS = "Solve the following math problem step by step."
# Of the chat styles this is the user's turn, of the others the whole prompt.
TEXTS = {
    "chat": "{question}",
    "chat_boxed": STEPS + " Give a concise solution and put your final answer in \\boxed{}.\n\nProblem: {question}",
    "chat_plain": STEPS + "\n\n{question}\n\nGive a concise solution and final numeric answer.",
    "boxed": "{question}\nPlease reason step by step, and put your final answer within \\boxed{}.\n",
    "qa": "Question: {question}\nAnswer: Let's think step by step.",
    "qwen_boxed": STEPS + " Put your final answer in \\boxed{}.\n\nProblem: {question}\n\nSolution:",
    "qwen_plain": STEPS + "\n\n{question}\n\nSolution:",
    "qwen_math": "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>"
    "\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
    "llama_abel": "Question:\n{question}\nAnswer:\nLet's think step by step.\n",
    "olmo3_math": "{question}\n\nPresent the answer in LaTex format: \\boxed{Your answer}",
    "olmo3_rlzero_math": STEPS + " The last line of your response should be the answer to the problem in form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{question}\n\n"
    'Remember to put your answer on its own line after "Answer:"',
}
CHAT = ("chat", "chat_boxed", "chat_plain")
MARKS = {"qwen_math": ("<|im_start|>", "<|im_end|>")}  # special tokens that the text itself writes

# What a name says, the style of such a model with a chat template, and without one; the first that is found decides.
# The tokenizers of Qwen base models have a chat template too, so of Qwen only the name tells a base from a chat model.
NAMES = (
    (r"olmo-?3.*rl-?zero-?math", "olmo3_rlzero_math", "olmo3_rlzero_math"),
    (r"\b(open-?|o)?r1\b|\bqwq\b|think|reason(ing|er)|qwen-?3(?!.*base)", "chat_boxed", "boxed"),
    (r"instruct|chat|\bit\b|\bsft\b|\bdpo\b", "chat", "boxed"),
    (r"olmo-?3.*math", "olmo3_math", "olmo3_math"),
    (r"qwen-?2(\.5)?-math|qwen.*oat-zero", "qwen_math", "qwen_math"),
    (r"qwen|olmo", "qwen_boxed", "qwen_boxed"),
    (r"^(meta-)?llama-?\d[\d.]*-\d+b(-hf)?$|^mi[sx]tral-[\dx]+b-v[\d.]+$|mistral.*base", "llama_abel", "llama_abel"),
    (r"llama|mi[sx]tral", "chat", "llama_abel"),
)
MODEL_TYPES = (
    (r"qwen3", "chat_boxed", "qwen_boxed"),
    (r"qwen|olmo", "chat", "qwen_boxed"),
    (r"llama|mi[sx]tral", "chat", "llama_abel"),
    (r"", "chat", "boxed"),
)
PROBE = "What is 1 + 1?"


class PromptError(RmxError):
    """The prompt style does not fit the model."""


def auto_style(names: list[str], model_type: str, has_template: bool) -> str:
    """The style of a model (docs/prompts.md).

    Args:
        names: hub names or paths of the model, the best first; only the last part of each is used.
        model_type: of its transformers configuration, for names that match no family.
        has_template: whether its tokenizer has a chat template.
    """
    said = [(_last_part(name), NAMES) for name in names] + [(model_type, MODEL_TYPES)]
    rules = (rule for text, table in said for rule in table if re.search(rule[0], text))
    _, with_template, without = next(rules)  # the last row of MODEL_TYPES fits any
    return with_template if has_template else without


def _last_part(name: str) -> str:
    path = Path(name).expanduser().absolute()  # the name of "." is that of the directory
    last = path.name
    if path.parent.name == "snapshots":  # the hub's cache: models--Qwen--Qwen2.5-1.5B/snapshots/<commit>
        last = path.parent.parent.name.rpartition("--")[2]
    return last.lower().replace("_", "-")


class Renderer:
    """Questions in, token ids of prompts out.

    Args:
        tokenizer: of the model.
        config: the run's ``prompt``.
        name: hub name or path of the model, for ``auto``; default: the name of the tokenizer.
        model_type: of the model's transformers configuration, for ``auto``.

    Attributes:
        style: never ``auto``.
        fingerprint: changes with everything that changes prompts; equal for ``auto`` and for the style it became.

    Raises:
        PromptError: the style, or another setting of ``prompt``, does not fit the model.
    """

    def __init__(self, tokenizer: Any, config: PromptConfig, name: str = "", model_type: str = "") -> None:
        self.tokenizer, self.config = tokenizer, config
        has_template = bool(getattr(tokenizer, "chat_template", None))
        self.style: str = config.style
        if config.style == "auto":
            names = [given for given in (name, getattr(tokenizer, "name_or_path", "")) if given]
            self.style = auto_style(names, model_type, has_template)
        if self.style in CHAT and not has_template:
            raise PromptError(f"prompt.style={self.style}: this model has no chat template; use boxed, qa or auto")
        for setting in ("system", "template"):
            given = getattr(config, setting)
            if given not in (None, {}) and self.style not in CHAT:
                raise PromptError(
                    f"prompt.{setting}: not supported by style {self.style!r}, got {given!r}: expected a style with "
                    f"the model's chat template ({', '.join(CHAT)})"
                )
        for mark in MARKS.get(self.style, ()):
            if mark not in tokenizer.get_added_vocab():
                raise PromptError(f"prompt.style={self.style}: the tokenizer has no token {mark}; use another style")
        self.control = _control_tokens(tokenizer)
        probe = json.dumps([{**config.model_dump(), "style": self.style}, self(PROBE)], sort_keys=True)
        self.fingerprint = fingerprint(probe.encode())

    def __call__(self, question: str) -> list[int]:
        """Token ids of the prompt, special tokens of the template or tokenizer included exactly once.

        What the question writes like a control token is tokenised as the text that it is.

        Raises:
            PromptError: the tokenizer knows no other way to read it.
        """
        written = self.style in CHAT or self.style in MARKS  # by the text itself, BOS where there is one
        found = self.controls(question)
        if not found:
            return list(self.tokenizer(self.text(question), add_special_tokens=not written)["input_ids"])
        mark = next(char for char in map(chr, range(0xE000, 0xF8FF)) if char not in question)
        cut = re.compile("|".join(map(re.escape, found)))
        said = cut.findall(question)
        # One piece between two of them each, and each of them in two, which are no control token any more.
        between = self.text(cut.sub(mark, question)).split(mark)
        ids = self._ids(between[0])
        for token, piece in zip(said, between[1:], strict=True):
            ids += self._as_text(token) + self._ids(piece)
        if written:
            return ids
        bare, whole = self._ids("a"), list(self.tokenizer("a")["input_ids"])
        at = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return whole[:at] + ids + whole[at + len(bare) :]

    def controls(self, question: str) -> list[str]:
        """The control tokens in a question, the longest first."""
        return [token for token in self.control if token in question]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _as_text(self, token: str) -> list[int]:
        ids = self._ids(token[:1]) + self._ids(token[1:])
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        if any(i != unknown and i in self.control.values() for i in ids):
            raise PromptError(f"a question contains {token!r}, which the tokenizer reads as a control token; reword it")
        return ids

    def text(self, question: str) -> str:
        """The prompt as text, without the special tokens that the tokenizer adds by itself."""
        if self.style not in CHAT:
            return self._fill(question)
        try:
            text: str = self.tokenizer.apply_chat_template(
                self.turns(question), add_generation_prompt=True, tokenize=False, **self.config.template
            )
        except jinja2.TemplateError as fault:
            raise PromptError(f"prompt: the model's chat template rejects these messages: {fault}") from fault
        return text

    def turns(self, question: str) -> list[dict[str, str]]:
        """What a chat style puts into the model's chat template."""
        system = [{"role": "system", "content": self.config.system}] if self.config.system is not None else []
        return [*system, {"role": "user", "content": self._fill(question)}]

    def _fill(self, question: str) -> str:
        return TEXTS[self.style].replace("{question}", question + self.config.suffix)


def _control_tokens(tokenizer: Any) -> dict[str, int]:
    """Text and id of the special tokens, and of added ones that the chat template writes; the longest first."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    added = getattr(tokenizer, "added_tokens_decoder", {})
    found = {t.content: i for i, t in added.items() if t.content.strip() and (t.special or t.content in template)}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def renderer_for(tokenizer: Any, model_type: str, config: Config) -> Renderer:
    """The renderer of a run; it prints what ``prompt.style=auto`` became."""
    renderer = Renderer(tokenizer, config.prompt, config.located_model.name, model_type)
    if config.prompt.style == "auto":
        console.print(f"prompt.style=auto: {renderer.style}", markup=False, highlight=False)
    return renderer
