"""Where a measurement was made."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from tokenmill.bench import environment as module


def test_environment_says_what_runs() -> None:
    found = module.environment()
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert all(found[name] for name in ("cpu", "python", "transformers", "tokenmill"))


def test_commit_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "src" / "tokenmill" / "bench" / "environment.py"
    monkeypatch.setattr(module, "__file__", str(file))
    assert module.commit() == ""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert module.commit() == ""
    (tmp_path / "a").write_text("1")
    subprocess.run([*git, "add", "a"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    clean = module.commit()
    assert len(clean) >= 7
    (tmp_path / "a").write_text("2")
    assert module.commit() == clean + "+"
