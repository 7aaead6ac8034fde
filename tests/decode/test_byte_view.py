from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from tests.text import vocabularies as real
from tests.text.test_merges import Rules, model_of, rules
from tests.text.views import TOY_MERGES, sample, spelled_by, toy, walk, wrong
from tokenmill.decode._byte_view import ByteTokenizerView
from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.text import TokenBytes

# The toy, exhaustively


def test_every_string_and_every_sequence_of_the_toy() -> None:
    view, tokenizer = toy(), model_of(TOY_MERGES)[1]
    for length in range(8):
        for letters in product("abc", repeat=length):
            text = "".join(letters)
            ids = tokenizer.encode(text).ids
            assert view.encode(text.encode()) == ids
            assert view.is_valid(ids)
            for v in range(len(view)):
                again = tokenizer.encode(text + (view.token_bytes[v] or b"").decode()).ids == [*ids, v]
                assert bool(view.valid_next(ids)[v]) == again
            if length <= 5:
                for sequence in spelled_by(view, text.encode()):
                    assert view.is_valid(sequence) == (list(sequence) == ids)


@given(rules(), st.text("abc", max_size=12), st.integers(0, 12))
def test_random_merges(merges: Rules, text: str, cut: int) -> None:
    view, tokenizer = toy(merges), model_of(merges)[1]
    ids = tokenizer.encode(text).ids
    assert view.encode(text.encode()) == ids
    assert wrong(view, ids, range(len(view))) == []
    for stop in range(len(ids)):  # prefix-closed
        assert view.is_valid(ids[:stop])
        assert view.valid_next(ids[:stop])[ids[stop]]
    head = view.encode(text[:cut].encode())
    assert view.extend(head, text[cut:].encode()) == ids


@pytest.mark.prop("byte-level-probabilities", 5)
@given(rules(), st.text("abc", min_size=1, max_size=7))
def test_covers_are_found_from_the_encodings_of_prefixes(merges: Rules, text: str) -> None:
    """Left contexts encode(x[:i]) and the tokens that may follow give every valid sequence that straddles the end."""
    view, x = toy(merges), text.encode()
    found = []
    for i in range(len(x)):
        left = view.encode(x[:i])
        low, high = view.trie.range(x[i:])
        mask = view.valid_next(left)
        found += [(*left, v) for v in view.trie.order[low:high].tolist() if mask[v]]
    assert len(set(found)) == len(found)
    join = view.token_bytes.join
    for cover in found:
        assert view.is_valid(cover)
        assert join(cover).startswith(x)
        assert len(join(cover[:-1])) < len(x)
    assert [c for c in found if join(c) == x] == [tuple(view.encode(x))]
    longest = view.token_bytes.max_length
    ends = ["".join(tail) for n in range(longest) for tail in product("abc", repeat=n)] if longest <= 4 else [""]
    brute = {
        sequence
        for end in ends
        for sequence in spelled_by(view, x + end.encode())
        if len(join(sequence[:-1])) < len(x) and view.is_valid(sequence)
    }
    assert brute == {c for c in found if longest <= 4 or join(c) == x}


# Real vocabularies

BEGINNINGS = [
    "",
    "The quick",
    "naïve café",
    "x = 1234",
    "<",
    "<un",
    "</tab",
    "a\n",
    "\n" * 30,
    "\n" * 31,
    "\t" * 3,
    "a  ",
    " " * 30,
    " " * 31,
    "<table>",
    "漢",
    "ไท",
    "🙂",
    "don'",
    "it'l",
    "http:",
    "1",
    "e\u0301",
    "[multimoda",
]


@pytest.mark.parametrize("text", BEGINNINGS)
def test_gemmas_masks_are_what_encoding_again_says(text: str) -> None:
    view = ByteTokenizerView(real.gemma_tokenizer())
    ids = view.encode(text.encode())
    assert wrong(view, ids, sample(view, ids, 250)) == []


def test_walks_among_gemmas_valid_tokens_stay_valid() -> None:
    view, rng = ByteTokenizerView(real.gemma_tokenizer()), random.Random(1)
    for _ in range(12):
        ids = walk(view, 8, rng)
        assert view.is_valid(ids)
        if not _unfinished(view, ids):
            assert wrong(view, ids, sample(view, ids, 60)) == []


def _unfinished(view: ByteTokenizerView, ids: list[int]) -> bool:
    try:
        view.token_bytes.join(ids).decode()
    except UnicodeDecodeError:
        return True
    return False


def test_the_shipped_models_masks_are_what_encoding_again_says() -> None:
    view, rng = ByteTokenizerView(real.python_target()), random.Random(2)
    for text in [*BEGINNINGS, *real.LINES]:
        ids = view.encode(text.encode())
        assert wrong(view, ids, range(0, len(view), 5)) == [], text
    for _ in range(5):
        ids = walk(view, 6, rng)
        assert view.is_valid(ids)


