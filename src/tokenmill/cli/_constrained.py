"""``tokenmill run`` for methods that need a constraint: which one it is, and what the particles say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape

from tokenmill import catalog
from tokenmill.errors import LimitError

from ._output import console, print_json, print_table

_SHOWN = 10  # texts of the posterior


@dataclass(frozen=True, slots=True)
class Constraint:
    """What was asked for on the command line: one of these, or nothing."""

    regex: str | None = None
    json_schema: str | None = None
    grammar: Path | None = None
    predicate: str | None = None
    python: bool = False

    @property
    def given(self) -> list[str]:
        """The options that were used."""
        found = {"--regex": self.regex, "--json-schema": self.json_schema, "--grammar": self.grammar}
        found |= {"--predicate": self.predicate, "--python": self.python or None}
        return [name for name, value in found.items() if value is not None]

    def build(self, slug: str) -> Any:
        """The constraint itself.

        Raises:
            BadParameter: none or more than one, or a file that is not there.
            LimitError: the constraint cannot be read, or the function is not there.
        """
        if len(self.given) != 1:
            names = "--regex, --json-schema, --grammar, --predicate or --python"
            raise typer.BadParameter(f"{slug} needs one constraint: {names}; got {', '.join(self.given) or 'none'}")
        from tokenmill import decode

        if self.regex is not None:
            return decode.regex(self.regex)
        if self.json_schema is not None:
            return decode.json_schema(_schema(self.json_schema))
        if self.grammar is not None:
            return decode.grammar(_read(self.grammar))
        if self.predicate is not None:
            from tokenmill.decode._predicate import named_function

            return decode.predicate(named_function("run", self.predicate), name=self.predicate)
        return decode.python_prefix()


def _read(path: Path) -> str:
    if not path.is_file():
        raise typer.BadParameter(f"there is no file {path}")
    return path.read_text(encoding="utf-8")


def _schema(given: str) -> str:
    """The schema's text: what was given, or the file of that name."""
    return given if given.lstrip().startswith(("{", "true", "false")) else _read(Path(given))


@dataclass(frozen=True, slots=True)
class Side:
    """How the model is loaded and asked."""

    model: str
    dtype: str
    packed: bool
    new_tokens: int
    seed: int


def run(
    card: catalog.Card, values: Mapping[str, Any], constraint: Any, text: str, side: Side, *, as_json: bool
) -> None:
    """Generate under the constraint, beside one plain sample, and print the posterior."""
    from tokenmill import models
    from tokenmill.bench.measure import timed

    model: Any
    model, tokenizer = models.load(side.model, dtype=side.dtype, packed=side.packed)
    if values.get("seed") is None:
        values = {**values, "seed": side.seed}
    decoder = catalog.method(card.slug)(constraint, tokenizer, **values)
    plain_ms, plain = timed(lambda: _generate(model, tokenizer, text, side, None))
    ms, chosen = timed(lambda: _generate(model, tokenizer, text, side, decoder))
    found, trace = decoder.sequences, decoder.trace
    posterior = {data.decode("utf-8", errors="replace"): p for data, p in found.posterior().items()}
    if as_json:
        counts = {**trace.counts(), "median_checks": trace.median_checks}
        data = {"text": chosen, "posterior": posterior, "log_ml": found.log_ml, "ess": found.ess, "ms": ms}
        print_json({"method": {**data, "counts": counts}, "plain": {"text": plain, "ms": plain_ms}})
        return
    out = console()
    rows = [(f"{p:.3f}", escape(json.dumps(t, ensure_ascii=False))) for t, p in list(posterior.items())[:_SHOWN]]
    print_table(("weight", "text"), rows, right=("weight",))
    out.print(f"\nchosen by weight: {escape(json.dumps(chosen, ensure_ascii=False))}")
    out.print(f"a plain sample:   {escape(json.dumps(plain, ensure_ascii=False))}")
    out.print(
        f"\nlog marginal likelihood {found.log_ml:.2f}, effective particles {found.ess:.1f} of {len(found)}; "
        f"{trace.median_checks:.0f} checks a token (median), {trace.checks} calls of the constraint, "
        f"{trace.model_calls} model calls, {ms:,.0f} ms (plain {plain_ms:,.0f} ms)"
    )


def _generate(model: Any, tokenizer: Any, text: str, side: Side, decoder: Any) -> str:
    """A sample at temperature 1 from the whole law: cuts of it could take the valid tokens away."""
    import torch

    inputs = tokenizer(text, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise LimitError("run", "prompt", text, "at least one token long")
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(side.seed)
        out = model.generate(
            **inputs,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=side.new_tokens,
            custom_generate=decoder,
        )
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
