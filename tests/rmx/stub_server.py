"""A server with the routes of OpenAI's, whose answers a test gives."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Stub(ThreadingHTTPServer):
    """Answers each POST with what ``answer(path, body)`` gives: a JSON value, or (status, JSON value)."""

    daemon_threads = True

    def __init__(self, answer: Callable[[str, dict[str, Any]], Any]) -> None:
        self.answer, self.bodies, self.busy, self.most = answer, [], 0, 0
        self.paths: list[str] = []
        self.headers: list[str | None] = []
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.paths.append(self.path)
            self.server.headers.append(self.headers["Authorization"])
            self.server.busy += 1
            self.server.most = max(self.server.most, self.server.busy)
        answer = self.server.answer(self.path, body)
        with self.server.lock:
            self.server.busy -= 1
        if answer is None:
            return  # hangs up
        status, value = answer if isinstance(answer, tuple) else (200, answer)
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def by_ids(path: str, body: dict[str, Any]) -> Any:
    """As vLLM: prompts as ids, n choices in any order, and their token ids; the seed decides what is said."""
    if path != "/v1/completions" or not isinstance(body["prompt"], list):
        return 404, {"error": {"message": "Not Found"}}
    choices = [
        {
            "index": i,
            "text": "?",
            "finish_reason": "length" if i % 2 else "stop",
            "token_ids": [5 + (body["seed"] + i) % 10, 7] if i % 2 else [5 + (body["seed"] + i) % 10, 2],
        }
        for i in range(body["n"])
    ]
    return {"choices": choices[::-1], "usage": {"prompt_tokens": len(body["prompt"])}}


def by_text(path: str, body: dict[str, Any]) -> Any:
    """As `transformers serve`: unknown fields are refused, prompts are text, n is ignored, no ids come back."""
    known = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "n", "generation_config"}
    if unknown := set(body) - known:
        return 422, {"detail": f"Unexpected fields in the request: {unknown}"}
    said = "1 2" if body["seed"] % 2 else "3"
    choice = {"index": 0, "text": said, "finish_reason": "length" if body["seed"] % 2 else "stop"}
    return {"choices": [choice], "usage": {"prompt_tokens": len(body["prompt"].split())}}


def by_chat(path: str, body: dict[str, Any]) -> Any:
    if path != "/v1/chat/completions":
        return 404, {"error": {"message": "no such endpoint"}}
    if body["n"] != 1:
        return 400, {"message": "n must be 1"}
    tokens = sum(len(turn["content"].split()) + 1 for turn in body["messages"]) + 2
    choice = {"index": 0, "message": {"role": "assistant", "content": "4"}, "finish_reason": "stop"}
    return {"choices": [choice], "usage": {"prompt_tokens": tokens}}
