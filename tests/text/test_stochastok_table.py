"""Tables of pairs: against brute force, of real vocabularies, and on disk."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models

from tests.text.stochastok_toys import TOY, brute_force
from tests.text.vocabularies import cl100k, minilm, mistral, o200k, python_target
from tokenmill.errors import LimitError
from tokenmill.text import ExpansionTable, TokenBytes
from tokenmill.text import _expansion_table as tables


@pytest.mark.prop("stochastok", 3)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.none() | st.binary(max_size=4).map(lambda b: bytes(x % 3 + 97 for x in b)), max_size=25))
def test_the_table_is_that_of_brute_force(tokens: list[bytes | None]) -> None:
    table = ExpansionTable.from_list(tokens)
    wanted = brute_force(tokens)
    assert [set(table.pairs(i)) for i in range(len(tokens))] == wanted
    assert len(table.left) == sum(map(len, wanted)), "no pair comes twice"
    for i, used in table.duplicates.items():
        assert used < i
        assert tokens[used] == tokens[i]
        assert i not in table.left
        assert i not in table.right


def test_pairs_of_a_toy() -> None:
    table = ExpansionTable.from_list(TOY)
    assert [table.pairs(i) for i in range(6)] == [[], [], [(0, 1)], [(0, 4), (2, 1)], [(1, 1)], []]
    assert table.splittable.tolist() == [False, False, True, True, True, False]
    with pytest.raises(LimitError, match="token = 6"):
        table.pairs(6)


@pytest.mark.prop("stochastok", 3)
def test_real_vocabularies_have_the_pairs_that_were_counted() -> None:
    for view, pairs in ((cl100k(), 233_378), (o200k(), 446_189)):
        table = ExpansionTable.from_tokenizer(view)
        assert len(table.left) == pairs
        assert not [t for t, s in zip(view.tokens, table.splittable, strict=True) if len(t or b"") > 1 and not s]
        tokens = view.tokens
        for i in range(0, len(view), 997):
            assert all((tokens[a] or b"") + (tokens[b] or b"") == tokens[i] for a, b in table.pairs(i))


def test_wordpiece_continues_words_with_continuations() -> None:
    tokenizer = minilm()
    table = ExpansionTable.from_tokenizer(tokenizer)
    for i in range(1000, len(table), 501):
        text = str(tokenizer.id_to_token(i))
        for a, b in table.pairs(i):
            left, right = str(tokenizer.id_to_token(a)), str(tokenizer.id_to_token(b))
            assert right.startswith("##")
            assert left.startswith("##") == text.startswith("##")
            assert left + right[2:] == text


def test_byte_tokens_are_used_only_where_there_is_no_piece() -> None:
    tokenizer = mistral()
    table = ExpansionTable.from_tokenizer(tokenizer)
    letter, byte = tokenizer.token_to_id("A"), tokenizer.token_to_id("<0x41>")
    assert letter is not None
    assert byte is not None
    assert byte < letter
    assert table.duplicates[byte] == letter
    assert byte not in table.left
    first = tokenizer.token_to_id("<0xC3>")
    assert (first, tokenizer.token_to_id("<0xA9>")) in table.pairs(tokenizer.token_to_id("é"))


def test_added_tokens_that_swallow_blanks_and_specials_are_left_alone() -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.add_tokens([AddedToken("aab", lstrip=True), AddedToken("bb")])
    tokenizer.add_special_tokens([AddedToken("abb", special=True)])
    table = ExpansionTable.from_tokenizer(tokenizer)
    assert [table.pairs(tokenizer.token_to_id(t)) for t in ("ab", "aab", "bb", "abb")] == [[(0, 1)], [], [(1, 1)], []]
    assert len(table.left) == 2


@pytest.mark.prop("stochastok", 8)
@pytest.mark.parametrize("make", [python_target, mistral, lambda: TokenBytes.from_list([None, b"a"])])
def test_a_table_comes_back_as_it_was(make: object, tmp_path: Path) -> None:
    tokenizer = make()  # type: ignore[operator]
    table = ExpansionTable.from_tokenizer(tokenizer)
    path = table.save(tmp_path / "deep" / "table.safetensors")
    assert [p.name for p in path.parent.iterdir()] == ["table.safetensors"]
    for back in (ExpansionTable.load(path, tokenizer), pickle.loads(pickle.dumps(table))):
        for name in ("offsets", "left", "right", "lengths", "classes"):
            a, b = getattr(table, name), getattr(back, name)
            assert a.dtype == b.dtype
            assert np.array_equal(a, b)
        assert back.duplicates == table.duplicates
        assert back.fingerprint == table.fingerprint


def test_a_loaded_table_is_a_map_and_goes_to_workers_as_a_name(tmp_path: Path) -> None:
    path = ExpansionTable.from_tokenizer(python_target()).save(tmp_path / "t.safetensors")
    table = ExpansionTable.load(path)
    assert isinstance(table.left, np.memmap)
    data = pickle.dumps(table)
    assert len(data) < 1000
    assert np.array_equal(pickle.loads(data).left, table.left)


def test_files_and_tables_of_others_are_refused(tmp_path: Path) -> None:
    path = ExpansionTable.from_list(TOY).save(tmp_path / "t.safetensors")
    with pytest.raises(LimitError, match="another tokenizer"):
        ExpansionTable.load(path, python_target())
    for content in (b"", b"x" * 40, b"\x02\0\0\0\0\0\0\0{}", b"\x02\0\0\0\0\0\0\0{]"):
        path.write_bytes(content)
        with pytest.raises(LimitError, match=r"ExpansionTable\.save"):
            ExpansionTable.load(path)
    with pytest.raises(LimitError, match=r"no\.such"):
        ExpansionTable.load(tmp_path / "no.such")


def test_the_fingerprint_tells_bytes_ids_and_continuations() -> None:
    lists: list[list[bytes | None]] = [
        [b"a", b"b"],
        [b"b", b"a"],
        [b"ab"],
        [b"a", None],
        [b"a", b"b", None],
        [b"a", b""],
    ]
    prints = [tables.fingerprint(TokenBytes.from_list(tokens)) for tokens in lists]
    assert len(set(prints)) == len(prints)


def test_classes() -> None:
    table = ExpansionTable.from_list([b" 12", b"the", "é".encode(), b" ", b"a1", None, b"\xc3"])
    assert [tables.CLASSES[c] for c in table.classes] == ["digits", "letters", "letters", *["other"] * 4]
