"""The task `tokenize`: vocabularies on held-out documents."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenmill import bench
from tokenmill.bench.task import MethodSpec
from tokenmill.bench.tasks.tokenize import Options, Task
from tokenmill.errors import LimitError
from tokenmill.text import CustomTokens


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


def test_custom_tokens_can_be_left_out_by_a_spec() -> None:
    ours = {token.content for token in CustomTokens().added(None)}
    task = Task(Options(vocab_size=2500, train_chars=60_000, limit=1))
    found = {}
    for written in ("kl3m-tokenizers:short=fill", "kl3m-tokenizers:short=fill:custom_tokens=empty"):
        spec = task.check(MethodSpec.parse(written))
        made = task._tokenizer(spec)
        found[written[-5:]] = len(ours & set(made.get_added_vocab()))
    assert found["empty"] < 100 < 1000 < found["=fill"]
    with pytest.raises(LimitError, match="custom_tokens"):
        task.check(MethodSpec.parse("kl3m-tokenizers:custom_tokens=some"))
