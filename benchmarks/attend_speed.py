"""What choosing costs beside dense attention, by length: TokenSelect, FASA and Token Sparse Attention.

python benchmarks/attend_speed.py     # about fifteen minutes on two idle cores

One attention layer in float32, called as a model calls it: the method reads a cache, chooses, and attends. Dense is the
layer's own sdpa on the same tensors, in turn with the method, medians. TokenSelect has queries and keys of Gemma 3
270M (its layer 17, 4 query heads of width 256 on one KV head) on Python source; 16K keys are repeated to reach longer
caches, each at the position where it stands. Its selection cache is hit as often as these queries are alike. FASA and
Token Sparse Attention, whose time does not depend on what the tensors hold, have random ones. The peak memory of one
call is that of a process of its own, beside the formula.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from statistics import median
from typing import Any

import _memory
import torch
from _lines import Lines, seconds
from _listener import Heard, Listener
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tokenmill import models
from tokenmill.attend._frequency import FCRanking
from tokenmill.attend._selection_cache import similar
from tokenmill.attend._session import Answer, AttendTrace, Reading, Session, SparseAttention
from tokenmill.attend.fasa import FASA
from tokenmill.attend.token_sparse_attention import TokenSparseAttention
from tokenmill.attend.tokenselect import TokenSelect
from tokenmill.bench.texts import sources
from tokenmill.hf.attention import Call
from tokenmill.hf.layers import StatefulLayer, token_state
from tokenmill.hf.layout import attention_layers
from tokenmill.hf.rotary import Rotary, layer_rotary

REAL, STEPS = 16_384, 60
LAYER = 17  # of the layers that see far, the one whose queries are most alike
LENGTHS = {"tokenselect": (8192, 32_768, 131_072), "fasa": (4096, 16_384, 65_536), "tsa": (2048, 4096, 8192)}


@dataclass(slots=True)
class Layer:
    """An attention layer with a full cache, and the queries that come next.

    Attributes:
        module: of the model.
        key: (1, G, S, d), rotated.
        value: (1, G, S, d).
        queries: (1, H, N, d), rotated; N queries one after another, or the S of a prompt.
        turn: the layer's rotation.
        scaling: of the dot products.
    """

    module: Any
    key: Tensor
    value: Tensor
    queries: Tensor
    turn: Rotary
    scaling: float
    cached: DynamicCache = field(default_factory=DynamicCache)

    def __post_init__(self) -> None:
        index = self.module.layer_idx
        for at in range(index + 1):
            more = self.key if at == index else self.key[:, :, :0]
            self.cached.update(more, self.value if at == index else self.value[:, :, :0], at)
        layer = token_state(self.cached, index)
        assert isinstance(layer, StatefulLayer)
        layer.append_state("unrotated", self.turn.unrotate(self.key, self.turn.phases(self.places(0, self.size))))

    @property
    def size(self) -> int:
        return self.key.shape[2]

    def places(self, first: int, stop: int) -> Tensor:
        return torch.arange(first, stop)[None]

    def dense(self, query: Tensor) -> Tensor:
        return sdpa_attention_forward(self.module, query, self.key, self.value, None, scaling=self.scaling)[0]

    def reader(self, method: SparseAttention) -> Callable[[Tensor], Answer]:
        """The method on this layer."""
        session = Session(method, self.module, AttendTrace(), LAYER, {self.module.layer_idx: self.turn})  # type: ignore[arg-type]

        def read(query: Tensor) -> Answer:
            first = self.size - query.shape[2]
            phases = self.turn.phases(self.places(first, self.size))
            call = Call(session, self.module.layer_idx, sdpa_attention_forward, self.cached, None, phases)
            return method.read(
                Reading(session, self.module, query, self.key, self.value, None, call, {"scaling": self.scaling})
            )

        read.trace = session.trace  # type: ignore[attr-defined]
        return read


@cache
def source() -> tuple[Any, Tensor]:
    """Gemma, and tokens of Python source."""
    model, tokenizer = models.load("gemma-3-270m", dtype="float32", attn="sdpa")
    texts = sources("attend_speed", "python-stdlib", 1)["code"].texts["test"]
    joined = "\n".join(text for _, text in sorted(texts.items()))[: 8 * REAL]
    return model, tokenizer(joined, return_tensors="pt").input_ids


@cache
def heard() -> tuple[Any, Rotary, Heard]:
    """Gemma's layer on Python source: the module, its rotation, and queries, keys and values without rotation."""
    model, ids = source()
    listener = Listener(layers=(LAYER,), turn_back=True)
    with listener.attach(model):
        for start in range(0, REAL, 2048):
            model.model(input_ids=ids[:, start : start + 2048])
    parts = listener.heard[LAYER]
    query, key, value = (torch.cat(part, 2) for part in list(zip(*parts, strict=True))[:3])
    module = next(m for m in attention_layers(model) if m.layer_idx == LAYER)
    return module, layer_rotary("attend_speed", model, LAYER), Heard(query, key, value, parts[0].scaling)


