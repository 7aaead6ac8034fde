"""Transplants: rows by hand against the vectorised rows, identities, and the model around them."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from tests.text.vocabularies import minilm, mistral
from tokenmill import corpora
from tokenmill import models as tm_models
from tokenmill.errors import LimitError, MissingExtraError, UnsupportedError
from tokenmill.models import _encoder
from tokenmill.text import HashEmbedder, TextEmbedder, TokenAdapt, TokenBytes, transplant
from tokenmill.text._row_estimates import focus_mixture, global_mixture, local_mixture, sparsemax
from tokenmill.text._row_mixture import RowMixture, bag_softmax
from tokenmill.text._vocabulary_match import match_vocabularies, old_pieces

TEXT = corpora.load("python-stdlib").records[7].text[:20_000] + " naïve façade Ünïcode 天地玄黃 🫠 ёлка"
HASH = HashEmbedder(dim=64)
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>"]


@cache
def bpe(size: int, seed_text: str = TEXT, specials: tuple[str, ...] = tuple(SPECIALS)) -> Any:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )  # pyright: ignore[reportCallIssue]
    made.train_from_iterator([seed_text], trainer)
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    roles = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), specials, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=made, **roles)


def renamed(tokenizer: Any, order: np.ndarray) -> Any:
    """The same tokenizer with id i at ``order[i]``."""
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    data["model"]["vocab"] = {token: int(order[i]) for token, i in data["model"]["vocab"].items()}
    for added in data["added_tokens"]:
        added["id"] = int(order[added["id"]])
    data["added_tokens"].sort(key=lambda a: a["id"])
    roles = {role: getattr(tokenizer, role) for role in ("pad_token", "bos_token", "eos_token", "unk_token")}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), **roles)


def model_for(kind: str, tokenizer: Any, rows: int | None = None) -> Any:
    made = tm_models.tiny(kind, seed=1, vocab=rows or len(tokenizer))
    made.config.eos_token_id = tokenizer.eos_token_id
    made.generation_config.eos_token_id = [tokenizer.eos_token_id]
    return made


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.prop("tokenadapt", 1)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("method", ["tokenadapt", "random", "mean", "piece-mean", "focus"])
def test_the_same_tokenizer_leaves_every_row_and_logit_as_it_was(kind: str, method: Any) -> None:
    old = bpe(320)
    model = model_for(kind, old)
    before = copy.deepcopy(model.state_dict())
    made = transplant(model, old, old, HASH, method=method, pad_to_multiple_of=8)
    assert made.report.counts == {"shared": 316, "special": 4}
    assert all(torch.equal(a, b) for a, b in zip(before.values(), made.model.state_dict().values(), strict=True))
    ids = old("def f(x): return naïve")["input_ids"]
    assert torch.equal(logits(model, ids), logits(made.model, ids))
    assert made.model is not model


@pytest.mark.prop("tokenadapt", 1)
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_permuted_vocabulary_permutes_the_logits(kind: str) -> None:
    old = bpe(320)
    order = np.random.default_rng(0).permutation(320)
    new = renamed(old, order)
    model = model_for(kind, old)
    made = transplant(model, old, new, HASH, pad_to_multiple_of=8)
    text = "class A(B):\n    pass  # ü"
    a, b = old(text)["input_ids"], new(text)["input_ids"]
    assert b == order[a].tolist()
    assert torch.equal(logits(model, a), logits(made.model, b)[:, torch.from_numpy(order)])
    assert made.model.config.eos_token_id == new.eos_token_id == order[old.eos_token_id]
    assert made.model.generation_config.eos_token_id == [new.eos_token_id]


def test_the_identity_of_a_real_model_has_the_same_logits_and_the_same_bits() -> None:
    model, tokenizer = tm_models.load("python-target")
    made = transplant(model, tokenizer, tokenizer, HASH, pad_to_multiple_of=1)
    ids = tokenizer("import os\n\ndef walk(top):\n")["input_ids"]
    assert torch.equal(logits(model, ids), logits(made.model, ids))


@pytest.mark.prop("tokenadapt", 10)
def test_the_identity_has_the_same_bits_a_byte() -> None:
    from tokenmill.bench.tasks._transplanted import bits_per_byte

    model, tokenizer = tm_models.load("python-target")
    made = transplant(model, tokenizer, tokenizer, HASH)
    text = corpora.load("python-stdlib").records[11].text[:1500]
    assert bits_per_byte(made.model, made.tokenizer, text) == bits_per_byte(model, tokenizer, text)


@pytest.mark.prop("tokenadapt", 2)
def test_another_spelling_of_the_same_tokens_leaves_nothing_new() -> None:
    sentencepiece = mistral()
    bytes_of = TokenBytes.of(sentencepiece)
    as_list = TokenBytes.from_list(bytes_of.tokens, bytes_of.specials)
    match = match_vocabularies(sentencepiece, as_list, len(bytes_of))
    assert not match.new_text.size
    assert not match.new_specials
    assert (match.source >= 0).sum() == sum(t is not None for t in bytes_of.tokens) + len(bytes_of.specials)
    # From SentencePiece to byte-level BPE: " the" is the same token in both, however it is written.
    new = bpe(400)
    match = match_vocabularies(sentencepiece, new, len(bytes_of))
    there = {t for t in bytes_of.tokens if t}
    names = TokenBytes.of(new).tokens
    assert {names[i] for i in match.new_text} == {t for t in names if t and t not in there}
    spaced = [i for i, t in enumerate(names) if t and t[:1] == b" " and len(t) > 2 and t in there]
    assert len(spaced) > 5
    assert all(bytes_of.tokens[match.source[i]] == names[i] for i in spaced)


def test_of_two_tokens_with_the_same_bytes_the_one_that_the_tokenizer_uses_counts() -> None:
    sentencepiece = mistral()
    bytes_of = TokenBytes.of(sentencepiece)
    assert [i for i, t in enumerate(bytes_of.tokens) if t == b"A"] == [68, sentencepiece.token_to_id("A")]
    new = bpe(400)
    match = match_vocabularies(sentencepiece, new, len(bytes_of))
    assert match.source[new.convert_tokens_to_ids("A")] == sentencepiece.token_to_id("A")
    space = new.convert_tokens_to_ids("Ġ")  # spelt otherwise: the one that the old tokenizer uses
    assert [i for i, t in enumerate(bytes_of.tokens) if t == b" "] == [35, match.source[space]]
    identity = match_vocabularies(sentencepiece, sentencepiece, len(bytes_of))
    assert np.array_equal(identity.source, np.arange(len(bytes_of)))


def without_ties(texts: list[str]) -> torch.Tensor:
    """A random direction for each text, the same one each time."""
    seeds = [sum(ord(c) * 31**i for i, c in enumerate(t)) % 2**31 for t in texts]
    return torch.stack([torch.randn(12, generator=torch.Generator().manual_seed(s)) for s in seeds])


def _slow_rows(old: Any, new: Any, matrix: torch.Tensor, how: TokenAdapt, embed: Callable) -> dict[int, torch.Tensor]:
    """New id -> row, token by token, from the equations."""
    ours, theirs = TokenBytes.of(old), TokenBytes.of(new)

    def text(token: bytes | None) -> str | None:
        try:
            out = (token or b"").decode()
        except UnicodeDecodeError:
            return None
        return out if out.strip() else None

    def phi(token: bytes | None) -> torch.Tensor | None:
        t = text(token)
        return None if t is None else embed([t])[0] / embed([t])[0].norm()

    eps, rows = 1e-5, {}
    neighbours = [(i, phi(t)) for i, t in enumerate(ours.tokens)]
    for i, token in enumerate(theirs.tokens):
        if token is None or token in ours.tokens:
            continue
        whole = phi(token)
        try:
            pieces = ours.encode(token.decode())
        except UnicodeDecodeError:
            pieces, at = [], 0
            while at < len(token):
                stop = max(s for s in range(at + 1, len(token) + 1) if token[at:s] in ours.tokens)
                pieces.append(ours.tokens.index(token[at:stop]))
                at = stop
        sims = []
        for p in pieces:
            other = phi(ours.tokens[p])
            sims.append(0.0 if whole is None or other is None else float(whole @ other))
        a = torch.tensor(sims, dtype=torch.float64).softmax(0)
        share = torch.tensor([len(ours.tokens[p] or b"") / len(token) for p in pieces], dtype=torch.float64)
        w = ((a + share) / 2 / (how.temperature + eps)).softmax(0)
        local = sum(float(x) * matrix[p] for x, p in zip(w, pieces, strict=True))
        nearest = None
        if whole is not None:
            cosines = [(float(whole @ v), j) for j, v in neighbours if v is not None]
            best = sorted(cosines, key=lambda c: -c[0])[: how.top_k]
            g = torch.tensor([c for c, _ in best], dtype=torch.float64) / (how.temperature + eps)
            g = g.softmax(0) * torch.tensor([c >= how.threshold for c, _ in best])
            if float(g.sum()) > 0:
                nearest = sum(float(x) * matrix[j] for x, (_, j) in zip(g / g.sum(), best, strict=True))
        share_of = how.global_weight if nearest is not None else 0.0
        rows[i] = (1 - share_of) * local + (share_of * nearest if nearest is not None else 0.0)
    return rows


@pytest.mark.prop("tokenadapt", 7)
@pytest.mark.parametrize(
    "how",
    [
        TokenAdapt(pad_to_multiple_of=8),
        TokenAdapt(pad_to_multiple_of=8, temperature=0.05, global_weight=0.8, threshold=0.3, top_k=5),
        TokenAdapt(pad_to_multiple_of=8, global_weight=1.0),
        TokenAdapt(pad_to_multiple_of=8, global_weight=0.0),
    ],
)
def test_rows_equal_the_equations_written_out_token_by_token(how: TokenAdapt) -> None:
    old, new = bpe(280), bpe(340)
    model = model_for("llama", old)
    made = how.transplant(model, old, new, without_ties)
    for before, after in (
        (model.get_input_embeddings(), made.model.get_input_embeddings()),
        (model.get_output_embeddings(), made.model.get_output_embeddings()),
    ):
        slow = _slow_rows(old, new, before.weight.detach(), how, without_ties)
        assert len(slow) == 60 == len(made.report.new_text)
        for i, row in slow.items():
            torch.testing.assert_close(after.weight[i], row.float(), atol=1e-6, rtol=0)


@pytest.mark.prop("tokenadapt", 3)
def test_shares_pieces_and_temperatures_at_their_ends() -> None:
    old, new = bpe(280), bpe(340)
    model = model_for("llama", old)
    e = model.get_input_embeddings().weight.detach()

    def table(**how: Any) -> torch.Tensor:
        made = transplant(model, old, new, HASH, pad_to_multiple_of=8, **how)
        return made.model.get_input_embeddings().weight[made.report.new_text].detach()

    local, near, hybrid = table(global_weight=0.0), table(global_weight=1.0), table(global_weight=0.25)
    # Tokens without a neighbour (blank ones) keep the local row whatever the share.
    report = transplant(model, old, new, HASH, global_weight=1.0).report
    has = torch.tensor([bool((TokenBytes.of(new).tokens[i] or b"").strip()) for i in report.new_text])
    assert not torch.equal(local[has], near[has])
    assert torch.equal(local[~has], near[~has])
    torch.testing.assert_close(hybrid[has], 0.75 * local[has] + 0.25 * near[has])
    torch.testing.assert_close(table(temperature=1e9, global_weight=0.0), table(method="piece-mean"))
    pieces = old_pieces(TokenBytes.of(old), [b"self", b"\xe5\xa4", b"zq"], 280)
    sharp = local_mixture(pieces, torch.zeros(len(pieces.indices)), _shares(pieces, old), temperature=1e-6)
    best = sharp.offsets[:-1]
    assert len(sharp) == len(best) == 3
    assert all(math.isclose(float(sharp.weights[a:b].max()), 1.0) or _tie(pieces, old, a, b) for a, b in _spans(sharp))
    alone = RowMixture.of(torch.tensor([0]), torch.tensor([7]), torch.tensor([1.0]), 1)
    one = local_mixture(alone, torch.tensor([0.2]), torch.tensor([1.0]), temperature=0.3)
    assert torch.equal(one.rows(e), e[[7]])


def _spans(mixture: RowMixture) -> list[tuple[int, int]]:
    ends = mixture.offsets.tolist()
    return list(itertools.pairwise(ends))


def _shares(pieces: RowMixture, old: Any) -> torch.Tensor:
    lengths = torch.from_numpy(TokenBytes.of(old).lengths.astype(np.float32))[pieces.indices]
    total = torch.zeros(len(pieces)).index_add(0, pieces.bags, lengths)
    return lengths / total[pieces.bags]


def _tie(pieces: RowMixture, old: Any, a: int, b: int) -> bool:
    shares = _shares(pieces, old)[a:b]
    return int((shares == shares.max()).sum()) > 1


@pytest.mark.prop("tokenadapt", 4)
@pytest.mark.parametrize("method", ["tokenadapt", "piece-mean", "focus"])
def test_every_row_lies_between_the_rows_it_is_made_of(method: Any) -> None:
    old, new = bpe(280), bpe(340)
    model = model_for("llama", old)
    made = transplant(model, old, new, HASH, method=method)
    mixture = made.report.mixture
    assert mixture is not None
    assert bool((mixture.weights >= 0).all())
    total = torch.zeros(len(mixture)).index_add(0, mixture.bags, mixture.weights)
    torch.testing.assert_close(total[mixture.found], torch.ones(int(mixture.found.sum())), atol=1e-6, rtol=0)
    e = model.get_input_embeddings().weight.detach()
    rows = made.model.get_input_embeddings().weight[made.report.new_text]
    for u, (a, b) in enumerate(_spans(mixture)):
        if a < b:
            used = e[mixture.indices[a:b]]
            assert bool((rows[u] >= used.min(0).values - 1e-6).all())
            assert bool((rows[u] <= used.max(0).values + 1e-6).all())


@pytest.mark.prop("tokenadapt", 5)
def test_a_threshold_above_one_leaves_the_local_estimate() -> None:
    old, new = bpe(280), bpe(340)
    model = model_for("qwen2", old)
    a = transplant(model, old, new, HASH, threshold=1.01, global_weight=0.7).model
    b = transplant(model, old, new, HASH, global_weight=0.0).model
    assert torch.equal(a.get_input_embeddings().weight, b.get_input_embeddings().weight)


@pytest.mark.prop("tokenadapt", 6)
def test_tied_matrices_stay_one_and_separate_ones_get_the_same_weights() -> None:
    old, new = bpe(280), bpe(340)
    tied = transplant(model_for("gemma3", old), old, new, HASH).model
    assert tied.get_input_embeddings().weight.data_ptr() == tied.get_output_embeddings().weight.data_ptr()
    model = model_for("llama", old)
    # With E_in and E_out built of unit rows, a new row is its weights.
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.eye(280, 32))
        model.get_output_embeddings().weight.copy_(2 * torch.eye(280, 32))
    made = transplant(model, old, new, HASH)
    at = made.report.new_text
    ours, theirs = made.model.get_input_embeddings().weight[at], made.model.get_output_embeddings().weight[at]
    assert not torch.equal(ours, theirs)
    torch.testing.assert_close(2 * ours, theirs)


def test_a_masked_model_with_a_bias() -> None:
    old, new = bpe(280), bpe(340)
    config = BertConfig(
        vocab_size=280, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = BertForMaskedLM(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().bias.normal_(generator=torch.Generator().manual_seed(0))
    made = transplant(model, old, new, HASH, pad_to_multiple_of=8)
    before, after = model.get_output_embeddings().bias, made.model.get_output_embeddings().bias
    shared = np.flatnonzero(made.report.source >= 0)
    assert torch.equal(after[shared], before[made.report.source[shared]])
    assert made.report.mixture is not None
    torch.testing.assert_close(after[made.report.new_text], made.report.mixture.rows(before.detach()))
    assert logits(made.model, new("def f")["input_ids"]).shape[1] == 344
    same = transplant(model, old, old, HASH, pad_to_multiple_of=8)
    ids = old("def f(x):")["input_ids"]
    assert torch.equal(logits(model, ids), logits(same.model, ids))


@pytest.mark.prop("tokenadapt", 8)
def test_saved_and_loaded_it_answers_the_same_stops_and_stays_inside_the_vocabulary(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    old, new = bpe(280), bpe(341)
    made = transplant(model_for("llama", old), old, new, HASH, pad_to_multiple_of=64)
    assert made.report.counts["filler"] == 384 - 341
    made.model.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    inputs = tokenizer("def f(x):", return_tensors="pt")
    assert torch.equal(loaded(inputs["input_ids"]).logits, made.model(inputs["input_ids"]).logits)
    with torch.no_grad():  # fillers would win every step if nothing held them back
        loaded.get_output_embeddings().weight[341:] *= 100
    out = loaded.generate(inputs["input_ids"], do_sample=True, top_k=0, max_new_tokens=60)
    assert int(out.max()) < 341
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    out = loaded.generate(inputs["input_ids"], max_new_tokens=5, suppress_tokens=list(range(2)) + list(range(3, 384)))
    assert out[0, -1] == new.eos_token_id == 2
    assert out.shape[1] == inputs["input_ids"].shape[1] + 1


def test_special_tokens_match_by_content_then_by_role_and_never_as_words() -> None:
    old = bpe(300)
    new = bpe(320, TEXT, ("[PAD]", "[START]", "[END]", "[UNK]", "<|im_start|>"))
    new.chat_template = None
    old.chat_template = "{{ messages }}"
    made = transplant(model_for("llama", old), old, new, HASH)
    ids = {role: getattr(old, f"{role}_token_id") for role in ("pad", "bos", "eos", "unk")}
    assert made.report.source[:4].tolist() == list(ids.values())
    assert made.report.of(4) == ("mean", {})
    assert made.tokenizer.chat_template == "{{ messages }}"
    assert new.chat_template is None
    assert made.model.config.eos_token_id == 2


def test_parts_of_a_character_are_covered_by_bytes_and_not_embedded() -> None:
    old, new = bpe(280), bpe(340)
    seen: list[str] = []

    def spy(texts: list[str]) -> torch.Tensor:
        seen.extend(texts)
        return HASH(texts)

    made = transplant(model_for("llama", old), old, new, spy)
    assert "\ufffd" not in "".join(seen)
    partial = [i for i in made.report.new_text if b"\xe2" in (TokenBytes.of(new).tokens[i] or b"")]
    for i in partial:
        origin, parts = made.report.of(int(i))
        assert origin == "hybrid"
        assert math.isclose(sum(parts.values()), 1.0, rel_tol=1e-6)
    found = old_pieces(TokenBytes.of(old), [b"\xe5\xa4", b"\xff\xfe\x80"], 280)
    assert [len(found.indices[a:b]) for a, b in _spans(found)] == [2, 3]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(-30, 30), min_size=1, max_size=5), min_size=1, max_size=6))
def test_softmax_inside_bags(bags: list[list[float]]) -> None:
    scores = torch.tensor([x for bag in bags for x in bag], dtype=torch.float64)
    index = torch.tensor([i for i, bag in enumerate(bags) for _ in bag])
    expected = torch.cat([torch.tensor(bag, dtype=torch.float64).softmax(0) for bag in bags])
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(bag_softmax(scores[order], index[order], len(bags)), expected[order])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=7))
def test_sparsemax_is_the_nearest_point_of_the_simplex(scores: list[float]) -> None:
    z = torch.tensor(scores, dtype=torch.float64)
    p = sparsemax(z)
    assert math.isclose(float(p.sum()), 1.0, abs_tol=1e-9)
    assert bool((p >= 0).all())
    # The conditions of the optimum: z - p is constant where p > 0 and at most that elsewhere.
    slack = z - p
    tau = slack[p > 0].mean()
    torch.testing.assert_close(slack[p > 0], tau.expand(int((p > 0).sum())))
    assert bool((slack[p == 0] <= tau + 1e-9).all())


def test_a_neighbour_below_the_threshold_counts_nothing() -> None:
    old = torch.eye(3)
    new = torch.nn.functional.normalize(torch.tensor([[3.0, 2.0, 0.1], [0.0, 0.0, 0.0]]), dim=1)
    ids = torch.tensor([5, 6, 7])
    found = global_mixture(new, old, ids, top_k=2, temperature=0.3, threshold=0.7)
    assert found.indices.tolist() == [5]
    assert found.weights.tolist() == [1.0]
    assert found.found.tolist() == [True, False]
    assert focus_mixture(new, old, ids).found.tolist() == [True, False]


def test_blocks_do_not_show() -> None:
    generator = torch.Generator().manual_seed(0)
    new, old = (torch.nn.functional.normalize(torch.randn(n, 6, generator=generator), dim=1) for n in (1300, 9))
    for make in (
        lambda x: global_mixture(x, old, torch.arange(9), top_k=2, temperature=0.3, threshold=0.1),
        lambda x: focus_mixture(x, old, torch.arange(9)),
    ):
        whole, parts = make(new), [make(new[i : i + 1]) for i in range(len(new))]
        assert torch.equal(whole.found, torch.cat([p.found for p in parts]))
        assert torch.equal(whole.indices, torch.cat([p.indices for p in parts]))
        torch.testing.assert_close(whole.weights, torch.cat([p.weights for p in parts]))


def test_shares_of_nothing_leave_no_entry() -> None:
    old, new = bpe(280), bpe(340)
    for share in (0.0, 1.0):
        mixture = transplant(model_for("llama", old), old, new, HASH, global_weight=share).report.mixture
        assert mixture is not None
        assert float(mixture.weights.min()) > 0


def test_pieces_of_a_tokenizer_that_puts_a_space_before_a_text() -> None:
    old = TokenBytes.of(mistral())
    for data in (b"the", b" the", b"A\xff", b"transplantation"):
        pieces = old_pieces(old, [data], len(old)).indices.tolist()
        assert old.join(pieces) == data
    piece, byte = mistral().token_to_id("A"), 68
    assert old_pieces(old, [b"A\xff"], len(old)).indices.tolist()[0] == piece != byte
    assert len(old_pieces(old, [b"the"], len(old)).indices) == 1


def test_an_embedder_without_answers_leaves_finite_rows() -> None:
    old, new = bpe(280), bpe(340)
    for broken in (
        lambda texts: torch.full((len(texts), 4), torch.nan),
        lambda texts: torch.zeros(len(texts), 4),
    ):
        made = transplant(model_for("llama", old), old, new, broken)
        assert set(made.report.counts) == {"filler", "shared", "special", "hybrid"}
        mixture = made.report.mixture
        assert mixture is not None
        by_length = local_mixture(mixture, torch.zeros(len(mixture.indices)), _shares(mixture, old), temperature=0.3)
        torch.testing.assert_close(mixture.weights, by_length.weights)
    with pytest.raises(LimitError, match="shape"):
        transplant(model_for("llama", old), old, new, lambda texts: torch.zeros(1, 4))


def test_a_row_that_is_not_finite_is_named() -> None:
    old, new = bpe(280), bpe(340)
    model = model_for("llama", old)
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = torch.nan
    with pytest.raises(UnsupportedError, match=r"row \d+ of the new matrix is not finite"):
        transplant(model, old, new, HASH)


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ({"top_k": 0}, "top_k"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"global_weight": 1.5}, "global_weight"),
        ({"threshold": math.nan}, "threshold"),
        ({"method": "best"}, "method"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of"),
    ],
)
def test_settings_outside_their_limit_are_named(how: dict[str, Any], name: str) -> None:
    with pytest.raises(LimitError, match=name):
        TokenAdapt(**how)


def test_models_and_tokenizers_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = bpe(300), bpe(320)
    with pytest.raises(LimitError, match="300, but it must be at most the embedding's 290 rows"):
        transplant(model_for("llama", old, rows=290), old, new, HASH)
    without = PreTrainedTokenizerFast(tokenizer_object=new.backend_tokenizer)
    with pytest.raises(UnsupportedError, match="no end token"):
        transplant(model_for("llama", old), old, without, HASH)
    with pytest.raises(UnsupportedError, match="no embedding"):
        transplant(torch.nn.Linear(2, 2), old, new, HASH)
    with pytest.raises(LimitError, match="embedder"):
        transplant(model_for("llama", old), old, new, "nomic")
    layered = model_for("llama", old)
    layered.model.embed_tokens_per_layer = torch.nn.Embedding(300, 4)
    with pytest.raises(UnsupportedError, match="each layer"):
        transplant(layered, old, new, HASH)
    monkeypatch.setattr(_encoder.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"tokenmill\[minilm\]"):
        TextEmbedder()(["x"])


def test_more_rows_than_tokens_are_allowed_and_random_rows_follow_the_seed() -> None:
    old, new = bpe(300), bpe(320)
    model = model_for("llama", old, rows=304)
    a, b, c = (
        transplant(model, old, new, method="random", seed=s).model.get_input_embeddings().weight for s in (1, 1, 2)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    e = model.get_input_embeddings().weight
    mean = transplant(model, old, new, method="mean")
    at = int(mean.report.new_text[0])
    torch.testing.assert_close(mean.model.get_input_embeddings().weight[at], e.mean(0))
    assert transplant(model, old, new, method="mean", inplace=True).model is model


def test_the_real_encoder_pools_over_its_own_positions_and_keeps_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path))
    embed = TextEmbedder(batch_size=64)
    texts = ["king", "queen of hearts", "the carburettor of an engine", "x"]
    together, alone = embed(texts), torch.cat([embed([t]) for t in texts])
    torch.testing.assert_close(together, alone, atol=2e-3, rtol=0)
    unit = torch.nn.functional.normalize(together, dim=1)
    assert float(unit[0] @ unit[1]) > float(unit[0] @ unit[2]) + 0.1
    many = [f"word {i}" for i in range(1000)]
    first = embed(many)
    files = list((tmp_path / "vectors").iterdir())
    assert [f.suffix for f in files] == [".safetensors"]
    monkeypatch.setattr(TextEmbedder, "_embed", lambda *_: pytest.fail("the vectors are in the cache"))
    assert torch.equal(embed(many), first)


def test_the_vocabulary_of_wordpiece_is_read_as_well() -> None:
    match = match_vocabularies(minilm(), minilm(), 30522)
    assert not match.new_text.size
