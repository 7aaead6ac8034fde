"""The task `shorten` with MiniLM and a network that is drawn at random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.text.test_dynamic_tokenization_models import drawn, minilm
from tokenmill import bench, laws
from tokenmill.bench.task import MethodSpec
from tokenmill.bench.tasks.shorten import Options, Task
from tokenmill.errors import LimitError, UnsupportedError


@pytest.fixture(autouse=True)
def _laws_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The laws have tests of their own."""
    monkeypatch.setattr(laws, "each", lambda slug: iter(()))


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("network")
    drawn(*minilm()).save_pretrained(place)
    return str(place)


def options(network: str, **more: Any) -> Options:
    given = {"batch": 4, "chars": 160, "limit": 2, "repeats": 1, "data": "multilingual-lines:german", **more}
    return Options(network=network, **given)


def test_every_method_is_measured_beside_the_ordinary_tokens(network: str, tmp_path: Path) -> None:
    level = ":target_reduction=1.0"
    names = [f"{name}{level}" for name in ("mean", "last-piece", "truncate", "dynamic-tokenization")]
    found = {r.method: r for r in bench.run(Task(options(network)), names, tmp_path)}
    assert [r.status for r in found.values()] == ["ok"] * 5
    assert found["plain"].quality["cosine"] == pytest.approx(1.0, abs=1e-5)
    assert found["plain"].quality["cut"] == 0
    cuts = [r.quality["cut"] for name, r in found.items() if name != "plain"]
    assert cuts == pytest.approx([cuts[0]] * 4)  # all of one length
    assert cuts[0] > 0.3
    assert found["mean"].quality["cosine"] > found["last-piece"].quality["cosine"]
    assert all(0.2 < r.quality["cosine"] < 0.999 for name, r in found.items() if name != "plain")
    assert 0 < found["dynamic-tokenization"].cost["hit_rate"] <= 1


def test_less_merging_stays_closer(network: str, tmp_path: Path) -> None:
    found = bench.run(Task(options(network)), ["mean:max_merges=3", "mean:boundary=word:target_reduction=1"], tmp_path)
    few, many = found[1].quality, found[2].quality
    assert few["cosine"] > many["cosine"]
    assert few["cut"] < many["cut"]
    assert few["recall"] == 1.0


def test_bad_input_is_refused(network: str) -> None:
    task = Task(options(network))
    with pytest.raises(LimitError, match="max_merges"):
        task.check(MethodSpec.parse("mean:max_merges=-1"))
    with pytest.raises(LimitError, match="boundary"):
        task.check(MethodSpec.parse("dynamic-tokenization:boundary=nowhere"))
    with pytest.raises(UnsupportedError, match="bench transplant"):
        task.check(MethodSpec.parse("tokenadapt"))
    with pytest.raises(LimitError, match="batches of 4 texts"):
        Task(options(network, limit=1000)).items("german")
    with pytest.raises(LimitError, match="chars = 0"):
        options(network, chars=0)
