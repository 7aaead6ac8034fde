from __future__ import annotations

import random as plain_random
from collections import Counter
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer
from transformers.generation.streamers import BaseStreamer

from tests.decode.chance import Law, chi_square, joint_law, next_laws
from tests.decode.conftest import Zoo
from tokenmill import hf
from tokenmill.decode._draft import fill, template_shape
from tokenmill.decode._tree import Tree
from tokenmill.decode.token_recycling import (
    TREES,
    AdjacencyMatrix,
    TokenRecycling,
    TreeTemplate,
    recycling_generate,
    tree_template,
    verify,
)
from tokenmill.errors import LimitError, NonFiniteError
from tokenmill.models import CostProfile, tiny

V, K, NEW = 64, 8, 14
KINDS = ("llama", "qwen2", "gemma3")
STATES = ("cold", "hot", "random", "adversarial")
LENGTHS = (5, 16, 40)  # below, at and beyond the window of 16
FLAT = CostProfile((1, 64), (1.0, 2.0))
FIXED = [name for name in TREES if name != "auto"]


def prompt(length: int, seed: int = 0) -> Tensor:
    """Random ids (1, length) with a repeated stretch, so that look-up finds something."""
    ids = torch.randint(1, V, (1, length), generator=torch.Generator().manual_seed(seed))
    half = length // 2
    ids[:, half : 2 * half] = ids[:, :half]
    return ids


def generate(model: Any, ids: Tensor, decoder: Any = None, **settings: Any) -> Any:
    settings = {"do_sample": False, "max_new_tokens": NEW} | settings
    if decoder is not None:
        settings["custom_generate"] = decoder
    return model.generate(input_ids=ids, **settings)


def written(rows: list[list[int]]) -> AdjacencyMatrix:
    """A matrix with these rows, one for each token."""
    matrix = AdjacencyMatrix(len(rows), len(rows[0]))
    matrix.write(torch.arange(len(rows)), torch.tensor(rows), torch.zeros(len(rows), len(rows[0])))
    return matrix


def random_state(vocab: int, k: int, seed: int = 0, *, twins: bool = False) -> AdjacencyMatrix:
    """Garbage: every row is written; with ``twins`` a row may name the same successor more than once."""
    random = plain_random.Random(seed)
    return written([(random.choices if twins else random.sample)(range(vocab), k=k) for _ in range(vocab)])


def adversarial_state(text: list[int], vocab: int, k: int) -> AdjacencyMatrix:
    """Every row is written, and no row names what comes next in ``text``."""
    after = [{b for a, b in pairwise(text) if a == token} for token in range(vocab)]
    return written([[t for t in range(vocab) if t not in after[token]][:k] for token in range(vocab)])


class Frozen(AdjacencyMatrix):
    """Never learns: stays as wrong as it was made."""

    def write(self, tokens: Tensor, successors: Tensor, values: Tensor) -> None:
        pass


def state_of(name: str, model: Any, ids: Tensor, plain: Tensor) -> AdjacencyMatrix | None:
    if name == "hot":
        decoder = TokenRecycling(tree="7").hot(model)
        generate(model, ids, decoder)
        return decoder.state
    if name == "random":
        return random_state(V, K, twins=True)
    return adversarial_state(plain[0].tolist(), V, K) if name == "adversarial" else None


@pytest.mark.prop("token-recycling", 1)
@pytest.mark.prop("token-recycling", 4)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", LENGTHS)
def test_greedy_output_is_plain_greedy_output(zoo: Zoo, kind: str, attention: str, length: int) -> None:
    """Every tree, from every state."""
    model, ids = zoo(kind, attention), prompt(length, seed=length)
    plain = generate(model, ids)
    for state in STATES:
        for tree in TREES:
            decoder = TokenRecycling(state_of(state, model, ids, plain), tree=tree, profile=FLAT)
            assert torch.equal(generate(model, ids, decoder), plain), (state, tree)


