"""Rollouts from an OpenAI-compatible server: a stub, and transformers serve."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stub_server import Stub, by_chat, by_ids, by_text
from test_engines import PROBLEMS, sampled
from transformers.utils.import_utils import is_serve_available

from rmx.config import PromptConfig
from rmx.models.model import CausalLM
from rmx.records import Rollout
from rmx.sampling import remote
from rmx.sampling.engines import EngineError
from rmx.sampling.remote import ServerError


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Stub]]:
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setattr(remote, "RETRIES_S", (0.01, 0.02))
    servers = []

    def start(answer: Callable[[str, dict[str, Any]], Any]) -> Stub:
        servers.append(Stub(answer))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_server_is_asked_by_token_ids_where_it_can(
    tiny: CausalLM, stub: Callable[..., Stub], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RMX_API_KEY", "open sesame")
    server = stub(by_ids)
    units: list[list[Rollout]] = []
    settings = {"base_url": server.url, "server_model": "tuned", "top_k": 7, "on_unit": units.append}
    rollouts = sampled(tiny, "openai", **settings)
    assert [(r.problem_id, r.sample) for r in rollouts] == [(p.problem_id, n) for p in PROBLEMS for n in range(4)]
    assert sorted(len(unit) for unit in units) == [4] * 5
    assert len(server.bodies) == 5
    by_prompt = {tuple(body["prompt"]): body for body in server.bodies}
    assert len({body["seed"] for body in server.bodies}) == 5
    for r in rollouts:
        body = by_prompt[tuple(r.prompt_ids)]
        asked = {"model": "tuned", "n": 4, "temperature": 1.3, "top_p": 0.95, "top_k": 7, "max_tokens": 12}
        assert asked.items() <= body.items()
        first = 5 + (body["seed"] + r.sample) % 10
        assert (r.completion_ids, r.finish_reason) == (([first, 7], "length") if r.sample % 2 else ([first, 2], "stop"))
        assert r.text == tiny.tokenizer.decode(r.completion_ids, skip_special_tokens=True)
        assert r.logprobs is None
    assert server.headers == ["Bearer open sesame"] * 5
    assert capsys.readouterr().err == ""  # the ids are the server's own
    assert sampled(tiny, "openai", **settings) == rollouts  # the same seeds
    assert sampled(tiny, "openai", known=tuple(rollouts[:9]), **settings) == rollouts
    assert len(server.bodies) == 5 + 5 + 3


def test_greedy_samples_are_asked_one_by_one(tiny: CausalLM, stub: Callable[..., Stub]) -> None:
    """vLLM refuses n > 1 at temperature 0."""
    server = stub(by_ids)
    sampled(tiny, "openai", base_url=server.url, temperature=0.0)
    assert [(body["n"], body["temperature"], body["top_k"]) for body in server.bodies] == [(1, 0.0, -1)] * 20


def test_ids_are_made_from_text_where_a_server_has_only_that(
    tiny: CausalLM, stub: Callable[..., Stub], capsys: pytest.CaptureFixture[str]
) -> None:
    server = stub(by_text)
    rollouts = sampled(tiny, "openai", base_url=server.url, top_k=3)
    digit = {word: tiny.tokenizer.convert_tokens_to_ids(word) for word in "123"}
    said = {(digit["1"], digit["2"]): "length", (digit["3"], 2): "stop"}
    assert {(tuple(r.completion_ids), r.finish_reason) for r in rollouts} == set(said.items())
    asked = server.bodies[1:]
    assert len(asked) == 20  # one choice an answer
    assert {body["prompt"] for body in asked} == {tiny.tokenizer.decode(r.prompt_ids) for r in rollouts}
    assert len({body["seed"] for body in asked}) == 20
    settings = json.loads(asked[0]["generation_config"])
    assert settings == {"do_sample": True, "top_k": 3, "eos_token_id": [2]}
    assert " ".join(capsys.readouterr().err.split()).count("its text is tokenised again") == 1


def test_a_server_that_only_chats_gets_turns(
    tiny: CausalLM, stub: Callable[..., Stub], capsys: pytest.CaptureFixture[str]
) -> None:
    server = stub(by_chat)
    prompt = PromptConfig(system="sum of", suffix=" is", template={"enable_thinking": False})
    rollouts = sampled(tiny, "openai", prompt, base_url=server.url)
    assert all(r.text == "4" and r.completion_ids[-1] == 2 for r in rollouts)
    turns = [{"role": "system", "content": "sum of"}, {"role": "user", "content": "sum of 1 is"}]
    assert turns in [body.get("messages") for body in server.bodies]
    assert server.bodies[-1]["chat_template_kwargs"] == {"enable_thinking": False}
    assert "applies its own chat template" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(EngineError, match=r"prompt.style=qa is not a chat style"):
        sampled(tiny, "openai", PromptConfig(style="qa"), base_url=server.url)
    with pytest.raises(EngineError, match=r"top_k=3: not possible with a prompt as text"):
        sampled(tiny, "openai", prompt, base_url=server.url, top_k=3)


def test_another_template_on_the_server_is_noticed(tiny: CausalLM, stub: Callable[..., Stub]) -> None:
    def other(path: str, body: dict[str, Any]) -> Any:
        answer = by_chat(path, body)
        if isinstance(answer, dict):
            answer["usage"]["prompt_tokens"] += 3
        return answer

    server = stub(other)
    with pytest.raises(ServerError, match=r"chat/completions: the server read a prompt of 9 tokens, rmx rendered 6"):
        sampled(tiny, "openai", base_url=server.url)


@pytest.mark.parametrize("fault", [(503, {"detail": "loading"}), (429, b"slow down"), (500, {"error": "oh"}), None])
def test_a_busy_server_is_asked_again(tiny: CausalLM, stub: Callable[..., Stub], fault: Any) -> None:
    """Every request fails twice before it is answered."""
    tries: Counter[str] = Counter()

    def answer(path: str, body: dict[str, Any]) -> Any:
        tries[str(body)] += 1
        return by_ids(path, body) if tries[str(body)] == 3 else fault

    server = stub(answer)
    assert len(sampled(tiny, "openai", base_url=server.url)) == 20
    assert set(tries.values()) == {3}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((503, {"error": {"message": "out of memory"}}), r"/v1/completions: status 503: out of memory$"),
        ((401, {"detail": "who are you?"}), r"/v1/completions: status 401: who are you\?$"),
        ((404, {"error": {"message": "no model x"}}), r"/v1/completions: status 404: no model x; .*chat/completions"),
        (b"<html>", r"/v1/completions: expected a JSON object, got b'<html>'"),
        ({"choices": []}, r"expected 1 to 4 choices, got"),
        ({"choices": [{"finish_reason": "content_filter", "text": ""}] * 4}, r"finish_reason stop or length, got"),
        (
            {"choices": [{"finish_reason": "stop", "token_ids": [5, 21]}] * 4},
            r"token id 21, but the vocabulary has 21 tokens",
        ),
        (None, r"/v1/completions: no answer: "),
    ],
)
def test_what_a_server_says_is_in_the_error(
    tiny: CausalLM, stub: Callable[..., Stub], answer: Any, message: str
) -> None:
    server = stub(lambda path, body: answer)
    with pytest.raises(EngineError, match=message):
        sampled(tiny, "openai", base_url=server.url)


def test_an_error_keeps_the_units_before_it(tiny: CausalLM, stub: Callable[..., Stub]) -> None:
    def answer(path: str, body: dict[str, Any]) -> Any:
        return (400, {"message": "too long"}) if len(body["prompt"]) > 12 else by_ids(path, body)

    server = stub(answer)
    units: list[list[Rollout]] = []
    with pytest.raises(ServerError, match=r"status 400: too long"):
        sampled(tiny, "openai", base_url=server.url, batch_size=4, on_unit=units.append)
    assert [unit[0].problem_id for unit in units] == ["p0", "p1", "p2", "p3"]


@pytest.mark.parametrize(("batch_size", "most"), [(8, 2), (4, 1)])
def test_no_more_sequences_are_under_way_than_a_batch(
    tiny: CausalLM, stub: Callable[..., Stub], batch_size: int, most: int
) -> None:
    def slow(path: str, body: dict[str, Any]) -> Any:
        time.sleep(0.05)
        return by_ids(path, body)

    server = stub(slow)
    sampled(tiny, "openai", base_url=server.url, batch_size=batch_size)
    assert server.most == most


def test_an_address_is_checked_before_anything_is_asked(tiny: CausalLM) -> None:
    with pytest.raises(EngineError, match=r"base_url: expected http://... or https://..., got 'localhost:8000'"):
        sampled(tiny, "openai", base_url="localhost:8000")


@pytest.fixture(scope="module")
def served(tiny_path: Path) -> Iterator[str]:
    """`transformers serve` of the tiny model, on a free port."""
    if not is_serve_available():
        pytest.skip("needs the packages of transformers[serving]: fastapi, openai, uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(tiny_path)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + 60
        while True:
            try:
                opener.open(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, process.communicate()[1].decode()[-2000:]
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


@pytest.mark.thorough
def test_transformers_serve_says_what_the_loop_says(
    tiny: CausalLM, served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy: the same ids, the EOS put back."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    ours = sampled(tiny, "loop", temperature=0.0, samples=1)
    theirs = sampled(tiny, "openai", temperature=0.0, samples=1, base_url=served)
    special = {0, 1, 2}
    for mine, other in zip(ours, theirs, strict=True):
        spoken = [token for token in mine.completion_ids if token not in special]
        assert [token for token in other.completion_ids if token not in special] == spoken
        assert (other.prompt_ids, other.finish_reason) == (mine.prompt_ids, mine.finish_reason)
        assert other.completion_ids[-1] == 2 or other.finish_reason == "length"


@pytest.mark.thorough
def test_transformers_serve_samples(tiny: CausalLM, served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings arrive: samples differ, top_k=1 leaves only the greedy one, one at a time they are repeatable."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    settings = {"base_url": served, "batch_size": 1, "problems": PROBLEMS[:2]}
    rollouts = sampled(tiny, "openai", **settings)
    assert len({r.text for r in rollouts}) == 8
    assert sampled(tiny, "openai", **settings) == rollouts
    narrow = sampled(tiny, "openai", top_k=1, **settings)
    assert [r.text for r in narrow] == [r.text for r in sampled(tiny, "openai", **settings, temperature=0.0)]
    wrong = {**settings, "server_model": "no/such-model"}
    with pytest.raises(EngineError, match=r"status 400: Server is pinned to .*requested 'no/such-model'"):
        sampled(tiny, "openai", **wrong)
