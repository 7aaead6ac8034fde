"""Characters per token: exact for every vocabulary, whatever the text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from tests.text import vocabularies
from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.text import TokenBytes, cpt, window_cpt
from tokenmill.text._char_lengths import CharCounter, completed
from tokenmill.text._cpt_windows import TokenBatch
from tokenmill.text._scripts import SCRIPTS, script

TEXTS = vocabularies.corpus(5, 80)
VOCABULARIES = {
    "gemma": vocabularies.gemma_tokenizer,
    "python": vocabularies.python_target,
    "deepseek": vocabularies.deepseek,
    "mistral": vocabularies.mistral,
    "mistral-prepend": lambda: vocabularies.mistral("prepend"),
    "cl100k": vocabularies.cl100k,
    "o200k": vocabularies.o200k,
    "qwen": vocabularies.qwen,
}
BYTE_LEVEL = ("python", "deepseek", "cl100k", "o200k", "qwen")


def parts(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    found = CharCounter.of(tokenizer).lengths(texts)
    return [found.lengths[a:b].tolist() for a, b in zip(found.offsets, found.offsets[1:], strict=False)]


def slow(vocabulary: TokenBytes, text: str) -> list[int]:
    """Decode byte by byte and look which characters are complete."""
    data, found, before = b"", [], 0
    for i in vocabulary.encode(text):
        data += vocabulary.tokens[i] or b""
        done = next(len(data[: len(data) - k].decode()) for k in range(4) if _is_text(data[: len(data) - k]))
        found.append(done - before)
        before = done
    return found


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.prop("cpt-filtering", 1)
@pytest.mark.prop("cpt-filtering", 9)
@pytest.mark.parametrize("name", sorted(VOCABULARIES))
def test_lengths_sum_to_the_text_in_any_batch(name: str) -> None:
    tokenizer = VOCABULARIES[name]()
    counter = CharCounter.of(tokenizer)
    together = parts(tokenizer, TEXTS)
    assert [sum(lengths) for lengths in together] == [len(text) for text in TEXTS]
    assert min(min(lengths, default=0) for lengths in together) >= 0
    counts = counter.counts(TEXTS).tolist()
    assert [len(lengths) for lengths in together] == counts
    assert [parts(tokenizer, [text])[0] for text in TEXTS[:40]] == together[:40]
    assert parts(tokenizer, TEXTS[::-1]) == together[::-1]
    for text, m in zip(TEXTS, counts, strict=True):
        if text:
            value = cpt(text, tokenizer)
            assert value is not None
            assert value * m == pytest.approx(len(text), rel=1e-12)


@pytest.mark.prop("cpt-filtering", 1)
def test_a_score_is_not_that_of_parts_joined() -> None:
    tokenizer = vocabularies.o200k()
    counts = CharCounter.of(tokenizer).counts
    a, b, both = counts(["foo", "bar", "foobar"]).tolist()
    assert both != a + b
    emoji = "🏳️‍🌈👍🏽❤️☕️👩‍👩‍👧‍👦🇩🇪🇫🇷"
    whole = int(counts([emoji])[0])
    halves = [int(counts([emoji[:c], emoji[c:]]).sum()) for c in range(1, len(emoji))]
    assert any(half != whole for half in halves)


@pytest.mark.prop("cpt-filtering", 2)
@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_bytes_of_tokens_are_those_of_the_text_and_characters_belong_to_the_last_token(name: str) -> None:
    vocabulary = TokenBytes.of(VOCABULARIES[name]())
    for text, lengths in zip(TEXTS, parts(VOCABULARIES[name](), TEXTS), strict=True):
        assert int(vocabulary.lengths[vocabulary.encode(text)].sum()) == len(text.encode())
        assert lengths == slow(vocabulary, text)


@pytest.mark.parametrize("name", ["deepseek", "python", "gemma"])
def test_offsets_and_bytes_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = VOCABULARIES[name]()
    texts = [text for text in TEXTS if "\u2581" not in text]
    by_bytes = parts(tokenizer, texts)
    monkeypatch.setattr(CharCounter.of(tokenizer), "_changes", {"something else"})
    assert parts(tokenizer, texts) == by_bytes


def test_a_dummy_prefix_and_a_bar_in_the_text_are_no_characters() -> None:
    for tokenizer in (vocabularies.mistral(), vocabularies.mistral("prepend")):
        for text in ("hello world", " hello", "  two", "naïve 👩", "▁bar ▁ a", "x"):
            (lengths,) = parts(tokenizer, [text])
            assert sum(lengths) == len(text)
    assert parts(vocabularies.mistral(), ["hello world"])[0] == [4, 1, 6]


def test_offsets_with_gaps_and_shared_characters() -> None:
    def made(*pairs: tuple[int, int], n: int) -> list[int]:
        return completed(np.array(pairs, dtype=np.int64).reshape(-1, 2), n).tolist()

    assert made((0, 1), (0, 1), (0, 1), (1, 3), n=3) == [0, 0, 1, 2]
    assert made((1, 3), (5, 6), n=9) == [3, 6]
    assert made((0, 2), (1, 3), n=3) == [1, 2]
    assert made((0, 0), (0, 4), n=4) == [0, 4]
    assert made(n=0) == []


@pytest.mark.prop("cpt-filtering", 3)
@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_bounds(name: str) -> None:
    tokenizer = VOCABULARIES[name]()
    vocabulary = TokenBytes.of(tokenizer)
    # A token that is not text by itself holds at most as many characters as bytes.
    longest = max(len(token.decode(errors="replace")) for token in vocabulary.tokens if token)
    for text in filter(None, TEXTS):
        value = cpt(text, tokenizer)
        assert value is not None
        assert len(text) / len(text.encode()) <= value <= longest
        if text.isascii():
            assert value >= 1


@pytest.mark.prop("cpt-filtering", 4)
def test_special_tokens_count_neither_in_ids_nor_in_the_encoding() -> None:
    tokenizer = vocabularies.gemma_tokenizer()
    text = "The same text in a chat template or with a beginning and an end."
    plain = cpt(text, tokenizer)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) < len(tokenizer(text).input_ids)
    assert cpt(text, tokenizer, ids=tokenizer(text).input_ids) == plain
    assert cpt(text, tokenizer, ids=[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]) == plain
    assert cpt(text, tokenizer) == plain


def test_given_ids_are_used_as_they_are() -> None:
    tokenizer = vocabularies.cl100k()
    singles = [tokenizer.encode(c)[0] for c in "hello"]
    assert cpt("hello", tokenizer, ids=singles) == 1
    assert cpt("hello", tokenizer) == 5
    with pytest.raises(LimitError, match="special tokens"):
        cpt("hello", tokenizer, ids=[100257])


def test_special_tokens_in_a_text_are_text_and_truncation_does_not_cut_it() -> None:
    tokenizer = vocabularies.deepseek()
    text = "<｜begin▁of▁sentence｜> hello " * 50
    tokenizer.enable_truncation(4)
    try:
        assert int(CharCounter.of(tokenizer).counts([text])[0]) > 300
    finally:
        tokenizer.no_truncation()


@pytest.mark.prop("cpt-filtering", 5)
@given(text=st.text(alphabet="ab cdeé天👩\n1", min_size=1, max_size=60), window=st.integers(1, 70))
def test_windows(text: str, window: int) -> None:
    tokenizer = vocabularies.cl100k()
    (lengths,) = parts(tokenizer, [text])
    scores, spans = window_cpt(text, tokenizer, window)
    w = min(window, len(lengths))
    assert scores.tolist() == [sum(lengths[i : i + w]) / w for i in range(len(lengths) - w + 1)]
    assert scores.dtype == np.float64
    assert spans.dtype == np.int64
    assert spans.tolist() == [[sum(lengths[:i]), sum(lengths[: i + w])] for i in range(len(lengths) - w + 1)]
    if window >= len(lengths):
        assert scores.tolist() == [cpt(text, tokenizer)]
    assert window_cpt(text, tokenizer, 1)[0].min() == min(lengths)


@pytest.mark.prop("cpt-filtering", 5)
@pytest.mark.parametrize("top", [0.5, 1.0, 1.15, 1.5, 2.25, 30.0])
def test_low_windows_of_a_batch_are_those_of_each_text(top: float) -> None:
    texts = [
        "",
        "天地玄黃，宇宙洪荒。" * 3,
        "a-b-c-d-e-f-g " * 4,
        "ok",
        "Съешь же ещё этих мягких булок",
        "qzx vvk " * 9,
    ]
    batch = TokenBatch(texts, CharCounter.of(vocabularies.cl100k()), 10**6)
    limits = np.full(len(SCRIPTS), -np.inf)
    limits[[SCRIPTS.index("latin"), SCRIPTS.index("han")]] = top, top / 2
    for window in (1, 4, 10):
        wanted = []
        for i, text in enumerate(texts):
            for at in range(batch.offsets[i], batch.offsets[i + 1] - window + 1):
                start, stop = batch.span(i, at, at + window)
                limit = limits[SCRIPTS.index(script(text[start:stop]))]
                wanted += [at] if (stop - start) / window < limit else []
        assert batch.below(window, limits).tolist() == wanted


def test_tiktoken_is_as_its_ranks() -> None:
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257, b" the": 258}
    pattern = r" ?\w+|\s|[^\w\s]+"
    encoding = tiktoken.Encoding("toy", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<end>": 259})
    ours = TokenBytes.from_ranks(ranks, {"<end>": 259}, pattern)
    texts = ["then the theme", "naïve", "<end> x", ""]
    assert parts(encoding, texts) == parts(ours, texts)
    many = [f"{text} {i}" for i, text in enumerate(texts * 60)]  # so many go to threads
    assert parts(encoding, many) == parts(ours, many)
    assert CharCounter.of(encoding).fingerprint == CharCounter.of(ours).fingerprint


class Counting:
    """Knows nothing but `encode`."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [0] * add_special_tokens + [1] * len(text.split())


