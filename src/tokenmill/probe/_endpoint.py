"""An OpenAI-compatible endpoint as one that can be asked. Standard library alone.

A server that is busy, slow, cut off or answers garbage is asked again, a bounded number of times; a prompt that it
refuses is an error of that example; anything else stops the run, whose answers so far are on disk. The key comes from
an environment variable when a request is made, and stands in no message, file or repr.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from tokenmill.errors import LimitError, TokenmillError
from tokenmill.probe._answers import Reply

_WHERE = "Endpoint"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_MOST_BYTES = 16_000_000  # of a response
_REFUSED = (400, 413, 422)  # this prompt, not every prompt
_BUSY = (408, 409, 425, 429)
_LONGEST_WAIT = 60.0  # seconds between two tries


class EndpointError(TokenmillError):
    """The endpoint does not answer as it should."""


class _AgainError(Exception):
    """A fault that may pass; `after` is how long the server asks to wait."""

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect could carry the key to another host, so it is an error."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A served model.

    Attributes:
        url: of the API, such as ``http://127.0.0.1:8000/v1``.
        model: name that the server knows; without it the server is asked, and must have one model alone.
        mode: "chat" for ``/chat/completions``, "completion" for ``/completions``.
        key_variable: environment variable with the API key; nothing is sent when it is not set.
        timeout: seconds for a whole response.
        retries: further tries after a fault that may pass.
        wait: seconds before the second try; they double with each.
        workers: requests at the same time.
        length_field: how the server calls the length of an answer.

    Raises:
        LimitError: an address that is not http or https or that holds a password, or a value outside its limit.
    """

    url: str
    model: str = ""
    mode: Literal["chat", "completion"] = "chat"
    key_variable: str = "TOKENMILL_API_KEY"
    timeout: float = 300.0
    retries: int = 4
    wait: float = 1.0
    workers: int = 1
    length_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port that is no number
            raise LimitError(_WHERE, "url", self.url, "an address such as http://127.0.0.1:8000/v1") from None
        if parts.username or parts.password:
            limit = "an address without user and password"
            raise LimitError(_WHERE, "url", parts.hostname, limit, f"Put the key into {self.key_variable}.")
        if not good or parts.query or parts.fragment:
            raise LimitError(_WHERE, "url", self.url, "an address such as http://127.0.0.1:8000/v1")
        for name, choices in (("mode", ("chat", "completion")), ("length_field", _LENGTH_FIELDS)):
            if getattr(self, name) not in choices:
                raise LimitError(_WHERE, name, getattr(self, name), f"one of {', '.join(choices)}")
        for name, least in (("retries", 0), ("workers", 1)):
            if getattr(self, name) < least:
                raise LimitError(_WHERE, name, getattr(self, name), f"at least {least}")
        if not 0 < self.timeout < float("inf"):
            raise LimitError(_WHERE, "timeout", self.timeout, "a number of seconds above 0")
        if not 0 <= self.wait < float("inf"):
            raise LimitError(_WHERE, "wait", self.wait, "a number of seconds, at least 0")

    @property
    def name(self) -> str:
        """Tells endpoints apart in a file of answers."""
        return f"{self.url.rstrip('/')} {self.model} {self.mode}"

    @property
    def at_once(self) -> int:
        """Prompts that are given together."""
        return self.workers

    def served(self) -> list[str]:
        """Names of the models that the server has.

        Raises:
            EndpointError: no list of models comes back.
        """
        listed = self._tried("models", None)
        if isinstance(listed, Reply):
            raise EndpointError(f"{self._place('models')} does not list models: {listed.error}. Name the model.")
        rows = listed.get("data")
        if not isinstance(rows, list):
            raise EndpointError(f"{self._place('models')} does not list models. Name the model.")
        return [str(row["id"]) for row in rows if isinstance(row, dict) and "id" in row]

    def answer(self, prompts: Sequence[str], max_new_tokens: int) -> list[Reply]:
        """One reply a prompt, in order.

        Raises:
            EndpointError: the server could not be asked, or did not answer after all tries; `.partial` holds a reply
                for each prompt that was answered all the same, and None for the others.
        """
        replies: list[Reply | None] = []
        fault: EndpointError | None = None
        with ThreadPoolExecutor(max_workers=self.workers) as pool:
            for job in [pool.submit(self._one, prompt, max_new_tokens) for prompt in prompts]:
                try:
                    replies.append(job.result())
                except EndpointError as error:
                    replies.append(None)
                    fault = fault or error
        if fault is not None:
            raise EndpointError(str(fault), partial=replies) from fault
        return [reply for reply in replies if reply is not None]

    def _one(self, prompt: str, max_new_tokens: int) -> Reply:
        chat = self.mode == "chat"
        body: dict[str, Any] = {"model": self.model, "temperature": 0, self.length_field: max_new_tokens}
        body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        got = self._tried("chat/completions" if chat else "completions", body)
        return got if isinstance(got, Reply) else _read(got, chat=chat)

    def _tried(self, path: str, body: dict[str, Any] | None) -> dict[str, Any] | Reply:
        """The response, after as many tries as are allowed; a `Reply` with the error when the prompt is refused."""
        wait = self.wait
        for left in range(self.retries, -1, -1):
            try:
                got = self._request(path, body)
                if body is not None and isinstance(got, dict):
                    _read(got, chat=self.mode == "chat")  # a response without an answer is a fault as well
                return got
            except _AgainError as fault:
                if not left:
                    tries = f"{self.retries + 1} tries" if self.retries else "1 try"
                    raise EndpointError(f"{self._place(path)}: {fault} ({tries})") from None
                time.sleep(min(max(wait, fault.after), _LONGEST_WAIT))
                wait *= 2
        raise AssertionError("the last try returns or raises")

    def _request(self, path: str, body: dict[str, Any] | None) -> dict[str, Any] | Reply:
        key = self._key()
        headers = {"Accept": "application/json", "User-Agent": "tokenmill"}
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(body).encode()
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._place(path), data=data, headers=headers)
        deadline = time.monotonic() + self.timeout
        try:
            with self._opener().open(request, timeout=self.timeout) as response:
                text = _whole(response, deadline)
        except urllib.error.HTTPError as error:
            return self._refused(path, error, key, deadline)
        except TimeoutError:
            raise _AgainError(f"no whole response in {self.timeout:g} seconds") from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, TimeoutError):
                raise _AgainError(f"no whole response in {self.timeout:g} seconds") from None
            raise _AgainError(f"{type(reason).__name__}: {reason}".rstrip(": ")) from None
        try:
            got = json.loads(text)
        except (ValueError, RecursionError):
            raise _AgainError("the response is not JSON") from None
        if not isinstance(got, dict):
            raise _AgainError("the response is not a JSON object")
        return got

    def _refused(self, path: str, error: urllib.error.HTTPError, key: str, deadline: float) -> Reply:
        """What a status above 299 means: try again, this prompt is refused, or stop."""
        try:
            said = _message(_whole(error, deadline))
        except (TimeoutError, OSError, http.client.HTTPException):
            said = ""
        text = f"HTTP {error.code} {said.replace(key, '***') if key else said}".rstrip()
        if error.code in _BUSY or error.code >= 500:
            raise _AgainError(text, _seconds(error.headers.get("Retry-After")))
        if error.code in _REFUSED and path != "models":
            return Reply(error=text)
        hint = f" Is {self.key_variable} set?" if error.code in (401, 403) else ""
        raise EndpointError(f"{self._place(path)}: {text}.{hint}")

    def _key(self) -> str:
        """The key of the environment; what no header can hold is refused here, since http.client would print it."""
        key = os.environ.get(self.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise EndpointError(f"the key in {self.key_variable} holds characters that no HTTP header can")
        return key

    def _opener(self) -> urllib.request.OpenerDirector:
        local = urlsplit(self.url).hostname in _LOOPBACK
        # A proxy of the environment is for other hosts.
        return urllib.request.build_opener(_NoRedirect(), *([urllib.request.ProxyHandler({})] if local else []))

    def _place(self, path: str) -> str:
        return f"{self.url.rstrip('/')}/{path}"


_LENGTH_FIELDS = ("max_tokens", "max_completion_tokens")


def _whole(response: Any, deadline: float) -> bytes:
    """All of a response, which may drip in slowly, but not for ever."""
    pieces, size = [], 0
    while piece := response.read1(65536):
        pieces.append(piece)
        size += len(piece)
        if time.monotonic() > deadline:
            raise TimeoutError
        if size > _MOST_BYTES:
            raise _AgainError(f"the response is longer than {_MOST_BYTES:,} bytes")
    promised = response.headers.get("Content-Length")
    if promised is not None and promised.isdigit() and size < int(promised):
        raise _AgainError(f"the response was cut off after {size:,} of {int(promised):,} bytes")
    return b"".join(pieces)


def _read(got: dict[str, Any], *, chat: bool) -> Reply:
    """The answer of a response."""
    try:
        choice = got["choices"][0]
        text = choice["message"]["content"] if chat else choice["text"]
    except (KeyError, IndexError, TypeError):
        raise _AgainError("the response holds no answer") from None
    if text is None:  # nothing but reasoning before the limit, or a refusal
        text = ""
    if not isinstance(text, str):
        raise _AgainError("the response holds an answer that is no text")
    usage = got.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    tokens = [counts.get(name) for name in ("prompt_tokens", "completion_tokens")]
    before, after = (n if isinstance(n, int) else None for n in tokens)
    return Reply(text, "", before, after, cut=choice.get("finish_reason") == "length")


def _message(body: bytes) -> str:
    """What a server says in an error: its message, or the beginning of the text, on one line."""
    text = body.decode("utf-8", errors="replace")
    try:
        held = json.loads(text)
        error = held.get("error", held)
        text = str(error.get("message", error)) if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError, RecursionError):
        pass  # not JSON: the text itself
    return " ".join(text.split())[:300]


def _seconds(text: str | None) -> float:
    try:
        return max(0.0, float(text or 0))
    except ValueError:  # a date: the ordinary waiting does
        return 0.0
