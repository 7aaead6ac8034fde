"""Fifteen ways in which prompts are hidden, each with its way back: for calibration, tests and benches.

All of them are old and public. Each gives its text back exactly on what its entry says it covers; leetspeak does not,
as it writes two letters with one digit.
"""

from __future__ import annotations

import base64
import binascii
import re
import string
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from tokenmill.errors import LimitError

_LOWER, _UPPER = string.ascii_lowercase, string.ascii_uppercase
_LEET = str.maketrans("aeilostzbgAEILOSTZBG", "43110572894311057289")
_UNLEET = str.maketrans("431057289", "aelostzbg")
_JOINER = "\u200b"
_WIDE = {code: code + 0xFEE0 for code in range(0x21, 0x7F)} | {0x20: 0x3000}
_CODES = """
    .- -... -.-. -.. . ..-. --. .... .. .--- -.- .-.. -- -. --- .--. --.- .-. ... - ..- ...- .-- -..- -.-- --..
    ----- .---- ..--- ...-- ....- ..... -.... --... ---.. ----. .-.-.- --..-- ..--.. .----. -.-.-- -..-. -.--. -.--.-
    .-... ---... -.-.-. -...- .-.-. -....- ..--.- .-..-. ...-..- .--.-.
"""
_MORSE = dict(zip(string.ascii_uppercase + string.digits + ".,?'!/()&:;=+-_\"$@", _CODES.split(), strict=True))
_UNMORSE = {code: letter for letter, code in _MORSE.items()}


@dataclass(frozen=True, slots=True)
class Obfuscator:
    """An encoding of text.

    Attributes:
        name: of the encoding.
        encode: text -> encoded text.
        decode: the way back.
        covers: the texts that come back exactly: "any", "ascii", "morse" (words in capitals, digits and the signs that
            Morse has, single spaces between them), "none".
    """

    name: str
    encode: Callable[[str], str]
    decode: Callable[[str], str]
    covers: str = "any"


def caesar(k: int) -> Obfuscator:
    """Letters a-z moved by k places in the alphabet."""
    if isinstance(k, bool) or not isinstance(k, int):
        raise LimitError("caesar", "k", k, "an integer")
    k %= 26
    there = str.maketrans(_LOWER + _UPPER, _LOWER[k:] + _LOWER[:k] + _UPPER[k:] + _UPPER[:k])
    back = {value: key for key, value in there.items()}
    return Obfuscator(f"caesar-{k}", lambda s: s.translate(there), lambda s: s.translate(back))


def _atbash(text: str) -> str:
    return text.translate(str.maketrans(_LOWER + _UPPER, _LOWER[::-1] + _UPPER[::-1]))


def _reverse(text: str) -> str:
    return text[::-1]


def _reverse_words(text: str) -> str:
    # The letters of each word, words where they were. Words in another order stay words, and no tokenizer sees that.
    return re.sub(r"\S+", lambda word: word[0][::-1], text)


def _from_binary(text: str) -> str:
    return bytes(int(group, 2) for group in text.split()).decode()


def _morse(text: str) -> str:
    words = text.upper().split()
    return " / ".join(" ".join(_MORSE[c] for c in word if c in _MORSE) for word in words)


def _unmorse(text: str) -> str:
    return " ".join("".join(_UNMORSE[code] for code in word.split()) for word in text.split(" / "))


def _percent(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode())


_ALL = (
    caesar(3),
    Obfuscator("rot13", caesar(13).encode, caesar(13).decode),
    Obfuscator("atbash", _atbash, _atbash),
    Obfuscator("reverse", _reverse, _reverse),
    Obfuscator("reverse-words", _reverse_words, _reverse_words),
    Obfuscator("leet", lambda s: s.translate(_LEET), lambda s: s.translate(_UNLEET), "none"),
    Obfuscator("base64", lambda s: base64.b64encode(s.encode()).decode(), lambda s: base64.b64decode(s).decode()),
    Obfuscator("base32", lambda s: base64.b32encode(s.encode()).decode(), lambda s: base64.b32decode(s).decode()),
    Obfuscator("hex", lambda s: s.encode().hex(), lambda s: binascii.unhexlify(s).decode()),
    Obfuscator("binary", lambda s: " ".join(f"{byte:08b}" for byte in s.encode()), _from_binary),
    Obfuscator("morse", _morse, _unmorse, "morse"),
    Obfuscator("percent", _percent, urllib.parse.unquote),
    Obfuscator("spaced", " ".join, lambda s: s[::2]),
    Obfuscator("zero-width", _JOINER.join, lambda s: s[::2]),
    Obfuscator(
        "fullwidth", lambda s: s.translate(_WIDE), lambda s: s.translate({v: k for k, v in _WIDE.items()}), "ascii"
    ),
)


class Obfuscators(Mapping[str, Obfuscator]):
    """Name -> encoding: the fifteen, Caesar with k = 3. `caesar(k)` makes others."""

    def __getitem__(self, name: str) -> Obfuscator:
        found = next((one for one in _ALL if one.name == name), None)
        if found is None:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return (one.name for one in _ALL)

    def __len__(self) -> int:
        return len(_ALL)


OBFUSCATORS = Obfuscators()
