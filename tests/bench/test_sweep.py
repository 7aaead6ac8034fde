"""Sweeps: flat files, lists as sweeps, unknown keys as errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenmill import bench, settings
from tokenmill.bench.task import MethodSpec, load_task
from tokenmill.errors import LimitError


def _write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_a_list_is_a_sweep_over_its_values(tmp_path: Path) -> None:
    path = _write(
        tmp_path,
        'task = "generate"\nmodel = "m"\nseeds = [0, 2]\n[[method]]\nid = "plain"\n'
        '[[method]]\nid = "token_recycling"\nk = [4, 8]\ntree = ["5", "7"]\n',
    )
    sweep = bench.load_sweep(path)
    assert (sweep.name, sweep.task, sweep.seeds, dict(sweep.options)) == ("mine", "generate", (0, 2), {"model": "m"})
    assert sweep.methods == (
        "plain",
        "token-recycling:k=4:tree=5",
        "token-recycling:k=4:tree=7",
        "token-recycling:k=8:tree=5",
        "token-recycling:k=8:tree=7",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('task = "generate"\nmodle = "m"\n[[method]]\nid = "plain"', "Did you mean model"),
        ('task = "generate"\nseed = 3\n[[method]]\nid = "plain"', "key = 'seed'"),
        ('task = "generat"\n[[method]]\nid = "plain"', "Did you mean generate"),
        ('[[method]]\nid = "plain"', "task = None"),
        ('task = "generate"', "at least one"),
        ('task = "generate"\n[[method]]\nk = 3', "method.id"),
        ('task = "generate"\n[[method]]\nid = "plain"\nk = [[1]]', "plain.k"),
        ('task = "generate"\nmodel = ["a"]\n[[method]]\nid = "plain"', "one value"),
        ('task = "generate"\nseeds = 3\n[[method]]\nid = "plain"', "seeds = 3"),
        ('task = "generate', "TOML"),
    ],
)
def test_what_does_not_belong_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(LimitError, match=message):
        bench.load_sweep(_write(tmp_path, text))


def test_unknown_sweeps_answer_with_the_nearest() -> None:
    with pytest.raises(LimitError, match="Did you mean generate"):
        bench.load_sweep("generat")
    with pytest.raises(LimitError, match="a file"):
        bench.load_sweep("missing.toml")


@pytest.mark.parametrize("name", bench.sweep_names())
def test_sweeps_that_ship_name_methods_and_settings_that_exist(name: str) -> None:
    sweep = bench.load_sweep(name)
    module = load_task(sweep.task)
    task = module.Task(module.Options(**settings.from_text(name, module.Options, sweep.options)))
    specs = [task.check(MethodSpec.parse(text)) for text in sweep.methods]
    assert "plain" in [spec.slug for spec in specs]