@pytest.mark.prop("token-recycling", 4)
@pytest.mark.parametrize("tree", TREES)
def test_a_state_that_is_never_right_gives_one_token_a_forward(zoo: Zoo, tree: str) -> None:
    for kind in KINDS:
        model, ids = zoo(kind, "sdpa"), prompt(10, seed=8)
        plain = generate(model, ids)
        wrong, frozen = adversarial_state(plain[0].tolist(), V, K), Frozen(V, K)
        frozen.table, frozen.count, frozen.shares = wrong.table, wrong.count, wrong.shares
        decoder = TokenRecycling(frozen, tree=tree, profile=FLAT)
        assert torch.equal(generate(model, ids, decoder), plain)
        assert decoder.trace.steps == [1] * (NEW - 1)
        assert decoder.trace.accepted == 0
        assert decoder.trace.drafted > 0 or tree in ("0", "auto")


@pytest.mark.prop("token-recycling", 1)
@pytest.mark.parametrize("tree", ["7", "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_hybrid_drafts_and_warm_up_change_no_token(zoo: Zoo, kind: str, tree: str) -> None:
    model = zoo(kind, "sdpa")
    for length in (1, *LENGTHS):
        ids = prompt(length, seed=length)
        decoder = TokenRecycling(tree=tree, draft="hybrid", warm_up_from_prompt=True, profile=FLAT)
        assert torch.equal(generate(model, ids, decoder), generate(model, ids))


@pytest.mark.parametrize("draft", ["adjacency", "hybrid"])
def test_a_planned_tree_follows_the_measured_cost(zoo: Zoo, draft: Any) -> None:
    """Where further positions are dear it is plain decoding, where they are free it drafts."""
    model, ids = zoo("gemma3", "sdpa"), prompt(30, seed=1)
    plain, drafted = generate(model, ids), []
    for profile in (CostProfile((1, 2, 64), (1.0, 60.0, 70.0)), CostProfile((1, 64), (1.0, 1.0))):
        decoder = TokenRecycling(tree="auto", draft=draft, warm_up_from_prompt=True, profile=profile).hot(model)
        for _ in range(2):
            assert torch.equal(generate(model, ids, decoder), plain)
        drafted.append(decoder.trace.drafted)
        if profile.ms[1] > 1:
            assert decoder.trace.steps == [1] * (NEW - 1)
    assert drafted[0] == 0
    assert drafted[1] > 20
    assert len(decoder.trace.steps) < NEW - 1


@pytest.mark.prop("token-recycling", 1)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_gapped_positions(zoo: Zoo, kind: str, attention: str) -> None:
    """Pruned prompts keep their positions: new tokens go on behind the last one, not at the cache's length."""
    model, ids = zoo(kind, attention), prompt(20, seed=2)
    positions = torch.arange(20)[None] * 3 + 5
    plain = generate(model, ids, position_ids=positions)
    assert not torch.equal(plain, generate(model, ids)), "positions make no difference here"
    for tree in ("0", "7", "2.2.2"):
        for state in (None, random_state(V, K)):
            ours = generate(model, ids, TokenRecycling(state, tree=tree), position_ids=positions)
            assert torch.equal(ours, plain)


@pytest.mark.prop("token-recycling", 1)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_left_padding(zoo: Zoo, kind: str, attention: str) -> None:
    model = zoo(kind, attention)
    for length in (3, 13, 30):
        ids = torch.cat([torch.zeros(1, 5, dtype=torch.long), prompt(length, seed=length)], dim=1)
        mask = (torch.arange(5 + length) >= 5).long()[None]
        plain = generate(model, ids, attention_mask=mask)
        for tree in ("0", "7", "2.2.2"):
            for state in (None, random_state(V, K)):
                ours = generate(model, ids, TokenRecycling(state, tree=tree), attention_mask=mask)
                assert torch.equal(ours, plain), (length, tree)


def tree_logits(
    model: Any, ids: Tensor, tokens: Tensor, tree: Tree, where: str = "test"
) -> tuple[Tensor, DynamicCache]:
    """(N, V) logits of one forward over a tree behind ``ids`` (1, T), whose last token is the root."""
    cache = DynamicCache(config=model.config)
    if ids.shape[1] > 1:
        model(input_ids=ids[:, :-1], past_key_values=cache)
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.activate_past_recording()
    mask = hf.tree_masks(
        model,
        cache,
        tree.ancestors,
        tree.depth,
        kinds=hf.layer_kinds("test", model),
        form=hf.mask_form("test", model),
    )
    positions = (ids.shape[1] - 1 + tree.depth)[None]
    out = model(input_ids=tokens[None], attention_mask=mask, position_ids=positions, past_key_values=cache)
    return out.logits[0], cache


@pytest.mark.prop("token-recycling", 2)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_tree_logits_are_those_of_prompt_and_path(zoo: Zoo, kind: str, attention: str) -> None:
    model, template = zoo(kind, attention), tree_template("32")
    tree = template.tree
    for length in (1, 12, 16, 17, 40):
        ids = prompt(length, seed=length)
        tokens = torch.randint(1, V, (len(tree),), generator=torch.Generator().manual_seed(length))
        tokens[0] = ids[0, -1]
        logits, _ = tree_logits(model, ids, tokens, tree)
        for node in range(len(tree)):
            path = tokens[tree.ancestors[node]][None, 1:]
            alone = model(input_ids=torch.cat([ids, path], dim=1)).logits[0, -1]
            assert float((logits[node] - alone).abs().max()) < 1e-4 * float(alone.abs().max())


@pytest.mark.prop("token-recycling", 3)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_cache_behind_a_call_is_that_of_a_fresh_prefill(zoo: Zoo, kind: str) -> None:
    model = zoo(kind, "sdpa")
    for length in (2, 15, 33):
        ids = prompt(length, seed=length)
        for tree in ("7", "2.2.2"):
            # The second call is hot: it accepts paths, also ones that are no prefix of the draft.
            decoder = TokenRecycling(tree=tree).hot(model)
            generate(model, ids, decoder)
            out = generate(model, ids, decoder, return_dict_in_generate=True)
            assert decoder.trace.accepted > 0
            fresh: Any = DynamicCache(config=model.config)
            model(input_ids=out.sequences[:, :-1], past_key_values=fresh)
            assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1
            for ours, theirs in zip(out.past_key_values.layers, fresh.layers, strict=True):
                assert ours.get_seq_length() == theirs.get_seq_length()
                assert torch.allclose(ours.keys, theirs.keys, atol=1e-4, rtol=1e-4)
                assert torch.allclose(ours.values, theirs.values, atol=1e-4, rtol=1e-4)


def fresh_text(model: Any) -> tuple[Tensor, Tensor]:
    """A prompt whose greedy continuation holds no token twice, and that continuation."""
    for seed in range(300):
        ids = prompt(3, seed)
        whole = generate(model, ids, max_new_tokens=15)
        if len(set(whole[0, 2:].tolist())) == whole.shape[1] - 2:
            return ids, whole
    raise AssertionError("no such prompt")


@pytest.mark.prop("token-recycling", 4)
@pytest.mark.parametrize("tree", ["7", "2.2.2"])
def test_an_oracle_gives_the_whole_depth_at_each_forward(zoo: Zoo, tree: str) -> None:
    model = zoo("llama", "sdpa")
    ids, whole = fresh_text(model)
    oracle = AdjacencyMatrix(V, K)
    oracle.put_first(whole[0, :-1], whole[0, 1:])
    # The rows are written anew while decoding: rank 0 is the model's own choice in context, so it stays right.
    depth = int(tree_template(tree).depth.max())
    decoder = TokenRecycling(oracle, tree=tree)
    made = generate(model, ids, decoder, max_new_tokens=15)
    assert torch.equal(made, whole)
    full, rest = divmod(14, depth + 1)
    assert decoder.trace.steps == [depth + 1] * full + ([rest] if rest else [])
    assert decoder.trace.mean_accepted == pytest.approx(14 / len(decoder.trace.steps))


@pytest.mark.prop("token-recycling", 5)
def test_a_bare_root_is_plain_decoding(zoo: Zoo) -> None:
    model, ids = zoo("llama", "sdpa"), prompt(6)
    for tree in ("0", TreeTemplate([])):
        decoder = TokenRecycling(random_state(V, K), tree=tree)
        assert torch.equal(generate(model, ids, decoder), generate(model, ids))
        assert decoder.trace.steps == [1] * (NEW - 1)
        assert decoder.trace.drafted == 0
        assert decoder.trace.model_calls == NEW


@pytest.mark.prop("token-recycling", 5)
def test_a_chain_with_one_successor_is_a_bigram_look_ahead(zoo: Zoo) -> None:
    """The drafts of a slow twin: follow the last seen successor, four times."""
    model, ids = zoo("gemma3", "sdpa"), prompt(6)
    matrix = AdjacencyMatrix(V, 1)
    decoder = TokenRecycling(matrix, tree=TreeTemplate([(0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)]))
    made = generate(model, ids, decoder)
    plain = generate(model, ids)
    assert torch.equal(made, plain)
    following: dict[int, int] = {}
    text, at, steps = plain[0].tolist(), ids.shape[1] + 1, []
    with torch.no_grad():
        while at < len(text):
            chain = [text[at - 1]]
            while len(chain) < min(5, len(text) - at) and chain[-1] in following:
                chain.append(following[chain[-1]])
            behind = model(input_ids=torch.tensor([text[: at - 1] + chain])).logits[0, at - 1 :].argmax(1).tolist()
            accepted = 0
            while accepted < len(chain) - 1 and chain[accepted + 1] == behind[accepted]:
                accepted += 1
            # Rejected nodes first, the accepted path last.
            order = [*range(accepted + 1, len(chain)), *range(accepted + 1)]
            following.update({chain[i]: behind[i] for i in order})
            at += accepted + 1
            steps.append(accepted + 1)
    assert decoder.trace.steps == steps
    assert max(steps) > 1


@pytest.mark.prop("token-recycling", 9)
@torch.no_grad()
def test_one_step_writes_the_rows_of_all_nodes_and_the_accepted_path_last(zoo: Zoo) -> None:
    model, ids = zoo("llama", "sdpa"), prompt(9)
    second = int(generate(model, ids)[0, ids.shape[1]])
    matrix = random_state(V, K, seed=4)
    before = AdjacencyMatrix(V, K)
    before.table, before.count = matrix.table.clone(), matrix.count.clone()
    template = tree_template("2.2.2")
    depth_limit = 1  # with three new tokens one level of nodes is worth drafting
    plan = fill(template_shape(template), before.rows, second, np.zeros(0, dtype=np.int64), depth_limit)
    tokens, tree = torch.from_numpy(plan.tokens), Tree.from_parents(torch.from_numpy(plan.parent))
    logits, _ = tree_logits(model, torch.cat([ids, tokens[None, :1]], dim=1), tokens, tree)
    path = verify(tree, tokens, logits.argmax(1)).tolist()
    order = [i for i in range(len(tree)) if i not in path] + path
    generate(model, ids, TokenRecycling(matrix), max_new_tokens=3 if len(path) == 2 else 2)
    expected = before.table.clone()
    if len(path) == 1:  # one new token is left, so nothing was drafted
        order, logits = [0], logits
    for node in order:
        expected[tokens[node]] = logits[node].topk(K).indices.int()
    assert torch.equal(matrix.table, expected)


@pytest.mark.prop("token-recycling", 10)
def test_equal_starts_give_equal_runs_and_a_hot_state_accepts_more(zoo: Zoo) -> None:
    for kind in KINDS:
        model, ids = zoo(kind, "sdpa"), prompt(12, seed=1)
        runs = []
        for _ in range(2):
            decoder = TokenRecycling(random_state(V, K), tree="15", seed=5)
            made = generate(model, ids, decoder, do_sample=True)
            runs.append((made.tolist(), decoder.trace.steps))
        assert runs[0] == runs[1]
        calls = [0, 0]
        for seed in range(6):
            hot = TokenRecycling().hot(model)
            for run in range(2):
                generate(model, prompt(12, seed), hot)
                calls[run] += len(hot.trace.steps)
        # A row remembers the last place of its token, so a single text may do a little worse; many do better.
        assert calls[1] < 0.9 * calls[0]


def test_a_state_stays_with_its_decoder_and_cold_decoders_have_none(zoo: Zoo) -> None:
    model, ids = zoo("qwen2", "sdpa"), prompt(12)
    cold = TokenRecycling(tree="15")
    hot = cold.hot(model)
    assert cold.state is None
    assert hot.state is not None
    for decoder in (cold, hot):
        generate(model, ids, decoder)
    first = (cold.trace.steps, hot.trace.steps)
    assert first[0] == first[1]
    for decoder in (cold, hot):
        generate(model, ids, decoder)
    assert cold.trace.steps == first[0]
    assert len(hot.trace.steps) < len(first[1])


def test_warm_up_writes_the_prompts_successors_in_front(zoo: Zoo) -> None:
    model, ids = zoo("llama", "sdpa"), prompt(30, seed=3)
    decoder = TokenRecycling(tree="0", warm_up_from_prompt=True).hot(model)
    generate(model, ids, decoder, max_new_tokens=1)
    state = decoder.state
    assert state is not None
    text = ids[0].tolist()
    logits = model(input_ids=ids).logits[0]
    for token in set(text):
        at = max(i for i, t in enumerate(text) if t == token)
        best = logits[at].topk(K).indices.tolist()
        follows = [text[i + 1] for i, t in enumerate(text[:-1]) if t == token]
        row = ([follows[-1]] if follows else []) + [b for b in best if not follows or b != follows[-1]]
        assert state.table[token].tolist() == row[:K]
    assert state.filled.nonzero().squeeze(1).tolist() == sorted(set(text))


@pytest.mark.prop("token-recycling", 1)
@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 12, "eos_token_id": list(range(0, 40)), "pad_token_id": 0},
        {"bad_words_ids": [[27], [55, 14], [10, 10]]},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "suppress_tokens": [5, 6]},
    ],
)
def test_processors_see_each_node_with_its_own_path(zoo: Zoo, settings: dict[str, Any]) -> None:
    changed = 0
    for kind in KINDS:
        model, ids = zoo(kind, "sdpa"), prompt(10, seed=4)
        plain = generate(model, ids, **settings)
        changed += not torch.equal(plain, generate(model, ids))
        hot = TokenRecycling().hot(model)
        for decoder in (hot, hot, TokenRecycling(random_state(V, K), tree="15")):
            assert torch.equal(generate(model, ids, decoder, **settings), plain)
    assert changed


