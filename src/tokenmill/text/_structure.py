"""What a `tokenizers` JSON says about a tokenizer: the bytes of every token and what is changed before the cut.

Everything is read from the structure (normalizer, pre-tokenizer, model, decoder, added tokens), never from decoding
single tokens, which loses leading spaces, bytes and duplicates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokenmill.errors import UnsupportedError

WHERE = "TokenBytes.of"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_FORMS = {
    "NFC": "NFC",
    "NFD": "NFD",
    "NFKC": "NFKC",
    "NFKD": "NFKD",
    "Lowercase": "lowercase",
    "StripAccents": "strips accents",
    "Strip": "strips blanks at the ends",
    "Precompiled": "SentencePiece's character map (usually NFKC)",
    "Nmt": "cleans control characters",
}
DUMMY_PREFIX = "puts a space before the text"
BLANKS_DROPPED = "drops blanks between words"


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the rest is moved up from U+0100."""
    keep = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [b for b in range(256) if b not in keep]
    return {chr(b): b for b in keep} | {chr(256 + n): b for n, b in enumerate(moved)}


_TO_LATIN = {ord(letter): byte for letter, byte in byte_level_alphabet().items()}
_OUTSIDE = re.compile("[^" + re.escape("".join(byte_level_alphabet())) + "]")


@dataclass(frozen=True)
class Structure:
    """What is needed to turn tokens into bytes and to follow the encoder.

    Attributes:
        kind: "byte-level", "sentencepiece" (space written as another character), "wordpiece" or "plain".
        space: the character that stands for a space in the vocabulary, or "".
        dummy_prefix: a space is put before the text.
        byte_fallback: characters outside the vocabulary become tokens <0x00> to <0xFF>.
        changes: what happens to a text before it is cut, in words.
        data: the JSON itself.
    """

    kind: str
    space: str
    dummy_prefix: bool
    byte_fallback: bool
    changes: tuple[str, ...]
    data: Mapping[str, Any]


