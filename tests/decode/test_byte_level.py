"""Byte-level models on transformers: tiny ones, the small Python model that ships, and Gemma."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import tokenizers
import torch
from scipy.stats import chisquare

from tokenmill import models
from tokenmill.decode import ByteEnsemble, ByteLevel, ByteLM, ByteTokenizerView, FillInTheMiddle
from tokenmill.decode._byte_text import ByteText, choose_slot, generate_bytes, mix, shape_law, whole_characters
from tokenmill.decode._byte_vocabulary import END, OTHER, SLOTS
from tokenmill.errors import LimitError, StoppedError, UnsupportedError

KINDS = ("llama", "qwen2", "gemma3")
SOURCE = "def mean(values):\n    total = sum(values)\n    return total / len(values)\n"


def tokens_as_they_are(lm: ByteLM, x: bytes) -> torch.Tensor:
    """The law behind the tokenizer's encoding of x: what plain decoding goes by."""
    ids = [*lm.head, *lm.view.encode(x)]
    with torch.no_grad():
        law = lm.model(torch.tensor([ids])).logits[0, -1].double().log_softmax(0)
    return torch.zeros(SLOTS, dtype=torch.float64).index_add(0, slots(lm), law.exp()).log()


@cache
def slots(lm: ByteLM) -> torch.Tensor:
    """(V,) the slot of each token's first byte."""
    ends = lm.vocabulary.end.tolist()
    found = [d[0] if d else END if i in ends else OTHER for i, d in enumerate(lm.view.token_bytes.tokens)]
    return torch.tensor(found)


@pytest.fixture(scope="module")
def python_lm() -> ByteLM:
    """A byte-level BPE of 2,048 tokens behind a regular expression."""
    model, tokenizer = models.load("python-target", dtype="float32")
    return ByteLM(model, tokenizer)


@pytest.fixture(scope="module")
def gemma_lm(gemma: Any) -> ByteLM:
    return ByteLM(*gemma)


@cache
def letters() -> tokenizers.Tokenizer:
    """64 tokens, each one byte."""
    return tokenizers.Tokenizer(tokenizers.models.BPE({chr(33 + i): i for i in range(64)}, []))


@pytest.mark.prop("byte-level-probabilities", 6)
@pytest.mark.parametrize("kind", KINDS)
def test_one_byte_tokens_give_the_models_own_law(kind: str) -> None:
    model: Any = models.tiny(kind, seed=5)
    x = b"5*A:?Q+%,-./0123456789ABC"  # beyond the window
    for mode in ("valid", "all"):
        lm = ByteLM(model, letters(), mode=mode, context=[3])
        law = lm.next_byte_logprobs(x)
        with torch.no_grad():
            own = model(torch.tensor([[3, *(b - 33 for b in x)]])).logits[0, -1].double().log_softmax(0)
        torch.testing.assert_close(law[33:97], own, rtol=0, atol=1e-4)
        assert bool((law[:33] == -math.inf).all())
        assert float(law.exp().sum()) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.prop("byte-level-probabilities", 6)
def test_nothing_is_biased_at_a_hard_boundary(gemma_lm: ByteLM) -> None:
    context = [*gemma_lm.head, *gemma_lm.view.encode(b"Hello"), 106]  # <end_of_turn>
    lm = ByteLM(gemma_lm.model, gemma_lm.tokenizer, mode="all", context=context)
    torch.testing.assert_close(lm.next_byte_logprobs(b""), tokens_as_they_are(lm, b""), rtol=0, atol=1e-4)
    valid = ByteLM(gemma_lm.model, gemma_lm.tokenizer, context=context).next_byte_logprobs(b"")
    # Valid continuations only: close to the same, since little mass is invalid behind a control token.
    assert float((valid.exp() - lm.next_byte_logprobs(b"").exp()).abs().max()) < 0.05


@pytest.mark.prop("byte-level-probabilities", 4)
def test_pushing_equals_starting_anew_on_a_regex_tokenizer(python_lm: ByteLM) -> None:
    text = "x = {'naïve': 12345}  # 日本 🙂\n\n    return x\n".encode()
    state = python_lm.start(b"")
    for at, byte in enumerate(text):
        law = state.logprobs()
        assert float(law.exp().sum()) == pytest.approx(1.0, abs=1e-9)
        fresh = python_lm.next_byte_logprobs(text[:at])
        torch.testing.assert_close(law.exp(), fresh.exp(), rtol=0, atol=2e-4)
        state = state.push(byte)


