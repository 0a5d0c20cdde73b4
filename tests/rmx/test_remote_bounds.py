"""What a server may do to us: nothing without bounds, nothing that is not understood, nothing to the bearer token."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rmx.config import PromptConfig, RolloutsConfig
from rmx.models.model import CausalLM
from rmx.models.prompts import Renderer
from rmx.records import Problem
from rmx.sampling import calls, remote
from rmx.sampling.calls import Calls, ServerError
from rmx.sampling.engines import EngineError
from rmx.sampling.rollouts import generate_rollouts

KEY = "sk-very-secret"
Serve = Callable[[BaseHTTPRequestHandler], None]
PROBLEMS = [Problem(f"p{i}", f"sum of {i}", "1") for i in range(3)]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Serve], str]]:
    """Start a server that does what it is told with each request; the address of its API."""
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setenv("RMX_API_KEY", KEY)
    monkeypatch.setattr(remote, "RETRIES_S", (0.01, 0.02))
    servers = []

    def start(act: Serve) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                act(self)

            do_GET = do_POST

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that hangs up
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def reply(request: BaseHTTPRequestHandler, content: bytes, status: int = 200, **headers: str) -> None:
    request.send_response(status)
    for name, value in {"Content-Length": str(len(content)), **headers}.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(content)


def sampled(lm: CausalLM, url: str, **settings: Any) -> list[Any]:
    sampling = RolloutsConfig(engine="openai", base_url=url, samples=2, max_new_tokens=12, **settings)
    return generate_rollouts(lm, Renderer(lm.tokenizer, PromptConfig()), PROBLEMS, sampling, 0)


def test_no_redirect_is_followed_and_the_token_stays_here(tiny: CausalLM, serve: Callable[[Serve], str]) -> None:
    for status in (301, 302, 303, 307, 308):
        got: list[str | None] = []
        elsewhere = serve(lambda request, got=got: got.append(request.headers["Authorization"]))  # type: ignore[misc]
        url = serve(lambda request, to=elsewhere, s=status: reply(request, b"", s, Location=to))  # type: ignore[misc]
        with pytest.raises(ServerError, match=rf"status {status}: redirects to {elsewhere}: set base_url"):
            sampled(tiny, url)
        assert got == []


@pytest.mark.parametrize(
    "body",
    [
        json.dumps({"error": {"message": f"no user has {KEY}"}}),
        f"<html>Bearer {KEY}</html>",
        "x" * 590 + KEY,  # cut in its middle
        json.dumps({"detail": [KEY]}),
    ],
)
@pytest.mark.parametrize("status", [200, 401, 500])
def test_the_token_is_not_printed(tiny: CausalLM, serve: Callable[[Serve], str], body: str, status: int) -> None:
    url = serve(lambda request: reply(request, body.encode(), status))
    with pytest.raises(ServerError) as caught:
        sampled(tiny, url)
    assert KEY[:6] not in str(caught.value)


@pytest.mark.parametrize("key", ["a\nb", "schlüssel", "a\0b"])
def test_a_token_that_no_header_holds_is_refused_unprinted(
    tiny: CausalLM, serve: Callable[[Serve], str], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, "RMX_API_KEY": key})
    with pytest.raises(EngineError, match="RMX_API_KEY: expected printable ASCII") as caught:
        sampled(tiny, serve(lambda request: None))
    assert key not in str(caught.value)


def test_an_address_with_a_password_is_refused_unprinted(tiny: CausalLM) -> None:
    with pytest.raises(EngineError, match="contains a user name or password") as caught:
        sampled(tiny, f"http://me:{KEY}@127.0.0.1:9/v1")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://", "http://a b/", "http://h:x/v1", "https:///v1", "ftp://h/v1", "http://h:99999/v1"]
)
def test_other_addresses_are_refused(tiny: CausalLM, url: str) -> None:
    with pytest.raises(EngineError, match=r"base_url: expected http://"):
        sampled(tiny, url)


@pytest.mark.parametrize("framing", ["endless", "chunked", "length"])
def test_an_endless_answer_is_cut(tiny: CausalLM, serve: Callable[[Serve], str], framing: str) -> None:
    sent = 0

    def flood(request: BaseHTTPRequestHandler) -> None:
        nonlocal sent
        request.send_response(200)
        if framing == "chunked":
            request.send_header("Transfer-Encoding", "chunked")
        if framing == "length":
            request.send_header("Content-Length", str(10**12))
        request.end_headers()
        chunk = b" " * (1 << 16)
        while sent < 1 << 30:
            request.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk) if framing == "chunked" else chunk)
            sent += len(chunk)

    with pytest.raises(ServerError, match=r"an answer of more than 1,054,720 bytes"):
        sampled(tiny, serve(flood))
    assert sent < 1 << 26


@pytest.mark.parametrize("drip", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_a_silent_or_dripping_server_is_left(
    tiny: CausalLM, serve: Callable[[Serve], str], monkeypatch: pytest.MonkeyPatch, drip: bytes
) -> None:
    """Once: a server that takes so long is not asked again."""
    monkeypatch.setattr(remote, "TIMEOUT_S", 0.3)
    asked = []

    def stall(request: BaseHTTPRequestHandler) -> None:
        asked.append(1)
        request.wfile.write(drip)
        for _ in range(200):
            time.sleep(0.02)
            request.wfile.write(b"x" if drip else b"")

    with pytest.raises(ServerError, match=r"no complete answer within 0 s"):
        sampled(tiny, serve(stall))
    assert asked == [1]


def choices(*found: Any, **more: Any) -> Any:
    return {"choices": list(found), "usage": {"prompt_tokens": 6}, **more}


GOOD = {"index": 0, "finish_reason": "stop", "token_ids": [5, 2]}
MALFORMED: list[Any] = [
    choices(None, None),
    choices("a", "b"),
    choices([], []),
    choices({**GOOD, "index": "0"}, GOOD),
    choices({**GOOD, "index": None}, GOOD),
    choices({**GOOD, "token_ids": "12"}, GOOD),
    choices({**GOOD, "token_ids": [1.5]}, GOOD),
    choices({**GOOD, "token_ids": ["5"]}, GOOD),
    choices({**GOOD, "token_ids": [None]}, GOOD),
    choices({**GOOD, "token_ids": [True]}, GOOD),
    choices({**GOOD, "token_ids": {"a": 1}}, GOOD),
    choices({**GOOD, "token_ids": [10**30]}, GOOD),
    choices({**GOOD, "token_ids": [-1]}, GOOD),
    choices({**GOOD, "token_ids": [5] * 200_000}, GOOD),
    choices({**GOOD, "token_ids": [5] * 13}, GOOD),
    choices({"index": 0, "finish_reason": "stop"}, GOOD),
    choices({"index": 0, "finish_reason": "stop", "text": 5}, GOOD),
    choices({"index": 0, "finish_reason": "stop", "text": "1 " * 1000}, GOOD),
    choices({"index": 0, "finish_reason": {}, "token_ids": [5]}, GOOD),
    choices({**GOOD, "message": "x"}, GOOD),
    {"choices": {"a": GOOD}},
    {"choices": [GOOD], "usage": [6]},
    {"choices": [GOOD], "usage": "6"},
    {"choices": [GOOD], "usage": {"prompt_tokens": "6"}},
    [GOOD],
    b"[" * 100_000,
    b'{"choices": ' + b"1" * 5000 + b"}",
    b'{"choices": [{"index": 0, "finish_reason": "stop", "text": "\\ud800"}]}',
    b"\xff\xfe",
    b"",
]


@pytest.mark.parametrize("answer", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_answers_are_named(tiny: CausalLM, serve: Callable[[Serve], str], answer: Any) -> None:
    content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    with pytest.raises(ServerError, match=r"^http://127\.0\.0\.1:\d+/v1") as caught:
        sampled(tiny, serve(lambda request: reply(request, content)))
    assert len(str(caught.value)) < 1000


def test_a_chat_without_a_message_is_named(tiny: CausalLM, serve: Callable[[Serve], str]) -> None:
    def chat_alone(request: BaseHTTPRequestHandler) -> None:
        if request.path.endswith("chat/completions"):
            reply(
                request,
                json.dumps(
                    {"choices": [{"finish_reason": "stop", "text": "a"}], "usage": {"prompt_tokens": 6}}
                ).encode(),
            )
        else:
            reply(request, b"{}", 404)

    with pytest.raises(ServerError, match=r"expected a choice with a message|the server read a prompt"):
        sampled(tiny, serve(chat_alone))


def test_hanging_up_ends_all_requests(serve: Callable[[Serve], str]) -> None:
    began = threading.Barrier(4, timeout=20)

    def hold(request: BaseHTTPRequestHandler) -> None:
        began.wait()
        time.sleep(60)

    url, faults = serve(hold), []
    line = Calls()

    def ask() -> None:
        try:
            line.ask(url, {}, seconds=600, most_bytes=100, waits=(600.0,))
        except ServerError as fault:
            faults.append(str(fault))

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    began.wait()
    line.hang_up()
    for thread in threads:
        thread.join(20)
    assert len(faults) == 3 and all("request cancelled" in fault for fault in faults)


@pytest.mark.thorough
def test_ctrl_c_ends_requests_under_way(serve: Callable[[Serve], str], tiny_path: Path) -> None:
    first, held = threading.Event(), threading.Event()

    def answer(request: BaseHTTPRequestHandler) -> None:
        if first.is_set():
            held.set()
            time.sleep(60)
        first.set()
        reply(request, json.dumps({"choices": [GOOD, GOOD]}).encode())

    script = f"""
        from rmx.config import ModelConfig, PromptConfig, RolloutsConfig
        from rmx.models import model
        from rmx.models.prompts import Renderer
        from rmx.records import Problem
        from rmx.sampling.rollouts import generate_rollouts
        lm = model.load(ModelConfig(name={str(tiny_path)!r}, dtype="float32", device="cpu"))
        sampling = RolloutsConfig(engine="openai", base_url={serve(answer)!r}, samples=2, max_new_tokens=12)
        problems = [Problem(f"p{{i}}", f"sum of {{i}}", "1") for i in range(4)]
        generate_rollouts(lm, Renderer(lm.tokenizer, PromptConfig()), problems, sampling, 0)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stderr=subprocess.PIPE, text=True)
    try:
        assert held.wait(60)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
        assert "KeyboardInterrupt" in said
    finally:
        process.kill()
        process.wait()


def test_a_port_that_nothing_listens_on_is_named(tiny: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RETRIES_S", ())
    monkeypatch.setattr(calls, "CONNECT_S", 1.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ServerError, match=r"no answer: .*refused"):
        sampled(tiny, f"http://127.0.0.1:{port}/v1")
