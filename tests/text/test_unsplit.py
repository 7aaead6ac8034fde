from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers
from tokenizers.models import BPE

from tests.text import vocabularies as real
from tests.text.test_merges import Rules, rules
from tests.text.views import toy, wrong
from tokenmill.decode._byte_view import ByteTokenizerView
from tokenmill.text import _unsplit


@st.composite
def mixed(draw: st.DrawFn) -> Tokenizer:
    """SentencePiece-like: random merges, "b" and the rest of Unicode spelled by bytes, random added tokens."""
    merges = [(a.replace("c", "▁"), b.replace("c", "▁")) for a, b in draw(rules()) if "b" not in a + b]
    pieces = list(dict.fromkeys(["a", "▁", *(a + b for a, b in merges)]))
    vocab = {name: i for i, name in enumerate([*pieces, *(f"<0x{b:02X}>" for b in range(256))])}
    made = Tokenizer(BPE(vocab, merges, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    for content in draw(st.lists(st.text("a b", min_size=1, max_size=4), max_size=4, unique=True)):
        normal = draw(st.booleans())
        if normal or "▁" not in content:
            made.add_tokens([AddedToken(content, special=False, normalized=normal)])
    return made


TEXTS = st.text(st.sampled_from("aaa  bé🙂"), max_size=12)


@settings(max_examples=25)
@given(mixed(), TEXTS, st.integers(0, 12))
def test_added_tokens_and_byte_tokens(tokenizer: Tokenizer, text: str, cut: int) -> None:
    view = ByteTokenizerView(tokenizer)
    assert view.prefix_closed
    ids = tokenizer.encode(text).ids
    assert view.encode(text.encode()) == ids
    for stop in range(len(ids) + 1):
        head = ids[:stop]
        if stop < len(ids):
            assert view.valid_next(head)[ids[stop]]
        try:
            view.token_bytes.join(head).decode()
        except UnicodeDecodeError:
            continue
        assert tokenizer.encode(view.token_bytes.join(head).decode()).ids == head
        assert wrong(view, head, range(len(view))) == []
    data = text.encode()
    head = view.encode(data[:cut])
    assert view.extend(head, data[cut:]) == ids


@settings(max_examples=25)
@given(mixed(), TEXTS)
def test_extending_looks_back_as_far_as_it_must(tokenizer: Tokenizer, text: str) -> None:
    """Behind a single token that is encoded again, the new ones often fit no more, or finish an added token."""
    view, data = ByteTokenizerView(tokenizer), text.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_unsplit, "BACK", 1)
        for cut in range(len(data) + 1):
            assert view.extend(view.encode(data[:cut]), data[cut:]) == tokenizer.encode(text).ids


@given(rules(), st.text("abc", min_size=3, max_size=14))
def test_extending_sees_merges_across_what_it_keeps(merges: Rules, text: str) -> None:
    view = toy(merges)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_unsplit, "BACK", 1)
        for cut in range(len(text) + 1):
            assert view.extend(view.encode(text[:cut].encode()), text[cut:].encode()) == view.encode(text.encode())


def with_added(*added: tuple[str, bool]) -> tuple[ByteTokenizerView, dict[str, int]]:
    """Letters, a space and added tokens, each with whether it is found in the normalised text."""
    made = Tokenizer(BPE({letter: i for i, letter in enumerate("abcx▁")}, []))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.add_tokens([AddedToken(content, special=False, normalized=normal) for content, normal in added])
    return ByteTokenizerView(made), made.get_vocab()


def test_what_the_first_round_finds_ends_what_the_second_began() -> None:
    view, vocab = with_added(("a b", True), (" bx", False))
    ids = [vocab["a"], vocab[" bx"]]
    assert view.encode(b"a bx") == ids
    assert view.valid_next(ids[:1])[ids[1]]
    assert not view.valid_next(view.encode(b"a "))[vocab["b"]]


