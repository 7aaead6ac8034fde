"""The task `bytes`: cuts, laws and completions, on the small Python model that ships."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenmill import bench, laws, models
from tokenmill.bench.task import Item, MethodSpec
from tokenmill.bench.tasks import _byte_probes as probes
from tokenmill.bench.tasks.bytes import Options, Task
from tokenmill.decode import ByteLM
from tokenmill.errors import LimitError, UnsupportedError


@pytest.fixture(autouse=True)
def _laws_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The laws have tests of their own."""
    monkeypatch.setattr(laws, "each", lambda slug: iter(()))


def task(**options: Any) -> Task:
    return Task(Options(**{"model": "python-target", "dtype": "float32", "packed": False, "limit": 3, **options}))


@pytest.fixture(scope="module")
def lm() -> ByteLM:
    return ByteLM(*models.load("python-target", dtype="float32"))


def test_cuts_are_where_they_say(lm: ByteLM) -> None:
    made = task(limit=12)
    assert made.kinds() == ["code, mid-token", "code, boundary"]
    for kind in made.kinds():
        items = made.items(kind)
        assert len({item.id for item in items}) == 12
        for item in items:
            ends, at = set(), 0
            for token in lm.view.encode(item.content.before + item.content.rest[:100]):
                at += len(lm.view.token_bytes[token] or b"")
                ends.add(at)
            assert (len(item.content.before) in ends) == kind.endswith("boundary")
            assert len(item.content.before) <= 1200
    assert [i.id for i in task(limit=12).items("code, mid-token")] == [i.id for i in made.items("code, mid-token")]


@pytest.mark.prop("byte-level-probabilities", 7)
def test_nothing_is_biased_where_no_token_reaches_past_the_cut(lm: ByteLM) -> None:
    made = task(cut="closed", limit=4, prompt_bytes=100)
    whole = ByteLM(lm.model, lm.tokenizer, mode="all", lookback=8, beam=32)
    for item in made.items("code, closed"):
        x = item.content.before
        assert lm.start(x).straddling <= 1e-3
        ours, theirs = (m.next_byte_logprobs(x).exp() for m in (whole, probes.tokens_as_they_are(lm)))
        assert float((ours - theirs).abs().max()) < 2e-3


def test_the_laws_at_a_cut(tmp_path: Path) -> None:
    lines = bench.run(task(limit=6), ["healing", "byte-level-probabilities"], tmp_path)
    found = {(line.method, line.data["kind"]): line for line in lines}
    assert all(line.status == "ok" for line in lines), [line.message for line in lines]
    plain, exact = (found[m, "code, mid-token"] for m in ("plain", "byte-level-probabilities"))
    assert exact.quality["bits"] < plain.quality["bits"]
    assert exact.cost["leak"] < 0.5
    assert plain.cost["model_calls"] == 1
    assert exact.cost["model_calls"] == 2


def test_the_rest_of_the_line(tmp_path: Path) -> None:
    made = task(measure="complete", limit=2, new_bytes=12, prompt_bytes=200)
    assert made.kinds() == ["code, mid-token"]
    methods = ["healing", "transformers-healing", "byte-level-probabilities"]
    lines = bench.run(made, methods, tmp_path)
    for line in lines:
        assert line.status == "ok", line.message
        assert 0 <= line.quality["similarity"] <= 1
    assert 0 < lines[-1].cost["rows_per_byte"] <= 1.3
    assert "rows_per_byte" not in lines[0].cost


def test_a_baseline_that_fails_on_a_prompt_has_no_answer_there(lm: ByteLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any, **__: Any) -> None:
        raise KeyError((578,))

    monkeypatch.setattr(lm.model, "generate", lost)
    item = Item("a", "code", probes.Cut(b"import o", b"s\n"))
    theirs = probes.TokenCompletion(lm, 6, "transformers", None).run(item)
    assert (theirs.output, theirs.counts["failed"]) == (b"", 1.0)
    with pytest.raises(KeyError):
        probes.TokenCompletion(lm, 6, "ours", None).run(item)


def test_two_models(tmp_path: Path) -> None:
    made = task(other="python-draft", cut="mid-token", limit=2)
    lines = bench.run(made, ["other", "ensemble", "byte-level-probabilities"], tmp_path)
    bits = {line.method: line.quality["bits"] for line in lines}
    assert bits["ensemble"] <= min(bits["other"], bits["byte-level-probabilities"]) + 1 + 1e-9


def test_healing_keeps_the_last_token_open(lm: ByteLM) -> None:
    x = b"def read(path):\n    ret"
    ids = lm.view.encode(x)
    last = lm.view.token_bytes[ids[-1]] or b""
    with torch.no_grad():
        rows = lm.model(torch.tensor([[*lm.head, *ids]])).logits[0].double().log_softmax(-1)
    masses = torch.zeros(258, dtype=torch.float64)
    for token, data in enumerate(lm.view.token_bytes.tokens):
        if data and data.startswith(last) and len(data) > len(last):
            masses[data[len(last)]] += rows[-2, token].exp()
        slot = data[0] if data else 256
        masses[slot] += (rows[-2, ids[-1]] + rows[-1, token]).exp()
    torch.testing.assert_close(probes.healed(lm, x).logprobs().exp(), masses / masses.sum(), rtol=0, atol=1e-4)


def test_healed_completion_may_lengthen_the_last_token(lm: ByteLM) -> None:
    item = Item("a", "code", probes.Cut(b"import os\nimpor", b"t sys\n"))
    healed = probes.TokenCompletion(lm, 6, "ours", None).run(item)
    ids = lm.view.encode(item.content.before)
    assert not lm.view.is_valid([*ids, *lm.view.encode(healed.output)]), "the last token of the prompt has grown"
    plain = probes.TokenCompletion(lm, 6, "", None).run(item)
    assert len(plain.output) <= 6
    assert plain.counts["positions"] > 4 + plain.counts["model_calls"] - 1


def test_bad_requests() -> None:
    made = task()
    for text, words in (
        ("token-recycling", "task generate"),
        ("ensemble", "--other"),
        ("transformers-healing", "complete"),
        ("byte-level-probabilities:mode=most", "most"),
        ("byte-level-probabilities:beam=0", "beam"),
        ("nothing", "nothing"),
    ):
        with pytest.raises((LimitError, UnsupportedError), match=words):
            made.check(MethodSpec.parse(text))
    with pytest.raises(LimitError, match="limit"):
        Options(limit=0)
    assert math.isfinite(Options().prompt_bytes)
