"""The middleware in front of an ASGI application."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from typing import Any

import pytest
import uvicorn

from tests.text import vocabularies
from tokenmill.errors import LimitError
from tokenmill.text import OBFUSCATORS, CPTFilter, CPTMiddleware

CLEAN = "Please write a short letter to the library and ask when it opens again."
SECRET = OBFUSCATORS["rot13"].encode(CLEAN)
PARTS = [{"type": "image_url"}, {"type": "text", "text": SECRET}]
INPUT_PARTS = [{"type": "input_text", "text": SECRET}]
FILTER = CPTFilter(vocabularies.cl100k(), threshold=3.0)


class App:
    """Reads the whole body and answers in three parts."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.scopes: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        if scope["type"] != "http":
            await send({"type": f"{scope['type']}.seen"})
            return
        while True:
            message = await receive()
            self.messages.append(message)
            if not message.get("more_body", False):
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in (b"a", b"b"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        self.messages.append(await receive())

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.messages)


def ask(
    body: Any, path: str = "/v1/chat/completions", cuts: int = 1, method: str = "POST", **settings: Any
) -> tuple[int, Any, App]:
    """(status, JSON or bytes of the answer, application) of a request whose body comes in `cuts` parts."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    size = -(-len(data) // cuts) or 1
    parts = [data[i : i + size] for i in range(0, len(data), size)] or [b""]
    left = [{"type": "http.request", "body": part, "more_body": i + 1 < len(parts)} for i, part in enumerate(parts)]
    left.append({"type": "http.disconnect", "last": True})
    sent: list[Any] = []
    app = App()

    async def receive() -> Any:
        return left.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": []}
    asyncio.run(CPTMiddleware(app, FILTER, **settings)(scope, receive, send))
    answer = b"".join(m.get("body", b"") for m in sent)
    if sent and sent[0]["status"] != 200:
        assert not app.scopes, "a refused request reaches nobody"
        assert dict(sent[0]["headers"])[b"content-length"] == str(len(answer)).encode()
        return sent[0]["status"], json.loads(answer), app
    return (sent[0]["status"] if sent else 0), answer, app


def chat(*contents: Any, role: str = "user") -> dict[str, Any]:
    return {"model": "m", "stream": True, "messages": [{"role": role, "content": content} for content in contents]}


@pytest.mark.parametrize("cuts", [1, 3])
def test_a_plain_request_arrives_as_it_was_and_the_stream_goes_back(cuts: int) -> None:
    request = json.dumps(chat(CLEAN, CLEAN), indent=3).encode() + b"\n "
    status, answer, app = ask(request, cuts=cuts)
    assert (status, answer, app.body) == (200, b"ab", request)
    assert [m["type"] for m in app.messages] == ["http.request"] * cuts + ["http.disconnect"]
    assert app.messages[-1]["last"], "what comes after the body is the server's own"


@pytest.mark.parametrize(
    ("request_", "path", "param", "index"),
    [
        (chat(CLEAN, f"{SECRET}"), "/v1/chat/completions", "messages[1]", 1),
        (
            chat([{"type": "image_url"}, {"type": "text", "text": SECRET}]),
            "/proxy/v1/chat/completions/",
            "messages[0]",
            0,
        ),
        ({"prompt": SECRET}, "/v1/completions", "prompt[0]", 0),
        ({"prompt": [CLEAN, SECRET]}, "/v1/completions", "prompt[1]", 1),
        ({"input": SECRET}, "/v1/responses", "input[0]", 0),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": SECRET}]}]},
            "/v1/responses",
            "input[0]",
            0,
        ),
        ({"input": [{"type": "input_text", "text": SECRET}]}, "/v1/responses", "input[0]", 0),
        ({"input": [{"content": SECRET}]}, "/v1/responses", "input[0]", 0),
    ],
)
def test_a_flagged_message_is_answered_with_its_worst_part(request_: Any, path: str, param: str, index: int) -> None:
    status, answer, _ = ask(request_, path)
    assert status == 400
    error = answer["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "obfuscated_prompt", param)
    assert error["cpt"] < error["threshold"] == 3.0
    worst = error["worst_span"]
    assert worst["message"] == index
    assert SECRET[worst["start"] : worst["end"]].startswith(worst["text"])
    assert 0 < len(worst["text"]) <= 120


@pytest.mark.parametrize(
    "request_",
    [
        chat(SECRET, role="assistant"),
        chat(None, 3, [], [{"type": "image_url", "text": SECRET}]),
        {"messages": "no list"} | {"prompt": None},
        {"messages": [3, None, [SECRET]]},
        [SECRET],
        SECRET,
        b'{"messages": [{"role": "user", "content": "' + SECRET.encode() + b'"',
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_what_is_no_users_message_or_no_json_goes_through(request_: Any) -> None:
    status, _, app = ask(request_)
    assert status == 200
    assert app.body == (request_ if isinstance(request_, bytes) else json.dumps(request_).encode())


def test_roles_and_paths() -> None:
    assert ask(chat(SECRET, role="tool"), roles=("user", "tool"))[0] == 400
    assert ask(chat(SECRET), "/v1/embeddings")[0] == 200
    assert ask(chat(SECRET), "/v1/embeddings", paths=("/embeddings",))[0] == 400
    assert ask(chat(SECRET), method="GET")[0] == 200


def test_prompts_of_token_ids_are_refused_unless_allowed() -> None:
    for prompt in ([1, 2, 3], [[1, 2], [3]]):
        status, answer, _ = ask({"prompt": prompt}, "/v1/completions")
        assert (status, answer["error"]["code"]) == (400, "token_ids_not_checked")
        assert ask({"prompt": prompt}, "/v1/completions", allow_token_ids=True)[0] == 200


def test_large_bodies_are_refused_before_they_are_read_to_the_end() -> None:
    status, answer, _ = ask(chat(CLEAN * 100), cuts=10, max_bytes=1000)
    assert (status, answer["error"]["code"]) == (413, "request_too_large")
    body = json.dumps(chat(CLEAN)).encode()
    assert ask(body, max_bytes=len(body))[0] == 200
    assert ask(body, max_bytes=len(body) - 1)[0] == 413


def test_lone_surrogates_are_answered() -> None:
    status, answer, _ = ask(b'{"messages": [{"role": "user", "content": "half \\ud83d"}]}')
    assert (status, answer["error"]["code"]) == (400, "invalid_text")


def test_a_request_that_breaks_off_reaches_nobody() -> None:
    app, sent = App(), []
    left = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return left.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/responses"}
    asyncio.run(CPTMiddleware(app, FILTER)(scope, receive, send))
    assert (app.scopes, sent) == ([], [])


@pytest.mark.parametrize("kind", ["lifespan", "websocket"])
def test_other_connections_pass(kind: str) -> None:
    app, sent = App(), []

    async def receive() -> Any:
        raise AssertionError("nothing is read")

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(CPTMiddleware(app, FILTER)({"type": kind, "path": "/v1/responses"}, receive, send))
    assert sent == [{"type": f"{kind}.seen"}]


def test_bad_settings_are_refused() -> None:
    with pytest.raises(LimitError, match="max_bytes = 0"):
        CPTMiddleware(App(), FILTER, max_bytes=0)
    with pytest.raises(LimitError, match="at least one role"):
        CPTMiddleware(App(), FILTER, roles=())


def test_a_real_server_answers_400_with_the_worst_span_and_lets_the_rest_through() -> None:
    async def endpoint(scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(CPTMiddleware(endpoint, FILTER), lifespan="off", log_level="error", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:

        def post(body: Any) -> tuple[int, Any]:
            link = http.client.HTTPConnection(*listener.getsockname(), timeout=30)
            link.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
            answer = link.getresponse()
            return answer.status, json.loads(answer.read())

        assert post(chat(CLEAN)) == (200, chat(CLEAN))
        status, answer = post(chat(CLEAN, SECRET))
        worst = answer["error"]["worst_span"]
        assert (status, answer["error"]["code"]) == (400, "obfuscated_prompt")
        assert worst["message"] == 1
        assert SECRET[worst["start"] : worst["end"]].startswith(worst["text"])
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()
