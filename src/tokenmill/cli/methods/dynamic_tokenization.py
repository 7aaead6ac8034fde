"""``tokenmill run dynamic-tokenization``: what merging the tokens of your texts would save, and what it does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from tokenmill import models
from tokenmill.cli._output import Json, console, print_json, print_table, quiet_loading
from tokenmill.errors import LimitError

_WHERE = "run dynamic-tokenization"
_MINILM = "all-minilm-l6-v2"
_SHOWN = 12


def command(
    file: Annotated[Path, typer.Argument(help="A text, one paragraph or document a line; - reads standard input.")],
    model: Annotated[
        str, typer.Option(help="A tokenizer: an embedded model's, a tokenizer's folder, or a transformers id.")
    ] = _MINILM,
    merges: Annotated[int | None, typer.Option(help="Merges of a batch at most.")] = None,
    reduction: Annotated[float | None, typer.Option(help="Share of what can be saved; 0.5 without --merges.")] = None,
    boundary: Annotated[
        str, typer.Option(help="What a merge may not cross: pretoken, word, word_hyphen or sentence.")
    ] = "pretoken",
    batch_size: Annotated[int, typer.Option(min=1, help="Texts that are merged together.")] = 32,
    cosine: Annotated[
        bool, typer.Option(help="Compare MiniLM's embeddings with and without merging; rows by its network.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Merge the frequent pairs of tokens of each batch of your lines, and show what that saves.

    Example: [bold]tokenmill run dynamic-tokenization notes.txt --reduction 0.5 --cosine[/bold]
    """
    from tokenmill.text import DynamicBPE

    lines = _lines(file)
    if cosine and model != _MINILM:
        raise LimitError(_WHERE, "model", model, f"{_MINILM} with --cosine")
    quiet_loading()
    tokenizer = models.tokenizer(model, where=_WHERE)
    if not hasattr(tokenizer, "is_fast"):  # a tokenizer.json alone
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    bpe = DynamicBPE(tokenizer, boundary=boundary, max_merges=merges, target_reduction=reduction)  # type: ignore[arg-type]
    compare = _Comparison(tokenizer) if cosine else None
    batches = [bpe.merge(lines[i : i + batch_size], max_length=512) for i in range(0, len(lines), batch_size)]
    base = sum(batch.base_length for batch in batches)
    length = sum(batch.length for batch in batches)
    told: dict[str, Any] = {
        "texts": len(lines),
        "batches": len(batches),
        "base_tokens": base,
        "tokens": length,
        "cut": 1 - length / base if base else 0.0,
        "limit": sum(batch.limit for batch in batches),
        "merges": sum(len(batch.merges) for batch in batches),
        "first_merges": [[a.decode("utf-8", "replace"), b.decode("utf-8", "replace")] for a, b in batches[0].merges],
    }
    if compare is not None:
        told["cosine"] = compare.mean(batches)
    if as_json:
        print_json(told)
        return
    print_table(
        ["texts", "batches", "tokens", "merged", "saved", "at most", "merges", *(["cosine"] if cosine else [])],
        [
            [
                str(len(lines)), str(len(batches)), f"{base:,}", f"{length:,}", f"{told['cut']:.1%}",
                f"{1 - told['limit'] / base if base else 0:.1%}", str(told["merges"]),
                *([f"{told['cosine']:.3f}"] if cosine else []),
            ]
        ],
    )  # fmt: skip
    shown = " ".join(f"[{a}+{b}]" for a, b in told["first_merges"][:_SHOWN])
    console().print(f"first merges: {escape(shown)}")
    if batches[0].tokens:
        console().print(escape("|".join(t.decode("utf-8", "replace") for t in batches[0].tokens[0][:60])))


def _lines(file: Path) -> list[str]:
    if str(file) == "-":
        text = sys.stdin.read()
    elif file.is_file():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise LimitError(_WHERE, "file", str(file), "a text in UTF-8") from error
    else:
        raise LimitError(_WHERE, "file", str(file), "a file, or - for standard input")
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise LimitError(_WHERE, "file", str(file), "a text that is not empty")
    return lines


class _Comparison:
    """MiniLM's embeddings of merged and ordinary tokens."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers import AutoModel

        from tokenmill.text import DynamicInputs, HyperNetwork
        from tokenmill.text._embedders import minilm_folder

        self.model, self.tokenizer = AutoModel.from_pretrained(minilm_folder()).eval(), tokenizer
        network = HyperNetwork.from_pretrained(_MINILM, self.model, tokenizer)
        self.inputs = DynamicInputs(self.model, network, positions="keep")

    def mean(self, batches: list[Any]) -> float:
        import torch

        values: list[float] = []
        for batch in batches:
            plain = self.tokenizer.pad({"input_ids": batch.base_ids}, return_tensors="pt")
            with torch.inference_mode():
                both = [self._embedding(plain), self._embedding(self.inputs(batch))]
            values += (both[0] * both[1]).sum(-1).tolist()
        return sum(values) / len(values)

    def _embedding(self, given: Any) -> Any:
        import torch

        hidden = self.model(**given).last_hidden_state
        mask = given["attention_mask"][..., None].to(hidden.dtype)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