@pytest.mark.prop("token-recycling", 11)
def test_an_end_token_inside_an_accepted_path_stops_there(zoo: Zoo) -> None:
    model = zoo("llama", "sdpa")
    ids, whole = fresh_text(model)
    for at in range(ids.shape[1], whole.shape[1]):
        oracle = AdjacencyMatrix(V, K)
        oracle.put_first(whole[0, :-1], whole[0, 1:])
        decoder = TokenRecycling(oracle)
        end = {"eos_token_id": int(whole[0, at]), "pad_token_id": 0}
        made = generate(model, ids, decoder, max_new_tokens=15, **end)
        assert made.tolist() == whole[:, : at + 1].tolist()
        assert made.tolist() == generate(model, ids, max_new_tokens=15, **end).tolist()
        assert decoder.trace.tokens_so_far == whole[0, ids.shape[1] : at + 1].tolist()
        assert sum(decoder.trace.steps) + 1 == decoder.trace.tokens


@pytest.mark.prop("token-recycling", 11)
def test_length_limits_hold_whatever_is_accepted(zoo: Zoo) -> None:
    model = zoo("llama", "sdpa")
    ids, whole = fresh_text(model)
    oracle = AdjacencyMatrix(V, K)
    oracle.put_first(whole[0, :-1], whole[0, 1:])
    for n in range(1, 16):
        made = generate(model, ids, TokenRecycling(oracle), max_new_tokens=n)
        assert made.tolist() == whole[:, : ids.shape[1] + n].tolist()
        made = model.generate(ids, max_length=ids.shape[1] + n, do_sample=False, custom_generate=TokenRecycling(oracle))
        assert made.shape[1] == ids.shape[1] + n


