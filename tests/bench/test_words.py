"""The task `words`: equal compute, held-out words against slow counts, and trainings of a few steps."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenmill import bench, laws
from tokenmill.bench.task import MethodSpec
from tokenmill.bench.tasks import _word_models as models
from tokenmill.bench.tasks.words import Options, Task, _pieces
from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.text import LearnYourTokens, WordSegmenter

PIECE = "def naïve(x):\n    return extraordinary_number + 12345678901234567890123456789\n"
SMALL: dict[str, Any] = {
    "gigaflops": 12, "width": 32, "layers": 1, "context": 96, "batch": 4, "train_bytes": 20_000, "test_bytes": 2000,
    "vocab_size": 512, "limit": 1, "data": "python-stdlib",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _laws_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The laws have tests of their own."""
    monkeypatch.setattr(laws, "each", lambda slug: iter(()))


def byte_lm() -> models.UnitLM:
    one = WordSegmenter()
    made = models.UnitLM(lambda t: one.flat(t).tolist(), one.bytes, 256, width=32, layers=2, context=200, seed=0)
    made.model.eval()
    return made


def pooled(p: int = 1) -> models.PooledLM:
    method = LearnYourTokens(num_prefix=p, c_max=8, enc_layers=1, dec_layers=1, dropout=0.0)
    made = models.PooledLM(method, method.segmenter(), width=32, layers=2, words=100, seed=0)
    made.model.eval()
    return made


def test_flops_are_those_that_torch_counts() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    subjects: list[tuple[Any, bool]] = [(byte_lm(), True), (pooled(), False), (pooled(2), False)]
    for subject, causal in subjects:
        batch = subject.batch([PIECE, PIECE[:40]])
        subject.model.train()  # without gradients torch runs an encoder layer as one operation that it does not count
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            subject.loss(subject.model, batch)
        found, wanted = subject.flops(batch), counter.get_total_flops()
        # Torch counts what a causal mask hides and we do not; the rest is the same.
        assert found == pytest.approx(wanted, rel=0.15), causal
        assert found <= wanted * 1.001


def test_held_out_words_are_those_of_a_slow_count() -> None:
    subject = byte_lm()
    with torch.no_grad():
        subject.model.lm_head.weight.mul_(30)  # the embedding as well: they are one matrix
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(subject.model.parameters(), lr=1e-2)
    batch = subject.batch([PIECE])
    for _ in range(60):
        optimizer.zero_grad()
        subject.loss(subject.model, batch).backward()
        optimizer.step()
    ((nats, right),) = subject.held_out([PIECE])
    words = WordSegmenter().words(PIECE)
    assert len(right) == len(words)
    assert 0 < sum(right) < len(words)
    total, at, data = 0.0, 0, PIECE.encode()
    for word, ok in zip(words, right, strict=True):
        n = len(word.encode())
        context = [256, *data[:at]]
        wanted = True
        for unit in word.encode():
            with torch.no_grad():
                law = subject.model(torch.tensor([context])).logits[0, -1].log_softmax(-1)
            total -= float(law[unit])
            wanted &= int(law.argmax()) == unit
            context.append(unit)
        at += n
        if at < len(data):
            with torch.no_grad():
                unit = int(subject.model(torch.tensor([context])).logits[0, -1].argmax())
            if unit != 256 and unit < 128:
                wanted &= WordSegmenter().words(word + chr(unit))[0] == word
            elif unit != 256:
                wanted &= not any(ch.isalpha() for ch in word)
        assert ok == wanted, word
    assert nats == pytest.approx(total, rel=1e-4)


def test_a_word_of_several_rows_is_right_when_all_are() -> None:
    subject = pooled()
    ((nats, right),) = subject.held_out([PIECE])
    words = subject.segmenter.words(PIECE)
    assert len(right) == len(words)
    assert nats == pytest.approx(-sum(subject.model.score([PIECE])[0].log_probs), rel=1e-5)
    optimizer = torch.optim.AdamW(subject.model.parameters(), lr=1e-2)
    batch = subject.batch([PIECE])
    for _ in range(150):
        optimizer.zero_grad()
        subject.loss(subject.model, batch).backward()
        optimizer.step()
    assert all(subject.held_out([PIECE])[0][1])

    def spoil(model: Any, args: Any, out: Any) -> None:  # one wrong row of the long number
        with torch.no_grad():
            out["logits"][0, -5].zero_()

    with torch.no_grad():
        hook = subject.model.register_forward_hook(spoil)
        right = subject.held_out([PIECE])[0][1]
        hook.remove()
    assert right.count(False) == 1


def test_words_fall_into_buckets_by_their_count_in_training() -> None:
    counts = Counter({"a": 1, "b": 5, "c": 6, "d": 50, "e": 51})
    words = models.Words()
    words.add(["a", "b", "c", "d", "e", "z"], [True, False, True, True, True, False], counts)
    assert words.asked == {"rare": 2, "some": 2, "frequent": 1, "unseen": 1}
    found = words.shares()
    assert found == {
        "next_word": 4 / 6, "next_word_unseen": 0.0, "next_word_rare": 0.5, "next_word_some": 1.0,
        "next_word_frequent": 1.0,
    }  # fmt: skip


def test_every_method_sees_the_same_pieces_in_the_same_order() -> None:
    given = [f"piece {i}\n" for i in range(10)]
    seen = []
    for subject in (byte_lm(), pooled()):
        taken: list[list[str]] = []
        subject.batch = lambda pieces, taken=taken: taken.append(list(pieces))  # type: ignore[method-assign,assignment]
        list(itertools.islice(models.batches(subject, given, 4, 7), 5))
        seen.append(taken)
    assert seen[0] == seen[1]
    assert {len(part) for part in seen[0]} == {4}
    assert seen[0][0] != seen[0][2]


def test_pieces_are_whole_lines_up_to_the_limit() -> None:
    text = "aaaa\nbb\n" + "x" * 50 + "\néé\ncccc\n"
    assert _pieces(text, 8) == ["aaaa\nbb\n", "éé\n", "cccc\n"]


def test_a_whole_run_at_equal_compute(tmp_path: Path) -> None:
    shape = ":num_prefix=1:enc_layers=1:dec_layers=1:enc_heads=2:dec_heads=2"
    names = ["byte", "char", f"learn-your-tokens{shape}", f"learn-your-tokens:base=sub{shape}"]
    names.append(f"learn-your-tokens:base=char{shape}")
    found = bench.run(Task(Options(**SMALL)), names, tmp_path)
    assert [r.status for r in found] == ["ok"] * 6, [r.message for r in found]
    for result in found:
        assert result.cost["gigaflops"] == pytest.approx(12, rel=0.15)
        assert 1 < result.quality["bits_per_byte"] < 12
        assert {"next_word", "next_word_frequent"} <= set(result.quality)
    steps = {r.method: r.cost["steps"] for r in found}
    assert steps["byte"] < steps["plain"]


def test_bad_input_is_refused() -> None:
    task = Task(Options(**SMALL))
    with pytest.raises(LimitError, match="a divisor of width=32"):
        task.check(MethodSpec.parse("learn-your-tokens:dec_heads=5"))
    with pytest.raises(LimitError, match="num_prefix"):
        task.check(MethodSpec.parse("learn-your-tokens:num_prefix=0"))
    with pytest.raises(UnsupportedError, match="bench lm"):
        task.check(MethodSpec.parse("stochastok"))
    with pytest.raises(LimitError, match="at least a batch"):
        Task(Options(**{**SMALL, "train_bytes": 10})).pieces("code", "train")
    with pytest.raises(LimitError, match="width"):
        Options(width=33)
