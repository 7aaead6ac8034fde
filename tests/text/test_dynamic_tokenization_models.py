"""Rows of merged tokens, inputs of real and tiny models, the cache, the network, the large vocabulary."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.text import vocabularies
from tokenmill import models
from tokenmill.errors import LimitError, MissingExtraError, NonFiniteError, UnsupportedError
from tokenmill.text import (
    CachedEmbedder,
    DynamicBPE,
    DynamicInputs,
    HyperNetwork,
    LargeVocabHead,
    LargeVocabulary,
    MeanEmbedder,
)
from tokenmill.text import _large_vocabulary as large_vocabulary
from tokenmill.text._token_embedders import Rows, tables

PROMPTS = ["def merge_tokens(batch, tokenizer):\n    return", "import os\nfor name in os.listdir(path):\n    if name"]
TEXTS = ["Überraschungsgäste kommen übermorgen", "tokenisation of hyperparameters", "short"]


@cache
def minilm() -> tuple[Any, Any]:
    return models.encoder()


@cache
def decoder() -> tuple[Any, Any]:
    return models.load("python-target")


def drawn(model: Any, tokenizer: Any, **shape: Any) -> HyperNetwork:
    """A network that does something: random weights where an untrained one has zeros."""
    torch.manual_seed(0)
    net = HyperNetwork.of(model, tokenizer, **{"hidden": 32, "layers": 1, "heads": 2, "ff": 64, **shape}).eval()
    torch.nn.init.normal_(net.leave.weight, std=0.05)
    return net


@pytest.mark.prop("dynamic-tokenization", 1)
def test_without_merges_the_output_is_bit_identical() -> None:
    model, tokenizer = minilm()
    batch = DynamicBPE(tokenizer, max_merges=0).merge(TEXTS)
    plain = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        wanted = model(**plain).last_hidden_state
        for positions in (None, "compact", "keep"):
            given = DynamicInputs(model, MeanEmbedder(model), positions=positions)(batch)
            found = model(**given).last_hidden_state
            mask = plain["attention_mask"].bool()
            assert torch.equal(given["attention_mask"].bool(), mask)
            assert torch.equal(found[mask], wanted[mask])
    for name in ("llama", "gemma3"):  # Gemma scales its rows inside the embedding call
        tiny = models.tiny(name, vocab=2048)
        tokenizer = decoder()[1]
        batch = DynamicBPE(tokenizer, max_merges=0).merge(PROMPTS[:1])
        given = DynamicInputs(tiny, MeanEmbedder(tiny))(batch)
        with torch.inference_mode():
            plain = tiny(**tokenizer(PROMPTS[:1], return_tensors="pt")).logits
            assert torch.equal(tiny(**given).logits, plain)


def test_kept_positions_are_those_of_first_pieces() -> None:
    model, tokenizer = minilm()
    batch = DynamicBPE(tokenizer, target_reduction=1.0).merge(TEXTS)
    given = DynamicInputs(model, MeanEmbedder(model), positions="keep")(batch)
    for row, tokens in enumerate(batch.pieces):
        wanted = [sum(len(token) for token in tokens[:i]) for i in range(len(tokens))]
        assert given["position_ids"][row, : len(tokens)].tolist() == wanted
    assert max(len(token) for row in batch.pieces for token in row) > 2


def test_merged_rows_are_scaled_as_the_model_scales_its_own() -> None:
    tiny = models.tiny("gemma3", vocab=2048)
    assert tables(tiny).scale == pytest.approx(tiny.config.get_text_config().hidden_size ** 0.5, rel=1e-3)
    batch = DynamicBPE(decoder()[1], target_reduction=1.0).merge(PROMPTS[:1])
    given = DynamicInputs(tiny, MeanEmbedder(tiny))(batch)
    at = next(i for i, token in enumerate(batch.pieces[0]) if len(token) > 1)
    own = tiny.get_input_embeddings()(torch.tensor(batch.pieces[0][at])).mean(0)
    assert torch.allclose(given["inputs_embeds"][0, at], own, atol=1e-5)


@pytest.mark.prop("dynamic-tokenization", 8)
def test_mean_of_one_piece_is_its_row_and_networks_see_no_padding_and_no_neighbours() -> None:
    model, tokenizer = minilm()
    weight = model.get_input_embeddings().weight
    mean = MeanEmbedder(model)
    assert torch.equal(mean.embed([(5,), (77,)]).input, weight[[5, 77]])
    assert torch.allclose(mean.embed([(5, 77, 9)]).input[0], weight[[5, 77, 9]].mean(0), atol=1e-6)
    untrained = HyperNetwork.of(model, tokenizer)
    assert torch.allclose(untrained.embed([(5, 77, 9)]).input, mean.embed([(5, 77, 9)]).input, atol=1e-6)
    net = drawn(model, tokenizer)
    alone = net.embed([(5, 77)]).input
    assert not torch.allclose(alone, mean.embed([(5, 77)]).input, atol=1e-3)
    assert torch.allclose(net.embed([(5, 77), (1, 2, 3, 4, 5)]).input[:1], alone, atol=1e-5)
    # The order of pieces counts, also of those behind the first.
    assert not torch.allclose(net.embed([(5, 77, 9)]).input, net.embed([(5, 9, 77)]).input, atol=1e-5)
    cached = CachedEmbedder(net, 3)
    for tokens in ([(5, 77), (8, 9)], [(5, 77)], [(1, 2), (3, 4), (5, 77)], [(8, 9)]):
        assert torch.allclose(cached.embed(tokens).input, net.embed(tokens).input, atol=1e-5)
        assert len(cached) <= 3
    assert (cached.hits, cached.misses) == (2, 5)


@pytest.mark.prop("dynamic-tokenization", 8)
def test_the_cache_drops_the_oldest_and_never_what_is_needed_now() -> None:
    model, _ = minilm()
    cached = CachedEmbedder(MeanEmbedder(model), 3)
    cached.embed([(1, 2), (3, 4), (5, 6)])
    cached.embed([(1, 2)])  # now (3, 4) is the oldest
    cached.embed([(7, 8)])
    cached.embed([(1, 2), (5, 6), (7, 8)])
    assert (cached.hits, cached.misses) == (4, 4)
    cached.embed([(3, 4), (5, 6), (9, 1)])  # needs two places while (5, 6) must stay
    assert (cached.hits, cached.misses) == (5, 6)
    with pytest.raises(LimitError, match="needs 4 rows, capacity 3"):
        cached.embed([(1, 2), (3, 4), (5, 6), (7, 8)])
    again = cached.embed([(1, 2), (1, 2)]).input
    assert torch.equal(again[0], again[1])


@pytest.mark.prop("dynamic-tokenization", 9)
def test_left_padding_does_not_change_the_last_state() -> None:
    model, tokenizer = decoder()
    bpe = DynamicBPE(tokenizer, target_reduction=0.8, per_example=True)
    inputs = DynamicInputs(model, MeanEmbedder(model))
    assert inputs.padding == "left"
    together = inputs(bpe.merge(PROMPTS, protect_tail=1))
    assert not together["attention_mask"].bool().all()
    with torch.inference_mode():
        both = model(**together, output_hidden_states=True).hidden_states[-1][:, -1]
        for row, prompt in enumerate(PROMPTS):
            alone = inputs(bpe.merge([prompt], protect_tail=1))
            one = model(**alone, output_hidden_states=True).hidden_states[-1][0, -1]
            assert torch.allclose(both[row], one, atol=1e-4)


@pytest.mark.prop("dynamic-tokenization", 10)
def test_writing_behind_a_merged_prompt_is_the_same_with_and_without_a_cache() -> None:
    model, tokenizer = decoder()
    bpe = DynamicBPE(tokenizer, target_reduction=0.8, per_example=True)
    given = DynamicInputs(model, MeanEmbedder(model))(bpe.merge(PROMPTS, protect_tail=1))
    given.pop("position_ids")
    more: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    with torch.inference_mode():
        cached, plain = (model.generate(**given, use_cache=use, **more) for use in (True, False))
    assert cached.shape == (2, 12)
    assert torch.equal(cached, plain)


def large(size: int, search: Any = "exact", **more: Any) -> tuple[LargeVocabulary, LargeVocabHead, DynamicBPE]:
    model, tokenizer = decoder()
    bpe = DynamicBPE(tokenizer, boundary="word", per_example=True, target_reduction=0.5)
    texts = ["for name in os.listdir(path):\n    print(name)\n" * 3, *PROMPTS]
    vocabulary = LargeVocabulary.from_texts(bpe, texts, size, base=model.config.vocab_size)
    return vocabulary, LargeVocabHead(model, vocabulary, drawn(model, tokenizer), search=search, **more), bpe


@pytest.mark.prop("dynamic-tokenization", 11)
def test_all_candidates_are_the_full_softmax_and_the_best_is_that_of_brute_force() -> None:
    model, _ = decoder()
    vocabulary, head, _ = large(2100)
    assert 2048 < len(vocabulary) <= 2100
    hidden = torch.randn(6, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    wanted = hidden @ head.output.T
    tokens, logits = head.candidates(hidden, len(vocabulary))
    full = torch.empty_like(wanted).scatter(1, tokens, logits)
    assert torch.allclose(full.softmax(-1), wanted.softmax(-1), atol=1e-6)
    # Rows of very different length: the nearest by angle is often not the one with the highest logit.
    angles = (hidden @ torch.nn.functional.normalize(head.output, dim=-1).T).argmax(-1)
    assert (angles != wanted.argmax(-1)).any()
    rows = large(2100, "hnsw")[1].index.reconstruct_n(0, 2048)  # all of one length: nearness is the inner product
    assert torch.from_numpy(rows).norm(dim=1).std() < 1e-3 * head.output.norm(dim=1).std()
    for search, more in (("pq", {"depth": 300}), ("ivf", {"nlist": 8, "nprobe": 8}), ("hnsw", {"ef": 2048})):
        head = large(2100, search, **more)[1]
        tokens, logits = head.candidates(hidden, 20)
        assert tokens[:, 0].tolist() == wanted.argmax(-1).tolist()
        assert torch.allclose(logits, wanted.gather(1, tokens), atol=1e-4)
        assert (logits[:, :-1] >= logits[:, 1:]).all()


@pytest.mark.prop("dynamic-tokenization", 11)
def test_rows_on_several_threads_keep_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_vocabulary, "_SHARD", 500)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    head = large(2100, "pq", depth=300)[1]
    assert head.index.count() == 3
    rows = torch.arange(0, len(head.output), 37)  # of all three parts
    own = head.output[rows] / head.output[rows].norm(dim=1, keepdim=True)
    wanted = own @ head.output.T
    tokens, logits = head.candidates(own, 5)
    assert tokens[:, 0].tolist() == wanted.argmax(-1).tolist()
    assert torch.allclose(logits, wanted.topk(5).values, atol=1e-4)


@pytest.mark.prop("dynamic-tokenization", 11)
@pytest.mark.prop("dynamic-tokenization", 10)
def test_a_vocabulary_of_base_tokens_writes_what_generate_writes() -> None:
    model, tokenizer = decoder()
    base = model.config.vocab_size
    plain = LargeVocabulary(tuple((i,) for i in range(base)))
    head = LargeVocabHead(model, plain, MeanEmbedder(model), search="exact")
    bpe = DynamicBPE(tokenizer, target_reduction=0.8, per_example=True)
    given = DynamicInputs(model, MeanEmbedder(model))(bpe.merge(PROMPTS, protect_tail=1))
    end = [tokenizer.eos_token_id]
    found = [head.generate(**given, max_new_tokens=12, eos=end, use_cache=use) for use in (True, False)]
    assert found[0].ids == found[1].ids
    given.pop("position_ids")
    wanted = model.generate(**given, max_new_tokens=12, do_sample=False).tolist()
    for ours, theirs in zip(found[0].ids, wanted, strict=True):
        assert ours == [*theirs[: theirs.index(end[0])], *end] if end[0] in theirs else ours == theirs


def test_joined_tokens_are_written_and_encode_as_the_longest_first() -> None:
    vocabulary, head, bpe = large(2100)
    model, tokenizer = decoder()
    ids = tokenizer("for name in os.listdir(path):", add_special_tokens=False)["input_ids"]
    tokens = vocabulary.encode(ids)
    assert vocabulary.decode(tokens) == ids
    assert len(tokens) < len(ids)
    rest = vocabulary.encode(ids[1:])
    assert vocabulary.decode(rest) == ids[1:]
    # A joined token whose output row is the largest is chosen, fed back, and counted as one step.
    joined = len(vocabulary) - 1
    given = DynamicInputs(model, MeanEmbedder(model))(bpe.merge(PROMPTS[:1], protect_tail=1))
    with torch.inference_mode():
        state = model.base_model(**given).last_hidden_state[0, -1]
        head.output = head.output.clone()
        head.output[joined] = state * 10
    out = head.generate(**given, max_new_tokens=3)
    assert out.tokens[0][0] == joined
    assert out.ids[0][: len(vocabulary.pieces[joined])] == list(vocabulary.pieces[joined])
    assert out.steps == 3


def test_sampling_follows_the_candidates_and_the_penalty_hits_what_was_written() -> None:
    _, head, bpe = large(2100)
    model = decoder()[0]
    given = DynamicInputs(model, MeanEmbedder(model))(bpe.merge(PROMPTS[:1], protect_tail=1))
    greedy = head.generate(**given, max_new_tokens=8)
    one = head.generate(**given, max_new_tokens=8, do_sample=True, top_k=1)
    assert one.ids == greedy.ids
    draws = [
        head.generate(**given, max_new_tokens=8, do_sample=True, min_p=0.0, temperature=2.0,
                      generator=torch.Generator().manual_seed(seed)).ids
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert draws[0] == draws[1] != draws[2]
    never = head.generate(**given, max_new_tokens=8, repetition_penalty=1e6)
    assert len(set(never.tokens[0])) == 8


def test_networks_are_saved_and_refuse_another_model(tmp_path: Path) -> None:
    model, tokenizer = decoder()
    net = drawn(model, tokenizer)
    net.save_pretrained(tmp_path)
    again = HyperNetwork.from_pretrained(tmp_path, model, tokenizer)
    pieces = [(5, 77), (1, 2, 3)]
    assert torch.allclose(again.embed(pieces).input, net.embed(pieces).input, atol=1e-3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hypernetwork.json", "hypernetwork.safetensors"]
    with pytest.raises(LimitError, match=r"the vocabulary .* that it was trained for"):
        HyperNetwork.from_pretrained(tmp_path, *minilm())
    other = models.tiny("llama", vocab=2048, seed=5)
    with pytest.raises(LimitError, match="the model whose rows it was trained on"):
        HyperNetwork.from_pretrained(tmp_path, other, tokenizer)
    with pytest.raises(LimitError, match=r"recipes/hypernetwork\.py"):
        HyperNetwork.from_pretrained("no-such-model", model, tokenizer)


def test_untied_models_get_output_rows_too() -> None:
    tokenizer = decoder()[1]
    tiny: Any = models.tiny("llama", vocab=2048)
    tiny.config.tie_word_embeddings = False
    tiny.lm_head.weight = torch.nn.Parameter(torch.randn_like(tiny.lm_head.weight))
    net = drawn(tiny, tokenizer)
    assert not net.config.tied
    for embedder in (net, MeanEmbedder(tiny), CachedEmbedder(net, 9)):
        rows = embedder.embed([(1, 2), (3, 4)])
        assert rows.output is not None
        assert rows.output.shape == rows.input.shape
        assert not torch.allclose(rows.output, rows.input)
    vocabulary = LargeVocabulary((*((i,) for i in range(2048)), (1, 2)))
    head = LargeVocabHead(tiny, vocabulary, MeanEmbedder(tiny), search="exact")
    assert torch.allclose(head.output[2048], tiny.lm_head.weight[[1, 2]].mean(0), atol=1e-6)
    assert torch.allclose(head.input[2048], tiny.get_input_embeddings().weight[[1, 2]].mean(0), atol=1e-6)


def test_long_tokens_are_cut_with_a_warning() -> None:
    model, tokenizer = minilm()
    net = drawn(model, tokenizer, surface_maxlen=3)
    with pytest.warns(UserWarning, match="1 tokens have more than 3 pieces"):
        rows = net.embed([(1, 2, 3, 4), (1, 2)]).input
    assert torch.allclose(rows[0], net.embed([(1, 2, 3)]).input[0], atol=1e-5)


def test_all_tokens_are_predicted_when_known_ones_are_not_kept() -> None:
    model, tokenizer = minilm()
    batch = DynamicBPE(tokenizer, max_merges=0).merge(TEXTS)
    kept = DynamicInputs(model, drawn(model, tokenizer))
    every = DynamicInputs(model, drawn(model, tokenizer), keep_known=False)
    assert kept.needed(batch) == []
    needed = every.needed(batch)
    special = {(101,), (102,)}
    assert special.isdisjoint(needed)
    assert {token for row in batch.pieces for token in row} - special == set(needed)


def test_bad_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = decoder()
    mean = MeanEmbedder(model)
    bpe = DynamicBPE(vocabularies.python_target())
    with pytest.raises(LimitError, match="tokens of text 1 = 0"):
        DynamicInputs(model, mean)(bpe.merge(["a", ""], add_special_tokens=False))
    with pytest.raises(LimitError, match="positions"):
        DynamicInputs(model, mean, positions="here")
    with pytest.raises(LimitError, match="padding"):
        DynamicInputs(model, mean, padding="top")
    with pytest.raises(LimitError, match="capacity = 0"):
        CachedEmbedder(mean, 0)
    with pytest.raises(LimitError, match="multiple of heads"):
        HyperNetwork.of(model, tokenizer, hidden=30, heads=4)

    class Broken:
        def embed(self, pieces: Any) -> Rows:
            return Rows(torch.full((len(pieces), model.config.hidden_size), torch.nan), None)

    with pytest.raises(NonFiniteError, match="not finite"):
        DynamicInputs(model, Broken())(DynamicBPE(tokenizer, target_reduction=1.0).merge(PROMPTS))
    base = model.config.vocab_size
    with pytest.raises(LimitError, match="1,000,000"):
        LargeVocabulary.from_texts(bpe, ["a"], 1_000_001, base=base)
    with pytest.raises(LimitError, match="size = 5"):
        LargeVocabulary.from_texts(bpe, ["a"], 5, base=base)
    with pytest.raises(LimitError, match="different tokens"):
        LargeVocabulary(((1,), (1,)))
    small = LargeVocabulary(((0,), (1,)))
    with pytest.raises(LimitError, match="the model's 2,048 tokens first"):
        LargeVocabHead(model, small, mean, search="exact")
    plain = LargeVocabulary(tuple((i,) for i in range(base)))
    with pytest.raises(LimitError, match="search"):
        LargeVocabHead(model, plain, mean, search="magic")  # type: ignore[arg-type]
    head = LargeVocabHead(model, plain, mean, search="exact")
    with pytest.raises(LimitError, match="k = 0"):
        head.candidates(torch.zeros(1, model.config.hidden_size), 0)
    given = DynamicInputs(model, mean)(bpe.merge(["a"]))
    for name, value in (("max_new_tokens", 0), ("temperature", 0.0), ("min_p", 2.0), ("repetition_penalty", 0.0)):
        with pytest.raises(LimitError, match=name):
            head.generate(**given, **{name: value})  # type: ignore[arg-type]
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(MissingExtraError, match="faiss-cpu"):
        LargeVocabHead(model, plain, mean, search="ivf")

    class Odd(torch.nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    tiny = models.tiny("llama", vocab=64)
    tiny.set_input_embeddings(Odd(64, tiny.config.hidden_size))
    with pytest.raises(UnsupportedError, match="more than look up"):
        tables(tiny)