@pytest.mark.prop("byte-level-probabilities", 4)
def test_pushing_equals_starting_anew_on_gemma(gemma_lm: ByteLM) -> None:
    text = "une élève\n\n\t日本語 🙂 <table>x".encode()
    state = gemma_lm.start(text[:3])
    for at in range(3, len(text)):
        if at % 3 == 0 or at > len(text) - 8:
            fresh = gemma_lm.next_byte_logprobs(text[:at])
            torch.testing.assert_close(state.logprobs().exp(), fresh.exp(), rtol=0, atol=2e-4)
        state = state.push(text[at])
    assert gemma_lm.trace.leak < 0.2


@pytest.mark.prop("byte-level-probabilities", 2)
def test_the_chain_of_next_bytes_is_the_prefix_probability(python_lm: ByteLM) -> None:
    text = SOURCE[:40].encode()
    assert python_lm.prefix_logprob(b"") == pytest.approx(0.0, abs=1e-9)
    state, chain = python_lm.start(b""), 0.0
    for byte in text:
        chain += float(state.logprobs()[byte])
        state = state.push(byte)
    assert chain == pytest.approx(python_lm.prefix_logprob(text), abs=1e-3)
    assert chain == pytest.approx(state.logp, abs=1e-9)


@pytest.mark.prop("byte-level-probabilities", 7)
def test_bias_inside_tokens(gemma_lm: ByteLM) -> None:
    text = b"import os\n\ndef read_file(path):\n    with open(pa"
    true = ord("t")
    exact, biased = gemma_lm.next_byte_logprobs(text), tokens_as_they_are(gemma_lm, text)
    assert float(exact[true].exp()) > 0.9
    assert float(biased[true].exp()) < 0.1
    losses = []
    whole, ends, at = SOURCE.encode(), set(), 0
    for token in gemma_lm.view.encode(whole):
        at += len(gemma_lm.view.token_bytes[token] or b"")
        ends.add(at)
    for cut in [c for c in range(20, len(whole)) if c not in ends][::2]:
        x = whole[:cut]
        losses.append([-float(law[whole[cut]]) for law in (
            gemma_lm.next_byte_logprobs(x), tokens_as_they_are(gemma_lm, x))])  # fmt: skip
    ours, theirs = (sum(column) / len(losses) for column in zip(*losses, strict=True))
    assert len(losses) > 8
    assert ours < theirs / 1.5


def test_a_byte_costs_at_most_a_row_and_a_bit(python_lm: ByteLM, gemma_lm: ByteLM) -> None:
    text = SOURCE.encode()
    for lm in (python_lm, gemma_lm):
        state = lm.start(text[:10])
        before = lm.trace.positions
        for byte in text[10:60]:
            state = state.push(byte)
        assert lm.trace.positions - before <= 1.3 * 50


@pytest.mark.prop("byte-level-probabilities", 8)
def test_an_ensemble_of_one_model_is_that_model(python_lm: ByteLM) -> None:
    x = b"import os, sy"
    alone = python_lm.next_byte_logprobs(x)
    for rule in ("mean", "product"):
        both = ByteEnsemble([python_lm, python_lm], rule=rule).next_byte_logprobs(x)
        torch.testing.assert_close(both.exp(), alone.exp(), rtol=0, atol=1e-9)
    weighted = ByteEnsemble([python_lm, python_lm], weights=[3, 1])
    assert weighted.weights == (0.75, 0.25)


@pytest.mark.prop("byte-level-probabilities", 8)
def test_models_of_different_vocabularies_average(python_lm: ByteLM, gemma_lm: ByteLM) -> None:
    text = b"import os\nfor name in os.listdir('.'):\n"
    mean, product = (ByteEnsemble([gemma_lm, python_lm], rule=rule).start(text[:8]) for rule in ("mean", "product"))
    members = [gemma_lm.start(text[:8]), python_lm.start(text[:8])]
    for byte in text[8:24]:
        laws = [m.logprobs() for m in members]
        law = mean.logprobs()
        for one in (law, product.logprobs()):
            assert float(one.exp().sum()) == pytest.approx(1.0, abs=1e-9)
        best = max(float(one[byte]) for one in laws)
        assert float(law[byte]) >= best - math.log(2) - 1e-9
        average = sum(one.exp() for one in laws) / 2
        torch.testing.assert_close(law.exp(), average, rtol=0, atol=1e-12)
        mean, product = mean.push(byte), product.push(byte)
        members = [m.push(byte) for m in members]
    made = ByteEnsemble([gemma_lm, python_lm]).generate(b"import sy", max_new_bytes=6, temperature=0)
    assert made.data.startswith(b"s")


