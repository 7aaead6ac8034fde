"""The task `vqa` on models that were trained for two steps, and the command that runs a method on a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from recipes import digits_vlm
from tests.prune.methods import scorer
from tokenmill import bench, corpora, laws
from tokenmill.bench.task import MethodSpec
from tokenmill.bench.tasks.vqa import Options, Task
from tokenmill.cli import main
from tokenmill.cli._pictured import dimmed
from tokenmill.errors import LimitError, UnsupportedError

METHODS = [
    "random:keep=0.25",
    "norm:keep=0.25",
    "norm-diverse:keep=0.25",
    "attention:keep=0.25",
    "divprune:keep=0.25",
    "idpruner:keep=0.25",
    "zoo-prune:keep=0.25",
    "entropyprune:keep=0.25",
    "information-horizon:keep=0.25",
    "todre:keep=0.25",
    "vflowopt:keep=0.25",
    "token-correlation-compression",
]


@pytest.fixture(autouse=True)
def _laws_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The laws have tests of their own."""
    monkeypatch.setattr(laws, "each", lambda slug: iter(()))


@pytest.fixture(scope="module", params=list(digits_vlm.ARCHS))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("vlm")
    arguments = ["--arch", request.param, "--pictures", "2", "--threads", "1", "--steps", "1"]
    digits_vlm.main([*arguments, "--out", str(place)])
    scorer(128).save(place / "scorer")
    return place / digits_vlm.ARCHS[request.param].name


def options(trained: Path, **more: Any) -> Options:
    return Options(model=str(trained), limit=2, scorer=str(trained.parent / "scorer"), **more)


def test_every_method_is_measured_beside_the_untouched_model(trained: Path, tmp_path: Path) -> None:
    task = Task(options(trained, data="digits"))
    found = [r for r in bench.run(task, METHODS, tmp_path) if r.data["kind"] == "digit"]
    by_name = {r.method: r for r in found}
    assert {r.status for r in found} == {"ok"}
    plain = by_name.pop("plain")
    assert plain.quality["same"] == 1.0
    assert plain.cost["kept"] == 1.0
    assert plain.cost["visual"] == 64
    for name in ("random", "norm", "norm-diverse", "divprune", "idpruner", "zoo-prune"):
        assert by_name[name].cost["kept"] == pytest.approx(0.25), name
    for name, result in by_name.items():
        if name not in ("token-correlation-compression",):
            assert result.cost["flops"] < plain.cost["flops"], name
            assert result.cost["kv_bytes"] < plain.cost["kv_bytes"], name
    depth = json.loads((trained / "config.json").read_text())["text_config"]["num_hidden_layers"]
    assert by_name["attention"].cost["kept"] == pytest.approx((2 + (depth - 2) * 0.25) / depth)
    assert by_name["vflowopt"].cost["kept"] == pytest.approx(0.25, abs=0.03)


def test_ones_own_pictures(trained: Path, tmp_path: Path) -> None:
    (picture,) = corpora.digit_scenes("test", 1)
    Image.fromarray(picture.pixels).save(tmp_path / "one.png")
    rows = [{"image": "one.png", "question": q.text, "answer": q.answer, "kind": q.kind} for q in picture.questions]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    task = Task(Options(model=str(trained), limit=1, data=str(file)))
    assert set(task.kinds()) == {q.kind for q in picture.questions}
    found = bench.run(task, ["divprune:keep=0.5"], tmp_path / "out")
    assert {r.n for r in found} == {1}
    file.write_text('{"image": "one.png", "question": "what ?"}')
    with pytest.raises(LimitError, match="answer"):
        Task(Options(model=str(trained), limit=1, data=str(file))).kinds()
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(LimitError, match="limit = 9"):
        Task(Options(model=str(trained), limit=9, data=str(file))).items("count")


def test_specs_are_checked_before_anything_is_loaded() -> None:
    task = Task(Options(model="nowhere"))
    assert task.check(MethodSpec.parse("divprune:keep=0.5")).params == {"keep": 0.5}
    for bad in ("divprune:keep=2.0", "divprune:metric=cos", "nothing", "random:keep=0.0"):
        with pytest.raises(LimitError):
            task.check(MethodSpec.parse(bad))
    with pytest.raises(UnsupportedError, match="bench generate"):
        task.check(MethodSpec.parse("token-recycling"))


def test_run_writes_the_picture_with_dropped_patches_dimmed(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (picture,) = corpora.digit_scenes("test", 1)
    Image.fromarray(picture.pixels).save(tmp_path / "photo.png")
    question = picture.questions[0].text
    common = ["--image", str(tmp_path / "photo.png"), "--question", question, "--model", str(trained), "--json"]
    for slug, setting in (("divprune", "keep=0.25"), ("entropyprune", "keep=0.25"), ("zoo-prune", "keep=16")):
        assert main(["run", slug, *common, "--set", setting, "--dtype", "float32"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["plain"]["visual"] == 64
        shown = np.asarray(Image.open(told["picture"]))
        bright = (shown.reshape(8, 8, 8, 8, 3) == picture.pixels.reshape(8, 8, 8, 8, 3)).all((1, 3, 4))
        assert int(bright.sum()) == 16, slug
    assert main(["run", "divprune", "--image", str(tmp_path / "photo.png")]) == 2
    assert main(["run", "divprune", "--image", str(tmp_path / "none.png"), "--question", "what ?"]) == 2
    (tmp_path / "bad.png").write_text("no picture")
    assert main(["run", "divprune", "--image", str(tmp_path / "bad.png"), "--question", "what ?"]) == 2


def test_dimming_follows_the_grid() -> None:
    kept = np.array([[True, False], [False, True]])
    shown = dimmed(np.full((4, 6, 3), 200, np.uint8), kept)
    assert shown[0, 0, 0] == 200
    assert shown[0, 5, 0] == 50
    assert shown[3, 0, 0] == 50
    assert shown[3, 5, 0] == 200
