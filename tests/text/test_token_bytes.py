from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers import models as kinds

from tests.text import vocabularies as real
from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.text import TokenBytes

EXACT: dict[str, Callable[[], Any]] = {
    "python-target": real.python_target,
    "deepseek": real.deepseek,
    "cl100k": real.cl100k,
    "o200k": real.o200k,
    "qwen": real.qwen,
}
SPACE = "\u2581"  # stands for a space in SentencePiece


@pytest.mark.parametrize("name", EXACT)
def test_joined_bytes_give_the_text_back(name: str) -> None:
    tokens = TokenBytes.of(EXACT[name]())
    assert tokens.changes == ""
    for text in real.corpus():
        assert tokens.join(tokens.encode(text)) == text.encode(), text


def test_gemma_gives_the_text_back_save_for_the_letter_that_is_its_space() -> None:
    tokens = TokenBytes.of(real.gemma_tokenizer())
    assert tokens.changes == "reads U+2581 as a space"
    for text in real.corpus():
        assert tokens.join(tokens.encode(text)) == text.replace(SPACE, " ").encode(), text


@pytest.mark.parametrize("prefix", ["first", "prepend"])
def test_mistral_puts_a_space_before_the_text(prefix: str) -> None:
    tokens = TokenBytes.of(real.mistral(prefix))
    assert "puts a space before the text" in tokens.changes
    assert tokens.specials == {"<unk>": 0, "<s>": 1, "</s>": 2}
    for text in filter(None, real.corpus()):
        plain = text.replace(SPACE, " ")
        has_it = prefix == "first" and plain.startswith(" ")
        assert tokens.join(tokens.encode(text)) == (plain if has_it else " " + plain).encode(), text


def test_word_pieces_join_without_the_blanks_between_words() -> None:
    tokens = TokenBytes.of(real.minilm())
    assert "lowercase" in tokens.changes
    assert "drops blanks between words" in tokens.changes
    assert tokens.join(tokens.encode("Tokenizers are UNBELIEVABLY fast!")) == b"tokenizersareunbelievablyfast!"
    vocab = real.minilm().get_vocab()
    assert tokens[vocab["##ing"]] == tokens[vocab["ing"]] == b"ing"
    assert tokens[vocab["[CLS]"]] is None
    assert tokens[vocab["[UNK]"]] is None


@pytest.mark.parametrize(
    ("make", "special"),
    [
        (real.gemma_tokenizer, "<eos>"),
        (real.deepseek, "<｜end▁of▁sentence｜>"),
        (real.mistral, "</s>"),
        (real.cl100k, "<|endoftext|>"),
        (real.python_target, "<|endoftext|>"),
    ],
)
def test_a_special_token_in_the_text_is_text(make: Callable[[], Any], special: str) -> None:
    tokens = TokenBytes.of(make())
    ids = tokens.encode(f"a{special}b")
    assert tokens.specials[special] not in ids
    assert set(tokens.specials.values()).isdisjoint(ids)
    assert tokens[tokens.specials[special]] is None
    joined = tokens.join(ids).decode().strip()
    assert joined.replace(" ", SPACE) == f"a{special}b".replace(" ", SPACE)


@pytest.mark.parametrize("make", [real.gemma_tokenizer, real.deepseek, real.python_target])
def test_encoding_is_the_tokenizers_own(make: Callable[[], Any]) -> None:
    tokenizer = make()
    tokens = TokenBytes.of(tokenizer)
    for text in real.LINES:
        if any(special in text for special in tokens.specials):
            continue
        own = tokenizer.encode(text, add_special_tokens=False)
        assert tokens.encode(text) == (own if isinstance(own, list) else own.ids), text


def test_truncation_and_padding_of_the_tokenizer_are_not_ours() -> None:
    tokenizer = Tokenizer.from_str(real.python_target().backend_tokenizer.to_str())
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=20)
    text = "def f(x): return x"
    tokens = TokenBytes.of(tokenizer)
    assert tokens.join(tokens.encode(text)) == text.encode()