def test_token_temperature_acts_inside_the_sums() -> None:
    model: Any = models.tiny("llama", seed=5)
    lm = ByteLM(model, letters(), context=[3])
    x = b"abcABC"[3:]
    with torch.no_grad():
        own = model(torch.tensor([[3, *(b - 33 for b in x)]])).logits[0, -1].double()
    law = lm.start(x, temperature=0.5).logprobs()
    torch.testing.assert_close(law[33:97], (own / 0.5).log_softmax(0), rtol=0, atol=1e-4)
    # Tokens of one byte: both temperatures are the same.
    same = [
        lm.generate(x, max_new_bytes=12, temperature=0.5, temperature_at=at, generator=torch.Generator().manual_seed(3))
        for at in ("byte", "token")
    ]
    assert same[0] == same[1]


def test_bytes_are_drawn_from_the_shaped_law() -> None:
    logprobs = torch.full((SLOTS,), -math.inf, dtype=torch.float64)
    logprobs[[65, 66, 67, 68, END, OTHER]] = torch.tensor([0.3, 0.25, 0.2, 0.05, 0.1, 0.1], dtype=torch.float64).log()
    law = shape_law(logprobs, temperature=0.7)
    expected = (torch.tensor([0.3, 0.25, 0.2, 0.05, 0.1], dtype=torch.float64)) ** (1 / 0.7)
    torch.testing.assert_close(law[[65, 66, 67, 68, END]], expected / expected.sum())
    generator = torch.Generator().manual_seed(7)
    counts = torch.zeros(SLOTS)
    for _ in range(20_000):
        counts[choose_slot(logprobs, temperature=0.7, top_k=0, top_p=1.0, generator=generator)] += 1
    assert chisquare(counts[law > 0], law[law > 0] * 20_000).pvalue > 1e-3
    # The slot that crosses the mass is kept, the rest is not.
    assert (shape_law(logprobs, top_p=0.6) > 0).nonzero().flatten().tolist() == [65, 66]
    assert (shape_law(logprobs, top_k=1) > 0).nonzero().flatten().tolist() == [65]
    assert choose_slot(logprobs, temperature=0, top_k=0, top_p=1.0, generator=None) == 65


def test_products_need_a_common_byte() -> None:
    one, other = (torch.full((SLOTS,), -math.inf, dtype=torch.float64) for _ in range(2))
    one[3], other[4] = 0.0, 0.0
    with pytest.raises(LimitError, match="in agreement"):
        mix([one, other], [0.5, 0.5], "product")
    assert float(mix([one, other], [0.5, 0.5], "mean")[3]) == pytest.approx(math.log(0.5))


def test_generated_text_stops_where_it_should(python_lm: ByteLM) -> None:
    made = python_lm.generate(SOURCE[:30], max_new_bytes=60, temperature=0)
    assert 57 <= len(made.data) <= 60
    line = python_lm.generate(SOURCE[:30], max_new_bytes=60, temperature=0, stop=[b"\n"])
    assert line.data == made.data.split(b"\n")[0]
    assert b"\n" in made.data, "the stop string has to come up"
    seeded = [
        python_lm.generate(b"def f", max_new_bytes=20, generator=torch.Generator().manual_seed(s)).data
        for s in (1, 1, 2)
    ]
    assert seeded[0] == seeded[1] != seeded[2]


@pytest.mark.parametrize(
    ("data", "whole"),
    [(b"", 0), (b"ab", 2), ("é".encode(), 2), ("日".encode()[:2], 0), (b"a\xf0\x9f", 1), (b"\x80", 1)],
)
def test_no_character_is_cut(data: bytes, whole: int) -> None:
    assert whole_characters(data) == whole


def test_errors_keep_the_text_so_far() -> None:
    class Broken:
        length = 0

        def __init__(self, left: int) -> None:
            self.left = left

        def logprobs(self) -> torch.Tensor:
            law = torch.full((SLOTS,), -math.inf, dtype=torch.float64)
            law[65] = 0.0
            return law

        def push(self, byte: int) -> Broken:
            if not self.left:
                raise RuntimeError("lost the model")
            return Broken(self.left - 1)

    with pytest.raises(StoppedError, match="lost the model") as caught:
        generate_bytes(Broken(3), max_new_bytes=9, temperature=0, top_p=1.0)
    assert caught.value.partial == ByteText(b"AAAA", False)


