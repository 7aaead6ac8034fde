"""An encoder for text alone: nothing added, and special tokens in the text are letters like others."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import Tokenizer

_HEAD = '"added_tokens":'


def plain_tokenizer(
    text: str, specials: Mapping[str, int], *, rename: bool, prefix: bool = True
) -> tuple[Tokenizer, dict[int, int]]:
    """A copy of a tokenizer that reads every text as text.

    Special tokens leave the added tokens, truncation and padding are switched off. Added tokens beyond the model's
    vocabulary get new ids in the copy.

    Args:
        text: the JSON of the tokenizer, in `tokenizers`' own compact order.
        specials: content -> id of what must not be found in a text.
        rename: the special tokens stand in the model's vocabulary where the model could find them; they get names
            that no text has.
        prefix: keep the step that puts a space before the text, if there is one.

    Returns:
        The copy, and its ids -> the tokenizer's ids where they differ.
    """
    start = text.index(_HEAD) + len(_HEAD)
    added, end = json.JSONDecoder().raw_decode(text, start)
    kept = [a for a in added if a["content"] not in specials]
    body = _renamed(text[end:], specials) if rename else text[end:]
    body = body if prefix else _unprefixed(body)
    head = '{"version":"1.0","truncation":null,"padding":null,' + _HEAD
    copy = Tokenizer.from_str(head + json.dumps(kept) + body)
    moved = {copy.token_to_id(a["content"]): a["id"] for a in kept}
    return copy, {new: old for new, old in moved.items() if new is not None and new != old}


def text_encoder(copy: Tokenizer, moved: Mapping[int, int]) -> Callable[[str], list[int]]:
    """`encode` of a `plain_tokenizer`, in the ids of the original."""
    if not moved:
        return lambda text: copy.encode(text, add_special_tokens=False).ids
    return lambda text: [moved.get(i, i) for i in copy.encode(text, add_special_tokens=False).ids]


def _renamed(body: str, specials: Mapping[str, int]) -> str:
    # Noncharacters (U+FDD0...) stand in no text that is meant for interchange.
    names = {content: f"\ufdd0{i}\ufdd1" for content, i in specials.items()}
    data = json.loads("{" + body.lstrip(", \n"))
    model = data["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
        if model["type"] == "BPE":
            model["merges"] = [m for m in model["merges"] if not {m[0], m[1], m[0] + m[1]} & names.keys()]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    data.pop("post_processor")
    return "," + json.dumps(data)[1:]


def _unprefixed(body: str) -> str:
    data = json.loads("{" + body.lstrip(", \n"))
    for name in ("normalizer", "pre_tokenizer"):
        data[name] = _without_prefix(data[name])
    return "," + json.dumps(data)[1:]


def _without_prefix(step: dict[str, Any] | None) -> dict[str, Any] | None:
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Sequence":
        name = "normalizers" if "normalizers" in step else "pretokenizers"
        return step | {name: [s for s in map(_without_prefix, step[name]) if s is not None]}
    if step["type"] == "Metaspace":
        return step | {"prepend_scheme": "never"}
    return step | {"add_prefix_space": False} if step["type"] == "ByteLevel" else step