def gemma(length: int) -> Layer:
    """The layer with a cache of so many keys."""
    module, turn, (query, key, value, scaling) = heard()
    many = -(-length // REAL)
    places = turn.phases(torch.arange(length)[None])
    key = turn.rotate(key.repeat(1, 1, many, 1)[:, :, -length:], places)
    # Every query stands at the end, where the key of its own token is taken to be the last one.
    last = turn.phases(torch.full((1, STEPS + 1), length - 1))
    query = turn.rotate(query[:, :, -STEPS - 1 :], last)
    value = value.repeat(1, 1, many, 1)[:, :, -length:].contiguous()
    return Layer(module, key, value, query, turn, scaling)


def drawn(length: int, heads: int, groups: int, width: int, queries: int) -> Layer:
    """Random keys, values and queries of a layer of the Llama kind."""
    config = LlamaConfig(
        hidden_size=heads * width, num_attention_heads=heads, num_key_value_heads=groups, head_dim=width,
        num_hidden_layers=1, intermediate_size=8, vocab_size=8,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    module, turn = next(iter(attention_layers(model))), layer_rotary("attend_speed", model, 0)
    g = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, groups, length, width, generator=g) for _ in range(2))
    query = torch.randn(1, heads, queries, width, generator=g)
    return Layer(module, key, value, query, turn, module.scaling)


def reuse() -> dict[str, dict[str, float]]:
    """theta -> layer -> the share of steps whose query is alike the one that chose last, over 512 tokens of source."""
    model, ids = source()
    listener = Listener(turn_back=True)
    with listener.attach(model):
        model.model(input_ids=ids[:, :1024])
    found: dict[str, dict[str, float]] = {}
    for theta in (0.9, 0.75):
        for layer, (one,) in listener.heard.items():
            kept, *later = one.query[0, :, 511:].transpose(0, 1).flatten(1)[:, None]  # (1, H d) each
            hits = 0
            for query in later:
                alike = bool(similar(query, kept, theta))
                hits, kept = hits + alike, kept if alike else query
            found.setdefault(str(theta), {})[str(layer)] = hits / len(later)
    return found


