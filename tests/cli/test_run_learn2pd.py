"""``tokenmill run learn2pd`` and ``tokenmill run unmasking-policies``: text that fills in."""

from __future__ import annotations

import json
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tokenmill.cli.methods import learn2pd, unmasking_policies
from tokenmill.errors import LimitError

filters, policies = typer.Typer(), typer.Typer()
filters.command()(learn2pd.command)
policies.command()(unmasking_policies.command)


def run(app: Any, *args: str) -> Any:
    return CliRunner().invoke(app, list(args), catch_exceptions=False)


@pytest.mark.parametrize("app", [filters, policies])
def test_the_answer_fills_in_pass_by_pass(app: Any) -> None:
    lines = run(app, "Pbdfhk").output.splitlines()
    assert lines[0] == "Pbdfhk"
    passes = [line for line in lines if line.startswith("pass ")]
    assert len(passes) >= 3
    masks = [line.count("·") for line in passes]
    assert masks == sorted(masks, reverse=True)
    assert masks[-1] == 0
    assert sorted(passes[-1].split()[-1].strip("_")) == sorted("bdfhk")
    assert any("one token a pass" in line for line in lines)
    assert "fewer passes" in lines[-1]


def test_data_instead_of_a_picture() -> None:
    told = json.loads(run(filters, "12+34=", "--predict-eot", "--json").output)
    assert told["method"]["text"] == told["plain"]["text"] == "046"
    assert told["plain"]["passes"] == 12
    assert told["method"]["passes"] < 12
    assert sum(told["plain"]["revealed"]) == 12
    drawn = json.loads(run(policies, "--seed", "3", "--cache", "prefix", "--json").output)
    assert drawn["prompt"]
    assert drawn["method"]["passes"] < 12


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(LimitError, match="filter"):
        run(filters, "12+34=", "--filter", "nowhere")
    with pytest.raises(LimitError, match="policy"):
        run(policies, "12+34=", "--model", "diffusion-mixed-guide-weak")
    with pytest.raises(LimitError, match="cache"):
        run(filters, "12+34=", "--cache", "big")
