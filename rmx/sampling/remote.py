"""The engine that samples from an OpenAI-compatible server (vLLM, SGLang, llama.cpp, `transformers serve`).

The way to speak with the server is settled by the first request: by token ids, which are exact; else by text that the
tokenizer turns into the same ids; else by chat turns, to which the server applies its own template.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from rmx.artefacts import describe
from rmx.config import EvaluateConfig, Sampling
from rmx.models.model import CausalLM
from rmx.models.prompts import CHAT, Renderer
from rmx.progress import console
from rmx.sampling.calls import Calls, ServerError, check_address, without_key
from rmx.sampling.engines import Completion, EngineError, Finished, Unit, stream_key

REFUSED = (400, 404, 405, 415, 422, 501)  # statuses by which a server says that it does not speak this way
RETRIES_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # waited before each further try
TIMEOUT_S = 3600.0  # that a server has for an answer at most
ANSWER_S, TOKEN_S = 60.0, 0.5  # that a server has for an answer: so long, and for each of its max_tokens
ANSWER_BYTES, TOKEN_BYTES = 1 << 20, 256  # that an answer may have: so many, and for each token that it may hold

NAMES = "set server_model (and evaluate.tuned_model) to these names"


class CannotSay(EngineError):
    """This request cannot be put in this dialect."""


class Said(pydantic.BaseModel):
    """A part of an answer; fields that are not looked at may hold anything."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)


class Usage(Said):
    prompt_tokens: int | None = None


class Message(Said):
    content: str | None = None
    reasoning_content: Any = None
    reasoning: Any = None


class Choice(Said):
    index: int = 0
    finish_reason: Any = None
    token_ids: list[int] | None = None
    text: str | None = None
    message: Message | None = None


class Answer(Said):
    choices: Annotated[list[Choice], pydantic.Field(min_length=1)]
    usage: Usage | None = None


class Model(Said):
    id: str


class Models(Said):
    data: Annotated[list[Model], pydantic.Field(min_length=1)]


@dataclass(frozen=True)
class Dialect:
    """How requests are put."""

    prompt: Literal["ids", "text", "chat"]
    transformers: bool  # `transformers serve`, which takes the rest of its settings as a generation_config
    many: bool  # all samples of a problem in one request, as far as the server follows

    @property
    def endpoint(self) -> str:
        return "chat/completions" if self.prompt == "chat" else "completions"

    @property
    def cuts(self) -> bool:
        """Whether top_k can be said."""
        return self.transformers or self.prompt == "ids"


