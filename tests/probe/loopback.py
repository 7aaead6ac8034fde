"""A real HTTP server on the loopback that speaks the OpenAI API, with the faults that servers have."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(slots=True)
class Served:
    """What the server answers, how it fails first, and what it was asked.

    Attributes:
        answer: prompt -> text.
        faults: what happens to the first requests, one each: "500", "503 1" (with Retry-After), "400", "401", "302",
            "garbage", "deep", "list", "no choices", "number", "cut", "close", "slow", "drip", "good".
        always: a fault of every request.
        models: names of the served models.
        bodies: the requests.
        keys: their Authorization headers.
        paths: their paths.
    """

    answer: Callable[[str], str | None]
    faults: list[str] = field(default_factory=list)
    always: str = ""
    models: tuple[str, ...] = ("served",)
    finish: str = "stop"
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def serving(answer: Callable[[str], str | None], *faults: str, **more: Any) -> Generator[Served, None, None]:
    """The server, on a free port, until the block ends."""
    state = Served(answer, list(faults), **more)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any, **__: Any) -> None:
            """Nothing is printed."""

        def do_GET(self) -> None:
            state.paths.append(self.path)
            self._send(200, {"data": [{"id": name} for name in state.models]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.bodies.append(body)
                state.keys.append(self.headers.get("Authorization"))
                state.paths.append(self.path)
                fault = state.faults.pop(0) if state.faults else state.always
            self._fail(fault) if fault not in ("", "good") else self._answer(body)

        def _answer(self, body: dict[str, Any]) -> None:
            chat = "messages" in body
            text = state.answer(body["messages"][0]["content"] if chat else body["prompt"])
            choice = {"message": {"content": text}} if chat else {"text": text}
            usage = {"prompt_tokens": 7, "completion_tokens": 3}
            self._send(200, {"choices": [choice | {"finish_reason": state.finish}], "usage": usage})

        def _fail(self, fault: str) -> None:
            code, _, after = fault.partition(" ")
            if code.isdigit():
                headers = {"Retry-After": after} if after else {}
                headers |= {"Location": "/elsewhere"} if code == "302" else {}
                key = self.headers.get("Authorization", "").removeprefix("Bearer ")
                self._send(int(code), {"error": {"message": f"fault {code} {key}".strip()}}, headers)
            elif fault == "close":
                self.close_connection = True
            elif fault in ("cut", "slow", "drip"):
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                for _ in range({"cut": 1, "slow": 1, "drip": 30}[fault]):
                    self.wfile.write(b'{"choices": [')
                    self.wfile.flush()
                    time.sleep({"cut": 0, "slow": 0.6, "drip": 0.05}[fault])
                self.close_connection = True
            else:
                found = {"garbage": b"<html>", "deep": b"[" * 200_000, "list": b"[]", "no choices": b"{}"}
                self._bytes(200, found.get(fault, b'{"choices": [{"message": {"content": 5}}]}'), {})

        def _send(self, code: int, body: Any, headers: dict[str, str] | None = None) -> None:
            self._bytes(code, json.dumps(body).encode(), headers or {})

        def _bytes(self, code: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(code)
            for name, value in (headers | {"Content-Length": str(len(data))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *_: Any, **__: Any) -> None:
            """A client that hangs up is part of the test."""

    server = Quiet(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
