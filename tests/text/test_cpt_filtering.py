"""The filter: verdicts, spans, thresholds by script, and what is refused."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.text import vocabularies
from tokenmill import corpora
from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.text import OBFUSCATORS, Calibration, CPTFilter, FlaggedPromptError, cpt
from tokenmill.text import _scripts as scripts
from tokenmill.text._char_lengths import CharCounter, CharLengths
from tokenmill.text._cpt_calibration import Group
from tokenmill.text._cpt_windows import TokenBatch, collapse, merged, pieces, to_raw
from tokenmill.text.cpt_filtering import caesar

CLEAN = "The committee met on Tuesday to discuss the new library, and everybody agreed that it should open in spring."
SECRET = OBFUSCATORS["base64"].encode("please tell me everything about it and then some more of it")


@cache
def prose() -> list[str]:
    """English paragraphs in an order that says nothing."""
    texts = [text for record in corpora.load("python-reference").records for text in record.text.split("\n\n")]
    flat = [" ".join(text.split()) for text in texts]
    found = [text for text in flat if len(text) >= 60 and text[0].isupper() and text.endswith((".", ":"))]
    random.Random(1).shuffle(found)
    return found


@cache
def fitted() -> CPTFilter:
    return CPTFilter(vocabularies.cl100k()).calibrate(prose()[:900], fpr=0.02)


pytestmark = pytest.mark.filterwarnings("ignore:CPTFilter.calibrate")


def test_plain_passes_and_encodings_do_not() -> None:
    found = fitted().flag(CLEAN)
    assert (found.flagged, found.reason, found.script, found.spans) == (False, "ok", "latin", ())
    for name in ("base64", "base32", "leet", "spaced", "zero-width", "fullwidth", "caesar-3"):
        verdict = fitted().flag(OBFUSCATORS[name].encode(CLEAN))
        assert verdict.flagged, name
        assert verdict.cpt is not None
        assert (verdict.threshold is None) == (verdict.script == "structured")


def test_the_hidden_part_is_found_in_the_raw_text() -> None:
    text = f"{CLEAN}\n\n\n   {SECRET}\t\t {CLEAN}"
    verdict = fitted().flag(text)
    assert verdict.flagged
    assert verdict.reason == "windows with too few characters per token"
    assert verdict.worst_span is not None
    start, stop = text.index(SECRET), text.index(SECRET) + len(SECRET)
    assert start <= verdict.worst_span.start < verdict.worst_span.stop <= stop
    assert verdict.worst_span.tokens == 10
    (span,) = verdict.spans
    assert span[0] < stop
    assert span[1] > start
    assert text[span[0] : span[1]].strip()
    (plain,) = fitted().flag(collapse(text)).spans
    assert collapse(text[span[0] : span[1]]) == collapse(text)[plain[0] : plain[1]].strip()


def test_a_short_run_is_let_through_where_a_long_one_is_asked_for() -> None:
    text = f"{CLEAN} {SECRET} {CLEAN}"
    assert fitted().flag(text).flagged
    assert not replace(fitted(), min_span=len(text)).flag(text).flagged
    assert replace(fitted(), min_span=40).flag(text).flagged


def test_blanks_do_not_raise_the_score() -> None:
    hidden = caesar(7).encode(CLEAN)
    padded = hidden.replace(" ", " " * 60) + "\n" * 500
    assert (cpt(padded, vocabularies.cl100k()) or 0) > (fitted().flag(hidden).threshold or 0)
    assert fitted().score(padded) == fitted().score(hidden)
    assert fitted().flag(padded).flagged


@pytest.mark.prop("cpt-filtering", 6)
def test_a_higher_threshold_only_adds() -> None:
    texts = [*prose()[:100], *(OBFUSCATORS["rot13"].encode(text) for text in prose()[:100])]
    before = np.zeros(len(texts), dtype=bool)
    for threshold in (0.5, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 9.0):
        now = CPTFilter(vocabularies.cl100k(), threshold=threshold).decide(texts).flagged
        assert (now | ~before).all()
        before = now
    assert before.mean() > 0.9
    exact = CPTFilter(vocabularies.cl100k()).score(CLEAN)
    assert exact is not None
    assert not CPTFilter(vocabularies.cl100k(), threshold=exact).flag(CLEAN).flagged
    assert CPTFilter(vocabularies.cl100k(), threshold=exact + 1e-9).flag(CLEAN).flagged


@pytest.mark.prop("cpt-filtering", 9)
def test_a_verdict_does_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*prose()[:30], SECRET, "", "  ", CLEAN + SECRET, *vocabularies.corpus(2, 30), *OBFUSCATORS]
    alone = [fitted().flag(text) for text in texts]
    assert fitted().flag_batch(texts) == alone
    assert fitted().flag_batch(texts[::-1]) == alone[::-1]
    monkeypatch.setattr("tokenmill.text.cpt_filtering._BATCH_CHARS", 500)
    assert fitted().flag_batch(texts) == alone
    assert fitted().predicate(texts) == [not verdict.flagged for verdict in alone]
    assert fitted().predicate(texts[0]) is not alone[0].flagged
    scores = fitted().score_batch(texts)
    assert scores.dtype == np.float64
    assert scores.tolist() == [np.inf if v.cpt is None else v.cpt for v in alone]


def test_reasons() -> None:
    made = fitted()
    assert (made.flag("").reason, made.flag("").cpt, made.flag(" \n").reason) == ("empty", None, "empty")
    assert made.flag("xQ9zK").reason == "too short"
    assert made.score("") is None
    numbers = made.flag("1234 5678 9012 3456 7890 {}[]::")
    assert (numbers.flagged, numbers.script) == (False, "structured")
    assert numbers.reason.startswith("structured")
    assert replace(made, structured="flag").flag("1234 5678 9012 3456").flagged
    russian = made.flag("Съешь же ещё этих мягких французских булок")
    assert (russian.flagged, russian.reason, russian.threshold) == (False, "no threshold for the script cyrillic", None)


class Dropping:
    """A tokenizer that drops everything but letters."""

    def encode(self, text: str) -> list[int]:
        return [1 for c in text if c.isalpha()]


def test_a_text_without_tokens_is_flagged() -> None:
    verdict = CPTFilter(Dropping(), threshold=0.5, windows=()).flag("\x01" * 12)
    assert (verdict.flagged, verdict.reason, verdict.cpt) == (True, "no tokens produced", None)


def test_scripts_have_thresholds_of_their_own() -> None:
    lines = [r.text for r in corpora.load("multilingual-lines").records if r.kind in ("chinese", "japanese", "korean")]
    one = CPTFilter(vocabularies.o200k(), threshold=3.1)
    assert one.decide(lines).flagged.all()
    ours = CPTFilter(vocabularies.o200k()).calibrate([*prose()[:400], *lines[::2]], fpr=0.02)
    assert ours.decide(lines[1::2]).flagged.mean() <= 0.05
    # A quotation in another script is judged by that script.
    assert not ours.flag(f"{CLEAN} {lines[0]} {CLEAN}").flagged
    assert ours.flag(f"{CLEAN} {SECRET} {CLEAN}").flagged


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("plain words", "latin"),
        ("", "latin"),
        ("Съешь же French булок", "cyrillic"),
        ("天地玄黃，宇宙洪荒", "han"),
        ("東京都の天気は晴れです", "japanese"),
        ("키스의 고유조건은", "hangul"),
        ("Ξεσκεπάζω", "greek"),
        ("نص حكيم", "arabic"),
        ("דג סקרן", "hebrew"),
        ("ऋषियों को", "devanagari"),
        ("เป็นมนุษย์", "thai"),
        ("ქართული ენა", "other"),
        ("ｆｕｌｌ", "latin"),
        ("p\u200bl\u200ba\u200bi\u200bn\u200b\u200b\u200b\u200b", "latin"),
        ("12 34 ab", "structured"),
        ("ab12", "latin"),
        ('{"a": 1}', "structured"),
        ("👍👍👍", "structured"),
    ],
)
def test_script_classes(text: str, script: str) -> None:
    assert scripts.script(text) == script
    both = scripts.text_classes([text, "Съешь", text])
    assert [scripts.SCRIPTS[i] for i in both] == [script, "cyrillic", script]


def test_spans_of_the_collapsed_text_are_found_in_the_text() -> None:
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice("ab é天\u3000\n\t ") for _ in range(rng.randrange(1, 30)))
        flat = collapse(text)
        if not flat:
            continue
        start = rng.randrange(len(flat))
        stop = rng.randrange(start + 1, len(flat) + 1)
        ((a, b),) = to_raw(text, [(start, stop)])
        assert collapse(text[a:b]) == collapse(flat[start:stop])
        assert 0 <= a <= b <= len(text)
        assert text[b - 1].isspace() == (flat[stop - 1] == " ")
    assert to_raw("  a   b ", [(0, 1), (0, 2), (2, 3)]) == [(2, 3), (2, 4), (6, 7)]
    assert merged([(5, 9), (0, 3), (3, 4), (8, 12)]) == [(0, 4), (5, 12)]


def test_long_lines_are_cut_at_blanks_and_scored_as_one_text() -> None:
    text = " ".join(prose()[:120])
    found = pieces(text, 1000)
    assert "".join(found) == text
    assert max(map(len, found)) <= 1000
    assert all(part.startswith(" ") for part in found[1:])
    assert "".join(pieces("x" * 2500, 1000)) == "x" * 2500
    whole, cut = fitted(), replace(fitted(), chunk_chars=1000)
    one, other = whole.score(text), cut.score(text)
    assert one is not None
    assert other == pytest.approx(one, rel=1e-3)
    hidden = f"{text[:30000]} {SECRET} {text[30000:]}"
    assert cut.flag(hidden).worst_span == whole.flag(hidden).worst_span
    batch = [text, "", CLEAN, hidden]
    assert cut.flag_batch(batch) == [cut.flag(one) for one in batch]
    assert replace(cut, windows=()).score_batch(batch).tolist() == cut.score_batch(batch).tolist()


def test_guard() -> None:
    seen: list[Any] = []

    def call(prompt: Any, **settings: Any) -> str:
        seen.append((prompt, settings))
        return "answer"

    guarded = fitted().guard(call)
    assert guarded(CLEAN, max_new_tokens=3) == "answer"
    chat = [{"role": "system", "content": SECRET}, {"role": "user", "content": [{"type": "text", "text": CLEAN}]}]
    assert guarded(chat) == "answer"
    assert seen == [(CLEAN, {"max_new_tokens": 3}), (chat, {})]
    bad = [*chat, {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": SECRET}]}]
    for prompt, index in ((SECRET, 0), ([CLEAN, SECRET], 1), (bad, 2), ([chat, bad], 1)):
        with pytest.raises(FlaggedPromptError, match=f"message {index} is flagged") as caught:
            guarded(prompt)
        assert caught.value.verdict.flagged
        assert caught.value.index == index
    assert fitted().guard(call, refusal="no")(bad) == "no"
    with pytest.raises(FlaggedPromptError, match="message 0"):
        fitted().guard(call, roles=("system",))(chat)
    assert len(seen) == 2
    with pytest.raises(LimitError, match="type of prompt"):
        guarded(7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": float("nan")}, "threshold = nan"),
        ({"threshold": float("inf")}, "threshold = inf"),
        ({"windows": (0,)}, "windows = 0"),
        ({"windows": (2.5,)}, "windows = 2.5"),
        ({"min_chars": -1}, "min_chars = -1"),
        ({"chunk_chars": 1}, "chunk_chars = 1"),
        ({"structured": "deny"}, "structured = 'deny'"),
        ({"threshold": 3.0, "calibration": Calibration(fingerprint="x", fpr=0.01)}, "None beside a calibration"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LimitError, match=message):
        CPTFilter(vocabularies.cl100k(), **settings)


def test_another_tokenizer_is_refused() -> None:
    ours, theirs = fitted().fingerprint, CPTFilter(vocabularies.qwen()).fingerprint
    message = f"threshold was calibrated for vocabulary {ours}, tokenizer has {theirs}"
    with pytest.raises(LimitError, match=message):
        CPTFilter(vocabularies.qwen(), calibration=fitted().calibration)


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="there is no threshold"):
        CPTFilter(vocabularies.cl100k()).flag(CLEAN)
    with pytest.raises(LimitError, match="Decode it first"):
        fitted().flag_batch([CLEAN, b"bytes"])  # type: ignore[list-item]
    with pytest.raises(LimitError, match="a list of texts"):
        fitted().flag_batch(CLEAN)
    with pytest.raises(LimitError, match="surrogates"):
        fitted().flag("half \ud83d of a pair")
    with pytest.raises(LimitError, match="no texts"):
        CPTFilter(vocabularies.cl100k()).calibrate(["", "short"])
    with pytest.raises(LimitError, match=r"fpr = 1\.0, but it must be in \(0, 1\)"):
        CPTFilter(vocabularies.cl100k()).calibrate([CLEAN], fpr=1.0)


def test_windows_of_digits_and_signs_are_held_to_a_threshold_only_when_asked() -> None:
    plain = CPTFilter(vocabularies.cl100k())
    groups = {"structured": Group(9, 9.0, 0.0, 0.0, 0.0, windows={10: 5.0}), "latin": Group(9, 1.0, 0.0, 0.0, 0.0)}
    limits = Calibration(fingerprint=plain.fingerprint, fpr=0.01, groups=groups)
    made = replace(plain, calibration=limits)
    text = f"{CLEAN} {'12 34 {} [] 56 78 90 ' * 6} {CLEAN} {CLEAN}"
    assert made.flag(text).script == "latin"
    assert not made.flag(text).flagged
    assert replace(made, structured="threshold").flag(text).flagged


class Stub(CharCounter):
    """Drops the first text, as a tokenizer without byte tokens may."""

    def __init__(self) -> None: ...

    def lengths(self, texts: Any) -> CharLengths:
        return CharLengths(np.array([2, 2]), np.array([0, 0, 1, 2]))


def test_a_text_without_tokens_does_not_move_the_scripts_of_the_next() -> None:
    batch = TokenBatch(["булок", "ab", "天地"], Stub(), 100)
    assert [scripts.SCRIPTS[i] for i in batch.script] == ["cyrillic", "latin", "han"]
    assert [scripts.SCRIPTS[i] for i in batch.classes(np.array([0, 1]), 1)] == ["latin", "han"]


def test_a_script_without_texts_has_no_threshold_even_where_its_windows_have_one() -> None:
    group = Group(0, 0.0, 0.0, 0.0, 0.0, windows={10: 1.0}, tau=0.0)
    made = Calibration(fingerprint="x", fpr=0.01, groups={"han": group})
    assert made.windows == (10,)
    assert made.window_limits(10)[scripts.SCRIPTS.index("han")] == 1.0
    assert np.isinf(made.window_limits(20)).all()
