"""`tokenmill run` under a constraint: which options go together, and what is printed, on the small Python model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tokenmill import models
from tokenmill.cli import main

Call = Callable[..., tuple[int, str, str]]
MODEL = ("--model", "python-target", "--dtype", "float32", "--no-packed")
FOUR_DIGITS = ("--regex", "[0-9]{4}", "--prompt", "year = ", "--max-new-tokens", "8")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Call `tokenmill run`: exit code, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["run", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_posterior_is_printed_beside_a_plain_sample(call: Call) -> None:
    code, out, err = call("awrs", *MODEL, *FOUR_DIGITS, "--set", "n_particles=10")
    assert code == 0, err
    weights = [float(w) for w, _ in re.findall(r'^ *(0\.\d+|1\.000) +"(\d{4})" *$', out, flags=re.MULTILINE)]
    assert weights
    assert sum(weights) == pytest.approx(1.0, abs=0.01)
    assert weights == sorted(weights, reverse=True)
    assert re.search(r'chosen by weight: "\d{4}"', out)
    assert "a plain sample:" in out
    for words in ("log marginal likelihood -", "of 10;", "checks a token", "model calls"):
        assert words in out


@pytest.mark.parametrize(
    ("options", "beginning"),
    [
        (("--regex", "[0-9]{4}"), r"\d{0,4}"),
        (("--json-schema", '{"type": "integer", "maximum": 99}'), r"-?\d*"),
        (("--grammar", "{folder}/list.lark"), r"(\d(,\d)*,?)?"),
        (("--json-schema", "{folder}/schema.json"), "[truefals]*"),
        (("--predicate", "rules:no_e"), "[^e]*"),
        (("--python",), "(?s).*"),
    ],
)
def test_every_kind_of_constraint(
    call: Call, options: tuple[str, ...], beginning: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "list.lark").write_text('start: DIGIT ("," DIGIT)*\nDIGIT: /[0-9]/\n')
    (tmp_path / "schema.json").write_text('{"type": "boolean"}')
    (tmp_path / "rules.py").write_text("def no_e(text):\n    return 'e' not in text\n")
    monkeypatch.chdir(tmp_path)
    given = [option.replace("{folder}", str(tmp_path)) for option in options]
    rest = ("--prompt", "x = ", "--max-new-tokens", "7", "--json", "--set", "boundary=prefix", "--set", "n_particles=2")
    # With boundary=prefix a text that reaches the length limit stays, as the beginning that it is.
    code, out, err = call("awrs", *MODEL, *given, *rest)
    assert code == 0, err
    found = json.loads(out)
    ours = found["method"]
    assert isinstance(found["plain"]["text"], str)
    assert ours["counts"]["checks"] > 0
    assert 0 < ours["ess"] <= 2
    assert sum(ours["posterior"].values()) == pytest.approx(1.0)
    assert ours["text"] in ours["posterior"]
    assert all(re.fullmatch(beginning, text) for text in ours["posterior"])


def test_a_seed_says_the_same_again(call: Call) -> None:
    first, again, other = (
        json.loads(call("awrs", *MODEL, *FOUR_DIGITS, "--json", "--seed", seed)[1])["method"] for seed in "112"
    )
    assert first["posterior"] == again["posterior"]
    assert first["log_ml"] == again["log_ml"]
    assert first["posterior"] != other["posterior"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["awrs"], "needs one constraint: --regex.* got none"),
        (["awrs", "--regex", "a", "--python"], "got --regex, --python"),
        (["awrs", "--regex", "a(b"], "unclosed group at position 1"),
        (["awrs", "--json-schema", '{"type": "strin"}'], r"\$.type = 'strin'"),
        (["awrs", "--json-schema", '{"type": '], "JSON: "),
        (["awrs", "--json-schema", "no-such-file"], "no file no-such-file"),
        (["awrs", "--grammar", "no-such-file"], "no file no-such-file"),
        (["awrs", "--predicate", "no_such_module:f"], "No module named 'no_such_module'"),
        (["awrs", "--predicate", "json:no_such_name"], "no attribute 'no_such_name'"),
        (["awrs", "--predicate", "json"], "module:function"),
        (["awrs", "--predicate", "json:__name__"], "not a str"),
        (["awrs", "--regex", "a", "--set", "n_particles=0"], "n_particles = 0"),
        (["awrs", "--regex", "a", "--set", "particles=3"], "n_particles"),
        (["token-recycling", "--regex", "a"], "token-recycling takes no constraint, got --regex"),
        (["token-recycling", "--python"], "takes no constraint, got --python"),
    ],
)
def test_bad_usage_is_said_in_one_line(
    call: Call, arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not any("n_particles=0" in a for a in arguments):
        monkeypatch.setattr(models, "load", None)  # all this is said before a model is loaded
    code, _, err = call(arguments[0], *MODEL, "--prompt", "x", *arguments[1:])
    assert code == 2
    assert re.search(words, err)
    assert err.count("\n") == 1


def test_a_constraint_that_the_model_cannot_keep_fails(call: Call) -> None:
    code, _, err = call("awrs", *MODEL, "--regex", "[0-9]{40}", "--prompt", "x = ", "--max-new-tokens", "5")
    assert code == 1
    assert "all 5 particles died" in err
    assert "n_particles" in err


def test_what_a_function_does_wrong_comes_out(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd_rules.py").write_text("def odd(text):\n    return 1 / len(text) > 0\n")
    monkeypatch.chdir(tmp_path)
    code, _, err = call("awrs", *MODEL, "--predicate", "odd_rules:odd", "--prompt", "x = ")
    assert code == 1
    assert "prefix_fn raised ZeroDivisionError at ''" in err
