"""What the filter costs beyond encoding: megabytes a second of CPT-Filtering beside the tokenizer's own batch encode.

python benchmarks/guard_speed.py     # some minutes on two cores

Texts are parts of held-out manual pages and source files. For each vocabulary these take turns: the tokenizer's
`encode_batch` and `encode_batch_fast` (tiktoken: `encode_ordinary_batch`), and `CPTFilter.decide` with calibrated
thresholds, without windows and with the three default ones. Overhead is the median over the rounds of the filter's time
by that of the encoding beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from _lines import Lines, seconds

from tokenmill import corpora
from tokenmill.models import tokenizer
from tokenmill.text import CPTFilter

VOCABULARIES = ("gemma-3-270m", "gpt2", "bpe_openai/cl100k_base", "bpe_openai/o200k_base", "python-target")
CHARS = 2000  # of a text
MEGABYTES = 3
REPEATS = 11


def texts(split: str) -> list[str]:
    """Parts of source files and of pages in all languages, by turns."""
    parts = []
    for name in ("manual-pages", "python-stdlib"):
        whole = [record.text for record in corpora.load(name).split(split)]
        cut = [text[at : at + CHARS] for text in whole for at in range(0, len(text), CHARS)]
        parts.append(cut[: int(MEGABYTES * 1e6) // CHARS // 2])
    return [text for pair in zip(*parts, strict=False) for text in pair]


def vocabulary(name: str, clean: list[str], asked: list[str]) -> dict[str, Any]:
    """Interleaved medians of one vocabulary."""
    made = tokenizer(name)
    own: Any = getattr(made, "backend_tokenizer", made)
    ways: dict[str, Callable[[], Any]] = {}
    if hasattr(own, "encode_batch_fast"):
        ways["encode_batch_fast"] = lambda: own.encode_batch_fast(asked, add_special_tokens=False)
        ways["encode_batch"] = lambda: own.encode_batch(asked, add_special_tokens=False)
    else:
        ways["encode_batch"] = lambda: own.encode_ordinary_batch(asked)
    bases = list(ways)
    for label, windows in (("filter", ()), ("filter with windows", (10, 20, 40))):
        guard = CPTFilter(made, windows=windows).calibrate(clean)
        ways[label] = lambda guard=guard: guard.decide(asked)
    took: dict[str, list[float]] = {way: [] for way in ways}
    for way in ways.values():
        way()  # warm
    for _ in range(REPEATS):
        for way, run in ways.items():
            took[way].append(seconds(run))
    over = {
        f"{label} over {base}": median(a / b for a, b in zip(took[label], took[base], strict=True)) - 1
        for label in ("filter", "filter with windows")
        for base in bases
    }
    size = sum(len(text.encode()) for text in asked) / 1e6
    rate = {way: size / median(values) for way, values in took.items()}
    return {"vocabulary": name, "megabytes": size, "texts": len(asked), "mb_a_second": rate, "overhead": over}


def main() -> None:
    lines = Lines("guard-speed", "cpt-filtering", repeats=REPEATS)
    clean, asked = texts("train"), texts("test")
    for name in VOCABULARIES:
        lines.keep("bulk", **vocabulary(name, clean, asked))


if __name__ == "__main__":
    main()
