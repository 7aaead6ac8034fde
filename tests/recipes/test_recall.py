"""The recipe of the recall models: a few steps, interrupted and gone on with; what they are taught."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenmill as tm
from recipes import recall
from tokenmill.probe.needle_threading import generate


@pytest.mark.parametrize("arch", recall.ARCHS)
def test_a_few_steps_give_a_model_that_loads_and_answers(arch: str, tmp_path: Path) -> None:
    arguments = ["--arch", arch, "--questions", "2", "--longest", "128", "--threads", "1", "--out", str(tmp_path)]
    recall.main([*arguments, "--steps", "1"])
    folder = tmp_path / recall.ARCHS[arch].name
    first = json.loads((folder / "card.json").read_text())
    recall.main([*arguments, "--steps", "2"])
    card = json.loads((folder / "card.json").read_text())
    assert (first["steps"], card["steps"]) == (1, 2)
    assert card["seconds"] >= first["seconds"]
    assert set(card["held_out_accuracy"]["single"]) == {"128"}
    model, tokenizer = tm.models.load(str(folder))
    ids = tokenizer(generate("single", n_pairs=5, keys="name").prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=2, do_sample=False)
    assert 1 <= out.shape[1] - ids["input_ids"].shape[1] <= 2


def test_a_prompt_of_the_probe_is_what_training_writes() -> None:
    tokenizer: Any = recall.build_tokenizer()
    for task, word, steps in (("single", recall.VALUE, 1), ("threading", recall.FINAL, 3)):
        more = {} if task == "single" else {"thread_length": steps}
        example = generate(task, n_pairs=6, seed=5, keys="name", **more)
        table = {}
        for key, value in json.loads(example.haystack).items():
            pair = tokenizer.convert_tokens_to_ids([key, value])
            table[pair[0]] = pair[1]
        row = recall.Row([recall.BOS])
        for key, value in table.items():
            row.say(key, value, recall.COMMA)
        asked = tokenizer.convert_tokens_to_ids(example.keys[0])
        row.say(*([recall.FOLLOW] if steps > 1 else []), recall.KEY, asked, word)
        assert tokenizer(example.prompt)["input_ids"] == row.ids
        assert tokenizer.convert_ids_to_tokens(recall._chain(table, asked, steps)[-1]) == example.values[0]


def test_lines_of_the_bench_are_pairs_as_well() -> None:
    tokenizer = recall.build_tokenizer()
    ids = tokenizer("bako -> lusi\nzuzu -> baba\nbako -> ", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["bako", "lusi", ",", "zuzu", "baba", ",", "bako"]
    assert tokenizer.decode(ids[:2]) == "bako lusi"


@pytest.mark.parametrize("hops", [1, 3])
def test_every_answer_follows_from_the_haystack(hops: int) -> None:
    names = range(recall.FIRST, recall.FIRST + 200)
    for seed in range(20):
        row = recall.make_row(random.Random(seed), 128, names, hops)
        assert len(row.ids) == 128
        assert row.answers
        table: dict[int, int] = {}
        for at in range(1, 128, 3):
            key, value, end = row.ids[at : at + 3]
            if key in table or key < recall.FIRST or end != recall.COMMA:
                break  # the haystack is over
            table[key] = value
        depths = set()
        for place, follows in row.answers:
            assert row.ids[place + 1] == follows[-1]
            if follows[-1] == recall.END:
                continue
            asked = row.ids[place] if row.ids[place] >= recall.FIRST else row.ids[place - 1]
            want = table[asked]
            assert follows[0] == want
            if row.ids[place] == recall.FINAL:
                assert follows == recall._chain(table, asked, hops)
                depths.add(len(set(follows)))
            else:
                assert set(follows) == {want}
        for place, key in row.before:
            assert row.ids[place - 1] == key
        assert hops == 1 or depths


def test_the_indexer_learns_from_attention_alone() -> None:
    torch.manual_seed(0)
    trainee = recall.Trainee("dsa")
    assert trainee.begin(0.9) == "index"
    trainee.loss(0, 0.9).backward()
    assert {name for name, p in trainee.named_parameters() if p.grad is not None} == {
        name for name, _ in trainee.named_parameters() if ".indexer." in name
    }
    assert trainee.begin(0.1) == "dense"
    assert not any(p.requires_grad for name, p in trainee.named_parameters() if ".indexer." in name)


def test_an_indexer_that_ranks_as_attention_does_diverges_least() -> None:
    """Zero for the same distribution; a uniform indexer costs the entropy that attention lacks."""
    torch.manual_seed(0)
    model = recall.build_model("dsa").eval()
    ids, _, _ = recall.batch(0, 1, 64, range(recall.FIRST, recall.FIRST + 100), 1)
    layers: Any = recall.index_layers("test", model)
    for attention, indexer in layers:
        indexer.index_topk = 64  # all
        torch.nn.init.zeros_(indexer.weights_proj.weight)
        torch.nn.init.zeros_(attention.q_b_proj.weight)
    flat = recall.divergence(model, ids)  # both are uniform over the past
    assert float(flat.detach()) == pytest.approx(0.0, abs=1e-5)
    (_, indexer), *_ = layers
    torch.nn.init.normal_(indexer.weights_proj.weight, std=1.0)
    assert float(recall.divergence(model, ids).detach()) > 0.01


def test_heads_start_where_the_recipe_says() -> None:
    """Before any training the first layer looks a token back."""
    torch.manual_seed(0)
    ids, _, _ = recall.batch(0, 1, 64, range(recall.FIRST, recall.FIRST + 100), 1)
    for arch in recall.ARCHS:
        model = recall.build_model(arch).eval()
        model.set_attn_implementation("eager")
        with torch.no_grad():
            weights = model(input_ids=ids, output_attentions=True).attentions[0][0, 0]
        back = weights.diagonal(-1)
        assert float(back.mean()) > 0.7, arch


def test_the_learning_rate_starts_low_and_ends_low() -> None:
    for arch, one in recall.ARCHS.items():
        rates = [recall.rate_at(at / 200, arch) for at in range(200)]
        assert rates[0] == 0
        assert max(rates[:140]) == one.rate
        assert rates[-1] < 0.25 * one.rate
