from __future__ import annotations

import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.decode._adjacency import AdjacencyMatrix, last_occurrences, vocabulary
from tokenmill.decode.token_recycling import TokenRecycling
from tokenmill.errors import LimitError, StoppedError
from tokenmill.models import CostProfile, tiny

V, K = 12, 4
Rows = dict[int, list[int]]


class SlowMatrix:
    """Rows as lists, one write after another."""

    def __init__(self) -> None:
        self.rows: Rows = {}

    def write(self, tokens: list[int], successors: list[list[int]]) -> None:
        for token, row in zip(tokens, successors, strict=True):
            self.rows[token] = list(row)

    def put_first(self, tokens: list[int], successors: list[int]) -> None:
        # Of equal tokens the later wins, so the earlier ones do nothing.
        for token, first in dict(zip(tokens, successors, strict=True)).items():
            others = [x for x in self.rows.get(token, []) if x != first]
            self.rows[token] = [first, *others][:K]


def decoded_with(matrix: AdjacencyMatrix) -> None:
    """Decode a little with planned trees, so that there are statistics."""
    model = tiny("llama", vocab=V, layers=1)
    decoder = TokenRecycling(matrix, tree="auto", draft="hybrid", profile=CostProfile((1, 64), (1.0, 2.0)))
    model.generate(torch.tensor([[1, 2, 3, 1, 2]]), do_sample=False, max_new_tokens=12, custom_generate=decoder)


def known_rows(matrix: AdjacencyMatrix) -> Rows:
    counts = matrix.count.tolist()
    return {t: matrix.table[t, : counts[t]].tolist() for t in range(matrix.vocab_size) if counts[t]}


ids = st.integers(0, V - 1)
row = st.permutations(range(V)).map(lambda p: p[:K])
writes = st.lists(st.tuples(ids, row), min_size=1, max_size=8).map(lambda w: ("write", w))
firsts = st.lists(st.tuples(ids, ids), min_size=1, max_size=8).map(lambda w: ("put_first", w))


@pytest.mark.prop("token-recycling", 9)
@given(st.lists(st.one_of(writes, firsts), min_size=1, max_size=6), st.sampled_from([torch.int32, torch.int64]))
def test_equals_a_slow_twin_after_any_writes(steps: list, dtype: torch.dtype) -> None:
    fast, slow = AdjacencyMatrix(V, K, dtype), SlowMatrix()
    for name, pairs in steps:
        tokens, values = ([p[i] for p in pairs] for i in range(2))
        if name == "write":
            fast.write(torch.tensor(tokens), torch.tensor(values), torch.zeros(len(pairs), K))
        else:
            fast.put_first(torch.tensor(tokens), torch.tensor(values))
        getattr(slow, name)(tokens, values)
        assert known_rows(fast) == slow.rows
    assert fast.table.dtype == dtype
    assert fast.filled.tolist() == [t in slow.rows for t in range(V)]
    tokens, after = torch.arange(V).repeat_interleave(V), torch.arange(V).repeat(V)
    expected = [
        slow.rows.get(t, []).index(a) if a in slow.rows.get(t, []) else K
        for t, a in zip(tokens.tolist(), after.tolist(), strict=True)
    ]
    assert fast.ranks(tokens, after).tolist() == expected


@pytest.mark.prop("token-recycling", 9)
def test_update_writes_the_best_successors_and_touches_no_other_row() -> None:
    matrix = AdjacencyMatrix(V, K)
    generator = torch.Generator().manual_seed(0)
    matrix.update(torch.arange(V), torch.randn(V, V, generator=generator))
    before = matrix.table.clone()
    tokens, logits = torch.tensor([3, 7, 3, 5]), torch.randn(4, V, generator=generator)
    matrix.update(tokens, logits)
    for node in (1, 2, 3):  # the first 3 is overwritten by the second
        assert matrix.table[tokens[node]].tolist() == logits[node].topk(K).indices.tolist()
    untouched = [t for t in range(V) if t not in (3, 5, 7)]
    assert torch.equal(matrix.table[untouched], before[untouched])


@given(st.lists(ids, max_size=300))
def test_last_occurrences_of_short_and_long_texts(tokens: list[int]) -> None:
    expected = [i for i, t in enumerate(tokens) if t not in tokens[i + 1 :]]
    assert last_occurrences(torch.tensor(tokens, dtype=torch.long)).tolist() == expected


def test_last_occurrences_beyond_the_size_of_the_square() -> None:
    tokens = torch.randint(0, 90, (700,), generator=torch.Generator().manual_seed(1))
    listed = tokens.tolist()
    assert last_occurrences(tokens).tolist() == [i for i, t in enumerate(listed) if t not in listed[i + 1 :]]


def test_reset_forgets_rows_and_statistics() -> None:
    matrix = AdjacencyMatrix(V, K)
    matrix.put_first(torch.tensor([1]), torch.tensor([2]))
    decoded_with(matrix)
    assert matrix.statistics.to_dict() != AdjacencyMatrix(V, K).statistics.to_dict()
    matrix.reset()
    assert known_rows(matrix) == {}
    assert not bool(matrix.table.any())
    assert not bool(matrix.shares.any())
    assert matrix.statistics.to_dict() == AdjacencyMatrix(V, K).statistics.to_dict()