@dataclass
class Server:
    lm: CausalLM
    renderer: Renderer | None  # of the prompts; None: nothing is sampled
    sampling: Sampling
    seed: int
    dialect: Dialect | None = None
    told: set[str] = field(default_factory=set)
    calls: Calls = field(default_factory=Calls)

    def settle(self, unit: Unit) -> list[Choice]:
        """The choices for this unit, by the first dialect that the server takes; :meth:`ask` keeps to it."""
        refusals: dict[str, None] = {}
        # vLLM refuses n > 1 where sampling is greedy; others refuse it always
        for many in (True, False) if len(unit.samples) > 1 and self.sampling.temperature > 0 else (False,):
            transformers = False
            for prompt in ("ids", "text", "chat"):
                dialect = Dialect(prompt, transformers, many)
                if self.sampling.top_k is not None and not dialect.cuts:
                    refusals[f"top_k={self.sampling.top_k}: not possible with a prompt as {prompt}"] = None
                    continue
                try:
                    return self.ask(unit, dialect)
                except ServerError as fault:
                    if fault.status not in REFUSED:
                        raise
                    refusals[str(fault)] = None
                    transformers |= "Unexpected fields" in str(fault)  # it alone checks the names of fields so
                except CannotSay as fault:
                    refusals[str(fault)] = None
        named = self.named
        if (names := self.served()) is not None and named not in names:
            raise EngineError(f"{self.sampling.base_url}: no model {named!r} there, only {_listed(names)}: {NAMES}")
        raise EngineError("the server accepts no form of request: " + "; ".join(refusals))

    @property
    def named(self) -> str:
        """The model's name on the server."""
        return self.sampling.server_model or str(self.lm.model.name_or_path)

    def served(self) -> list[str] | None:
        """The names of the models that the server lists; None where it lists none."""
        url = f"{(self.sampling.base_url or '').rstrip('/')}/models"
        try:
            said = self.calls.ask(url, None, seconds=ANSWER_S, most_bytes=ANSWER_BYTES, waits=())
            return [model.id for model in Models.model_validate(said).data]
        except (ServerError, pydantic.ValidationError):
            return None

    def ask(self, unit: Unit, dialect: Dialect | None = None) -> list[Choice]:
        """The choices for a unit of one problem, samples ascending, from as many requests as the server needs.

        A request's seed is a function of (seed, problem_id, first of its samples).
        """
        dialect = dialect or self.dialect
        assert dialect is not None
        url = f"{(self.sampling.base_url or '').rstrip('/')}/{dialect.endpoint}"
        choices: list[Choice] = []
        while len(choices) < len(unit.samples):
            asked = len(unit.samples) - len(choices) if dialect.many else 1
            most = self.sampling.max_new_tokens
            said = self.calls.ask(
                url,
                self.body(unit, dialect, unit.samples[len(choices)], asked),
                seconds=min(TIMEOUT_S, ANSWER_S + TOKEN_S * most),
                most_bytes=ANSWER_BYTES + TOKEN_BYTES * most * asked,
                waits=RETRIES_S,
            )
            answer = _answer(url, said, asked)
            found = answer.choices
            prompt = answer.usage and answer.usage.prompt_tokens
            if prompt != len(unit.prompts[0]) and not (prompt is None and dialect.prompt == "ids"):
                raise ServerError(
                    url,
                    f"the server read a prompt of {prompt} tokens, rmx rendered {len(unit.prompts[0])}: its model, "
                    "tokenizer or chat template differs",
                )
            choices += sorted(found, key=lambda choice: choice.index)
            dialect = dialect if len(found) == asked else replace(dialect, many=False)
        self.dialect = dialect
        return choices

    def body(self, unit: Unit, dialect: Dialect, sample: int, n: int) -> dict[str, Any]:
        sampling = self.sampling
        body: dict[str, Any] = {
            "model": self.named,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": stream_key(self.seed, unit.problems[0].problem_id, sample) >> 97,  # of 31 bits, which all take
            "n": n,
        }
        if dialect.prompt == "ids":
            body["prompt"] = unit.prompts[0]
            # said even where they cut nothing: a server's defaults may come from the model's generation_config.json
            body |= {"top_k": sampling.top_k or -1, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True}
        elif dialect.prompt == "text":
            body["prompt"] = self.text(unit.prompts[0])
        else:
            body["messages"] = self.turns(unit.problems[0].question)
            if self.renderer and self.renderer.config.template:
                body["chat_template_kwargs"] = self.renderer.config.template
        if dialect.transformers:
            settings = {"do_sample": sampling.temperature > 0, "top_k": sampling.top_k or 0}
            body["generation_config"] = json.dumps({**settings, "eos_token_id": sorted(self.lm.eos_ids)})
        return body

    def text(self, prompt: list[int]) -> str:
        """What the tokenizer, with the special tokens that it adds by itself, turns into exactly ``prompt``."""
        for ids in (prompt, prompt[1:]):
            text: str = self.lm.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if list(self.lm.tokenizer(text)["input_ids"]) == prompt:
                return text
        raise CannotSay("a text prompt: no text gives the token ids of the rendered prompt")

    def turns(self, question: str) -> list[dict[str, str]]:
        assert self.renderer is not None
        if self.renderer.style not in CHAT:
            raise CannotSay(f"a chat: prompt.style={self.renderer.style} is not a chat style")
        if found := self.renderer.controls(question):
            raise CannotSay(f"a chat: the server would read {found[0]!r} in a question as a control token")
        return self.renderer.turns(question)

    def completion(self, choice: Choice) -> Completion:
        assert self.dialect is not None
        url, reason, most = self.sampling.base_url or "", choice.finish_reason, self.sampling.max_new_tokens
        if reason not in ("stop", "length"):
            raise ServerError(url, f"expected finish_reason stop or length, got {choice.model_dump_json()[:300]}")
        if self.dialect.prompt == "chat":
            self.say("the server applies its own chat template; its prompts have as many tokens as rmx's")
        ids = choice.token_ids
        if ids is None:
            self.say("the server returned no token ids: its text is tokenised again, which may give other ids")
            ids, most = self._read(url, choice), 2 * most  # text may fall into more tokens than were sampled
        ids, eos, V = list(ids), self.lm.tokenizer.eos_token_id, self.lm.weight.shape[0]
        if len(ids) > most:
            raise ServerError(
                url, f"a completion of {len(ids)} tokens, but max_tokens was {self.sampling.max_new_tokens}"
            )
        if wrong := [token for token in ids if not 0 <= token < V]:
            raise ServerError(url, f"token id {wrong[0]}, but the vocabulary has {V} tokens: another model")
        if reason == "stop" and not (ids and ids[-1] in self.lm.eos_ids) and self.lm.eos_ids:
            ids.append(eos if eos in self.lm.eos_ids else min(self.lm.eos_ids))
        return Completion(ids, None)

    def _read(self, url: str, choice: Choice) -> list[int]:
        """The token ids of the text of a choice, should it repeat the key without that."""
        assert self.dialect is not None
        text = choice.text
        if self.dialect.prompt == "chat":
            if choice.message is None:
                raise ServerError(url, f"expected a choice with a message, got {choice.model_dump_json()[:300]}")
            if choice.message.reasoning_content or choice.message.reasoning:
                raise ServerError(url, "the server removes the reasoning from the text: turn off its reasoning parser")
            text = choice.message.content or ""
        if text is None:
            raise ServerError(url, f"expected a choice with text or token_ids, got {choice.model_dump_json()[:300]}")
        return list(self.lm.tokenizer(without_key(text), add_special_tokens=False)["input_ids"])

    def say(self, note: str) -> None:
        """Once."""
        if note not in self.told:
            console.print(f"{self.sampling.base_url}: {note}", markup=False, highlight=False, soft_wrap=True)
            self.told.add(note)


