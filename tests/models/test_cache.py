from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tokenmill.models._cache import cache_dir, ensure, is_intact, write_json

BUILD = """
import sys, time
from pathlib import Path
from tokenmill.models._cache import ensure

place, seconds = Path(sys.argv[1]), float(sys.argv[2])

def build(target):
    with (place.parent / "builds").open("a") as log:
        log.write("built\\n")
    (target / "weights").write_bytes(b"a" * 5000)
    (place.parent / "half").touch()
    time.sleep(seconds)
    (target / "sub").mkdir()
    (target / "sub" / "config").write_text("{}")

ensure(place, build, version="1")
"""


def counted(calls: list[Path]) -> Callable[[Path], None]:
    def build(target: Path) -> None:
        calls.append(target)
        (target / "weights").write_bytes(b"abc" * 1000)
        (target / "config").write_text("{}")

    return build


def start(place: Path, seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", BUILD, str(place), str(seconds)])


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


def test_the_second_use_builds_nothing(tmp_path: Path) -> None:
    calls: list[Path] = []
    place = tmp_path / "deep" / "model"
    assert ensure(place, counted(calls), version="1") == place
    assert ensure(place, counted(calls), version="1") == place
    assert len(calls) == 1
    assert sorted(p.name for p in place.iterdir()) == ["config", "manifest.json", "weights"]


@pytest.mark.parametrize("damage", ["truncate", "alter", "remove", "manifest", "no manifest", "listless"])
def test_a_damaged_folder_is_noticed_and_rebuilt(tmp_path: Path, damage: str) -> None:
    calls: list[Path] = []
    place = ensure(tmp_path / "model", counted(calls), version="1")
    weights, manifest = place / "weights", place / "manifest.json"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "alter":
        weights.write_bytes(b"abd" + weights.read_bytes()[3:])
    elif damage == "remove":
        weights.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:-5])
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(json.dumps({"version": "1", "files": ["weights"]}))
    assert not is_intact(place, version="1")
    ensure(place, counted(calls), version="1")
    assert len(calls) == 2
    assert weights.read_bytes() == b"abc" * 1000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model.lock"]


def test_another_version_is_rebuilt(tmp_path: Path) -> None:
    calls: list[Path] = []
    ensure(tmp_path / "model", counted(calls), version="1")
    ensure(tmp_path / "model", counted(calls), version="2")
    assert len(calls) == 2


def test_a_failing_build_leaves_nothing_and_the_error_is_kept(tmp_path: Path) -> None:
    def build(target: Path) -> None:
        (target / "weights").write_bytes(b"half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        ensure(tmp_path / "model", build, version="1")
    assert [p.name for p in tmp_path.iterdir()] == ["model.lock"]


def test_a_failing_rebuild_keeps_no_damaged_folder_alive(tmp_path: Path) -> None:
    calls: list[Path] = []
    place = ensure(tmp_path / "model", counted(calls), version="1")
    (place / "weights").write_bytes(b"")
    with pytest.raises(ZeroDivisionError):
        ensure(place, lambda _: 1 / 0, version="1")  # pyright: ignore[reportArgumentType]
    assert not is_intact(place, version="1")
    ensure(place, counted(calls), version="1")
    assert is_intact(place, version="1")


def test_two_processes_at_once_build_one_good_folder(tmp_path: Path) -> None:
    place = tmp_path / "model"
    both = [start(place, 0.5), start(place, 0.5)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert (tmp_path / "builds").read_text() == "built\n"
    assert is_intact(place, version="1")
    assert (place / "sub" / "config").read_text() == "{}"


def test_a_killed_build_leaves_no_folder_and_the_next_one_clears_up(tmp_path: Path) -> None:
    place = tmp_path / "model"
    process = start(place, 60)
    wait_for(tmp_path / "half")
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    assert not place.exists()
    assert list(tmp_path.glob(".model.*"))
    calls: list[Path] = []
    ensure(place, counted(calls), version="1")
    assert is_intact(place, version="1")
    assert not list(tmp_path.glob(".model.*"))


def test_the_environment_decides_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("TOKENMILL_CACHE")
    assert cache_dir().name == "tokenmill"


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "facts.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["facts.json"]