def test_drafts_end_where_the_models_positions_end(zoo: Zoo) -> None:
    """Tokens are asked for beyond the last position: no drafted node stands there."""
    model, ids = zoo("llama", "sdpa"), prompt(500)
    drafted: list[int] = []

    def look(module: Any, args: Any, named: dict[str, Any]) -> None:
        if 1 < named["input_ids"].shape[1] < 500:
            drafted.append(int(named["position_ids"].max()))

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        made = generate(model, ids, TokenRecycling(random_state(V, K)), max_new_tokens=20)
    finally:
        handle.remove()
    assert max(drafted) == 511
    assert torch.equal(made, generate(model, ids, max_new_tokens=20))


class StopsAt(StoppingCriteria):
    """Stops when the text ends with a given pair of tokens; counts how often it was asked."""

    def __init__(self, pair: list[int]) -> None:
        self.pair, self.lengths = pair, []

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # pyright: ignore
        self.lengths.append(input_ids.shape[1])
        return torch.tensor([input_ids[0, -2:].tolist() == self.pair])


def test_the_callers_own_criterion_is_asked_after_each_token(zoo: Zoo) -> None:
    model = zoo("llama", "sdpa")
    ids, whole = fresh_text(model)
    oracle = AdjacencyMatrix(V, K)
    oracle.put_first(whole[0, :-1], whole[0, 1:])
    criterion = StopsAt(whole[0, 9:11].tolist())
    made = generate(model, ids, TokenRecycling(oracle), max_new_tokens=15, stopping_criteria=[criterion])
    assert made.tolist() == whole[:, :11].tolist()
    assert criterion.lengths == list(range(ids.shape[1] + 1, 12))