def test_a_character_that_would_be_cut_is_left_out() -> None:
    class Writes:
        length = 0

        def __init__(self, data: bytes) -> None:
            self.data = data

        def logprobs(self) -> torch.Tensor:
            law = torch.full((SLOTS,), -math.inf, dtype=torch.float64)
            law[self.data[0]] = 0.0
            return law

        def push(self, byte: int) -> Writes:
            return Writes(self.data[1:])

    for limit, whole in ((3, "日"), (4, "日"), (5, "日"), (6, "日本")):
        made = generate_bytes(Writes("日本語".encode()), max_new_bytes=limit, temperature=0, top_p=1.0)
        assert made.data == whole.encode()


@pytest.fixture(scope="module")
def toy() -> tuple[Any, tokenizers.Tokenizer]:
    """A tiny model whose tokenizer merges pairs and has control tokens: an end, and the three of infilling."""
    vocab = {chr(97 + i): i for i in range(26)}
    merges = [("a", "b"), ("c", "d"), ("ab", "cd"), ("e", "f")]
    vocab |= {a + b: 26 + i for i, (a, b) in enumerate(merges)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    names = ["<end>", "<pre>", "<suf>", "<mid>"]
    tokenizer.add_special_tokens([tokenizers.AddedToken(n, special=True) for n in names])
    return models.tiny("llama", seed=9), tokenizer


FIM = FillInTheMiddle(prefix="<pre>", suffix="<suf>", middle="<mid>")


def test_infilling_arranges_the_parts(toy: Any) -> None:
    model, tokenizer = toy
    view = ByteTokenizerView(tokenizer)
    assert FIM.arrange(view, b"xab", b"cd", [30]) == ([30, 31, 32, 27, 33], b"xab")
    psm = FillInTheMiddle(prefix="<pre>", suffix="<suf>", middle="<mid>", order="psm")
    assert psm.arrange(view, b"xab", b"cd", [30]) == ([30, 31, 23, 26, 32, 27, 33], b"")
    lm = ByteLM(model, tokenizer, context=[30])
    made = lm.infill("xa", "cd", FIM, max_new_bytes=5, temperature=0)
    state = lm.start(b"xa", context=[30, 31, 32, 27, 33])
    for byte in made.data:
        assert int(state.logprobs()[:256].argmax()) == byte
        state = state.push(byte)
    assert len(made.data) == 5
    with pytest.raises(LimitError, match="<gap>"):
        lm.infill("a", "b", FillInTheMiddle(prefix="<gap>"))
    with pytest.raises(LimitError, match="psm"):
        FillInTheMiddle(order="mps")  # type: ignore[arg-type]


def run(toy: Any, ids: list[int], decoder: Any, **settings: Any) -> Any:
    settings = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0} | settings
    prompt = torch.tensor([ids])
    return toy[0].generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), custom_generate=decoder, **settings
    )


def test_generate_keeps_the_prompt_and_continues_its_bytes(toy: Any) -> None:
    model, tokenizer = toy
    lm = ByteLM(model, tokenizer, context=[30])
    decoder = ByteLevel(tokenizer)
    prompt = [30, 23, 0]  # <end> x a: the last token may go on as ab or abcd
    out = run(toy, prompt, decoder)[0].tolist()
    assert out[:3] == prompt
    assert len(out) == 11
    made = lm.view.token_bytes.join(out[3:])
    assert made == lm.generate(b"xa", max_new_bytes=len(made), temperature=0).data
    assert decoder.trace.tokens_so_far == out[3:]
    assert decoder.trace.bytes >= len(made)
    # The text begins behind the last control token, and what is before it is a context as it stands.
    two = run(toy, [30, 23, 31, 0], decoder)[0].tolist()
    behind = ByteLM(model, tokenizer, context=[30, 23, 31])
    made = lm.view.token_bytes.join(two[4:])
    assert made == behind.generate(b"a", max_new_bytes=len(made), temperature=0).data
    # Padding on the left is not part of the text.
    padded = torch.tensor([[0, 0, *prompt]])
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    again = model.generate(
        input_ids=padded, attention_mask=mask, custom_generate=decoder, do_sample=False, max_new_tokens=8
    )
    assert again[0, 5:].tolist() == out[3:]


def test_the_end_token_ends_the_text(toy: Any) -> None:
    ended = 0
    sampling = {"do_sample": True, "top_k": 0, "temperature": 4.0, "eos_token_id": 30, "max_new_tokens": 40}
    for seed in range(6):
        out = run(toy, [23, 0, 1], ByteLevel(toy[1], seed=seed), **sampling)[0].tolist()
        assert out.count(30) == (out[-1] == 30)
        ended += out[-1] == 30
    assert ended > 0


