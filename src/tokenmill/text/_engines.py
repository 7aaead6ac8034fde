"""Which engine says what tokens are valid: by pairs where text is not cut first, by encoding again elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import regex
from tokenizers import Regex, Tokenizer, pre_tokenizers

from tokenmill.errors import UnsupportedError
from tokenmill.text._added import CutOut
from tokenmill.text._classes import GPT2, read_patterns
from tokenmill.text._cut_masks import CutMasks, Cutting
from tokenmill.text._encoder import plain_tokenizer, text_encoder
from tokenmill.text._merges import Merges, Pairs, first_symbols
from tokenmill.text._pieces import WHERE, Pieces
from tokenmill.text._ranks import RankEncoder
from tokenmill.text._structure import (
    BLANKS_DROPPED,
    DUMMY_PREFIX,
    Structure,
    byte_level_alphabet,
    parts,
    read_structure,
    vocabulary,
)
from tokenmill.text._token_bytes import TokenBytes
from tokenmill.text._unsplit import Unsplit, Vocabulary
from tokenmill.text._utf8 import Spelled

_LETTERS = {byte: letter for letter, byte in byte_level_alphabet().items()}
_HARMLESS = ("NFC", DUMMY_PREFIX)


def engine_of(token_bytes: TokenBytes) -> tuple[Unsplit | Pieces, bool]:
    """The engine of a vocabulary, built once, and whether its texts must begin with a space.

    Raises:
        UnsupportedError: no encoder, or one that changes text so that bytes cannot be given back.
    """
    if token_bytes.engine is None:
        token_bytes.engine = _build(token_bytes)
    return token_bytes.engine


def _build(token_bytes: TokenBytes) -> tuple[Unsplit | Pieces, bool]:
    if token_bytes.ranks is not None:
        return _of_ranks(token_bytes, token_bytes.ranks), False
    if token_bytes.json is None:
        mend = "Build it with TokenBytes.of(tokenizer) or from_ranks."
        raise UnsupportedError(WHERE, "a bare vocabulary has no encoder", mend)
    structure = read_structure(token_bytes.json)
    _check_changes(structure)
    copy, moved = plain_tokenizer(
        token_bytes.json, token_bytes.specials, rename=token_bytes.rename, prefix=not structure.dummy_prefix
    )
    if _is_unsplit(structure):
        made = _unsplit(token_bytes, structure, copy, text_encoder(copy, moved))
        if made is not None:
            return made, structure.dummy_prefix
    byte_ids = _byte_ids(structure) if structure.byte_fallback else {} if structure.kind == "byte-level" else None
    possible = token_bytes.lengths > 0
    cutter = _TokenizerCutter(copy, moved, token_bytes)
    fast = _cut_masks(token_bytes, structure, cutter) if structure.kind == "byte-level" else None
    return Pieces(token_bytes.tokens, token_bytes.trie, cutter, byte_ids, possible, fast), structure.dummy_prefix


def _cut_masks(token_bytes: TokenBytes, structure: Structure, cutter: _TokenizerCutter) -> CutMasks | None:
    """Masks by classes of characters, where the patterns can be read and added tokens are plain."""
    model, patterns = structure.data["model"], []
    for step in parts(structure.data["pre_tokenizer"]):
        if step["type"] == "Split":
            patterns.append(step["pattern"].get("Regex") or re.escape(step["pattern"]["String"]))
        elif step["type"] == "ByteLevel":
            patterns += [GPT2] * step.get("use_regex", True)
        else:
            return None
    normal = [step["type"] for step in parts(structure.data["normalizer"])]
    looks = read_patterns(patterns)
    if model["type"] != "BPE" or looks is None or not _plain_added(structure) or not {"NFC"}.issuperset(normal):
        return None
    text, size = token_bytes.json or "", len(token_bytes)
    specials = token_bytes.specials

    def pairs() -> Pairs:
        model = read_structure(text).data["model"]  # read again: keeping it would take hundreds of megabytes
        vocab = {piece: i for piece, i in model["vocab"].items() if piece not in specials}
        return _simulate(Merges.from_model(size, model["vocab"], model["merges"]), vocab)[0]

    added = CutOut(*_added(structure, token_bytes), token_bytes.trie)
    cutting = Cutting(cutter, looks, _probe, added, pairs, bool(model.get("ignore_merges")), "NFC" in normal)
    return CutMasks(token_bytes.tokens, token_bytes.trie, cutting, token_bytes.lengths > 0)


def _probe(atom: str, letters: str) -> list[bool]:
    """Which letters have a property, by the engine that runs a tokenizer's patterns."""
    has = [True] * len(letters)
    for _, (start, stop) in pre_tokenizers.Split(Regex(atom), "removed").pre_tokenize_str(letters):
        has[start:stop] = [False] * (stop - start)
    return has