def test_tiktoken_encodings_are_read_and_encoded_alike() -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ours = real.o200k()
    assert ours.ranks is not None
    theirs = tiktoken.Encoding(
        "o200k", pat_str=real.O200K, mergeable_ranks=ours.ranks.ranks, special_tokens=ours.specials
    )
    read = TokenBytes.of(theirs)
    assert read.tokens == ours.tokens
    for text in real.corpus():
        assert read.encode(text) == theirs.encode_ordinary(text), text


def test_equal_bytes_keep_their_own_ids() -> None:
    tokens = TokenBytes.of(real.gemma_tokenizer())
    vocab = real.gemma_tokenizer().get_vocab()
    byte, piece = vocab["<0x41>"], vocab["A"]
    assert tokens[byte] == tokens[piece] == b"A"
    assert byte != piece
    assert tokens.encode("A") == [piece]
    low, high = tokens.trie.range(b"A")
    assert {byte, piece} <= set(tokens.trie.order[low:high].tolist())


def test_added_tokens_that_are_not_special_have_bytes() -> None:
    tokens = TokenBytes.of(real.gemma_tokenizer())
    vocab = real.gemma_tokenizer().get_vocab()
    assert tokens[vocab["<table>"]] == b"<table>"
    assert tokens[vocab["\n\n"]] == b"\n\n"
    assert tokens[vocab[SPACE * 3]] == b"   "
    assert tokens.encode("<table>\n\n   ") == [vocab["<table>"], vocab["\n\n"], vocab[SPACE * 3]]
    deepseek = TokenBytes.of(real.deepseek())
    assert deepseek[real.deepseek().token_to_id("<｜User｜>")] == "<｜User｜>".encode()
    assert deepseek.encode("<｜User｜>") == [real.deepseek().token_to_id("<｜User｜>")]


def toy(**parts: Any) -> Tokenizer:
    vocab = {"a": 0, "b": 1, "ab": 2, "▁": 3, "▁a": 4} | parts.pop("more", {})
    merges = parts.pop("merges", [("a", "b"), ("▁", "a")])
    made = Tokenizer(kinds.BPE(vocab, merges, **parts.pop("model", {})))
    for name, value in parts.items():
        setattr(made, name, value)
    return made


def test_byte_tokens_are_bytes_only_with_byte_fallback() -> None:
    with_it = TokenBytes.of(toy(more={"<0xF0>": 5}, model={"byte_fallback": True}))
    without = TokenBytes.of(toy(more={"<0xF0>": 5}))
    assert with_it[5] == b"\xf0"
    assert without[5] == b"<0xF0>"


@pytest.mark.parametrize(
    ("parts", "changes"),
    [
        ({}, ""),
        ({"normalizer": normalizers.Replace(" ", "▁")}, "reads U+2581 as a space"),
        ({"normalizer": normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])}, "NFKC; lowercase"),
        ({"normalizer": normalizers.Prepend("x")}, "puts 'x' before the text"),
        ({"normalizer": normalizers.Replace(Regex(" {2,}"), " ")}, "replaces ' {2,}' by ' '"),
        ({"pre_tokenizer": pre_tokenizers.Metaspace("▁", prepend_scheme="always")}, "puts a space before the text"),
        ({"pre_tokenizer": pre_tokenizers.Metaspace("▁", prepend_scheme="never")}, "reads U+2581 as a space"),
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "puts a space before the text"),
        ({"pre_tokenizer": pre_tokenizers.WhitespaceSplit()}, "drops blanks between words"),
        ({"pre_tokenizer": pre_tokenizers.Split(" ", "removed")}, "drops what the pre-tokenizer splits at"),
        ({"pre_tokenizer": pre_tokenizers.Punctuation()}, ""),
        ({"normalizer": normalizers.Nmt()}, "cleans control characters"),
    ],
)
def test_what_is_changed_before_the_cut_is_said(parts: dict[str, Any], changes: str) -> None:
    assert TokenBytes.of(toy(**parts)).changes == changes