def parts(node: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, with its sequences unrolled."""
    if node is None:
        return
    if node["type"] == "Sequence":
        inner = node.get("normalizers") or node.get("pretokenizers") or node.get("decoders") or ()
        for one in inner:
            yield from parts(one)
    else:
        yield node


def read_structure(text: str) -> Structure:
    """Read the JSON of a `tokenizers.Tokenizer`.

    Raises:
        UnsupportedError: a model or suffix whose bytes are not known.
    """
    data = json.loads(text)
    model = data["model"]
    steps = [*parts(data["normalizer"]), *parts(data["pre_tokenizer"])]
    byte_level = any(s["type"] == "ByteLevel" for s in [*steps, *parts(data["decoder"])])
    space = next(filter(None, map(_space_of, steps)), "")
    if model["type"] not in ("BPE", "Unigram", "WordPiece", "WordLevel"):
        raise UnsupportedError(WHERE, f"a model of type {model['type']}", "Pass TokenBytes.from_list(tokens).")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model["type"] == "BPE" and model.get(name):
            mend = "Its words carry marks instead of spaces; pass TokenBytes.from_list(tokens)."
            raise UnsupportedError(WHERE, f"BPE with {name} = {model[name]!r}", mend)
    if model.get("dropout"):
        raise UnsupportedError(WHERE, f"BPE with dropout {model['dropout']}", "Set tokenizer.model.dropout = None.")
    kind = "byte-level" if byte_level else "sentencepiece" if space else "plain"
    kind = "wordpiece" if model["type"] == "WordPiece" else kind
    fallback = bool(model.get("byte_fallback")) and not byte_level
    changes = tuple(dict.fromkeys(filter(None, (_change(s, space) for s in steps)))) + _swallowed(data)
    return Structure(kind, space, DUMMY_PREFIX in changes, fallback, changes, data)


def _space_of(step: Mapping[str, Any]) -> str:
    if step["type"] == "Replace" and step["pattern"] == {"String": " "}:
        return step["content"]
    return step["replacement"] if step["type"] == "Metaspace" else ""


def _change(step: Mapping[str, Any], space: str) -> str:
    """What this step does to the text's bytes, or "" when it only cuts."""
    kind = step["type"]
    if kind in _FORMS:
        return _FORMS[kind]
    if kind == "Replace":
        if step["pattern"] == {"String": " "}:
            return f"reads U+{ord(space):04X} as a space" if len(space) == 1 else f"reads {space!r} as a space"
        return f"replaces {next(iter(step['pattern'].values()))!r} by {step['content']!r}"
    if kind == "Metaspace":
        prefix = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
        return DUMMY_PREFIX if prefix != "never" else f"reads U+{ord(space):04X} as a space"
    if kind == "Prepend":
        return DUMMY_PREFIX if step["prepend"] == space else f"puts {step['prepend']!r} before the text"
    if kind == "ByteLevel":
        return DUMMY_PREFIX if step.get("add_prefix_space") else ""
    if kind == "BertNormalizer":
        lower = "lowercase, " if step["lowercase"] else ""
        accents = step["strip_accents"]
        strips = "strips accents, " if accents or (accents is None and step["lowercase"]) else ""
        return lower + strips + "cleans control characters"
    if kind in ("BertPreTokenizer", "Whitespace", "WhitespaceSplit"):
        return BLANKS_DROPPED
    if kind == "CharDelimiterSplit" or step.get("behavior") == "Removed":
        return "drops what the pre-tokenizer splits at"
    known = ("Split", "Digits", "Punctuation", "UnicodeScripts", "FixedLength")
    return "" if kind in known else f"runs {kind}, of which nothing is known"


def _swallowed(data: Mapping[str, Any]) -> tuple[str, ...]:
    some = [a["content"] for a in data["added_tokens"] if not a["special"] and (a["lstrip"] or a["rstrip"])]
    return (f"drops blanks beside {some[0]!r}",) if some else ()


def special_tokens(structure: Structure) -> dict[str, int]:
    """Content -> id of added tokens that are special, and of the unknown token, which stands for no text."""
    data, model = structure.data, structure.data["model"]
    found = {a["content"]: a["id"] for a in data["added_tokens"] if a["special"]}
    if model["type"] == "Unigram":
        if model["unk_id"] is not None:
            found.setdefault(model["vocab"][model["unk_id"]][0], model["unk_id"])
    elif model.get("unk_token") in model["vocab"]:
        found.setdefault(model["unk_token"], model["vocab"][model["unk_token"]])
    return found


def vocabulary(structure: Structure) -> dict[str, int]:
    """The model's pieces, content -> id. A Unigram vocabulary may repeat none, so neither does this."""
    vocab = structure.data["model"]["vocab"]
    if structure.data["model"]["type"] == "Unigram":
        return {piece: i for i, (piece, _) in enumerate(vocab)}
    return vocab


def token_list(structure: Structure, specials: Mapping[str, int]) -> list[bytes | None]:
    """Canonical bytes of every id, ``None`` for special tokens and unused ids."""
    vocab, added = vocabulary(structure), structure.data["added_tokens"]
    size = 1 + max([*vocab.values(), *(a["id"] for a in added)], default=-1)
    tokens: list[bytes | None] = [None] * size
    convert = _converter(structure)
    for content, i in vocab.items():
        tokens[i] = convert(content)
    for a in added:
        plain = a["content"]
        if a["normalized"] and structure.space:
            plain = plain.replace(structure.space, " ")  # matched behind the normalizer, where spaces look like that
        tokens[a["id"]] = plain.encode()
    for i in specials.values():
        tokens[i] = None
    return tokens


def _converter(structure: Structure) -> Any:
    if structure.kind == "byte-level":
        return _from_letters
    model = structure.data["model"]
    if structure.kind == "wordpiece":
        mark = model["continuing_subword_prefix"]
        return lambda t: (t[len(mark) :] if t.startswith(mark) and t != mark else t).encode()
    space, fallback = structure.space, structure.byte_fallback

    def from_piece(piece: str) -> bytes:
        byte = _BYTE_TOKEN.match(piece) if fallback and piece.startswith("<0x") else None
        if byte:
            return bytes([int(byte[1], 16)])
        return (piece.replace(space, " ") if space else piece).encode()

    return from_piece


def _from_letters(token: str) -> bytes:
    """A piece outside the alphabet cannot come from text; the decoder gives it back as it is."""
    return token.encode() if _OUTSIDE.search(token) else token.translate(_TO_LATIN).encode("latin-1")
