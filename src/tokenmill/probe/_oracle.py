"""A solver that reads the generated haystack: the ceiling of the benchmark, and a check of its own questions."""

from __future__ import annotations

import json

from tokenmill.probe._example import Example


def follow(content: dict[str, str], start: str, steps: int) -> str | None:
    """The value behind so many lookups, or None where the chain ends before."""
    at: str | None = start
    for _ in range(steps):
        at = content.get(at) if at is not None else None
    return at


def oracle(example: Example) -> str:
    """The answer as a model would write it, from the haystack, the question's keys and the parameters alone."""
    content: dict[str, str] = json.loads(example.haystack)
    meta = example.meta
    match example.task:
        case "conditional":
            found = [value for key, value in content.items() if meta["conditional_character"] in key]
        case "threading" | "multi-threading":
            found = [follow(content, key, int(meta["thread_length"])) or "" for key in example.keys]
        case "branched":
            found = _branches(content, example.keys[0], meta["branches"])
        case _:
            found = [content[key] for key in example.keys]
    return found[0] if len(found) == 1 else json.dumps(found)


def _branches(content: dict[str, str], start: str, wanted: str) -> list[str]:
    """Values behind the last step of the longest thread: all of that step, or the one that it has."""
    children: dict[str, list[str]] = {}
    for key, value in content.items():
        stem, _, suffix = key.rpartition("-")
        if len(suffix) < 12:  # the last group of a bare UUID has twelve digits
            children.setdefault(stem, []).append(value)
    level = [content[start]]
    while after := [value for stem in level for value in children.get(stem, [])]:
        level = after
    return level if wanted == "all" else level[:1]
