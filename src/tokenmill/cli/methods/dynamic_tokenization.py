"""``tokenmill run dynamic-tokenization``: what merging the tokens of your texts would save, and what it does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from tokenmill import models
from tokenmill.cli._output import Json, console, print_json, print_table, quiet_loading, read_text
from tokenmill.errors import LimitError

if TYPE_CHECKING:
    from tokenmill.text import DynamicBatch

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

    lines = [line for line in read_text(_WHERE, file).splitlines() if line.strip()]
    if cosine and model != _MINILM:
        raise LimitError(_WHERE, "model", model, f"{_MINILM} with --cosine")
    quiet_loading()
    tokenizer = models.tokenizer(model, where=_WHERE)
    if not hasattr(tokenizer, "is_fast"):  # a tokenizer.json alone
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    bpe = DynamicBPE(tokenizer, boundary=boundary, max_merges=merges, target_reduction=reduction)  # type: ignore[arg-type]
    compare = _Comparison() if cosine else None
    batches = [bpe.merge(lines[i : i + batch_size], max_length=512) for i in range(0, len(lines), batch_size)]
    told = _counted(batches, len(lines))
    if compare is not None:
        told["cosine"] = compare.mean(batches)
    if as_json:
        print_json(told)
    else:
        _show(told, batches[0])


def _counted(batches: list[DynamicBatch], texts: int) -> dict[str, Any]:
    base, length = (sum(getattr(batch, name) for batch in batches) for name in ("base_length", "length"))
    limit = sum(batch.limit for batch in batches)
    return {
        "texts": texts,
        "batches": len(batches),
        "base_tokens": base,
        "tokens": length,
        "cut": 1 - length / base,
        "limit": limit,
        "largest_cut": 1 - limit / base,
        "merges": sum(len(batch.merges) for batch in batches),
        "first_merges": [[_text(a), _text(b)] for a, b in batches[0].merges],
    }


def _show(told: dict[str, Any], first: DynamicBatch) -> None:
    heads = ["texts", "batches", "tokens", "merged", "saved", "at most", "merges"]
    row = [
        str(told["texts"]), str(told["batches"]), f"{told['base_tokens']:,}", f"{told['tokens']:,}",
        f"{told['cut']:.1%}", f"{told['largest_cut']:.1%}", str(told["merges"]),
    ]  # fmt: skip
    if "cosine" in told:
        heads, row = [*heads, "cosine"], [*row, f"{told['cosine']:.3f}"]
    print_table(heads, [row])
    shown = " ".join(f"[{a}+{b}]" for a, b in told["first_merges"][:_SHOWN])
    console().print(f"first merges: {escape(shown)}")
    console().print(escape("|".join(map(_text, first.tokens[0][:60]))))


def _text(token: bytes) -> str:
    return token.decode("utf-8", "replace")


class _Comparison:
    """MiniLM's embeddings of merged and ordinary tokens."""

    def __init__(self) -> None:
        from tokenmill.text import DynamicInputs, HyperNetwork

        self.model, self.tokenizer = models.encoder(_MINILM, where=_WHERE)
        network = HyperNetwork.from_pretrained(_MINILM, self.model, self.tokenizer)
        self.inputs = DynamicInputs(self.model, network, positions="keep")

    def mean(self, batches: list[DynamicBatch]) -> float:
        """Cosine between the two embeddings of a text, over all texts."""
        import torch

        from tokenmill.text._embedders import mean_state

        values: list[float] = []
        for batch in batches:
            plain = self.tokenizer.pad({"input_ids": batch.base_ids}, return_tensors="pt")
            with torch.inference_mode():
                one, two = (
                    mean_state(self.model(**given).last_hidden_state, given["attention_mask"])
                    for given in (plain, self.inputs(batch))
                )
            values += torch.cosine_similarity(one, two).tolist()
        return sum(values) / len(values)
