"""The task `tokenize`: vocabularies on held-out documents."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenmill import bench
from tokenmill.bench.task import MethodSpec
from tokenmill.bench.tasks.tokenize import Options, Task
from tokenmill.errors import LimitError


def test_lines(tmp_path: Path) -> None:
    made = Task(Options(limit=3, vocab_size=4096, train_chars=300_000))
    lines = bench.run(made, ["kl3m-tokenizers", "vocabulary:path=bpe_openai/cl100k_base"], tmp_path)
    assert all(line.status == "ok" for line in lines), [line.message for line in lines]
    found = {(line.method, line.data["kind"]): line for line in lines}
    for line in lines:
        assert 0 < line.quality["tokens_per_char"] <= 1
        assert line.cost["tokens_per_char"] * line.cost["bytes_per_token"] == pytest.approx(1, rel=0.1)
    assert found["plain", "code"].quality["reduction"] == 0
    assert found["vocabulary", "code"].quality["reduction"] > 0


def test_bad_requests() -> None:
    for text in ("vocabulary", "nothing", "kl3m-tokenizers:min=3"):
        with pytest.raises(LimitError):
            Task(Options()).check(MethodSpec.parse(text))
    with pytest.raises(LimitError, match="domain"):
        Task(Options(domain="law")).check(MethodSpec("plain"))
    with pytest.raises(LimitError, match="limit"):
        Options(limit=0)
