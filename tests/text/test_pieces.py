from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from tests.text import vocabularies as real
from tokenmill.decode._byte_view import ByteTokenizerView
from tokenmill.text import TokenBytes
from tokenmill.text._pieces import Pieces


def small_ranks(pattern: str) -> TokenBytes:
    """The shipped tokenizer's tokens as merge ranks, and two that no merges make, so that they are found whole."""
    tokens = TokenBytes.of(real.python_target())
    ranks = {token: i for i, token in enumerate(tokens.tokens) if token}
    return TokenBytes.from_ranks(ranks | {b" jzx": len(tokens), b"'zz": len(tokens) + 1}, pattern=pattern)


def behind(*steps: Any, nfc: bool = False, whole: bool = False, added: Sequence[tuple[str, bool]] = ()) -> Tokenizer:
    """The shipped tokenizer behind other steps; with `whole`, words of the vocabulary are not merged."""
    made = Tokenizer.from_str(real.python_target().backend_tokenizer.to_str())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([*steps, plain])
    if nfc:
        made.normalizer = normalizers.NFC()
    made.model.ignore_merges = whole
    made.add_tokens([AddedToken(content, special=False, normalized=normal) for content, normal in added])
    return made


def deepseek_steps() -> list[Any]:
    steps = json.loads(real.deepseek().to_str())["pre_tokenizer"]["pretokenizers"][:-1]
    return [pre_tokenizers.Split(Regex(step["pattern"]["Regex"]), "isolated") for step in steps]


QWEN_SPLIT = pre_tokenizers.Split(Regex(real.QWEN), "isolated")
ADDED = [("re  x", True), ("\n\n", False), ("<a>", False), (" <", True)]
BEHIND_PATTERNS: dict[str, Callable[[], Any]] = {
    "cl100k": lambda: small_ranks(real.CL100K),
    "o200k": lambda: small_ranks(real.O200K),
    "qwen": lambda: small_ranks(real.QWEN),
    "composed": lambda: behind(QWEN_SPLIT, nfc=True),
    "whole words": lambda: behind(QWEN_SPLIT, whole=True),
    "added tokens": lambda: behind(QWEN_SPLIT, added=ADDED),
    "three steps": lambda: behind(*deepseek_steps()),
    "GPT-2": real.python_target,
}
ENDS = ["", "a", "don'", "I'l", "a'r", "x ", "x  ", "\n", "x\n\n", " \t", "12", "1234", "re ", "<", " jz", "é", "漢"]


@pytest.mark.parametrize("name", BEHIND_PATTERNS)
def test_masks_by_classes_of_characters_are_those_of_encoding_again(name: str) -> None:
    view = ByteTokenizerView(BEHIND_PATTERNS[name]())
    engine = view._engine
    assert isinstance(engine, Pieces)
    assert engine.fast is not None
    candidates = (engine._candidates & engine._continuations.after(0)).nonzero()[0].tolist()
    only_before_more = 0
    for text in ENDS:
        data = f" one{text}".encode() if text else b""
        for ids in view.openings(data):
            mask = view.valid_next(ids).tolist()
            assert [i for i in candidates if mask[i]] == sorted(engine._again(ids, candidates)), text
            only_before_more += not view.is_valid(ids)
    assert only_before_more, "sequences that stand only before something else are among them"


def test_letters_that_compose_are_encoded_again() -> None:
    """A mark behind a letter that it composes with is another text; one behind another letter is not."""
    view = ByteTokenizerView(small_marks())
    acute, grave = (next(i for i, t in enumerate(view.token_bytes.tokens) if t == m.encode()) for m in "\u0301\u0302")
    after_e, after_q = (view.valid_next(view.encode(text)) for text in (b"e", b"q"))
    assert not after_e[acute]
    assert not after_e[grave]
    assert after_q[acute]
    assert after_q[grave]


def small_marks() -> Tokenizer:
    """The tokenizer with NFC and the combining acute and circumflex as tokens."""
    data = json.loads(behind(QWEN_SPLIT, nfc=True).to_str())
    model = data["model"]
    for first, second in (("Ì", "ģ"), ("Ì", "Ĥ")):  # CC 81 and CC 82 in the byte-level alphabet
        model["vocab"].setdefault(first + second, len(model["vocab"]) + 1)
        model["merges"].append([first, second])
    return Tokenizer.from_str(json.dumps(data))


@pytest.mark.parametrize("name", BEHIND_PATTERNS)
def test_what_begins_some_text_is_reached_token_by_token(name: str) -> None:
    view = ByteTokenizerView(BEHIND_PATTERNS[name]())
    for line in ["if x:\n\n    y  =  'don't'\n", "a  b \t\n c's  12345 ", "naïve  漢字 \n\n", " jzx 'zz jz"]:
        ids = view.encode(line.encode())
        for stop, i in enumerate(ids):
            assert view.valid_next(ids[:stop])[i], (line, stop)


def test_a_piece_that_is_a_token_is_taken_whole() -> None:
    view = ByteTokenizerView(small_ranks(real.CL100K))
    whole = len(view) - 2
    assert view.encode(b" jzx") == [whole]
    parts = view.encode(b" jz")
    x = view.encode(b"x")[0]
    assert not view.valid_next(parts)[x]
    assert view.valid_next(parts)[view.encode(b"q")[0]]
    assert view.valid_next([])[whole]


def test_patterns_that_are_not_understood_are_encoded_again() -> None:
    strange = pre_tokenizers.Split(Regex(r"(?i:\p{Lu}+)|\s+"), "isolated")
    engine = ByteTokenizerView(behind(strange))._engine
    assert isinstance(engine, Pieces)
    assert engine.fast is None


@pytest.mark.parametrize("text", ["漢字平假，名片仮。" * 40, "x='a';y=\"b\";" * 30, "1234567890," * 40])
@pytest.mark.parametrize("name", ["o200k", "three steps", "GPT-2"])
def test_the_end_alone_is_encoded_again_where_no_words_are_in_sight(name: str, text: str) -> None:
    view = ByteTokenizerView(BEHIND_PATTERNS[name]())
    engine = view._engine
    assert isinstance(engine, Pieces)
    ids = view.encode(text.encode())
    for stop in (len(ids), len(ids) - 3):
        head = ids[:stop]
        if not view.is_valid(head):
            continue
        assert engine._safe(head) > 0
        for more in ("a", "'s", "1", " ", "\n", "漢", "."):
            data = view.token_bytes.join(head) + more.encode()
            if data.decode(errors="replace").count("\ufffd"):
                continue
            assert view.extend(head, more.encode()) == view.encode(data)