@pytest.mark.parametrize("make", [real.deepseek, real.cl100k, real.o200k])
@pytest.mark.parametrize("text", ["The quick", "don'", "a  ", "x=12"])
def test_masks_of_large_vocabularies_behind_a_pattern(make: Callable[[], Any], text: str) -> None:
    view = ByteTokenizerView(make())
    ids = view.encode(text.encode())
    assert wrong(view, ids, sample(view, ids, 150)) == []


@pytest.mark.parametrize("prefix", ["first", "prepend"])
def test_mistrals_space_is_part_of_the_bytes(prefix: str) -> None:
    tokenizer = real.mistral(prefix)
    view = ByteTokenizerView(tokenizer)
    assert view.prefix_closed
    for text in ["Hello", "def f(x):\n  return", "naïve 漢字 🙂 \u0378"]:
        assert view.encode(b" " + text.encode()) == tokenizer.encode(text, add_special_tokens=False).ids
    starts = view.valid_next([]).nonzero()[:, 0].tolist()
    assert starts
    assert all((view.token_bytes[i] or b"").startswith(b" ") for i in starts)
    for text in ["", "The quick", "a  ", "x = 1"]:
        ids = view.encode(b" " + text.encode())
        mask = view.valid_next(ids)
        for i in sample(view, ids, 150):
            try:
                whole = (text.encode() + (view.token_bytes[i] or b"")).decode()
            except UnicodeDecodeError:
                continue
            seen = " " + whole if prefix == "first" else whole  # which adds none where there is one
            assert bool(mask[i]) == (tokenizer.encode(seen, add_special_tokens=False).ids == [*ids, i])
    with pytest.raises(LimitError, match="must be a text that starts with a space"):
        view.encode(b"Hello")


MADE: dict[str, Callable[[], Any]] = {
    "gemma": real.gemma_tokenizer,
    "mistral": real.mistral,
    "python-target": real.python_target,
    "deepseek": real.deepseek,
    "cl100k": real.cl100k,
    "o200k": real.o200k,
    "qwen": real.qwen,
}


@pytest.mark.parametrize("name", MADE)
def test_extending_is_encoding_the_whole(name: str) -> None:
    view, rng = ByteTokenizerView(MADE[name]()), random.Random(3)
    for line in real.corpus(texts=25):
        data = (" " + line).replace("▁", "_").encode()
        ids = view.encode(data)
        assert view.token_bytes.join(ids) == data
        for cut in {rng.randrange(len(data) + 1) for _ in range(6)}:
            head = view.encode(data[:cut])
            assert view.token_bytes.join(head) == data[:cut]
            assert view.extend(head, data[cut:]) == ids, (line, cut)


@pytest.mark.parametrize("name", ["gemma", "deepseek", "qwen"])
@pytest.mark.parametrize("text", ["some words and more, ", "字漢字，平假名。片仮名\n"])
def test_extending_encodes_no_more_than_the_end(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    view = ByteTokenizerView(MADE[name]())
    ids = view.encode(text.encode() * 300)
    engine, sizes = view._engine, []
    encode = engine.encode

    def spy(head: str, rest: bytes) -> list[int]:
        sizes.append(len(head))
        return encode(head, rest)

    monkeypatch.setattr(engine, "encode", spy)
    assert view.extend(ids, b"more") == encode(text * 300 + "more", b"")
    assert sum(sizes) < 1000


# Bytes that are no text, or not the tokenizer's


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b" ok\xff", "byte 0xFF at position 3"),
        (b" \xe2\x28", "byte 0x28 at position 2"),
        (b" \xed\xa0\x80", "byte 0xA0 at position 2"),
        (b" \xed\xa0", "byte 0xA0 at position 2"),
        (b" \xc0\xaf", "byte 0xC0 at position 1"),
        (b" \xf4\x90\x80\x80", "byte 0x90 at position 2"),
        (b" \x80", "byte 0x80 at position 1"),
    ],
)
def test_bytes_that_no_text_begins_with_are_named(name: str, data: bytes, words: str) -> None:
    view = ByteTokenizerView(MADE[name]())
    with pytest.raises(LimitError, match=words):
        view.encode(data)


@pytest.mark.parametrize("name", MADE)
def test_text_may_end_inside_a_character(name: str) -> None:
    view = ByteTokenizerView(MADE[name]())
    data = " Ещё 漢字 🙂 naïve ไทย".encode()
    for stop in range(1, len(data) + 1):
        ids = view.encode(data[:stop])
        assert view.token_bytes.join(ids) == data[:stop]
    for i in range(len(view)):
        if view.token_bytes[i] == b"\xff":
            assert not view.valid_next(view.encode(data))[i]


