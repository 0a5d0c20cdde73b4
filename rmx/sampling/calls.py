"""HTTP requests to a server, with limits on time, bytes and redirects; the bearer token is never printed."""

import http.client
import json
import os
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from rmx.sampling.engines import EngineError

CONNECT_S = 20.0
FINAL = (400, 404, 405, 415, 422, 501)  # statuses that stay what they are when asked again
ERROR_BYTES = 1 << 16  # of the body of an error
API_KEY = "RMX_API_KEY"  # environment variable: the bearer token, where the server wants one


class ServerError(EngineError):
    """The server cannot be reached, refuses, or gives an invalid answer; the message names the URL."""

    def __init__(self, url: str, message: str, status: int | None = None) -> None:
        super().__init__(f"{url}: {f'status {status}: ' if status else ''}{without_key(message)}")
        self.status = status


def api_key() -> str:
    """The bearer token; empty if there is none.

    Raises:
        EngineError: it cannot be sent in a header.
    """
    key = os.environ.get(API_KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise EngineError(f"{API_KEY}: expected printable ASCII characters, since it is sent in a header, got others")
    return key


def without_key(text: str) -> str:
    """The text of a server without the bearer token, in case the server repeated it."""
    key = os.environ.get(API_KEY, "").strip()
    for form in {key, json.dumps(key)[1:-1], urllib.parse.quote(key), urllib.parse.quote(key, safe="")} if key else ():
        text = text.replace(form, f"[{API_KEY}]")
    return text


def check_address(base_url: str) -> None:
    """Raise EngineError unless this is the address of a server, without a user's name or password in it."""
    try:
        parts = urllib.parse.urlsplit(base_url)
        host, _ = parts.hostname, parts.port
    except ValueError as fault:
        raise EngineError(f"base_url: expected http://HOST[:PORT]/..., got another address: {fault}") from fault
    if parts.username is not None or parts.password is not None:
        raise EngineError(f"base_url: contains a user name or password; set the bearer token {API_KEY} instead")
    if parts.scheme not in ("http", "https") or not host or not base_url.isascii() or " " in base_url:
        raise EngineError(f"base_url: expected http://... or https://..., got {base_url!r}")


class Calls:
    """The running requests to a server; :meth:`hang_up` ends all of them at once."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()

    def hang_up(self) -> None:
        """End the running requests; later ones fail at once."""
        with self._lock:
            self.ended.set()
            for sock in self._open:
                _shut(sock)

    def ask(
        self, url: str, body: dict[str, Any] | None, *, seconds: float, most_bytes: int, waits: Sequence[float]
    ) -> dict[str, Any]:
        """The JSON object that the server returns; tries again if the server is busy, down or cannot be reached.

        Args:
            body: to POST; None: a GET.
            seconds: time limit for the whole answer. most_bytes: its size limit. waits: seconds before each retry.

        Raises:
            ServerError: an error status, no answer, one that is too late or too long, no JSON object, or a redirect,
                which is never followed: the bearer token would go with it.
        """
        headers = {"Content-Type": "application/json"}
        if key := api_key():
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
        left = iter(waits)
        while True:
            if self.ended.is_set():
                raise ServerError(url, "request cancelled, because the run ended")
            with _Call(self, seconds) as call:
                found = self._once(call, request, most_bytes)
            if not isinstance(found, ServerError):
                return found
            wait = next(left, None)
            if wait is None:
                raise found
            self.ended.wait(wait)

    def _once(self, call: "_Call", request: urllib.request.Request, most: int) -> dict[str, Any] | ServerError:
        """The answer, or an error that may go by itself."""
        url = request.full_url
        try:
            with call.opener.open(request, timeout=min(CONNECT_S, call.seconds)) as response:
                return _object(url, call.read(response, most))
        except urllib.error.HTTPError as fault:
            with fault:
                if 300 <= fault.code < 400:
                    said = f"redirects to {fault.headers.get('Location', 'nowhere')[:300]}: set base_url to where it is"
                    raise ServerError(url, said, fault.code) from fault
                with suppress(OSError, http.client.HTTPException):  # the status says enough
                    error = ServerError(url, "", fault.code)
                    error = ServerError(url, _message(fault.read(ERROR_BYTES)), fault.code)
            if fault.code != 429 and (fault.code < 500 or fault.code in FINAL):
                raise error from fault
            return error
        except (OSError, http.client.HTTPException) as fault:  # URLError and timeouts are OSErrors
            if call.late:
                said = f"no complete answer within {call.seconds:.0f} s, the time limit for max_new_tokens"
                raise ServerError(url, said) from fault
            return ServerError(url, f"no answer: {getattr(fault, 'reason', None) or fault!r}")


class _Call:
    """One try of a request: its socket is shut at the deadline, whatever the server does until then."""

    def __init__(self, calls: Calls, seconds: float) -> None:
        self.calls, self.seconds, self.late = calls, seconds, False
        self.socket: socket.socket | None = None
        self.timer = threading.Timer(seconds, self._end)
        self.timer.daemon = True
        # Proxies are those of the environment; a redirect is an error.
        schemes = (urllib.request.HTTPHandler, urllib.request.HTTPSHandler)
        self.opener = urllib.request.build_opener(_NoRedirects, *(_handler(self, scheme) for scheme in schemes))

    def __enter__(self) -> "_Call":
        self.timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()
        with self.calls._lock:
            if self.socket is not None:
                self.calls._open.discard(self.socket)

    def connected(self, sock: socket.socket) -> None:
        sock.settimeout(None)  # from here on the timer ends it
        with self.calls._lock:
            self.socket = sock
            self.calls._open.add(sock)
            if self.late or self.calls.ended.is_set():
                _shut(sock)

    def _end(self) -> None:
        self.late = True
        if self.socket is not None:
            _shut(self.socket)

    def read(self, response: http.client.HTTPResponse, most: int) -> bytes:
        content = bytearray()
        while chunk := response.read(1 << 16):
            content += chunk
            if len(content) > most:
                raise ServerError(response.url, f"an answer of more than {most:,} bytes")
        if response.length or self.late or self.calls.ended.is_set():  # the socket was shut
            raise http.client.IncompleteRead(bytes(content[:100]), response.length)
        return bytes(content)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _tracked(call: _Call, http_class: type[http.client.HTTPConnection]) -> type[http.client.HTTPConnection]:
    class Tracked(http_class):  # type: ignore[valid-type, misc]
        def connect(self) -> None:
            super().connect()
            call.connected(self.sock)

    return Tracked


def _handler(call: _Call, scheme: type[urllib.request.AbstractHTTPHandler]) -> urllib.request.AbstractHTTPHandler:
    """That of http or https, whose connections the call knows."""

    class Handler(scheme):  # type: ignore[valid-type, misc]
        def do_open(self, http_class: Any, req: Any, **more: Any) -> Any:
            return super().do_open(_tracked(call, http_class), req, **more)

    return Handler()


def _shut(sock: socket.socket) -> None:
    with suppress(OSError):  # it is closed already
        sock.shutdown(socket.SHUT_RDWR)


def _object(url: str, answer: bytes) -> dict[str, Any]:
    try:
        value = json.loads(answer)
        json.dumps(value, ensure_ascii=False).encode()  # lone surrogates are no text
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ServerError(
            url, f"expected a JSON object, got {without_key(answer[:1000].decode(errors='replace'))[:300].encode()!r}"
        )
    return value


def _message(answer: bytes) -> str:
    """What an error answer says, in any of the usual shapes; cut to a few lines, and without the bearer token."""
    text = without_key(answer.decode(errors="replace").strip())
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text[:600]
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and key in value:
            value = value[key]
    return (value if isinstance(value, str) else json.dumps(value))[:600]
