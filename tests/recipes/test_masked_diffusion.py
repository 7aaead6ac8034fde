"""The recipes of the masked diffusion models, their guides, filters and policies: a few steps of each."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenmill as tm
from recipes import masked_diffusion
from tokenmill import corpora
from tokenmill.diffuse import Diffusion, Threshold
from tokenmill.diffuse.learn2pd import Learn2PD
from tokenmill.diffuse.unmasking_policies import UnmaskingPolicy

FOLDER = Path(masked_diffusion.__file__).parent


@pytest.fixture
def _beside() -> Iterator[None]:
    """The recipe of the policy imports that of the filter, as it does when it is run as a script."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.mark.parametrize("task", masked_diffusion.TASKS)
def test_a_few_steps_give_a_model_that_loads_and_goes_on(task: str, tmp_path: Path) -> None:
    arguments = ["--task", task, "--held-out", "2", "--threads", "1", "--out", str(tmp_path)]
    masked_diffusion.main([*arguments, "--steps", "1"])
    folder = tmp_path / f"diffusion-{task}"
    first = json.loads((folder / "card.json").read_text())
    masked_diffusion.main([*arguments, "--steps", "2"])
    card = json.loads((folder / "card.json").read_text())
    assert (first["steps"], card["steps"]) == (1, 2)
    assert "--steps 2" in card["command"]
    kinds = ["gaps", "bits_per_byte"] if task == "python" else corpora.EXERCISE_TASKS[task].kinds
    assert set(card["held_out"]) == {"each_kind", "seed", *kinds}
    loaded: Any = tm.models.load(str(folder))
    model, tokenizer = loaded
    text = "x = 1\n" if task == "python" else corpora.exercises(task, "test", 1)[0].prompt
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    out = Diffusion(Threshold(0.5)).generate(model, ids, max_new_tokens=6)
    assert out.shape[1] == ids.shape[1] + 6
    assert tokenizer.decode(ids[0]) == text


def test_a_byte_of_python_is_a_token() -> None:
    tokenizer: Any = masked_diffusion.build_tokenizer("python")
    text = "def f(x):\n    return 'é' + x\n"
    ids = tokenizer(text)["input_ids"]
    assert ids == [byte + 3 for byte in text.encode()]
    assert tokenizer.decode(ids) == text
    stream = masked_diffusion.python_stream()
    first = corpora.load("python-stdlib").split("train")[0].text.encode()
    assert stream[: len(first)].tolist() == [byte + 3 for byte in first]
    assert stream[len(first)] == stream[-1] == masked_diffusion.EOT
    rows = masked_diffusion.python_rows(stream, 4, step=1)
    assert rows.ids.shape == (4, corpora.PYTHON_WINDOW)
    assert rows.answer.all()


