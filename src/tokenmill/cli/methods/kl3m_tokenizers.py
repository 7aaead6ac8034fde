"""``tokenmill run kl3m-tokenizers``: train a vocabulary on your files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tokenmill.cli._output import Json, console, print_json, write_folder
from tokenmill.errors import LimitError

_WHERE = "run kl3m-tokenizers"
_HELD = 20  # one document in so many is held out for the report


def command(
    files: Annotated[list[str], typer.Argument(help="Text, .jsonl or .jsonl.gz files; FILE:0.1 reads a tenth.")],
    out: Annotated[Path, typer.Option(help="The folder that the tokenizer is written to.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens of the vocabulary.")] = 32_768,
    family: Annotated[str, typer.Option(help="domain: ordinary tokens; char: short ones, for texts with errors.")] = (
        "domain"
    ),
    max_chars: Annotated[int, typer.Option(help="The longest token of the family char.")] = 3,
    unit: Annotated[str, typer.Option(help="What --max-chars counts: symbol (bytes) or char.")] = "symbol",
    custom: Annotated[
        Path | None, typer.Option(help="Your own custom tokens, one a line, beside the defaults.")
    ] = None,
    defaults: Annotated[bool, typer.Option(help="The default custom tokens of the family domain.")] = True,
    lowercase: Annotated[bool, typer.Option("--lowercase", help="An uncased vocabulary.")] = False,
    min_frequency: Annotated[int, typer.Option(help="How often a pair must occur to be merged.")] = 1,
    short: Annotated[str, typer.Option(help="Too small a corpus: raise, or fill with whitespace runs.")] = "raise",
    report: Annotated[bool, typer.Option("--report", help="Hold a share out and compare tokens on it.")] = False,
    baseline: Annotated[str, typer.Option(help="For --report: a tokenizer.json, a folder, or a model's id.")] = "",
    plots: Annotated[Path | None, typer.Option(help="For --report: a folder for its plots (SVG).")] = None,
    seed: Annotated[int, typer.Option(help="Of sampled files and of the report.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it is there.")] = False,
    as_json: Json = False,
) -> None:
    """Train a vocabulary for a field of work on your own files.

    Example: [bold]tokenmill run kl3m-tokenizers contracts.jsonl --vocab-size 32768 --out my-tokenizer --report[/bold]
    """
    from tokenmill.text import TokenizerReport
    from tokenmill.text._corpus_stream import CorpusStream

    if family not in ("domain", "char"):
        raise LimitError(_WHERE, "family", family, "domain or char")
    if family == "char" and custom is not None:
        raise LimitError(_WHERE, "custom", str(custom), "left out: the family char has no custom tokens")
    if out.exists() and not force:
        raise LimitError(_WHERE, "out", str(out), "a folder that is not there yet", "Replace it with --force.")
    if out.exists() and not (out / "tokenizer.json").is_file():
        raise LimitError(_WHERE, "out", str(out), "new or a tokenizer's folder, which alone --force replaces")
    for name, value in (("baseline", baseline), ("plots", str(plots or ""))):
        if value and not report:
            raise LimitError(_WHERE, name, value, "given together with --report")
    other = _baseline(baseline)
    stream = CorpusStream(files=files, seed=seed, where=_WHERE)
    held = [text for number, text in enumerate(stream) if number % _HELD == _HELD - 1] if report else []
    if report and not held:
        raise LimitError(_WHERE, "report", True, f"used with at least {_HELD} documents or pieces of 64 KB of text")
    source = (text for number, text in enumerate(stream) if not report or number % _HELD != _HELD - 1)
    common: dict[str, Any] = {"lowercase": lowercase, "min_frequency": min_frequency, "short": short, "seed": seed}
    made = _train(family, source, vocab_size, max_chars, unit, custom, defaults, common)
    write_folder(out, made.save_pretrained)
    told = {"out": str(out), "tokens": len(made), "documents": stream.counts.documents, "bad": dict(stream.counts.bad)}
    compared = TokenizerReport({**other, "kl3m": made}, {"held out": held}, seed=seed) if held else None
    if plots is not None and compared is not None:
        plots.mkdir(parents=True, exist_ok=True)
        for name, svg in compared.plots().items():
            (plots / f"{name}.svg").write_text(svg, encoding="utf-8")
    _tell(told, compared, as_json)


def _train(
    family: str, source: Any, size: int, longest: int, unit: str, custom: Path | None, defaults: bool, common: Any
) -> Any:
    from tokenmill.text import CustomTokens, train_char_bpe, train_domain_bpe

    if family == "char":
        return train_char_bpe(source, size, longest, unit=unit, **common)  # type: ignore[arg-type]
    if custom is not None and not custom.is_file():
        raise LimitError(_WHERE, "custom", str(custom), "a file with one string a line")
    own = tuple(line for line in custom.read_text(encoding="utf-8").splitlines() if line) if custom else ()
    tokens = CustomTokens(citations=own) if defaults else CustomTokens.only(citations=own)
    return train_domain_bpe(source, size, custom_tokens=tokens, **common)


def _baseline(name: str) -> dict[str, Any]:
    from tokenmill import models

    return {name: models.tokenizer(name, where=_WHERE)} if name else {}


def _tell(told: dict[str, Any], made: Any, as_json: bool) -> None:
    if as_json:
        print_json({**told, **({"report": made.to_dict()} if made else {})})
        return
    bad = sum(told["bad"].values())
    left_out = f", {bad} bad records left out" if bad else ""
    console().print(f"{told['tokens']} tokens from {told['documents']} documents{left_out}: {told['out']}")
    if made:
        console().print(made.to_markdown(), markup=False)
