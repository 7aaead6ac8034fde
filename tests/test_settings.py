"""Settings that come as text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import pytest

from tokenmill.errors import LimitError
from tokenmill.settings import from_text, settings_of

if TYPE_CHECKING:
    from tokenmill.models import CostProfile


@dataclass(frozen=True)
class Knobs:
    """Things to turn.

    Args:
        k: how many
            there are.
        share: part of the whole.
        draft: where drafts come from.

    Raises:
        LimitError: never.
    """

    k: int = 8
    share: float = 0.5
    on: bool = False
    tree: str | list[int] = "2.2.2"
    draft: Literal["near", "far"] = "near"
    budget: int | float = 3
    seed: int | None = None
    state: list[int] | None = None
    profile: CostProfile | None = None
    hidden: int = field(default=0, init=False)


def test_settings_are_the_fields_that_text_can_say() -> None:
    known = settings_of(Knobs)
    assert list(known) == ["k", "share", "on", "tree", "draft", "budget", "seed"]
    assert known["k"].help == "how many there are."
    assert known["draft"].choices == ("near", "far")
    assert known["share"].default == 0.5
    assert known["tree"].help == ""


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ({"k": "4"}, {"k": 4}),
        ({"share": "0.25"}, {"share": 0.25}),
        ({"share": "1"}, {"share": 1.0}),
        ({"on": "true"}, {"on": True}),
        ({"on": "False"}, {"on": False}),
        ({"tree": "7"}, {"tree": "7"}),
        ({"draft": "far"}, {"draft": "far"}),
        ({"budget": "3"}, {"budget": 3}),
        ({"budget": "0.5"}, {"budget": 0.5}),
        ({"seed": "none"}, {"seed": None}),
        ({"seed": "5"}, {"seed": 5}),
        ({"k": 4}, {"k": 4}),
    ],
)
def test_text_becomes_the_fields_type(written: dict[str, Any], value: dict[str, Any]) -> None:
    made = from_text("here", Knobs, written)
    assert made == value
    assert [type(v) for v in made.values()] == [type(v) for v in value.values()]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"kk": "4"}, "Did you mean k"),
        ({"state": "4"}, "setting = 'state'"),
        ({"k": "four"}, "here: k = 'four', but it must be a value of type int"),
        ({"on": "yes"}, "a value of type bool"),
        ({"draft": "fa"}, "Did you mean far"),
    ],
)
def test_other_text_is_refused_by_name(written: dict[str, Any], message: str) -> None:
    with pytest.raises(LimitError, match=message):
        from_text("here", Knobs, written)


def test_a_function_has_its_keyword_only_parameters() -> None:
    def walk(x: int, *, keep: int, far: bool = True) -> None:
        """Walk.

        Args:
            x: the start.
            keep: the end.
        """

    assert {name: s.help for name, s in settings_of(walk).items()} == {"keep": "the end.", "far": ""}