def test_an_added_token_that_swallows_blanks_is_a_change() -> None:
    made = toy()
    made.add_tokens([AddedToken("<m>", lstrip=True, special=False)])
    assert TokenBytes.of(made).changes == "drops blanks beside '<m>'"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: toy(model={"end_of_word_suffix": "</w>"}), "end_of_word_suffix"),
        (lambda: toy(model={"dropout": 0.1}), "dropout 0.1"),
        (object, "object has no `tokenizers` backend"),
        (
            lambda: Tokenizer(kinds.BPE({"a": 0, "##b": 1}, [], continuing_subword_prefix="##")),
            "continuing_subword_prefix",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        TokenBytes.of(make())


def test_unigram_pieces_are_read_and_its_special_pieces_are_never_found_in_a_text() -> None:
    pieces = [
        ("<unk>", 0.0),
        ("</s>", 0.0),
        ("▁", -2.0),
        ("▁a", -1.0),
        ("a", -3.0),
        ("<", -3.0),
        ("/", -3.0),
        ("s", -3.0),
    ]
    made = Tokenizer(kinds.Unigram([*pieces, (">", -3.0)], unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="never")
    made.decoder = decoders.Metaspace("▁", prepend_scheme="never")
    made.add_special_tokens(["</s>"])
    tokens = TokenBytes.of(made)
    assert tokens.tokens == (None, None, b" ", b" a", b"a", b"<", b"/", b"s", b">")
    assert tokens.specials == {"</s>": 1, "<unk>": 0}
    assert tokens.encode("a</s> a") == [4, 5, 6, 7, 8, 3]


def test_a_whole_word_that_is_special_is_spelled() -> None:
    """`ignore_merges` takes a piece that is in the vocabulary whole, even a special token."""
    vocab = {"<": 0, "e": 1, ">": 2, "<e": 3, "<e>": 4}
    made = Tokenizer(kinds.BPE(vocab, [("<", "e"), ("<e", ">")], ignore_merges=True))
    made.add_special_tokens(["<e>"])
    assert TokenBytes.of(made).encode("<e>") == [3, 2]


def test_added_tokens_behind_special_ones_keep_their_ids() -> None:
    made = toy()
    made.add_special_tokens(["<s1>", "<s2>"])
    made.add_tokens([AddedToken("<plain>", special=False, normalized=False)])
    tokens = TokenBytes.of(made)
    plain = made.token_to_id("<plain>")
    assert plain is not None
    assert tokens.encode("a<plain>b") == [0, plain, 1]
    assert tokens[plain] == b"<plain>"
    assert tokens.tokens[plain - 2 : plain] == (None, None)


def test_one_object_a_tokenizer_until_it_grows() -> None:
    made = toy()
    first = TokenBytes.of(made)
    assert TokenBytes.of(made) is first
    assert TokenBytes.of(first) is first
    made.add_tokens(["new"])
    grown = TokenBytes.of(made)
    assert grown is not first
    assert grown.tokens[-1] == b"new"
    gone = weakref.ref(made)
    del made
    gc.collect()
    assert gone() is None


def test_a_bare_vocabulary_joins_but_does_not_encode() -> None:
    tokens = TokenBytes.from_list([b"a", None, b"bc", b""], {"<end>": 1})
    assert len(tokens) == 4
    assert tokens.lengths.tolist() == [1, 0, 2, 0]
    assert tokens.max_length == 2
    assert tokens.join([2, 0]) == b"bca"
    with pytest.raises(UnsupportedError, match="bare vocabulary"):
        tokens.encode("a")
    for bad in (1, 4, -1):
        with pytest.raises(LimitError, match=rf"ids\[1\] = {bad}"):
            tokens.join([0, bad])
    with pytest.raises(LimitError, match=r"specials\['<end>'\] = 0"):
        TokenBytes.from_list([b"a"], {"<end>": 0})


def test_ranks_are_ids() -> None:
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 256, b"bc": 257, b"abc": 258}
    tokens = TokenBytes.from_ranks(ranks, {"<end>": 259})
    assert tokens.encode("abcbcab") == [258, 257, 256]
    assert tokens.encode("<end>") == [ord(c) for c in "<end>"]
    assert tokens[259] is None
    with pytest.raises(UnsupportedError, match="distinct"):
        TokenBytes.from_ranks({b"a": 0, b"b": 0})
    with pytest.raises(LimitError, match="specials"):
        TokenBytes.from_ranks({b"a": 0, b"b": 1}, {"<end>": 1})
    with pytest.raises(LimitError, match="0x63"):
        TokenBytes.from_ranks({b"a": 0, b"b": 1}).encode("abc")