def test_a_guide_is_causal_and_has_the_models_vocabulary(tmp_path: Path) -> None:
    masked_diffusion.main(
        ["--task", "mixed", "--guide", "small", "--steps", "1", "--held-out", "2", "--out", str(tmp_path)]
    )
    model, tokenizer = tm.models.load(str(tmp_path / "diffusion-mixed-guide-small"))
    other = tm.models.load("diffusion-mixed")[1]
    assert tokenizer.get_vocab() == other.get_vocab()
    ids = torch.tensor([[4, 5, 6, 7], [4, 5, 6, 9]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert torch.equal(logits[0, :3], logits[1, :3])


def test_shares_of_hidden_tokens_are_spread_evenly() -> None:
    tokenizer = masked_diffusion.build_tokenizer("mixed")
    rows = masked_diffusion.exercise_rows(tokenizer, "mixed", 64, step=2, whole=False)
    shares = []
    for seed in range(20):
        hide = masked_diffusion.hidden(rows, torch.Generator().manual_seed(seed))
        assert not (hide & ~rows.answer).any()
        assert (hide.sum(1) >= 1).all()
        shares.append(hide.sum(1) / rows.answer.sum(1))
    counts = torch.cat(shares)
    assert 0.45 < float(counts.mean()) < 0.6
    assert float((counts < 0.2).float().mean()) > 0.1
    assert float((counts > 0.8).float().mean()) > 0.1


def test_rows_by_blocks_are_hidden_as_decoding_meets_them() -> None:
    tokenizer = masked_diffusion.build_tokenizer("long")
    met: set[int] = set()
    for step in range(0, 20, 2):
        rows = masked_diffusion.exercise_rows(tokenizer, "long", 8, step=step, whole=False)
        generator = torch.Generator().manual_seed(step)
        before = masked_diffusion.hidden(rows, generator)
        hide, asked = masked_diffusion.by_blocks(rows, before, 16, 6, generator)
        assert torch.equal(hide[6:], before[6:])
        assert torch.equal(asked[6:], before[6:])
        for at in range(6):
            begin = int(rows.answer[at].nonzero()[0])
            text = int((rows.answer[at] & (rows.ids[at] != masked_diffusion.EOT)).sum())
            places = asked[at].nonzero()[:, 0] - begin
            block = int(places[0]) // 16
            met.add(block)
            assert set((places // 16).tolist()) == {block}
            assert 16 * block <= text  # the block in which the text ends is the last one
            assert not hide[at, : begin + 16 * block].any()
            assert hide[at, begin + 16 * (block + 1) :].all()
            inside = slice(begin + 16 * block, begin + 16 * (block + 1))
            assert torch.equal(hide[at, inside], asked[at, inside])
    assert len(met) > 5


@pytest.mark.parametrize("task", ["mixed", "long", "hard"])
def test_rows_are_prompts_answers_and_a_tail(task: str) -> None:
    tokenizer: Any = masked_diffusion.build_tokenizer(task)
    room = corpora.EXERCISE_TASKS[task].answer
    widths = set()
    for step in range(6):
        rows = masked_diffusion.exercise_rows(tokenizer, task, 8, step=step, whole=False)
        prompts, said = [], []
        for row, seen, answer in zip(rows.ids, rows.seen, rows.answer, strict=True):
            assert row[~seen].tolist() == [masked_diffusion.PAD] * int((~seen).sum())
            assert row[-1] == masked_diffusion.EOT
            prompts.append(tokenizer.decode(row[seen & ~answer]))
            said.append(corpora.answer_text(tokenizer, row[answer].tolist()))
        wanted = corpora.exercises(task, "train", 8, seed=step)
        assert [(x.prompt, x.answer) for x in wanted] == list(zip(prompts, said, strict=True))
        width = int(rows.answer[0].sum())
        widths.add(width)
        assert width == room or step % 2
        whole = masked_diffusion.exercise_rows(tokenizer, task, 8, step=step, whole=True)
        assert int(whole.answer[0].sum()) == room
    assert len(widths) > 1


@pytest.mark.usefixtures("_beside")
def test_a_filter_and_a_policy_of_a_few_steps(tmp_path: Path) -> None:
    from recipes import diffusion_filter, diffusion_policy

    few = ["--model", "diffusion-mixed", "--validation", "4", "--threads", "1", "--out", str(tmp_path)]
    diffusion_filter.main([*few, "--prompts", "20", "--iterations", "20", "--hidden", "8"])
    card = json.loads((tmp_path / "diffusion-mixed-filter" / "card.json").read_text())
    assert card["replayed"]["text_kept"] == 1
    rule: Any = Learn2PD.load(tmp_path / "diffusion-mixed-filter")
    assert rule.filter.config.threshold == card["threshold"]
    assert rule.filter.config.block_length == card["block_length"] == 12
    assert f"{card['threshold']:g}" in card["validation"]["by_threshold"]
    diffusion_policy.main([*few, "--updates", "2", "--prompts", "2", "--group", "2", "--width", "16"])
    card = json.loads((tmp_path / "diffusion-mixed-policy" / "card.json").read_text())
    assert card["rollouts"] == 8
    network: Any = UnmaskingPolicy(tmp_path / "diffusion-mixed-policy").network
    assert sum(p.numel() for p in network.parameters()) == card["weights"]
    assert set(card["validation"]["by_temperature"]) == {"0", "0.5", "1"}


@pytest.mark.usefixtures("_beside")
def test_the_threshold_is_the_cheapest_that_keeps_the_accuracy() -> None:
    from recipes import diffusion_filter

    def measure(tau: float) -> dict[str, float]:
        return {"accuracy": min(0.9, 0.5 + 0.5 * tau), "passes": 1 + 10 * tau, "positions": 1.0}

    best, tried = diffusion_filter.choose(measure, 0.9, 0.01)
    assert best == 0.8
    assert set(tried) == {f"{tau:g}" for tau in diffusion_filter.THRESHOLDS}
    assert diffusion_filter.choose(measure, 2.0, 0.01)[0] == 0.8  # none is good enough: the most accurate