def openai(lm: CausalLM, renderer: Renderer, units: Sequence[Unit], sampling: Sampling, seed: int) -> Finished:
    """One problem a unit, at most ``batch_size`` sequences under way.

    Seeds make a server's answers repeatable as far as it goes: `transformers serve` has one random stream for all
    requests, and needs ``batch_size: 1`` for it. Log-probs are not told: servers give them before the temperature.

    Raises:
        ServerError: no connection, or an error status, after some tries; or an answer that does not fit.
        EngineError: the server takes no request of this kind; top_k where it has no such setting.
    """
    check_address(sampling.base_url or "")
    server = Server(lm, renderer, sampling, seed)
    if not units:
        return
    yield units[0], _completions(server, server.settle(units[0]))
    assert server.dialect is not None
    together = sampling.samples if server.dialect.many else 1
    pool = ThreadPoolExecutor(max(1, sampling.batch // together))
    try:
        asked = {pool.submit(server.ask, unit): unit for unit in units[1:]}
        for future in as_completed(asked):
            yield asked[future], _completions(server, future.result())
    finally:
        server.calls.hang_up()  # an error or Ctrl-C waits for no answer
        pool.shutdown(cancel_futures=True)


def tuned_server(sampling: Sampling) -> Sampling:
    """The same, asked of the model that is the tuned one on the server."""
    if not isinstance(sampling, EvaluateConfig) or sampling.tuned_model is None:
        raise EngineError("engine=openai: the name of the adapter on the server is not known: set evaluate.tuned_model")
    return sampling.model_copy(update={"server_model": sampling.tuned_model})


def check_served(lm: CausalLM, sampling: Sampling, adapter: Path) -> None:
    """Whether a server has the base and the tuned model: one that looks at no name would give both sides the same.

    Args:
        adapter: where the tuned model's adapter lies, for the message.

    Raises:
        EngineError: it has not, or does not list what it has.
    """
    check_address(sampling.base_url or "")
    tuned = tuned_server(sampling).server_model
    server = Server(lm, None, sampling, 0)
    names, found, url = [server.named, str(tuned)], server.served(), sampling.base_url
    if found is None:
        raise EngineError(
            f"{url}: does not list its models (GET /models), so base and tuned may be the same model there: "
            "use a server that lists its models, such as vLLM, or another evaluate.engine"
        )
    if missing := [name for name in names if name not in found]:
        said = f"{url}: no model {missing[0]!r} there, only {_listed(found)}: {NAMES}"
        if missing[0] == names[-1]:
            said += f", or serve the adapter: vllm serve --enable-lora --lora-modules {names[-1]}={adapter}"
        raise EngineError(said)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(map(repr, names[:20])) + more


def _completions(server: Server, choices: list[Choice]) -> list[Completion]:
    return [server.completion(choice) for choice in choices]


def _answer(url: str, said: dict[str, Any], asked: int) -> Answer:
    """An answer of 1 to ``asked`` choices, or a ServerError."""
    found = said.get("choices")
    if not isinstance(found, list) or not 1 <= len(found) <= asked:
        raise ServerError(url, f"expected 1 to {asked} choices, got {json.dumps(said)[:300]}")
    try:
        return Answer.model_validate(said)
    except pydantic.ValidationError as fault:
        raise ServerError(url, f"the answer cannot be parsed: {describe(fault)[:300]}") from fault
