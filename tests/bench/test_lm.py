"""The task `lm`: questions, training, measures, and a whole run in the small."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.text.vocabularies import python_target
from tokenmill import bench, laws, models
from tokenmill.bench.task import MethodSpec
from tokenmill.bench.tasks import _langgame as game
from tokenmill.bench.tasks import _lm_training as training
from tokenmill.bench.tasks.lm import Options, Task
from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.text import TokenBytes

SMALL: dict[str, Any] = {
    "width": 32, "layers": 1, "context": 32, "batch": 4, "steps": 6, "tuning_steps": 3, "questions": 12,
    "train_bytes": 20_000, "test_bytes": 2_000, "limit": 2,
}  # fmt: skip
WORDS = ["a", "in", "the", "cat", "tree", "letter", "banana", "because", "elephant", "running"]
WORDS += ["missing", "success", "kayak", "little", "string"]


@pytest.fixture(autouse=True)
def _laws_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The laws have tests of their own."""
    monkeypatch.setattr(laws, "each", lambda slug: iter(()))


def test_questions_have_one_right_answer() -> None:
    asked = game.questions(WORDS, 600, random.Random(0))
    assert Counter(q.kind for q in asked) == dict.fromkeys(game.KINDS, 100)
    for q in asked:
        right, wrong = q.options[q.answer], [o for i, o in enumerate(q.options) if i != q.answer]
        assert len(set(q.options)) == 4
        assert all(option in q.prompt for option in q.options)
        assert q.text == f"{q.prompt} {right}"
        sought = re.search(r"letter (\w)\?|does (\w) come|contains (\w+)|has (\w+) in|with (\w+)\?", q.prompt)
        x = next(filter(None, sought.groups())) if sought else ""
        good = {
            "most": lambda w: w.count(x) >= 2,  # noqa: B023
            "contains": lambda w: x in w,  # noqa: B023
            "starts": lambda w: w.startswith(x),  # noqa: B023
            "ends": lambda w: w.endswith(x),  # noqa: B023
            "longest": lambda w: len(w) >= 7,
            "shortest": lambda w: len(w) <= 3,
        }[q.kind]
        assert good(right), q
        assert not any(good(w) for w in wrong), q
        if q.kind in ("longest", "shortest"):
            assert sorted(map(len, q.options))[-1 if q.kind == "longest" else 0] == len(right)
    assert set(Counter(q.answer for q in asked)) == {0, 1, 2, 3}
    before = sum(q.prompt.startswith("The words") for q in asked)
    assert 230 < before < 370
    assert game.questions(WORDS, 30, random.Random(1)) == game.questions(WORDS, 30, random.Random(1))
    with pytest.raises(LimitError, match="words"):
        game.questions(["aa", "ab"], 6, random.Random(0))


def test_frequent_words() -> None:
    assert game.frequent_words(["the cat the_x Cat 3cat x dog", "cat dog"], 2) == ["cat", "dog"]


def documents(rows: list[list[int]]) -> list[training.Document]:
    return [training.Document("", np.array(row)) for row in rows]


def test_windows_hold_the_whole_text_of_a_pass_and_count_it() -> None:
    made = training.Windows(
        documents([[1, 2, 3], [4, 5], [6, 7, 8, 9]]),
        lambda d, epoch: [np.concatenate([x.ids, [50 + epoch]]) for x in d],
        context=4, end=99, seed=0,
    )  # fmt: skip
    batches = made.batches(1)
    first = torch.cat([next(batches) for _ in range(3)])
    assert first.shape == (3, 5)
    assert sorted(first.flatten().tolist()) == sorted([1, 2, 3, 50, 99, 4, 5, 50, 99, 6, 7, 8, 9, 50, 99])
    assert 51 in torch.cat([next(batches) for _ in range(3)])
    assert (made.tokens, made.plain) == (24, 18)
    with pytest.raises(ValueError, match="windows"):
        next(training.Windows(documents([[1]]), training.canonical, context=4, end=9, seed=0).batches(1))


class Uniform(torch.nn.Module):
    """All tokens alike, except that token 7 never comes."""

    def forward(self, ids: torch.Tensor, **_: Any) -> Any:
        logits = torch.zeros(*ids.shape, 8)
        logits[..., 7] = -math.inf

        class Output:
            pass

        found: Any = Output()
        found.logits = logits
        return found


def test_bits_are_counted_per_byte() -> None:
    view = TokenBytes.from_list([b"a", b"bb", b"ccc", None, None, None, None, None], {"<end>": 3})
    rows = [np.array([0, 1, 2, 2]), np.array([1, 1])]
    for context in (2, 3, 100):
        bits = training.bits_per_byte(Uniform(), view, rows, context=context, end=3)
        assert bits == pytest.approx(6 * math.log2(7) / 13)


def test_the_likeliest_option_is_the_answer() -> None:
    model, tokenizer = models.load("python-target", dtype="float32")
    view, end = TokenBytes.of(tokenizer), 0
    q = game.Question("most", "import numpy as", ("np", "zebra", "{{", "quux"), 0)
    turned = game.Question("most", "import numpy as", ("zebra", "np", "{{", "quux"), 0)
    assert training.answers(model, view, [q, turned], end) == [True, False]
    assert [training.normalised(x) for x in (0.25, 1.0)] == [0.0, 1.0]


