"""Endpoints: a real server on the loopback that answers, fails, lies, dawdles and hangs up."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.probe.loopback import serving
from tests.probe.solvers import solving
from tokenmill.errors import LimitError, StoppedError
from tokenmill.probe import Endpoint, read_answers
from tokenmill.probe._endpoint import EndpointError
from tokenmill.probe.needle_threading import Example, run, small

FAST: dict[str, Any] = {"wait": 0.0, "timeout": 5.0}
SAME: dict[str, Any] = {"max_new_tokens": 100}
PASSING = ("500", "503 0", "429", "408", "garbage", "deep", "list", "no choices", "number", "cut", "close")


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return list(small().suite())


@pytest.mark.parametrize("mode", ["chat", "completion"])
def test_an_endpoint_is_asked_greedily(mode: Any, examples: list[Example]) -> None:
    with serving(solving(examples)) as server:
        found = run(Endpoint(server.url, "served", mode=mode, **FAST), None, examples)
    assert [a.correct for a in found] == [1.0] * len(examples)
    assert {(a.prompt_tokens, a.tokens, a.cut) for a in found} == {(7, 3, False)}
    assert set(server.paths) == {f"/v1/{'chat/' if mode == 'chat' else ''}completions"}
    for body, example in zip(server.bodies, examples, strict=True):
        assert (body["model"], body["temperature"]) == ("served", 0)
        assert body["max_tokens"] >= 100
        said = body["messages"] if mode == "chat" else body["prompt"]
        assert said == ([{"role": "user", "content": example.prompt}] if mode == "chat" else example.prompt)
    assert server.keys == [None] * len(examples)


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_is_tried_again(fault: str, examples: list[Example]) -> None:
    with serving(solving(examples), fault, fault) as server:
        (found,) = run(Endpoint(server.url, "served", retries=2, **FAST), None, examples[:1])
    assert found.correct == 1.0
    assert len(server.bodies) == 3


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_stays_stops_the_run_and_keeps_what_there_is(
    fault: str, examples: list[Example], tmp_path: Path
) -> None:
    file = tmp_path / "answers.jsonl"
    with serving(solving(examples), "good", "good", always=fault) as server:
        endpoint = Endpoint(server.url, "served", retries=1, **FAST)
        with pytest.raises(StoppedError, match=r"after 2 examples: .*\(2 tries\)") as stopped:
            run(endpoint, None, examples, out=file)
        assert len(server.bodies) == 4, "retries have a bound"
        assert stopped.value.partial == read_answers(file)
        server.always = ""
        found = run(endpoint, None, examples, out=file)
        assert len(server.bodies) == 4 + len(examples) - 2, "and the run goes on where it stopped"
    assert [a.correct for a in found] == [1.0] * len(examples)


@pytest.mark.parametrize("fault", ["slow", "drip"])
def test_a_response_has_one_deadline_however_it_comes(fault: str, examples: list[Example]) -> None:
    with serving(solving(examples), always=fault) as server:
        began = time.monotonic()
        with pytest.raises(StoppedError, match=r"no whole response in 0\.3 seconds"):
            run(Endpoint(server.url, "served", retries=0, timeout=0.3), None, examples[:1])
        assert time.monotonic() - began < 1.2


def test_a_prompt_that_is_refused_is_an_error_of_that_example(examples: list[Example], tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    with serving(solving(examples), "good", "400", "413") as server:
        endpoint = Endpoint(server.url, "served", **FAST)
        found = run(endpoint, None, examples, out=file)
        assert [a.error for a in found[:3]] == ["", "HTTP 400 fault 400", "HTTP 413 fault 413"]
        assert [a.correct for a in found[3:]] == [1.0] * (len(examples) - 3)
        run(endpoint, None, examples, out=file)
    assert len(server.bodies) == len(examples), "a refused prompt is not sent again"


@pytest.mark.parametrize("code", ["401", "403", "404", "302"])
def test_what_concerns_every_prompt_stops_at_once(code: str, examples: list[Example]) -> None:
    with (
        serving(solving(examples), always=code) as server,
        pytest.raises(StoppedError, match=f"HTTP {code}"),
    ):
        run(Endpoint(server.url, "served", **FAST), None, examples)
    assert len(server.bodies) == 1
    assert server.paths == ["/v1/chat/completions"], "redirects are not followed"


def test_nobody_there(examples: list[Example]) -> None:
    with serving(solving(examples)) as server:
        url = server.url
    with pytest.raises(StoppedError, match=r"ConnectionRefusedError.*\(2 tries\)"):
        run(Endpoint(url, "served", retries=1, **FAST), None, examples)


def test_a_server_may_ask_for_patience(examples: list[Example]) -> None:
    with serving(solving(examples), "503 0.4") as server:
        began = time.monotonic()
        run(Endpoint(server.url, "served", **FAST), None, examples[:1])
    assert 0.4 <= time.monotonic() - began < 3


@pytest.mark.parametrize("fault", ["", "400", "401", "500"])
def test_the_key_is_sent_and_stands_nowhere(
    fault: str, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sesame-5f2")
    monkeypatch.setenv("TOKENMILL_API_KEY", "another")
    with serving(solving(examples), always=fault) as server:
        endpoint = Endpoint(server.url, "served", key_variable="MY_KEY", retries=0, **FAST)
        said = repr(endpoint) + endpoint.name
        try:
            said += repr(run(endpoint, None, examples[:2], out=tmp_path / "a.jsonl"))
        except StoppedError as error:
            said += f"{error!r} {error} {error.__cause__!r} {error.partial}"
    assert set(server.keys) == {"Bearer sesame-5f2"}
    said += "".join(p.read_text() for p in tmp_path.iterdir())
    assert "sesame" not in said
    assert "another" not in said
    if fault in ("400", "401"):
        assert "***" in said, "the server echoed it"


def test_a_key_that_no_header_can_hold_is_not_printed(examples: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(solving(examples)) as server:
        monkeypatch.setenv("TOKENMILL_API_KEY", "sesame\r\nX-Other: 1")
        with pytest.raises(StoppedError, match="TOKENMILL_API_KEY") as stopped:
            run(Endpoint(server.url, "served", **FAST), None, examples[:1])
        assert "sesame" not in f"{stopped.value} {stopped.value.__cause__!r}"
        monkeypatch.setenv("TOKENMILL_API_KEY", "sesame\n")
        run(Endpoint(server.url, "served", **FAST), None, examples[:1])
    assert server.keys == ["Bearer sesame"]


def test_what_others_answered_is_kept_when_one_request_fails(examples: list[Example], tmp_path: Path) -> None:
    solve, broken = solving(examples), examples[1].prompt

    def no_text(prompt: str) -> Any:
        return 5 if prompt == broken else solve(prompt)

    with serving(no_text) as server, pytest.raises(StoppedError, match="after 3 examples") as stopped:
        run(Endpoint(server.url, "m", workers=4, retries=0), None, examples, out=tmp_path / "a.jsonl", **SAME)
    assert [a.id for a in stopped.value.partial] == [0, 2, 3]
    assert read_answers(tmp_path / "a.jsonl") == stopped.value.partial


def test_requests_at_the_same_time_come_back_in_order(examples: list[Example]) -> None:
    solve = solving(examples)

    def uneven(prompt: str) -> str:
        time.sleep(0.05 * (len(prompt) % 3))
        return solve(prompt)

    with serving(uneven) as server:
        found = run(Endpoint(server.url, "served", workers=4, **FAST), None, examples)
    assert [a.id for a in found] == [e.id for e in examples]
    assert [a.correct for a in found] == [1.0] * len(examples)


def test_an_answer_without_text_or_cut_at_its_length(examples: list[Example]) -> None:
    with serving(lambda prompt: None, finish="length") as server:
        (found,) = run(Endpoint(server.url, "served", **FAST), None, examples[:1])
    assert (found.text, found.error, found.cut, found.correct) == ("", "", True, 0.0)
    with serving(lambda prompt: "x") as server:
        run(Endpoint(server.url, "m", length_field="max_completion_tokens", **FAST), None, examples[:1])
    assert "max_tokens" not in server.bodies[0]
    assert server.bodies[0]["max_completion_tokens"] == 100


def test_the_server_names_its_models() -> None:
    with serving(lambda prompt: "", models=("a", "b")) as server:
        assert Endpoint(server.url).served() == ["a", "b"]
    with pytest.raises(EndpointError, match="tries"):
        Endpoint(server.url, retries=1, **FAST).served()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"url": "127.0.0.1:8000"}, "url"),
        ({"url": "ftp://a/v1"}, "url"),
        ({"url": "http:///v1"}, "url"),
        ({"url": "http://a:port/v1"}, "url"),
        ({"url": "http://a/v1?key=secret"}, "url"),
        ({"mode": "talk"}, "mode"),
        ({"length_field": "n"}, "length_field"),
        ({"retries": -1}, "retries = -1"),
        ({"workers": 0}, "workers = 0"),
        ({"timeout": 0}, "timeout = 0"),
        ({"timeout": float("nan")}, "timeout"),
        ({"wait": -1}, "wait = -1"),
    ],
)
def test_bad_endpoints_are_refused_by_name(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(LimitError, match=words):
        Endpoint(**{"url": "http://127.0.0.1:1/v1", **bad})


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(LimitError, match="TOKENMILL_API_KEY") as refused:
        Endpoint("http://me:sesame@host/v1")
    assert "sesame" not in str(refused.value)
    assert json.dumps(str(refused.value))
