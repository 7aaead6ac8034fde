"""Manual pages of the machine in many languages, as plain text: what the installed packages brought.

Nothing of them ships with this package: every page has its package's licence. English pages are those that have a
translation, so that the languages speak of the same things. The few roff requests that pages use are read here; pages
in the mdoc language, and definitions of macros, are left out.
"""

from __future__ import annotations

import gzip
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from tokenmill.corpora._corpus import Record, sections

LICENCE = "each page its package's; read on this machine, not shipped"
SOURCE = "manual pages under {root}"
ROOT = Path("/usr/share/man")
LANGUAGES = {
    "cs": "czech", "da": "danish", "de": "german", "en": "english", "es": "spanish", "fr": "french",
    "hu": "hungarian", "id": "indonesian", "it": "italian", "ja": "japanese", "ko": "korean", "nl": "dutch",
    "pl": "polish", "pt": "portuguese", "pt_BR": "portuguese", "ro": "romanian", "ru": "russian", "sv": "swedish",
    "tr": "turkish", "uk": "ukrainian", "zh_CN": "chinese",
}  # fmt: skip

_SECTIONS = ("man1", "man5", "man7", "man8")
_BREAKS = frozenset({"PP", "P", "LP", "IP", "TP", "HP", "TQ", "sp", "br", "RS", "RE", "nf", "fi", "Sp", "Vb", "Ve"})
_INLINE = frozenset({"B", "I", "R", "SM", "SB", "BR", "RB", "IR", "RI", "BI", "IB", "UR", "MT", "SY", "OP"})
_ALTERNATING = frozenset({"BR", "RB", "IR", "RI", "BI", "IB"})
_HEADINGS = frozenset({"SH", "SS"})
_CHARACTERS = {
    "aq": "'", "dq": '"', "bu": "•", "em": "—", "en": "–", "lq": "“", "rq": "”", "oq": "‘", "cq": "’", "co": "©",
    "rs": "\\", "ha": "^", "ti": "~", "ga": "`", "mu": "×", "->": "→", "<=": "≤", ">=": "≥", "Fo": "«", "Fc": "»",
    "hy": "-", "mi": "−", "la": "⟨", "ra": "⟩", "ss": "ß", "Po": "£", "Eu": "€",
}  # fmt: skip
_CHARACTERS |= {"oa": "å", "oA": "Å", "/o": "ø", "/O": "Ø", "/l": "ł", "/L": "Ł", "ae": "æ", "AE": "Æ", "oe": "œ"}
_ACCENTS = {":": "\u0308", "'": "\u0301", "`": "\u0300", "^": "\u0302", "~": "\u0303", ",": "\u0327"}
_STRINGS = {'L"': "“", 'R"': "”", "--": "--", "C+": "C++", "PI": "π", "lq": "“", "rq": "”"}
_ESCAPE = re.compile(
    r"""\\(?:
    ["#].*                                             # a comment
    | f(?:\((?:..)|\[[^\]]*\]|.)                       # fonts
    | s[-+]?(?:\([-+]?\d\d|\[[^\]]*\]|\d\d?)           # sizes
    | [mMFY](?:\((?:..)|\[[^\]]*\]|.)                  # colours
    | [hvwxlLDoCNZbAR]'[^']*'                          # moves, lines
    | n(?:[-+]?\((?:..)|\[[^\]]*\]|.)                  # registers
    | [*](?:\((?P<string2>..)|\[(?P<stringn>[^\]]*)\]|(?P<string1>.))
    | \((?P<char2>..) | \[(?P<charn>[^\]]*)\]
    | (?P<single>.)
    | $
    )""",
    re.VERBOSE,
)
_SINGLES = {"-": "-", "e": "\\", "\\": "\\", "'": "'", "`": "`", " ": " ", "~": " ", "0": " ", ".": ".", "t": "\t"}


def pages(root: Path = ROOT) -> Iterator[Record]:
    """Parts of pages; the id is ``<language code>/<section>/<page>#<number>`` and the kind the language's name."""
    translated: set[str] = set()
    for code, kind in LANGUAGES.items():
        if code != "en":
            for name, path in _files(root / code):
                translated.add(name)
                yield from _records(f"{code}/{name}", path, kind)
    for name, path in _files(root):
        if name in translated:
            yield from _records(f"en/{name}", path, "english")


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for section in _SECTIONS:
        # A symbolic link is another name of a page that is read anyway.
        for path in sorted((folder / section).glob("*")):
            if path.is_file() and not path.is_symlink():
                yield f"{section}/{path.name.removesuffix('.gz')}", path


def _records(name: str, path: Path, kind: str) -> Iterator[Record]:
    raw = path.read_bytes()
    try:
        page = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError):
        return
    for number, part in enumerate(sections(plain_text(page)), start=1):
        yield Record(f"{name}#{number:02d}", part, kind)


def plain_text(page: str) -> str:
    """A page in the man language as paragraphs; an empty text for one in the mdoc language.

    >>> plain_text('.TH X 1\\n.SH NAME\\nx \\\\- do\\n.PP\\nUse\\n.B x\\nor\\n.BR y (1).\\n')
    'NAME\\n\\nx - do\\n\\nUse x or y(1).'
    """
    if re.search(r"^\.(Dd|Sh)\b", page, re.MULTILINE):
        return ""
    paragraphs: list[list[str]] = [[]]
    for line in _without_programs(page):
        if not line.startswith((".", "'")):
            if line.strip():
                paragraphs[-1].append(_text(line).strip())
            else:
                paragraphs.append([])
            continue
        name, _, rest = line[1:].strip().partition(" ")
        words = [_text(word) for word in _arguments(rest)]
        if name in _HEADINGS:
            paragraphs += [[" ".join(words)], []]
        elif name in _BREAKS:
            paragraphs.append([words[0]] if name == "IP" and words and len(words[0]) > 1 else [])
        elif name in _INLINE:
            paragraphs[-1].append(("" if name in _ALTERNATING else " ").join(words))
    joined = (" ".join(part for part in paragraph if part) for paragraph in paragraphs)
    return "\n\n".join(text for text in joined if text)


def _without_programs(page: str) -> Iterator[str]:
    """The page's lines without macro definitions, conditions and comments."""
    inside, depth = False, 0
    for line in page.splitlines():
        if inside:
            inside = not line.startswith("..")
        elif depth or re.match(r"[.']\s*(if|ie|el|while)\b", line):
            depth = max(0, depth + line.count("\\{") - line.count("\\}"))
        elif re.match(r"[.']\s*(de1?|am|ig)\b", line):
            inside = True
        elif not line.startswith(('.\\"', "'\\\"", "..")):
            yield line


def _arguments(rest: str) -> list[str]:
    """Words of a request; one in double quotes may hold blanks."""
    return [quoted or bare for quoted, bare in re.findall(r'"((?:[^"]|"")*)"?|((?:\\ |[^\s"])+)', rest)]


def _text(line: str) -> str:
    """A line without its escapes."""
    return _ESCAPE.sub(_character, line)


def _character(found: re.Match[str]) -> str:
    string = found["string2"] or found["stringn"] or found["string1"]
    if string is not None:
        return _STRINGS.get(string, "")
    name = found["char2"] or found["charn"]
    if name is None:
        return _SINGLES.get(found["single"] or "", "")
    if re.fullmatch(r"u[0-9A-F]{4,6}", name):
        return chr(int(name[1:], 16))
    if len(name) == 2 and name[0] in _ACCENTS:
        return unicodedata.normalize("NFC", name[1] + _ACCENTS[name[0]])
    return _CHARACTERS.get(name, "")