def test_the_loss_of_tuning_is_on_answers_alone() -> None:
    view = TokenBytes.of(python_target())
    asked = game.questions(WORDS, 8, random.Random(0))
    ids, labels = next(training.tuning_batches(view, asked, 4, 0, random.Random(1)))
    assert ids.shape == labels.shape
    for row, marks in zip(ids, labels, strict=True):
        answer = row[marks != -100]
        assert torch.equal(answer, marks[marks != -100])
        assert answer[-1] == 0
        text = view.join([*row[: int((marks != -100).nonzero()[0])].tolist(), *answer[:-1].tolist()]).decode()
        assert text in [q.text for q in asked]
        assert view.join(answer[:-1].tolist()).decode().strip() in WORDS


def test_probes_read_letters_that_are_there() -> None:
    view = TokenBytes.of(python_target())
    size = len(view)
    torch.manual_seed(0)
    model = training.small_llama(size, width=64, layers=1, context=32, seed=0)
    blind = training.spelling(model, view, 0)
    weight = torch.zeros(size, 64)
    for i, token in enumerate(view.tokens):
        if token and token.strip().isalpha() and token.isascii():
            text = token.strip().lower()
            weight[i, text[0] - 97] = weight[i, 26 + text[-1] - 97] = 1.0
            weight[i, 60] = len(text)
    model.get_input_embeddings().weight.data.copy_(weight)
    seen = training.spelling(model, view, 0)
    assert all(seen[name] > 0.95 for name in ("first_letter", "last_letter", "length_r2"))
    assert all(blind[name] < 0.4 for name in ("first_letter", "last_letter", "length_r2"))


def test_training_learns_and_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    model = training.small_llama(16, width=32, layers=1, context=16, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    text = documents([[i % 5 + 1 for i in range(400)]])
    batches = training.Windows(text, training.canonical, context=16, end=0, seed=0).batches(4)
    assert training.train(model, batches, 40, 1e-2) < 0.5
    assert not model.training


def test_a_whole_run(tmp_path: Path) -> None:
    lines = bench.run(Task(Options(**SMALL)), ["stochastok:p=0.5", "bpe-dropout:dropout=0.2"], tmp_path)
    found = {line.method: line for line in lines}
    for line in lines:
        assert line.status == "ok", line.message
        assert set(line.quality) <= set(Task.METRICS)
        assert {"bits_per_byte", "langgame", "langgame_most", "first_letter"} <= set(line.quality)
        assert line.n == 2
    assert found["plain"].cost["growth"] == 1
    assert 1.1 < found["stochastok"].cost["growth"] < 1.5
    assert found["bpe-dropout"].cost["growth"] > 1.05
    assert 1 < found["plain"].quality["bits_per_byte"] < 12


def test_seeds_differ_and_repeat() -> None:
    made = Task(Options(**{**SMALL, "tuning_steps": 0}))
    subject = made.subject(made.check(MethodSpec.parse("stochastok")), "code")
    items = made.items("code")
    outputs = [subject.run(item).output for item in (*items, items[0])]
    assert outputs[0] == outputs[2] != outputs[1]
    assert "langgame" not in outputs[0]
    recipe = made.recipe(made.check(MethodSpec.parse("stochastok:seed=5")), 0)
    docs = made.documents("code", "train", 5000)
    same, other = recipe(docs, 0), recipe(docs, 1)
    assert [r.tolist() for r in same] != [r.tolist() for r in other]
    again = made.recipe(MethodSpec("stochastok", {"seed": 5}), 9)(docs, 0)
    assert [r.tolist() for r in again] == [r.tolist() for r in same]
    drawn = [[r.tolist() for r in made.recipe(MethodSpec("stochastok"), seed)(docs, 0)] for seed in (0, 1, 0)]
    assert drawn[0] == drawn[2] != drawn[1]


def test_texts_are_cut_at_lines_and_splits_are_apart() -> None:
    made = Task(Options(**SMALL))
    train, test = (made.documents("code", split, 30_000) for split in ("train", "test"))
    assert sum(len(d.text.encode()) for d in train) <= 30_000
    assert not {d.text for d in train if len(d.text) > 200} & {d.text for d in test}
    assert all(made.view.join(d.ids.tolist()).decode() == d.text for d in train)
    assert max(len(d.text) for d in train) <= 2000


def test_bad_requests() -> None:
    made = Task(Options(**SMALL))
    for text, words in (
        ("token-recycling", "task generate"),
        ("bpe-dropout:dropout=2", "dropout"),
        ("stochastok:q=1", "q"),
        ("nothing", "nothing"),
    ):
        with pytest.raises((LimitError, UnsupportedError), match=words):
            made.check(MethodSpec.parse(text))
    for name, value in (("steps", 0), ("rate", 0.0), ("width", 40), ("tuning_steps", -1)):
        with pytest.raises(LimitError, match=name):
            Options(**{name: value})  # type: ignore[arg-type]
