"""``tokenmill run`` of methods that drop visual tokens: a question about a picture, and which patches were kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape

from tokenmill.catalog import Card
from tokenmill.errors import LimitError, MissingExtraError

from ._output import console, print_json, print_table, quiet_loading

_DIMMED = 0.25  # brightness of a dropped patch


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user asked for."""

    model: str
    dtype: str
    image: Path | None
    question: str | None
    out: Path | None
    new_tokens: int


def run(card: Card, values: dict[str, Any], asked: Asked, *, as_json: bool) -> None:
    """Answer with all visual tokens and with those that the method keeps; write the picture with the others dimmed."""
    if asked.image is None or not asked.question:
        raise typer.BadParameter(f"{card.slug} needs --image and --question")
    if not asked.image.is_file():
        raise typer.BadParameter(f"there is no file {asked.image}")
    try:
        import numpy as np
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingExtraError(f"run {card.slug}", "pillow", "prune") from error
    try:
        with Image.open(asked.image) as opened:
            pixels = np.asarray(opened.convert("RGB"))
    except UnidentifiedImageError as error:
        raise LimitError(f"run {card.slug}", "image", str(asked.image), "a picture that Pillow can read") from error
    from tokenmill.bench.task import Item, MethodSpec
    from tokenmill.bench.tasks.vqa import Answering, Options, Task
    from tokenmill.corpora import Picture, Question

    quiet_loading()
    model = asked.model if asked.model != "gemma-3-270m" else "digits-llava"
    task = Task(Options(model=model, dtype=asked.dtype, new_tokens=asked.new_tokens))  # type: ignore[arg-type]
    loaded, processor = task.load()
    pruner = task.pruner(MethodSpec(card.slug, values))
    item = Item("input", "question", (Picture("input", pixels, ()), Question(asked.question, "", "question")))
    ways = {"plain": Answering(loaded, processor, None, asked.new_tokens)}
    ways[card.slug] = Answering(loaded, processor, pruner, asked.new_tokens)
    told = {}
    for name, way in ways.items():
        way.run(item)  # warm
        outcome = way.run(item)
        told[name] = {"answer": outcome.output, **outcome.counts}
    kept = kept_patches(loaded, processor, pruner, pixels, asked.question)
    out = asked.out if asked.out is not None else asked.image.with_name(f"{asked.image.stem}-{card.slug}.png")
    half = out.with_name(f".{out.name}.tmp")
    Image.fromarray(dimmed(pixels, kept)).save(half, format="PNG")
    half.replace(out)
    if as_json:
        print_json({**told, "picture": str(out)})
        return
    rows = [
        (
            name,
            str(t["answer"]),
            f"{t['visual_kept']:.1f} of {t['visual']:.0f}",
            f"{t['flops'] / 1e9:.2f}",
            f"{t['kv_bytes'] / 1024:,.0f}",
            f"{t['prepare_ms'] + t['generate_ms']:.0f}",
        )
        for name, t in told.items()
    ]
    heads = ("", "answer", "visual tokens", "prefill GFLOP", "KV KiB", "ms")
    print_table(heads, rows, right=heads[2:])
    console().print(f"\nkept patches: {escape(str(out))}")


def kept_patches(model: Any, processor: Any, pruner: Any, pixels: Any, question: str) -> Any:
    """(rows, columns) bool: patches of the picture whose tokens are left at the end of the decoder."""
    import torch

    from tokenmill.hf.vision import encode, visual_mask

    inputs = processor(processor.prompt(question), [pixels])
    with torch.inference_mode():
        visual = encode("run", model, inputs).visuals[0]
        pruned = pruner.prepare(model, inputs)
        with pruner.attach(model, pruned) as trace:
            model(**pruned)
    stays = torch.ones(len(visual), dtype=torch.bool)
    if pruned.report:
        stays = torch.zeros(len(visual), dtype=torch.bool)
        stays[pruned.report[0].keep] = True
    if trace.shortening.kept:
        last = trace.shortening.kept[max(trace.shortening.kept)][0]
        left = stays.nonzero()[:, 0]
        stays = torch.zeros_like(stays)
        stays[left[last[visual_mask(model, pruned["input_ids"])[0]]]] = True
    # The finest view: stitched tiles where there are any, else the whole picture.
    view = int(visual.place[:, 0].max())
    mine = (visual.place[:, 0] == view) & ~visual.newline
    place = visual.place[mine]
    grid = torch.zeros(int(place[:, 1].max()) + 1, int(place[:, 2].max()) + 1, dtype=torch.bool)
    grid[place[:, 1], place[:, 2]] = stays[mine]
    return grid.numpy()


def dimmed(pixels: Any, kept: Any) -> Any:
    """The picture (H, W, 3) with the patches dark that are false in ``kept`` (rows, columns)."""
    import numpy as np

    rows = (np.arange(pixels.shape[0]) * kept.shape[0]) // pixels.shape[0]
    columns = (np.arange(pixels.shape[1]) * kept.shape[1]) // pixels.shape[1]
    light = np.where(kept[rows][:, columns], 1.0, _DIMMED)
    return (pixels * light[:, :, None]).astype(np.uint8)