def test_without_byte_tokens_characters_are_whole() -> None:
    view = toy()
    with pytest.raises(LimitError, match="no byte fallback; the prompt must be valid UTF-8"):
        view.encode(b"ab\xc3")
    with pytest.raises(LimitError, match=r"at position 2.*no byte fallback"):
        ByteTokenizerView(Tokenizer(BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>"))).encode(b"aaz")
    cut = Tokenizer(BPE({"a": 0, " ": 1}, []))
    cut.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    with pytest.raises(LimitError, match="no byte fallback"):
        ByteTokenizerView(cut).encode(b"a\xc3")


def test_the_letter_that_stands_for_a_space_has_no_tokens() -> None:
    view = ByteTokenizerView(real.gemma_tokenizer())
    with pytest.raises(LimitError, match=r"'▁b' at position 1.*U\+2581"):
        view.encode("a▁b".encode())
    byte = real.gemma_tokenizer().get_vocab()["<0xE2>"]
    spelled = [byte, byte - 0xE2 + 0x96]
    assert not view.valid_next(spelled)[byte - 0xE2 + 0x81]


def test_text_in_another_normal_form_has_no_tokens() -> None:
    tokenizer = Tokenizer.from_str(real.python_target().backend_tokenizer.to_str())
    tokenizer.normalizer = normalizers.NFC()
    view = ByteTokenizerView(tokenizer)
    composed = "caf\u00e9"
    assert view.token_bytes.join(view.encode(composed.encode())) == composed.encode()
    with pytest.raises(LimitError, match=r"at position 3.*NFC"):
        view.encode("cafe\u0301".encode())
    ids = view.encode(b"cafe")
    assert wrong(view, ids, range(len(view))) == []


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (real.minilm, "lowercase"),
        (lambda: TokenBytes.from_list([b"a"]), "bare vocabulary"),
        (lambda: _with(normalizer=normalizers.NFKC()), "NFKC"),
        (lambda: _with(normalizer=normalizers.Lowercase()), "lowercase"),
        (lambda: _with(pre_tokenizer=pre_tokenizers.Whitespace()), "drops blanks"),
        (lambda: _with(normalizer=normalizers.Prepend("▁"), added="<m>"), "puts '▁' before the text"),
        (lambda: _with(pre_tokenizer=pre_tokenizers.Metaspace(split=False), added="<m>"), "behind each added token"),
    ],
)
def test_tokenizers_that_change_text_are_refused_with_the_reason(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        ByteTokenizerView(make())


def _with(added: str = "", **parts: Any) -> Tokenizer:
    made = model_of(TOY_MERGES)[1]
    for name, value in parts.items():
        setattr(made, name, value)
    if added:
        made.add_tokens([AddedToken(added, special=False)])
    return made


# The rest of the interface


def test_special_tokens_are_never_valid() -> None:
    view = ByteTokenizerView(real.gemma_tokenizer())
    specials = list(view.token_bytes.specials.values())
    assert not view.valid_next(view.encode(b"a"))[specials].any()
    assert not view.is_valid(specials[:1])
    assert not view.is_valid([len(view)])


def test_masks_are_ones_own() -> None:
    view = toy()
    view.valid_next([0]).fill_(False)
    assert view.valid_next([0]).any()


def test_a_mask_depends_on_the_end_alone() -> None:
    view = ByteTokenizerView(real.gemma_tokenizer())
    assert torch.equal(view.valid_next(view.encode(b"one two")), view.valid_next(view.encode(b"three two")))


def test_first_bytes_and_stops() -> None:
    view = ByteTokenizerView(real.python_target())
    end = view.token_bytes.specials["<|endoftext|>"]
    matrix = view.first_byte_matrix([[end]])
    assert matrix.is_sparse
    assert matrix.shape == (257, len(view))
    dense = matrix.to_dense()
    assert dense.dtype == torch.float64
    for i, token in enumerate(view.token_bytes.tokens):
        assert dense[:, i].nonzero()[:, 0].tolist() == ([token[0]] if token else [256] if i == end else [])
    with pytest.raises(LimitError, match=r"stop_ids\[1\] = 5"):
        view.first_byte_matrix([[end], [5]])


def test_a_pattern_that_looks_ahead_is_not_prefix_closed() -> None:
    """Why `prefix_closed` is there: two spaces are one piece until a letter comes that takes the second."""
    view = ByteTokenizerView(real.python_target())
    assert not view.prefix_closed
    ids = view.encode("a  \u0448".encode())
    assert any(not view.is_valid(ids[:stop]) for stop in range(len(ids)))


@settings(max_examples=25)
@given(st.lists(st.sampled_from(["a", " b", "  ", "\n", "'s", "1", "23", "é", "漢", "don't ", "🙂"]), max_size=8))
def test_byte_level_bpe_with_no_pattern(parts: list[str]) -> None:
    """The byte-level alphabet without cutting goes by pairs; bytes that can never be text are not allowed."""
    made = Tokenizer.from_str(real.python_target().backend_tokenizer.to_str())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    view = ByteTokenizerView(made)
    assert view.prefix_closed
    data = "".join(parts).encode()
    ids = view.encode(data)
    assert wrong(view, ids, range(0, len(view), 3)) == []
    for stop in range(len(data)):
        assert view.token_bytes.join(view.encode(data[:stop])) == data[:stop]
        assert view.extend(view.encode(data[:stop]), data[stop:]) == ids
