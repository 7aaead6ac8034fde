"""The filter as pure ASGI middleware, in front of any server that speaks OpenAI's chat, completion or response API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from tokenmill.errors import LimitError
from tokenmill.text._cpt_guard import content_texts, first_flagged, user_texts

if TYPE_CHECKING:
    from tokenmill.text._cpt_verdict import Verdict
    from tokenmill.text.cpt_filtering import CPTFilter

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_EXCERPT = 120


class CPTMiddleware:
    """Answers requests whose user messages look encoded with status 400; all others reach the application unchanged.

    ``app.add_middleware(CPTMiddleware, filter=cpt_filter)`` in Starlette and FastAPI, or ``CPTMiddleware(app, filter)``
    around any ASGI application. A body that is no JSON, or has no messages where they are expected, goes through: the
    application answers it. Prompts of token ids hide their text and are refused, unless that is allowed.
    """

    def __init__(
        self,
        app: App,
        filter: CPTFilter,
        *,
        paths: Sequence[str] = PATHS,
        roles: Sequence[str] = ("user",),
        max_bytes: int = 10_000_000,
        allow_token_ids: bool = False,
    ) -> None:
        """Wrap an application.

        Args:
            app: an ASGI application.
            filter: a calibrated filter.
            paths: ends of the paths whose POST requests are checked.
            roles: whose messages are checked.
            max_bytes: larger bodies are answered with status 413.
            allow_token_ids: let prompts of token ids through unchecked.

        Raises:
            LimitError: a limit below 1; no roles.
        """
        if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 1:
            raise LimitError("CPTMiddleware", "max_bytes", max_bytes, "an integer of at least 1")
        if not roles:
            raise LimitError("CPTMiddleware", "roles", tuple(roles), "at least one role", 'Usual is ("user",).')
        self.app, self.filter, self.paths, self.roles = app, filter, tuple(paths), tuple(roles)
        self.max_bytes, self.allow_token_ids = max_bytes, allow_token_ids

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection."""
        path = str(scope.get("path", "")).rstrip("/")
        if scope.get("type") != "http" or scope.get("method") != "POST" or not path.endswith(self.paths):
            await self.app(scope, receive, send)
            return
        messages, body = await self._read(receive)
        if body is None:
            if messages and messages[-1].get("type") == "http.disconnect":
                return  # nobody waits for an answer
            await _answer(send, 413, _too_large(self.max_bytes))
            return
        error = await self._checked(body)
        if error is not None:
            await _answer(send, 400, error)
            return
        await self.app(scope, _replayed(messages, receive), send)

    async def _checked(self, body: bytes) -> dict[str, Any] | None:
        """`_error` in a thread, as tokenizing takes a while and other connections go on meanwhile."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # another event loop than asyncio's
            return self._error(body)
        return await loop.run_in_executor(None, self._error, body)

    async def _read(self, receive: Receive) -> tuple[list[Message], bytes | None]:
        """The messages of the body and the body; None for one that is too large or breaks off."""
        messages, size = [], 0
        while True:
            message = await receive()
            messages.append(message)
            if message["type"] != "http.request":
                return messages, None
            size += len(message.get("body", b""))
            if size > self.max_bytes:
                return messages[:-1], None
            if not message.get("more_body", False):
                return messages, b"".join(m.get("body", b"") for m in messages)

    def _error(self, body: bytes) -> dict[str, Any] | None:
        """What to answer instead of the application, or None."""
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            return None
        if not isinstance(request, dict):
            return None
        if not self.allow_token_ids and _is_ids(request.get("prompt")):
            what = "Prompts of token ids cannot be checked; send text."
            return _error_json(what, "prompt", "token_ids_not_checked")
        texts = list(self._texts(request))
        for name, index, text in texts:
            bad = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
            if bad is not None:
                what = f"The text holds the lone surrogate U+{ord(bad):04X}."
                return _error_json(what, f"{name}[{index}]", "invalid_text")
        found = first_flagged(self.filter, [(place, text) for place, (_, _, text) in enumerate(texts)])
        if found is None:
            return None
        place, text, verdict = found
        name, index, _ = texts[place]
        return _flagged_json(name, index, text, verdict)

    def _texts(self, request: dict[str, Any]) -> Iterator[tuple[str, int, str]]:
        """(field, index of the message, text) of everything that a user wrote."""
        for name in ("messages", "prompt", "input"):
            value = request.get(name)
            if isinstance(value, list):
                for index, one in enumerate(value):
                    if isinstance(one, str):
                        yield name, index, one
                    elif isinstance(one, dict) and "role" not in one and "content" not in one:
                        yield from ((name, index, text) for text in content_texts([one]))
                    elif isinstance(one, dict):
                        yield from ((name, index, text) for _, text in user_texts([one], self.roles))
            elif isinstance(value, str):
                yield name, 0, value


def _is_ids(prompt: Any) -> bool:
    if not isinstance(prompt, list):
        return False
    return any(isinstance(one, int) or (isinstance(one, list) and one) for one in prompt)


def _replayed(messages: list[Message], receive: Receive) -> Receive:
    """A `receive` that gives the body's messages again as they were, then what comes after them."""
    left = iter(messages)

    async def again() -> Message:
        message = next(left, None)
        return await receive() if message is None else message

    return again


async def _answer(send: Send, status: int, data: dict[str, Any]) -> None:
    body = json.dumps(data).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _error_json(message: str, param: str | None, code: str, **more: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code, **more}}


def _too_large(limit: int) -> dict[str, Any]:
    return _error_json(f"The body is larger than {limit} bytes.", None, "request_too_large")


def _flagged_json(name: str, index: int, text: str, verdict: Verdict) -> dict[str, Any]:
    span = verdict.worst_span
    worst = None
    if span is not None:
        excerpt = text[span.start : min(span.stop, span.start + _EXCERPT)]
        worst = {"message": index, "start": span.start, "end": span.stop, "text": excerpt, "cpt": round(span.cpt, 3)}
    what = f"The message looks encoded or obfuscated ({verdict.reason}). Send it as plain text."
    about = {"cpt": verdict.cpt, "threshold": verdict.threshold, "script": verdict.script, "worst_span": worst}
    return _error_json(what, f"{name}[{index}]", "obfuscated_prompt", **about)