def test_shares_stay_beside_their_successors() -> None:
    matrix, logits = AdjacencyMatrix(V, K), torch.randn(1, V, generator=torch.Generator().manual_seed(3))
    matrix.update(torch.tensor([5]), logits)
    values, best = logits[0].topk(K)
    assert torch.allclose(matrix.shares[5], values.softmax(0))
    before = matrix.shares[5].tolist()
    matrix.put_first(torch.tensor([5]), best[2:3])
    assert matrix.table[5].tolist() == [int(best[i]) for i in (2, 0, 1, 3)]
    assert matrix.shares[5, 1:].tolist() == [before[0], before[1], before[3]]
    assert float(matrix.shares[5, 0]) > 1  # it really stood there


def written() -> AdjacencyMatrix:
    matrix = AdjacencyMatrix(V, K)
    matrix.update(torch.tensor([2, 4]), torch.randn(2, V, generator=torch.Generator().manual_seed(2)))
    matrix.put_first(torch.tensor([9]), torch.tensor([1]))
    decoded_with(matrix)
    return matrix


def test_save_and_load_keep_everything(tmp_path: Path) -> None:
    matrix, path = written(), tmp_path / "state.safetensors"
    matrix.save(path)
    again = AdjacencyMatrix.load(path)
    assert known_rows(again) == known_rows(matrix)
    assert torch.equal(again.table, matrix.table)
    assert torch.equal(again.shares, matrix.shares)
    assert again.statistics.to_dict() == matrix.statistics.to_dict() != AdjacencyMatrix(V, K).statistics.to_dict()
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_save_that_fails_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.safetensors"
    written().save(path)
    before = path.read_bytes()

    def half_written(tensors: object, name: str, **_: object) -> None:
        Path(name).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.torch, "save_file", half_written)
    with pytest.raises(OSError, match="no space left"):
        AdjacencyMatrix(V, K).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_files_that_are_no_matrix_are_refused(tmp_path: Path) -> None:
    text, tensors = tmp_path / "notes.txt", tmp_path / "weights.safetensors"
    text.write_text("not a matrix")
    safetensors.torch.save_file({"table": torch.zeros(2, 2)}, tensors)
    for path in (text, tensors):
        with pytest.raises(LimitError, match=path.name):
            AdjacencyMatrix.load(path)


def test_a_file_with_ids_beyond_its_vocabulary_is_refused(tmp_path: Path) -> None:
    matrix = written()
    matrix.table[2, 0] = V + 5
    matrix.save(tmp_path / "bent")
    with pytest.raises(LimitError, match=rf"{V + 5}.*V={V}"):
        AdjacencyMatrix.load(tmp_path / "bent")


@pytest.mark.parametrize("token", [V, -1])
@pytest.mark.parametrize("method", ["write", "put_first", "update"])
def test_tokens_outside_the_vocabulary_are_refused(method: str, token: int) -> None:
    values = {
        "write": (torch.zeros(2, K, dtype=torch.long), torch.zeros(2, K)),
        "put_first": (torch.zeros(2, dtype=torch.long),),
        "update": (torch.zeros(2, V),),
    }[method]
    matrix = AdjacencyMatrix(V, K)
    with pytest.raises(LimitError, match=rf"token id = {token}.*V={V}"):
        getattr(matrix, method)(torch.tensor([1, token]), *values)
    assert known_rows(matrix) == {}


@pytest.mark.parametrize(
    ("arguments", "parameter", "value"),
    [
        ((4, 5), "k", "5"),
        ((4, 0), "k", "0"),
        ((0, 1), "vocab_size", "0"),
        ((4, 2, torch.int16), "dtype", "torch.int16"),
    ],
)
def test_impossible_sizes_are_refused(arguments: tuple, parameter: str, value: str) -> None:
    with pytest.raises(LimitError, match=rf"{parameter} = {value}"):
        AdjacencyMatrix(*arguments)


def test_a_claimed_matrix_refuses_a_second_holder_and_is_free_again() -> None:
    matrix = AdjacencyMatrix(V, K)
    refused: list[str] = []

    def hold(name: str) -> None:
        try:
            with matrix.claimed(name):
                raise RuntimeError("while it is held")
        except StoppedError as error:
            refused.append(str(error))
        except RuntimeError:
            pass

    with matrix.claimed("first"):
        thread = threading.Thread(target=hold, args=("second",))
        thread.start()
        thread.join()
    assert refused == ["second: state is in use by another call. Give each concurrent call a matrix of its own."]
    hold("third")
    hold("fourth")  # the third let go, although it failed
    assert len(refused) == 1


def test_the_matrix_is_as_wide_as_the_output_layer() -> None:
    model = tiny("llama", vocab=20, layers=1)
    assert vocabulary(model) == 20
    model.resize_token_embeddings(23)
    assert AdjacencyMatrix.for_model(model, 3).table.shape == (23, 3)


@pytest.mark.parametrize("broken", ["count", "shares"])
def test_a_file_whose_parts_do_not_fit_together_is_refused(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "matrix.safetensors"
    AdjacencyMatrix(16, 4).save(path)
    with safetensors.safe_open(path, framework="pt") as file:
        about, parts = file.metadata(), {name: file.get_tensor(name) for name in ("table", "count", "shares")}
    parts[broken] = parts[broken] + 5 if broken == "count" else parts[broken][:, :2].contiguous()
    safetensors.torch.save_file(parts, path, metadata=about)
    with pytest.raises(LimitError, match="a whole matrix"):
        AdjacencyMatrix.load(path)