@pytest.mark.parametrize("normal", [False, True])
def test_extending_sees_an_added_token_begun_in_what_it_keeps(normal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    view, vocab = with_added(("abcx", normal))
    monkeypatch.setattr(_unsplit, "BACK", 1)
    assert view.extend(view.encode(b"cabc"), b"xa") == [vocab["c"], vocab["abcx"], vocab["a"]]


def test_the_second_round_does_not_look_across_the_first() -> None:
    view, vocab = with_added(("ab c", True), ("b", False))
    ids = view.encode(b"ab c")
    assert ids == [vocab[piece] for piece in ("a", "b", "▁", "c")]
    assert view.valid_next(ids[:3])[vocab["c"]]


def test_an_added_token_is_cut_out_though_each_pair_is_fine() -> None:
    view, vocab = ByteTokenizerView(real.gemma_tokenizer()), real.gemma_tokenizer().get_vocab()
    ids = [vocab[piece] for piece in ("<", "ta", "ble")]
    assert view.encode(b"<table") != view.encode(b"<table>")
    assert view.encode(b"<table>") == [vocab["<table>"]]
    head = view.encode(b"<table")
    assert not view.valid_next(head)[vocab[">"]]
    assert view.valid_next(head)[vocab["<"]]
    assert not view.is_valid([*ids, vocab[">"]])
    newlines = [vocab["\n" * 30]]
    assert not view.valid_next(newlines)[vocab["\n"]]
    assert view.valid_next([vocab["\n" * 31]])[vocab["\n"]]  # there is no longer one


def test_byte_tokens_spell_only_what_the_vocabulary_lacks() -> None:
    tokenizer = real.gemma_tokenizer()
    view, vocab = ByteTokenizerView(tokenizer), tokenizer.get_vocab()

    def byte(value: int) -> int:
        return vocab[f"<0x{value:02X}>"]

    unknown = "\u0378"  # not assigned, so no piece
    ids = view.encode(f"a{unknown}".encode())
    assert ids == [vocab["a"], *map(byte, unknown.encode())]
    assert view.is_valid(ids)
    assert not view.is_valid([byte(0x41)])  # "A" has a piece
    assert not view.is_valid([byte(b) for b in "é".encode()])
    start = view.valid_next([])
    assert not start[byte(0x41)]
    assert not start[byte(0xC3)]  # every character that begins with C3 has a piece
    assert not start[byte(0xFF)]
    assert not start[byte(0x80)]
    inside = view.valid_next(ids[:-1]).nonzero()[:, 0].tolist()
    assert inside  # only bytes that finish a character without a piece
    for i in inside:
        token = view.token_bytes[i]
        assert token is not None
        character = (unknown.encode()[:-1] + token).decode()
        assert character not in vocab
        assert tokenizer.encode("a" + character, add_special_tokens=False) == [*ids[:-1], i]
    finishing = [chr(0x340 + k) for k in range(64)]
    assert len(inside) == sum(c not in vocab for c in finishing)


@pytest.mark.parametrize("lead", [b"\xc3", b"\xe2", b"\xf0\x9f", b"\xf4", b"\xe0\xa4", b"\xed"])
def test_unfinished_characters_can_still_be_finished(lead: bytes) -> None:
    """Against all characters: the next byte is allowed when some character without a piece goes on like that."""
    tokenizer = real.gemma_tokenizer()
    view, vocab = ByteTokenizerView(tokenizer), tokenizer.get_vocab()
    points = (p for p in range(0x80, 0x110000) if not 0xD800 <= p < 0xE000)
    spelled = (chr(p).encode() for p in points if chr(p) not in vocab)
    expected = {data[len(lead)] for data in spelled if data.startswith(lead)}
    ids = view.encode(lead)
    found = {(view.token_bytes[int(i)] or b"")[0] for i in view.valid_next(ids).nonzero()[:, 0]}
    assert found == expected
    assert view.is_valid(ids) == bool(expected)