def _check_changes(structure: Structure) -> None:
    lossy = [c for c in structure.changes if c not in _HARMLESS and not c.startswith("reads ")]
    if structure.kind == "wordpiece" and BLANKS_DROPPED not in lossy:
        lossy.append("joins words without blanks")
    if lossy:
        mend = "Give it a tokenizer without that step, with the text changed before."
        raise UnsupportedError(WHERE, f"this tokenizer {', '.join(lossy)}: bytes cannot be exact", mend)
    some = [a["content"] for a in structure.data["added_tokens"] if not a["special"]]
    first = any(s["type"] == "Metaspace" and s.get("prepend_scheme") == "first" for s in _steps(structure))
    if structure.dummy_prefix and some and not first:
        what = f"this tokenizer puts a space behind each added token such as {some[0]!r} as well"
        raise UnsupportedError(WHERE, what, "Set its prepend_scheme to 'first', or make these tokens special.")


def _steps(structure: Structure) -> list[Mapping]:
    return [*parts(structure.data["normalizer"]), *parts(structure.data["pre_tokenizer"])]


def _is_unsplit(structure: Structure) -> bool:
    """Whether BPE sees everything between added tokens in one go."""
    model = structure.data["model"]
    if model["type"] != "BPE" or model.get("ignore_merges"):
        return False
    return _plain_added(structure) and all(_cuts_nothing(step, structure) for step in _steps(structure))


def _plain_added(structure: Structure) -> bool:
    plain = [a for a in structure.data["added_tokens"] if not a["special"]]
    return not any(a["lstrip"] or a["rstrip"] or a["single_word"] for a in plain)


def _cuts_nothing(step: Mapping, structure: Structure) -> bool:
    kind = step["type"]
    if kind == "Split":  # behind a normalizer that has replaced all spaces
        replaced = any(s["type"] == "Replace" for s in parts(structure.data["normalizer"]))
        return replaced and step["pattern"] == {"String": " "} and " " not in structure.space
    if kind == "Metaspace":
        return not step.get("split", True)
    if kind == "ByteLevel":
        return not step.get("use_regex", True)
    return kind in ("Replace", "Prepend")


def _byte_ids(structure: Structure) -> dict[int, int]:
    vocab = vocabulary(structure)
    return {b: vocab[name] for b in range(256) if (name := f"<0x{b:02X}>") in vocab}


def _unsplit(
    token_bytes: TokenBytes, structure: Structure, copy: Tokenizer, encode: Callable[[str], list[int]]
) -> Unsplit | None:
    """The pair engine, or None where byte tokens are not what it takes them for."""
    model, trie = structure.data["model"], token_bytes.trie
    byte_ids = _byte_ids(structure) if structure.byte_fallback else {}
    names = {f"<0x{b:02X}>" for b in byte_ids}
    if byte_ids and (len(byte_ids) < 256 or any(not names.isdisjoint((a, b, a + b)) for a, b in model["merges"])):
        return None
    vocab = {piece: i for piece, i in model["vocab"].items() if piece not in token_bytes.specials}
    merges = Merges.from_model(len(token_bytes), model["vocab"], model["merges"])
    pairs, table = _simulate(merges, vocab)
    known = table >= 0
    if structure.space:
        known[0x20] = known[ord(structure.space)]
    added = CutOut(*_added(structure, token_bytes), trie)
    spelled = Spelled(known) if byte_ids else None

    def partial(data: bytes) -> list[int]:
        ids, rest = _before_last_section(token_bytes, encode, data, added.ids)
        return ids + [t.id for t in copy.model.tokenize("".join(_LETTERS[b] for b in rest))]

    return Unsplit(
        Vocabulary(
            token_bytes.tokens,
            trie,
            pairs,
            added,
            byte_ids,
            spelled,
            encode,
            partial if structure.kind == "byte-level" else None,
        )
    )


def _simulate(merges: Merges, vocab: Mapping[str, int]) -> tuple[Pairs, np.ndarray]:
    table = np.full(0x110000, -1, dtype=np.int32)
    for piece, i in vocab.items():
        if len(piece) == 1:
            table[ord(piece)] = i
    ids = np.fromiter(vocab.values(), dtype=np.int64, count=len(vocab))
    return Pairs(merges, *first_symbols(list(vocab), table), ids), table