def test_scores_and_logits_are_those_of_plain_decoding(zoo: Zoo) -> None:
    asked = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "repetition_penalty": 1.3,
    }
    for kind in KINDS:
        model, ids = zoo(kind, "sdpa"), prompt(10, seed=4)
        plain, hot = generate(model, ids, **asked), TokenRecycling().hot(model)
        for _ in range(2):
            ours = generate(model, ids, hot, **asked)
            assert torch.equal(ours.sequences, plain.sequences)
            for name in ("scores", "logits"):
                got, expected = getattr(ours, name), getattr(plain, name)
                assert len(got) == len(expected) == NEW
                assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(got, expected, strict=True))
        assert hot.trace.accepted > 0


class Listener(BaseStreamer):
    """Keeps what a streamer hears."""

    def __init__(self) -> None:
        self.heard: list[int] = []
        self.ends = 0

    def put(self, value: Tensor) -> None:
        assert self.ends == 0
        self.heard += value.flatten().tolist()

    def end(self) -> None:
        self.ends += 1


def test_a_streamer_hears_every_token_once(zoo: Zoo) -> None:
    model, ids, decoder = zoo("llama", "sdpa"), prompt(10), TokenRecycling().hot(zoo("llama", "sdpa"))
    for _ in range(2):
        listener = Listener()
        made = generate(model, ids, decoder, token_streamer=listener)
        assert listener.heard == made[0].tolist()
        assert listener.ends == 1