def test_an_object_with_encode_can_be_counted_but_not_measured() -> None:
    assert cpt("two words", Counting()) == 4.5
    with pytest.raises(UnsupportedError, match="windows="):
        window_cpt("two words", Counting(), 2)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (vocabularies.minilm, "keep blanks; this is WordPiece"),
        (lambda: TokenBytes.from_list([b"a"]), "bare vocabulary"),
        (lambda: object(), "object has no method encode"),
    ],
)
def test_tokenizers_that_cannot_be_used_are_refused(tokenizer: Callable[[], Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        cpt("text", tokenizer())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"text", "type of text = 'bytes', but it must be str. Decode it first."),
        (None, "type of text = 'NoneType'"),
        ("a\ud800b", r"text = 'U\+D800 at position 1', but it must be free of lone surrogates"),
    ],
)
def test_what_is_no_text_is_refused(text: Any, message: str) -> None:
    with pytest.raises(LimitError, match=message):
        cpt(text, vocabularies.cl100k())


@pytest.mark.parametrize("window", [0, -1, 2.0, True])
def test_windows_below_one_are_refused(window: Any) -> None:
    with pytest.raises(LimitError, match="window = "):
        window_cpt("text", vocabularies.cl100k(), window)


def test_the_empty_text_has_no_score() -> None:
    assert cpt("", vocabularies.cl100k()) is None
    assert [len(found) for found in window_cpt("", vocabularies.cl100k(), 3)] == [0, 0]


def test_fingerprints_tell_vocabularies_and_patterns_apart() -> None:
    names = {CharCounter.of(make()).fingerprint for make in VOCABULARIES.values()}
    assert len(names) >= len(VOCABULARIES) - 1  # where the dummy prefix is written makes no difference
    ranks = {bytes([i]): i for i in range(256)} | {b"of": 256, b" o": 257, b" of": 258}
    cut, uncut = TokenBytes.from_ranks(ranks, pattern=r"\w|\W"), TokenBytes.from_ranks(ranks)
    assert CharCounter.of(cut).fingerprint != CharCounter.of(uncut).fingerprint
