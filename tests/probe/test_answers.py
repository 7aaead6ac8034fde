"""Runs: resumed, batched, interrupted; on functions and on a transformers model with prompts padded on the left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.probe.solvers import characters, solving, tiny_llama
from tokenmill.catalog import card
from tokenmill.errors import LimitError, StoppedError, TokenmillError
from tokenmill.models import tiny
from tokenmill.probe import Local, NeedleThreading, read_answers
from tokenmill.probe._answers import Reply, room
from tokenmill.probe.needle_threading import Example, aggregate, generate, run, small


class Counting:
    """Answers right, counts what it is asked, and stops working after so many prompts."""

    def __init__(self, examples: list[Example], *, until: int = 10**9, at_once: int = 1) -> None:
        self.solve, self.until, self.at_once, self.name = solving(examples), until, at_once, "counting"
        self.sizes: list[int] = []

    def answer(self, prompts: list[str], max_new_tokens: int) -> list[Reply]:
        if sum(self.sizes) + len(prompts) > self.until:
            raise TokenmillError("the line is dead")
        self.sizes.append(len(prompts))
        return [Reply(self.solve(prompt)) for prompt in prompts]


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return list(small().suite())


def test_a_run_is_scored_kept_and_not_repeated(examples: list[Example], tmp_path: Path) -> None:
    file = tmp_path / "a" / "answers.jsonl"
    seen: list[tuple[int, int | None]] = []
    first = run(Counting(examples), None, examples, out=file, progress=lambda *done: seen.append(done))
    assert [a.correct for a in first] == [1.0] * len(examples)
    assert seen == [(i + 1, len(examples)) for i in range(len(examples))]
    assert read_answers(file) == first
    assert len(file.read_text().splitlines()) == len(examples)
    again = Counting(examples, until=0)
    assert run(again, None, iter(examples), out=file) == first
    assert again.sizes == []
    # Another length of answers, model or haystack is another question.
    assert len(run(Counting(examples), None, examples[:1], out=file, max_new_tokens=5)) == 1
    other = list(small().suite())[:1]
    other = [Example(0, other[0].haystack + " ", other[0].question, other[0].keys, other[0].values, other[0].meta)]
    run(Counting([*other]), None, other, out=file)
    assert len(file.read_text().splitlines()) == len(examples) + 2


@given(until=st.integers(0, 9), at_once=st.integers(1, 4))
@settings(max_examples=15)
def test_a_run_that_stopped_goes_on_where_it_was(
    tmp_path_factory: pytest.TempPathFactory, until: int, at_once: int
) -> None:
    made = list(small().suite())
    file = tmp_path_factory.mktemp("run") / "answers.jsonl"
    broken = Counting(made, until=until, at_once=at_once)
    if until < len(made):
        with pytest.raises(StoppedError, match="the line is dead") as stopped:
            run(broken, None, made, out=file)
        kept = read_answers(file) if file.exists() else []
        assert stopped.value.partial == kept
        assert f"after {len(kept)} examples" in str(stopped.value)
    else:
        assert len(run(broken, None, made, out=file)) == len(made)
    whole = Counting(made, at_once=at_once)
    found = run(whole, None, made, out=file)
    assert [a.id for a in found] == [e.id for e in made]
    assert sum(whole.sizes) + sum(broken.sizes) == len(made)
    assert read_answers(file) == found


def test_a_line_that_was_cut_off_is_asked_again(examples: list[Example], tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    first = run(Counting(examples), None, examples, out=file)
    file.write_text(file.read_text()[:-40])
    again = Counting(examples)
    found = run(again, None, examples, out=file)
    assert [a.key for a in found] == [a.key for a in first]
    assert sum(again.sizes) == 1
    for bad in ("{}", '{"key": "a"}', "[]"):
        file.write_text(bad + "\n")
        with pytest.raises(LimitError, match=r"answers\.jsonl:1"):
            run(again, None, examples, out=file)
    with pytest.raises(LimitError, match="nowhere"):
        read_answers(tmp_path / "nowhere")


def test_the_same_question_is_asked_once_and_told_for_each_example(tmp_path: Path) -> None:
    """Of two pairs, depths 0 and 40 are the first one."""
    made = list(NeedleThreading(tasks=("single",), contexts=(160,), repeats=1, depths=(0, 40, 100)).suite())
    for at_once in (1, 3):
        asked = Counting(made, at_once=at_once)
        found = run(asked, None, made, out=tmp_path / f"{at_once}.jsonl")
        assert [(a.id, a.meta["needle_depth"]) for a in found] == [(0, "0"), (1, "40"), (2, "100")]
        assert sum(asked.sizes) == 2


def test_batches_hold_prompts_of_about_one_length(examples: list[Example]) -> None:
    made = list(NeedleThreading(tasks=("single",), contexts=(480, 8000), repeats=1, depths=(0, 50, 100)).suite())
    asked = Counting(made, at_once=8)
    run(asked, None, made)
    assert asked.sizes == [3, 3]


def test_a_function_is_asked(examples: list[Example]) -> None:
    found = run(solving(examples), None, examples)
    assert {a.model for a in found} == {"oracle_of_tests"}
    assert all(cell.accuracy == 1.0 for cell in aggregate(found))
    silent = run(lambda prompt: "", None, examples)
    assert all(cell.accuracy == 0.0 for cell in aggregate(silent))


def test_a_function_that_breaks_leaves_what_it_answered(examples: list[Example]) -> None:
    solve, asked = solving(examples), []

    def breaking(prompt: str) -> str:
        asked.append(prompt)
        return solve(prompt) if len(asked) < 3 else 1 / 0  # type: ignore[return-value]

    with pytest.raises(StoppedError, match="after 2 examples: ZeroDivisionError") as stopped:
        run(breaking, None, examples)
    assert [a.correct for a in stopped.value.partial] == [1.0, 1.0]


def test_who_cannot_be_asked_is_refused(examples: list[Example]) -> None:
    model, tokenizer = tiny_llama()
    for bad, words in (
        ((5, None), "model = 'int'"),
        ((model, None), "tokenizer"),
    ):
        with pytest.raises(LimitError, match=words):
            run(*bad, examples)
    wrong: list[tuple[dict[str, Any], str]] = [({"batch_size": 0}, "batch_size = 0")]
    wrong.append(({"max_new_tokens": 0}, "max_new_tokens = 0"))
    for more, words in wrong:
        with pytest.raises(LimitError, match=words):
            run(model, tokenizer, examples, **more)
    with pytest.raises(LimitError, match="template"):
        Local(model, tokenizer, template="chatty")  # type: ignore[arg-type]


def test_an_answer_has_room_for_its_values() -> None:
    assert room(generate("single", n_pairs=5)) == 100
    assert room(generate("multiple", n_pairs=30, num_needles=25)) == 1200


@pytest.mark.parametrize("kind", card("needle-threading").works_with)
def test_left_padded_batches_give_what_single_prompts_give(kind: str) -> None:
    model, tokenizer = tiny(kind.removesuffix("_text"), vocab=64), characters()
    prompts = ['{"a": "b"}', '{"a": "b", "c": "d"} key "c"', "x" * 60]
    together = Local(model, tokenizer, batch_size=3).answer(prompts, 20)
    apart = [Local(model, tokenizer).answer([prompt], 20)[0] for prompt in prompts]
    assert together == apart
    assert [r.prompt_tokens for r in together] == [len(p) for p in prompts]
    assert all(r.cut and r.tokens == 20 and r.text for r in together)
    ids = torch.tensor([tokenizer(prompts[0])["input_ids"]])
    out = model.generate(input_ids=ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == together[0].text


def test_an_end_token_ends_the_answer() -> None:
    model, tokenizer = tiny_llama()
    whole = Local(model, tokenizer).answer(["abc"], 30)[0]
    ids = torch.tensor([tokenizer("abc")["input_ids"]])
    new = model.generate(input_ids=ids, max_new_tokens=30, do_sample=False, pad_token_id=0)[0, 3:].tolist()
    model.generation_config.eos_token_id = [new[5], 0]
    at = new.index(new[5])
    ended = Local(model, tokenizer, batch_size=2).answer(["abc", "abcd"], 30)[0]
    assert (ended.tokens, ended.cut) == (at, False)
    assert whole.text.startswith(ended.text)


def test_a_prompt_that_does_not_fit_is_an_error_and_is_not_cut(tmp_path: Path) -> None:
    model, tokenizer = tiny_llama()
    made = list(NeedleThreading(tasks=("single",), contexts=(160, 800), repeats=1, depths=(50,)).suite())
    found = run(model, tokenizer, made, out=tmp_path / "a.jsonl", max_new_tokens=4, batch_size=2)
    assert found[0].error == ""
    assert "do not fit in 512 positions" in found[1].error
    assert found[1].prompt_tokens == len(made[1].prompt)
    cells = aggregate(found)
    assert [(c.n, c.failed, c.accuracy) for c in cells] == [(1, 0, 0.0), (0, 1, None)]
    assert [c.prompt_tokens for c in cells] == [len(e.prompt) for e in made]


def test_a_chat_template_must_leave_the_prompt_alone() -> None:
    model, tokenizer = tiny_llama()
    turns = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    tokenizer.chat_template = turns
    chatting = Local(model, tokenizer)
    assert chatting.name.endswith("chat")
    assert tokenizer.decode(chatting.encode("ab&c")) == "[ab&c]"
    assert Local(model, tokenizer, template="none").encode("abc") == tokenizer("abc")["input_ids"]
    tokenizer.chat_template = turns.replace("m['content']", "m['content'] | replace('&', '+')")
    example = generate("conditional", n_pairs=2, num_needles=1, character="&")
    (reply,) = Local(model, tokenizer).answer([example.prompt], 4)
    assert reply.error == "the chat template changes the prompt"


def test_answers_of_a_model_are_data(tmp_path: Path) -> None:
    model, tokenizer = tiny_llama()
    made = list(NeedleThreading(tasks=("single",), contexts=(160,), repeats=1, depths=(50,)).suite())
    (found,) = run(model, tokenizer, made, out=tmp_path / "a.jsonl", max_new_tokens=3)
    line: dict[str, Any] = json.loads((tmp_path / "a.jsonl").read_text())
    assert line["text"] == found.text
    assert line["context"] == 160
    assert line["seconds"] > 0
    assert line["meta"]["needle_depth"] == "50"
    assert line["prompt_tokens"] == len(made[0].prompt)