def test_a_streamer_is_ended_after_an_error_too(zoo: Zoo) -> None:
    model, ids, listener = tiny("llama", layers=1), prompt(10), Listener()
    calls = []

    def poison(module: Any, args: Any, out: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            out.logits = out.logits * torch.nan
        return out

    model.register_forward_hook(poison)
    with pytest.raises(NonFiniteError) as failed:
        generate(model, ids, TokenRecycling(), token_streamer=listener)
    assert listener.ends == 1
    assert listener.heard == ids[0].tolist() + failed.value.partial


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_turn_goes_on_from_the_cache_of_the_first(zoo: Zoo, kind: str) -> None:
    model, ids, asked = zoo(kind, "sdpa"), prompt(12, seed=6), {"return_dict_in_generate": True}
    more = prompt(7, seed=7)
    ours_cache, plain_cache = DynamicCache(config=model.config), DynamicCache(config=model.config)
    decoder = TokenRecycling().hot(model)
    first = generate(model, ids, decoder, past_key_values=ours_cache, **asked)
    plain = generate(model, ids, past_key_values=plain_cache, **asked)
    assert torch.equal(first.sequences, plain.sequences)
    second_ids = torch.cat([first.sequences, more], dim=1)
    second = generate(model, second_ids, decoder, past_key_values=first.past_key_values, **asked)
    assert torch.equal(second.sequences, generate(model, second_ids))
    assert decoder.trace.positions < second_ids.shape[1] + sum(decoder.trace.steps) * 81
    turn = generate(model, second_ids, past_key_values=plain.past_key_values, **asked)
    assert torch.equal(second.sequences, turn.sequences)


def test_counts_add_up(zoo: Zoo) -> None:
    model, ids, decoder = zoo("gemma3", "sdpa"), prompt(10), TokenRecycling(tree="15").hot(zoo("gemma3", "sdpa"))
    for _ in range(2):
        generate(model, ids, decoder)
        trace = decoder.trace
        assert trace.tokens == len(trace.tokens_so_far) == NEW
        assert trace.model_calls == 1 + len(trace.steps)
        assert trace.positions == ids.shape[1] + trace.drafted + len(trace.steps)
        assert sum(trace.steps) == NEW - 1
        assert trace.accepted == NEW - 1 - len(trace.steps)


def test_the_function_form_decodes_alike(zoo: Zoo) -> None:
    model, ids, matrix = zoo("llama", "sdpa"), prompt(10), AdjacencyMatrix(V, K)
    made = generate(model, ids, recycling_generate, recycling=matrix, tree="7")
    assert torch.equal(made, generate(model, ids))
    assert bool(matrix.filled.any())


VOCAB, DRAWS = 5, 20_000
TWINS = TreeTemplate([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (1, 0, 0)])


GARBAGE = {
    "cold": lambda: AdjacencyMatrix(VOCAB, 3),
    "distinct": lambda: random_state(VOCAB, 3, seed=1),
    "twins": lambda: random_state(VOCAB, 3, seed=2, twins=True),
    "one-sided": lambda: written([[2 * t % VOCAB] * 3 for t in range(VOCAB)]),
}
Accept = Any


def longest_of_twins(tree: Tree, tokens: Tensor, chosen: Tensor) -> Tensor:
    """A wrong rule: among equal siblings take the one whose continuation goes deepest."""
    fits = tokens == chosen[tree.parent.clamp(min=0)]
    fits[0] = True
    accepted = ~(tree.ancestors & ~fits[None, :]).any(1)
    last = torch.where(accepted, tree.depth, -1).argmax()
    return tree.ancestors[last].nonzero().squeeze(1)


def draft_of(state: AdjacencyMatrix, root: int, *, merged: bool) -> tuple[Tensor, Tree]:
    if merged:
        plan = fill(template_shape(TWINS), state.rows, root, np.zeros(0, dtype=np.int64), 9)
        return torch.from_numpy(plan.tokens), Tree.from_parents(torch.from_numpy(plan.parent))
    tokens = torch.full((len(TWINS) + 1,), root)
    for node in range(1, len(TWINS) + 1):
        tokens[node] = state.table[tokens[TWINS.parent[node]], TWINS.child_rank[node]]
    return tokens, TWINS.tree


@torch.no_grad()
def sampled_counts(state: AdjacencyMatrix, accept: Accept, *, merged: bool, draws: int) -> dict[tuple[int, ...], int]:
    """Counts of three-token samples. Each is drawn as the decoder does it: one draw at every node of the tree.

    Samples that stand at the same prefix share the forward over the tree.
    """
    model, ids = tiny("llama", seed=5, vocab=VOCAB, layers=1), torch.tensor([[1, 3, 2, 2]])
    generator = torch.Generator().manual_seed(11)
    first = torch.multinomial(next_laws(model, ids)[0], draws, replacement=True, generator=generator)
    waiting: dict[tuple[int, ...], int] = dict(Counter((t,) for t in first.tolist()))
    done: Counter[tuple[int, ...]] = Counter()

    @cache
    def behind(head: tuple[int, ...]) -> tuple[Tensor, Tree, Tensor]:
        tokens, tree = draft_of(state, head[-1], merged=merged)
        logits, _ = tree_logits(model, torch.cat([ids, torch.tensor([head])], dim=1), tokens, tree)
        return tokens, tree, logits.double().softmax(1)

    while waiting:
        head, number = waiting.popitem()
        tokens, tree, law = behind(head)
        drawn = torch.multinomial(law, number, replacement=True, generator=generator).T  # (number, N)
        for chosen, times in Counter(map(tuple, drawn.tolist())).items():
            picked = torch.tensor(chosen)
            whole = (*head, *picked[accept(tree, tokens, picked)].tolist())
            if len(whole) >= 3:
                done[whole[:3]] += times
            else:
                waiting[whole] = waiting.get(whole, 0) + times
    return dict(done)


@pytest.fixture(scope="module")
def three_tokens() -> Law:
    return joint_law(tiny("llama", seed=5, vocab=VOCAB, layers=1), torch.tensor([[1, 3, 2, 2]]), 3)


@pytest.mark.prop("token-recycling", 8)
@pytest.mark.parametrize(
    ("name", "merged"), [("cold", True), ("distinct", True), ("twins", True), ("twins", False), ("one-sided", False)]
)
def test_samples_follow_the_target_from_any_state(three_tokens: Law, name: str, merged: bool) -> None:
    counts = sampled_counts(GARBAGE[name](), verify, merged=merged, draws=DRAWS)
    assert sum(counts.values()) == DRAWS
    assert chi_square(counts, three_tokens) > 1e-3


@pytest.mark.prop("token-recycling", 8)
def test_choosing_the_deeper_of_two_twins_bends_the_law(three_tokens: Law) -> None:
    """The same count of samples is enough to notice a verification that is wrong in one detail."""
    counts = sampled_counts(GARBAGE["one-sided"](), longest_of_twins, merged=False, draws=DRAWS)
    assert chi_square(counts, three_tokens) < 1e-6


@pytest.mark.prop("token-recycling", 8)
def test_samples_of_generate_follow_the_target(three_tokens: Law) -> None:
    """End to end, hot: the state changes with every sample."""
    model, ids = tiny("llama", seed=5, vocab=VOCAB, layers=1), torch.tensor([[1, 3, 2, 2]])
    decoder, counts = TokenRecycling(k=3, tree="7").hot(model), Counter()
    settings = model.generation_config
    settings.do_sample, settings.top_k, settings.max_new_tokens = True, 0, 3
    generator = torch.Generator().manual_seed(3)
    for _ in range(600):
        counts[tuple(model.generate(ids, custom_generate=decoder, generator=generator)[0, 4:].tolist())] += 1
    assert chi_square(dict(counts), three_tokens) > 1e-3


@pytest.mark.prop("token-recycling", 8)
def test_warpers_shape_the_sampled_law() -> None:
    """Top-k leaves two tokens at each place: nothing else may ever come out, and what does has the law's shares."""
    model, ids = tiny("llama", seed=5, vocab=VOCAB, layers=1), torch.tensor([[1, 3, 2, 2]])

    processors = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(1.5), TemperatureLogitsWarper(1.7), TopKLogitsWarper(3)]
    )
    law = joint_law(model, ids, 2, processors)
    decoder, counts = TokenRecycling(k=3, tree="7").hot(model), Counter()
    generator = torch.Generator().manual_seed(4)
    settings = model.generation_config
    settings.do_sample, settings.max_new_tokens = True, 2
    settings.top_k, settings.temperature, settings.repetition_penalty = 3, 1.7, 1.5
    for _ in range(300):
        counts[tuple(model.generate(ids, custom_generate=decoder, generator=generator)[0, 4:].tolist())] += 1
    assert chi_square(dict(counts), law) > 1e-3


def test_a_tree_is_a_name_or_a_template() -> None:
    with pytest.raises(LimitError, match="tree = 15"):
        TokenRecycling(tree=15)  # type: ignore[arg-type]
