"""The engine that samples from an OpenAI-compatible server (vLLM, SGLang, llama.cpp, `transformers serve`).

The way to speak with the server is settled by the first request: by token ids, which are exact; else by text that the
tokenizer turns into the same ids; else by chat turns, to which the server applies its own template.
"""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rmx.config import Sampling
from rmx.engines import Completion, EngineError, Finished, Unit, stream_key
from rmx.model import CausalLM
from rmx.progress import console
from rmx.prompts import CHAT, Renderer

TIMEOUT_S = 3600.0  # a completion of many tokens is answered all at once
RETRIES_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # waited before each further try
REFUSED = (400, 404, 405, 415, 422, 501)  # statuses by which a server says that it does not speak this way
API_KEY = "RMX_API_KEY"  # environment variable: the bearer token, where the server wants one


class ServerError(EngineError):
    """The server cannot be reached, refuses, or answers what does not fit; the message names the URL."""

    def __init__(self, url: str, message: str, status: int | None = None) -> None:
        super().__init__(f"{url}: {f'status {status}: ' if status else ''}{message}")
        self.status = status


class CannotSay(EngineError):
    """This request cannot be put in this dialect."""


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
    renderer: Renderer
    sampling: Sampling
    seed: int
    dialect: Dialect | None = None
    told: set[str] = field(default_factory=set)

    def settle(self, unit: Unit) -> list[dict[str, Any]]:
        """The choices for this unit, by the first dialect that the server takes; :meth:`ask` keeps to it."""
        refusals: dict[str, None] = {}
        # vLLM refuses n > 1 where sampling is greedy; others refuse it always
        for many in (True, False) if len(unit.samples) > 1 and self.sampling.temperature > 0 else (False,):
            transformers = False
            for prompt in ("ids", "text", "chat"):
                dialect = Dialect(prompt, transformers, many)
                if self.sampling.top_k is not None and not dialect.cuts:
                    refusals[f"top_k={self.sampling.top_k}: cannot be said to this server, by {prompt}"] = None
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
        raise EngineError("the server takes no way of asking: " + "; ".join(refusals))

    def ask(self, unit: Unit, dialect: Dialect | None = None) -> list[dict[str, Any]]:
        """The choices for a unit of one problem, samples ascending, from as many requests as the server needs.

        A request's seed is a function of (seed, problem_id, first of its samples).
        """
        dialect = dialect or self.dialect
        assert dialect is not None
        url = f"{(self.sampling.base_url or '').rstrip('/')}/{dialect.endpoint}"
        choices: list[dict[str, Any]] = []
        while len(choices) < len(unit.samples):
            asked = len(unit.samples) - len(choices) if dialect.many else 1
            answer = post(url, self.body(unit, dialect, unit.samples[len(choices)], asked))
            found = answer.get("choices")
            if not isinstance(found, list) or not 1 <= len(found) <= asked:
                raise ServerError(url, f"expected 1 to {asked} choices, got {json.dumps(answer)[:300]}")
            prompt = (answer.get("usage") or {}).get("prompt_tokens")
            if prompt != len(unit.prompts[0]) and not (prompt is None and dialect.prompt == "ids"):
                raise ServerError(
                    url,
                    f"the server read a prompt of {prompt} tokens where rmx rendered {len(unit.prompts[0])}: another "
                    "model, tokenizer or chat template",
                )
            choices += sorted(found, key=lambda choice: choice.get("index", 0))
            dialect = dialect if len(found) == asked else replace(dialect, many=False)
        self.dialect = dialect
        return choices

    def body(self, unit: Unit, dialect: Dialect, sample: int, n: int) -> dict[str, Any]:
        sampling = self.sampling
        body: dict[str, Any] = {
            "model": sampling.server_model or self.lm.model.name_or_path,
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
            if self.renderer.config.template:
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
        if self.renderer.style not in CHAT:
            raise CannotSay(f"a chat: prompt.style={self.renderer.style} is no chat")
        if found := self.renderer.controls(question):
            raise CannotSay(f"a chat: the server would read {found[0]!r} in a question as a control token")
        return self.renderer.turns(question)

    def completion(self, choice: dict[str, Any]) -> Completion:
        assert self.dialect is not None
        url, reason = self.sampling.base_url or "", choice.get("finish_reason")
        if reason not in ("stop", "length"):
            raise ServerError(url, f"expected finish_reason stop or length, got {json.dumps(choice)[:300]}")
        if self.dialect.prompt == "chat":
            self.say("the server applies its own chat template; its prompts have as many tokens as rmx's")
        ids = choice.get("token_ids")
        if ids is None:
            self.say("the server tells no token ids: they are made from its text, and may differ from what was sampled")
            message = choice["message"] if self.dialect.prompt == "chat" else {"content": choice["text"]}
            if message.get("reasoning_content") or message.get("reasoning"):
                raise ServerError(url, "the server takes the reasoning out of the completion: turn its parser off")
            ids = self.lm.tokenizer(message["content"] or "", add_special_tokens=False)["input_ids"]
        ids, eos, V = list(ids), self.lm.tokenizer.eos_token_id, self.lm.weight.shape[0]
        if wrong := [token for token in ids if not 0 <= token < V]:
            raise ServerError(url, f"token id {wrong[0]} where the vocabulary has {V}: another model")
        if reason == "stop" and not (ids and ids[-1] in self.lm.eos_ids) and self.lm.eos_ids:
            ids.append(eos if eos in self.lm.eos_ids else min(self.lm.eos_ids))
        return Completion(ids, None)

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
    if not (sampling.base_url or "").startswith(("http://", "https://")):
        raise EngineError(f"base_url: expected http://... or https://..., got {sampling.base_url!r}")
    server = Server(lm, renderer, sampling, seed)
    if not units:
        return
    yield units[0], _completions(server, server.settle(units[0]))
    assert server.dialect is not None
    together = sampling.samples if server.dialect.many else 1
    pool = ThreadPoolExecutor(max(1, sampling.batch_size // together))
    try:
        asked = {pool.submit(server.ask, unit): unit for unit in units[1:]}
        for future in as_completed(asked):
            yield asked[future], _completions(server, future.result())
    finally:
        pool.shutdown(cancel_futures=True)


def _completions(server: Server, choices: list[dict[str, Any]]) -> list[Completion]:
    return [server.completion(choice) for choice in choices]


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The JSON object that the server answers; tried again where it is busy, down or cannot be reached."""
    headers = {"Content-Type": "application/json"}
    if API_KEY in os.environ:
        headers["Authorization"] = f"Bearer {os.environ[API_KEY]}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    waits = iter(RETRIES_S)
    while True:
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                return _object(url, response.read())
        except urllib.error.HTTPError as fault:
            error = ServerError(url, _message(fault.read()), fault.code)
            if fault.code != 429 and (fault.code < 500 or fault.code in REFUSED):
                raise error from fault
        except (OSError, http.client.HTTPException) as fault:  # URLError and timeouts are OSErrors
            error = ServerError(url, f"no answer: {getattr(fault, 'reason', None) or fault!r}")
        wait = next(waits, None)
        if wait is None:
            raise error
        time.sleep(wait)


def _object(url: str, answer: bytes) -> dict[str, Any]:
    try:
        value = json.loads(answer)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ServerError(url, f"expected a JSON object, got {answer[:300]!r}")
    return value


def _message(answer: bytes) -> str:
    """What an error answer says, in any of the usual shapes; cut to a few lines."""
    text = answer.decode(errors="replace").strip()
    try:
        value = json.loads(text)
    except ValueError:
        return text[:600]
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and key in value:
            value = value[key]
    return value if isinstance(value, str) else json.dumps(value)[:600]