def some_ranking(layer: Layer) -> FCRanking:
    heads, width = layer.queries.shape[1], layer.queries.shape[3]
    ca = torch.rand(1, 1, width // 2, heads, generator=torch.Generator().manual_seed(1))
    return FCRanking(ca, layers=(0,), k_list=(256,), layout="half_split", head_dim=width, rotary_dim=width)


def decoding(layer: Layer, methods: dict[str, SparseAttention]) -> dict[str, Any]:
    """Milliseconds a step, dense and with each method, over the same queries one after another."""
    readers: dict[str, Callable[[Tensor], Any]] = {"dense": layer.dense}
    readers |= {name: layer.reader(method) for name, method in methods.items()}
    first, *steps = (query.contiguous() for query in layer.queries.split(1, 2))
    before: dict[str, dict[str, int]] = {}
    for name, read in readers.items():
        read(first)  # makes the state; the query before those that are timed, so that none of them is met again
        before[name] = read.trace.counts() if name in methods else {}  # type: ignore[attr-defined]
    took: dict[str, list[float]] = {name: [] for name in readers}
    for query in steps:
        for name, read in readers.items():
            took[name].append(1000 * seconds(lambda read=read, query=query: read(query)))
    found: dict[str, Any] = {}
    for name, times in took.items():
        found[name] = {"ms_p50": median(times), "ms_mean": sum(times) / len(times)}
        if name not in methods:
            continue
        # The mean over steps counts those that choose anew; the median would leave out the rarer of the two.
        found[name]["faster"] = sum(took["dense"]) / sum(times)
        found[name]["faster_p50"] = median(d / t for d, t in zip(took["dense"], times, strict=True))
        after = readers[name].trace.counts()  # type: ignore[attr-defined]
        counted = {key: after[key] - before[name][key] for key in ("selections", "reused", "bytes_read")}
        found[name]["reused"] = counted["reused"] / len(times)
        found[name]["bytes_read"] = counted["bytes_read"] // len(times)
    return found


def prefill(layer: Layer, method: SparseAttention, repeats: int) -> dict[str, Any]:
    """Milliseconds of a prompt's attention, dense and with the method, in turn."""
    read, took = layer.reader(method), {"dense": [], "sparse": []}
    for _ in range(repeats):
        took["dense"].append(1000 * seconds(lambda: dense_prompt(layer)))
        took["sparse"].append(1000 * seconds(lambda: read(layer.queries)))
    pairs = zip(took["dense"], took["sparse"], strict=True)
    trace: AttendTrace = read.trace  # type: ignore[attr-defined]
    return {
        "dense": {"ms_p50": median(took["dense"])},
        "sparse": {
            "ms_p50": median(took["sparse"]),
            "faster_p50": median(d / s for d, s in pairs),
            "density": trace.density,
        },
    }


def dense_prompt(layer: Layer) -> Tensor:
    key, value = layer.key, layer.value
    return sdpa_attention_forward(
        layer.module, layer.queries, key, value, None, scaling=layer.scaling, is_causal=True
    )[0]  # fmt: skip


def cases(what: str, length: int, *, alone: bool = False) -> tuple[Layer, dict[str, SparseAttention]]:
    match what:
        case "tokenselect":
            made: dict[str, SparseAttention] = {}
            for positions in ("contiguous", "original"):
                for theta in (0.9, None, -1.0):  # -1 reuses at every step: the most that the cache can save
                    made[f"{positions}, theta {theta}"] = TokenSelect(theta=theta, positions=positions)  # type: ignore[arg-type]
            return drawn(length, 4, 1, 256, 2) if alone else gemma(length), made
        case "fasa":
            layer = drawn(length, 32, 8, 128, STEPS // 3 + 1)
            ranking = some_ranking(layer)
            shares = ("head", "kv_group")
            return layer, {f"share {share}": FASA(ranking, share=share) for share in shares}  # type: ignore[arg-type]
        case _:
            layer = drawn(length, 32, 8, 128, length)
            return layer, {"half": TokenSparseAttention(tau=0.999, min_tokens=length // 2 - 128)}


def formula(layer: Layer, method: SparseAttention) -> int:
    """Bytes above the cache and the method's own state on it, for one call of one sequence."""
    heads, width, size = layer.queries.shape[1], layer.queries.shape[3], layer.size
    if isinstance(method, TokenSelect):
        rows = 4 * (method.n_init + int(method.keep) + method.n_local) * width
        # Logits and their softmax for each head, and their sum, unless the last selection is used again.
        scores = 0 if method.theta == -1 else 4 * (2 * heads + 1) * size
        # Keys and values that are gathered; to turn keys: cosines and sines, three products and what comes out.
        return (
            scores + layer.key.shape[1] * rows * 2 + (rows * (2 + 4 * layer.key.shape[1]) if method.needs_rotary else 0)
        )
    if isinstance(method, FASA):
        # Scores of each head; for each that chooses a copy without padding, counts of ties (twice) and three masks.
        choosers = heads if method.share == "head" else layer.key.shape[1]
        return 4 * heads * size + (4 + 2 * 4 + 3) * choosers * size + 4 * 2 * choosers * int(method.keep) * width
    kept = size // 2
    # Window scores of one KV head (logits and softmax), all heads' sums; query, key, value and output of what stays.
    window = 4 * 2 * (heads // layer.key.shape[1]) * 128 * size + 4 * 3 * heads * size
    return window + 4 * 4 * heads * kept * width + 4 * 2 * heads * size * width


def peak(what: str, length: int, name: str) -> float:
    """MiB of one call in a process of its own, above the layer and the state of the method."""
    code = [sys.executable, __file__, "--peak", what, str(length), name]
    return float(subprocess.run(code, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_peak(what: str, length: int, name: str) -> None:
    layer, methods = cases(what, length, alone=True)
    read = layer.reader(methods[name])
    first, query = (layer.queries, layer.queries) if what == "tsa" else layer.queries[:, :, :2].split(1, 2)
    with torch.inference_mode():
        if what != "tsa":
            # The dominant channels of all keys, and keys without rotation, are state. The second query is unlike it.
            read(first.contiguous())
        query = query.contiguous()
        print(_memory.peak_mib(lambda: read(query)))


SLUGS = {"tokenselect": "tokenselect", "fasa": "fasa", "tsa": "token-sparse-attention"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=SLUGS, nargs="+", default=list(SLUGS))
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        measure_peak(options.peak[0], int(options.peak[1]), options.peak[2])
        return
    for what in options.only:
        lines = Lines("attend-speed", SLUGS[what], threads=options.threads)
        for length in LENGTHS[what]:
            with torch.inference_mode():
                layer, methods = cases(what, length)
                found = prefill(layer, methods["half"], 20) if what == "tsa" else decoding(layer, methods)
                if what == "tokenselect" and length == LENGTHS[what][0]:
                    lines.keep("reuse", shares=reuse())
            heads, groups, width = layer.queries.shape[1], *layer.key.shape[1::2]
            shape = {"heads": heads, "kv_heads": groups, "width": width}
            lines.keep("prefill" if what == "tsa" else "decoding", tokens=length, **shape, ways=found)
            if length == LENGTHS[what][-1]:
                for name, method in methods.items():
                    lines.keep(
                        "memory", tokens=length, way=name, peak_mib=peak(what, length, name),
                        formula_mib=formula(layer, method) / 2**20,
                    )  # fmt: skip


if __name__ == "__main__":
    main()
