"""Strings that a domain tokenizer should hold as one token each, by group, and how they are found in a text."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken

from tokenmill.errors import LimitError
from tokenmill.text import _bpe_training as bpe

_TAGS = [
    "a",
    "abbr",
    "article",
    "aside",
    "b",
    "blockquote",
    "body",
    "br",
    "button",
    "code",
    "div",
    "em",
    "footer",
    "form",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "head",
    "header",
    "hr",
    "html",
    "i",
    "img",
    "input",
    "li",
    "link",
    "main",
    "meta",
    "nav",
    "ol",
    "option",
    "p",
    "pre",
    "script",
    "section",
    "select",
    "span",
    "strong",
    "style",
    "table",
    "tbody",
    "td",
    "th",
    "thead",
    "title",
    "tr",
    "ul",
]
_ATTRIBUTES = ("href", "src", "class", "id", "style", "title")
_ROMAN = ("ii", "iii", "iv", "vi", "vii", "viii", "ix")
_WORD = re.compile(r"\w")


def _whitespace() -> tuple[str, ...]:
    return (*(c * n for c in " \t\r\n" for n in range(2, 9)), "\r\n", "\t ")


def _markdown() -> tuple[str, ...]:
    runs = (c * n for c in ".-=_*~" for n in range(2, 9))
    headings = ("#" * n for n in range(2, 7))
    others = ("**", "__", "~~", "```", "![", "http://", "https://", "ftp://", "sftp://", "www.", "mailto:", "tel:")
    return (*headings, *runs, *others, "://")


def _html() -> tuple[str, ...]:
    found = [form for tag in _TAGS for form in (f"<{tag}", f"</{tag}>", f"<{tag.upper()}", f"</{tag.upper()}>")]
    return (*found, *(f' {name}="' for name in _ATTRIBUTES), *(f" {name}=" for name in _ATTRIBUTES))


def _enumerations() -> tuple[str, ...]:
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    inner = (*map(str, range(1, 100)), *letters, *_ROMAN, *(r.upper() for r in _ROMAN))
    return tuple(f"({text})" for text in inner)


def _strings(made: Any) -> Any:
    return field(default_factory=made)


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomTokens:
    """Groups of strings that are reserved for; give ``()`` for a group to leave it out.

    They are added tokens: found in the normalised text before it is cut into words, the longest first. One that
    begins or ends with a letter or digit is found only where no letter, digit or underscore goes on at either side
    (``single_word``): "10" does not cut "2010", "A10" or "x_10". URL beginnings are found everywhere.

    Attributes:
        whitespace: runs of 2-8 blanks, tabs, returns and newlines.
        markdown: marks, runs of rules, beginnings of URLs.
        html: opening and closing tags in both cases, attributes.
        json: pairs of marks, and the three words.
        xml: comments, CDATA, the prolog.
        years: 1776-2049.
        numbers: 10-999.
        enumerations: "(1)" to "(99)", "(a)" to "(Z)", Roman numbers.
        citations: your own abbreviations ("U.S.C.", "F.3d"); none by default.
        code: your own strings of code; none by default.
    """

    whitespace: tuple[str, ...] = _strings(_whitespace)
    markdown: tuple[str, ...] = _strings(_markdown)
    html: tuple[str, ...] = _strings(_html)
    json: tuple[str, ...] = ('{"', '"}', '["', '"]', '": ', '", ', '":', '",', "null", "true", "false")
    xml: tuple[str, ...] = ("<!--", "-->", "<![CDATA[", "]]>", "<?xml", "?>", "/>")
    years: tuple[str, ...] = _strings(lambda: tuple(map(str, range(1776, 2050))))
    numbers: tuple[str, ...] = _strings(lambda: tuple(map(str, range(10, 1000))))
    enumerations: tuple[str, ...] = _strings(_enumerations)
    citations: tuple[str, ...] = ()
    code: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.groups():
            group = getattr(self, name)
            if isinstance(group, str) or not all(isinstance(text, str) for text in group):
                raise LimitError("CustomTokens", name, group, "a sequence of strings")
            object.__setattr__(self, name, tuple(group))

    @classmethod
    def groups(cls) -> tuple[str, ...]:
        """The names of the groups."""
        return tuple(f.name for f in dataclasses.fields(cls))

    @classmethod
    def only(cls, **groups: Iterable[str]) -> CustomTokens:
        """These groups, and nothing else."""
        return cls(**{name: tuple(groups.pop(name, ())) for name in cls.groups()}, **groups)  # type: ignore[arg-type]

    def texts(self, normalizer: Any = None) -> tuple[str, ...]:
        """All strings of more than one character, normalised, each once, sorted."""
        return tuple(token.content for token in self.added(normalizer))

    def added(self, normalizer: Any = None) -> list[AddedToken]:
        """The tokens as `tokenizers` takes them, sorted; those that normalisation makes equal are one.

        Raises:
            LimitError: a string that `tokenizers` would decode to other bytes, as it does with added tokens whose
                characters are all printable and not all ASCII, below U+0144.
        """
        alphabet = set(bpe.byte_alphabet())
        found: dict[str, bool] = {}
        for name in self.groups():
            for raw in getattr(self, name):
                text = normalizer.normalize_str(raw) if normalizer is not None else raw
                if len(text) < 2:
                    continue
                if not text.isascii() and set(text) <= alphabet:
                    mend = "Leave it to the merges, or add a character such as a space to it."
                    raise LimitError("CustomTokens", name, raw, "a string that decodes to itself", mend)
                found[text] = found.get(text, False) or _stands_alone(name, text)
        return [AddedToken(text, single_word=found[text], normalized=True) for text in sorted(found)]


def _stands_alone(group: str, text: str) -> bool:
    """Whether a string must not be found inside a word. Beginnings of URLs are followed by one."""
    return group != "markdown" and bool(_WORD.match(text[0]) or _WORD.match(text[-1]))


def fit(
    where: str, learned: bpe.Learned, added: Sequence[AddedToken], vocab_size: int, specials: int
) -> tuple[bpe.Learned, list[AddedToken]]:
    """The most merges with which they, the custom tokens that they lack, and the rest have room in the vocabulary.

    A merge may make a custom token, which then need not be added: strings are compared as text, not in the alphabet
    of bytes. So the number of tokens grows by 0 or 1 with each merge, and the size is met exactly if the corpus gives
    enough merges.

    Raises:
        LimitError: no room for the custom tokens.
    """
    made = learned.vocabulary()  # symbols and merges in order, strings once
    contents = {bpe.to_symbols(token.content) for token in added}
    bpe.require_room(where, vocab_size, specials, len(added), len(learned.symbols))
    seen, size, keep = set(learned.symbols), specials + len(learned.symbols) + len(added), 0
    for a, b in learned.merges:
        text = a + b
        grows = text not in seen and text not in contents
        if size + grows > vocab_size:
            break
        seen.add(text)
        size += grows
        keep += 1
    kept = learned.first(keep)
    known = {text for text in made if text in seen}
    return kept, [token for token in added if bpe.to_symbols(token.content) not in known]