def test_text_streams_as_it_settles(toy: Any) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.parts: list[int] = []
            self.ended = 0

        def put(self, value: torch.Tensor) -> None:
            self.parts += value.flatten().tolist()

        def end(self) -> None:
            self.ended += 1

    streamer = Streamer()
    out = run(toy, [30, 23, 0], ByteLevel(toy[1]), token_streamer=streamer, max_new_tokens=12)[0].tolist()
    assert streamer.parts == out
    assert streamer.ended == 1


def test_stopping_criteria_see_settled_tokens(toy: Any) -> None:
    decoder = ByteLevel(toy[1])
    whole = run(toy, [30, 23, 0], decoder, max_new_tokens=12)[0].tolist()

    def fourth(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([ids.shape[1] == 7])

    assert run(toy, [30, 23, 0], decoder, stopping_criteria=[fourth])[0].tolist() == whole[:7]


def test_what_cannot_be_served_is_refused(toy: Any, python_lm: ByteLM) -> None:
    model, tokenizer = toy
    decoder = ByteLevel(tokenizer)
    with pytest.raises(UnsupportedError, match="RepetitionPenalty"):
        run(toy, [1, 2], decoder, repetition_penalty=1.3)
    with pytest.raises(UnsupportedError, match="no scores"):
        run(toy, [1, 2], decoder, return_dict_in_generate=True, output_scores=True)
    with pytest.raises(UnsupportedError, match="batch 2"):
        model.generate(torch.ones(2, 3, dtype=torch.long), custom_generate=decoder, max_new_tokens=2)
    with pytest.raises(LimitError, match="mode"):
        ByteLM(model, tokenizer, mode="most", context=[1])  # type: ignore[arg-type]
    for name, value in (("beam", 0), ("lookback", -1), ("beam", True)):
        with pytest.raises(LimitError, match=name):
            ByteLM(model, tokenizer, mode="all", context=[1], **{name: value})
    with pytest.raises(LimitError, match="no bos and no eos"):
        ByteLM(model, tokenizer)
    with pytest.raises(LimitError, match="context"):
        ByteLM(model, tokenizer, context=[])
    with pytest.raises(LimitError, match="temperature"):
        ByteLM(model, tokenizer, context=[1], temperature=0.0)
    lm = ByteLM(model, tokenizer, context=[1])
    for settings in ({"temperature": -1}, {"top_p": 0.0}, {"max_new_bytes": 0}, {"temperature_at": "word"}):
        with pytest.raises(LimitError, match=next(iter(settings))):
            lm.generate(b"ab", **settings)
    with pytest.raises(LimitError, match="weights"):
        ByteEnsemble([lm, lm], weights=[1.0])
    with pytest.raises(LimitError, match="members"):
        ByteEnsemble([])
    with pytest.raises(LimitError, match="rule"):
        ByteEnsemble([lm], rule="best")  # type: ignore[arg-type]
    with pytest.raises(LimitError, match=r"UTF-8|0xff"):
        python_lm.start(b"abc\xff\xff")


@pytest.mark.prop("byte-level-probabilities", 5)
def test_texts_end_where_they_can(python_lm: ByteLM, gemma_lm: ByteLM) -> None:
    """Two covers end at a blank line, and behind only one of them the text may end; nowhere inside a character."""
    end = {tuple(python_lm.view.encode(b"x = 1\n\n"))}
    state = python_lm.start(b"x = 1\n\n")
    whole = {c.ids: float(c.bytes[END]) for c in state.contexts if c.bytes is not None}
    assert len(whole) == 2
    assert {ids for ids, mass in whole.items() if mass > 0} == end
    assert {ids for ids in whole if python_lm.view.may_end(ids)} == end
    for lm in (python_lm, gemma_lm):
        for text in ("日本".encode(), "𠀋".encode()):
            for cut in range(1, len(text)):
                inside = text[:cut]
                can_end = inside.decode(errors="ignore").encode() == inside
                assert (float(lm.next_byte_logprobs(inside)[END]) > -math.inf) == can_end


def test_segmentations_do_not_explode_unseen(python_lm: ByteLM) -> None:
    with pytest.raises(LimitError, match="give a beam"):
        ByteLM(python_lm.model, python_lm.tokenizer, mode="all").start(b"def mean(values, weights=None):")


def test_special_tokens_in_a_text_are_plain_text(python_lm: ByteLM) -> None:
    text = "x = '<|endoftext|>'"
    ids = python_lm.view.encode(text.encode())
    assert 0 not in ids
    assert python_lm.view.token_bytes.join(ids) == text.encode()
    assert python_lm.start(text).length == len(text)