def _added(structure: Structure, token_bytes: TokenBytes) -> tuple[dict[bytes, int], dict[bytes, int]]:
    found: tuple[dict[bytes, int], dict[bytes, int]] = ({}, {})
    for a in structure.data["added_tokens"]:
        token = token_bytes[a["id"]]
        if token and a["content"] not in token_bytes.specials:
            found[a["normalized"]][token] = a["id"]
    return found


def _before_last_section(
    token_bytes: TokenBytes, encode: Callable[[str], list[int]], data: bytes, added: frozenset[int]
) -> tuple[list[int], bytes]:
    """The tokens up to the last added token, and the bytes behind it."""
    text = data.decode(errors="ignore")
    ids = encode(text)
    k = next((k for k in range(len(ids), 0, -1) if ids[k - 1] in added), 0)
    return ids[:k], data[len(token_bytes.join(ids[:k])) :]


class _TokenizerCutter:
    """Pieces of a `tokenizers.Tokenizer`."""

    def __init__(self, copy: Tokenizer, moved: Mapping[int, int], token_bytes: TokenBytes) -> None:
        self._copy, self._moved, self._bytes = copy, moved, token_bytes

    def batch(self, texts: Sequence[str]) -> list[list[int]]:
        found = [e.ids for e in self._copy.encode_batch_fast(list(texts), add_special_tokens=False)]
        return [[self._moved.get(i, i) for i in ids] for ids in found] if self._moved else found

    def cut(self, text: str) -> list[tuple[bytes, tuple[int, ...]]]:
        encoding = self._copy.encode(text, add_special_tokens=False)
        pieces: list[list[int]] = []
        before = None
        for i, word in zip(encoding.ids, encoding.word_ids, strict=True):
            if word != before or not pieces:
                pieces.append([])
            before = word
            pieces[-1].append(self._moved.get(i, i))
        return [(self._bytes.join(ids), tuple(ids)) for ids in pieces]

    def ends(self, text: str) -> list[int]:
        cutter = self._copy.pre_tokenizer
        return [] if cutter is None else [stop for _, (_, stop) in cutter.pre_tokenize_str(text)]

    def piece(self, data: bytes) -> tuple[int, ...]:
        return tuple(t.id for t in self._copy.model.tokenize("".join(_LETTERS[b] for b in data)))


class _RankCutter:
    """Pieces of merge ranks."""

    def __init__(self, encoder: RankEncoder) -> None:
        self._encoder, self.piece = encoder, encoder.piece

    def batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encoder(text) for text in texts]

    def cut(self, text: str) -> list[tuple[bytes, tuple[int, ...]]]:
        return [(p.encode(), self.piece(p.encode())) for p in self._encoder.pieces(text)]

    def ends(self, text: str) -> list[int]:
        ends = np.cumsum([len(piece) for piece in self._encoder.pieces(text)], dtype=np.int64).tolist()
        return ends if ends and ends[-1] == len(text) else []


def _rank_probe(atom: str, letters: str) -> list[bool]:
    has = regex.compile(atom)
    return [has.fullmatch(letter) is not None for letter in letters]


def _of_ranks(token_bytes: TokenBytes, encoder: RankEncoder) -> Unsplit | Pieces:
    tokens, trie, possible = token_bytes.tokens, token_bytes.trie, token_bytes.lengths > 0

    def pairs() -> Pairs:
        # Latin-1 letters stand for the bytes, so that both kinds of vocabulary are simulated alike.
        vocab = {token.decode("latin-1"): i for token, i in encoder.ranks.items()}
        return _simulate(Merges.from_ranks(len(tokens), encoder.ranks), vocab)[0]

    def partial(data: bytes) -> list[int]:
        return list(encoder.piece(data))

    added, cutter = CutOut({}, {}, trie), _RankCutter(encoder)
    if encoder.pattern is None:
        simulated = pairs()
        if simulated.reachable[list(encoder.ranks.values())].all():
            return Unsplit(Vocabulary(tokens, trie, simulated, added, {}, None, encoder, partial))
        return Pieces(tokens, trie, cutter, {}, possible)
    looks = read_patterns([encoder.pattern])
    if looks is None:
        return Pieces(tokens, trie, cutter, {}, possible)
    cutting = Cutting(cutter, looks, _rank_probe, added, pairs, whole=True, nfc=False)
    return Pieces(tokens, trie, cutter, {}, possible, CutMasks(tokens, trie, cutting, possible))
