"""What visual pruning costs and saves: selection beside one product of all pairs, and a prefill of 100 M weights.

python benchmarks/prune_speed.py     # five minutes on two idle cores

Selections run on random features with their scores given, in turn with the N x N x D product of the same features,
medians; the memory is the peak of a process of its own. The prefill is that of a LLaVA-shaped model with random weights
(12 layers of width 768, 576 visual tokens, 40 of text), for one prompt and for four: its time with everything, and with
a method, selection included and the vision tower apart; and the time of the decoder's layers beside their operations by
formula, which count neither the output layer nor the reading of weights.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import _memory
import torch
from _lines import Lines, seconds
from torch import Tensor

from tokenmill import prune
from tokenmill.hf.layout import decoder
from tokenmill.hf.vision import encode
from tokenmill.prune._greedy import Similarity
from tokenmill.prune.information_horizon import InformationHorizon
from tokenmill.prune.vflowopt import VFlowOpt, VFlowParams

REPEATS = 7
HEADS = 32


def selections(x: Tensor, k: int) -> dict[str, Callable[[], Any]]:
    """Every training-free selection of k among the tokens x (N, D), with its scores given."""
    n = len(x)
    scores = torch.rand(n, generator=torch.Generator().manual_seed(1))
    side = round(n**0.5)
    place = torch.stack([torch.zeros(n), torch.arange(n) // side, torch.arange(n) % side], 1).long()
    keys = x.unflatten(1, (HEADS, -1)).transpose(0, 1)[None]
    return {
        "divprune": lambda: prune.divprune_select(x, k),
        "idpruner": lambda: prune.mmr_select(x, scores, k),
        "zoo-prune": lambda: prune.zoo_select(x, scores, k),
        "todre": lambda: prune.select_diverse(x, k, pivot=0),
        "todre k-center": lambda: prune.select_diverse(x, k, pivot=0, objective="k_center"),
        "entropyprune": lambda: scores.topk(k).indices,
        "information-horizon": lambda: torch.randperm(n)[:k],
        "vflowopt": lambda: prune.recycle_prune(x, scores, place, k / n, 8.0),
        "token-correlation-compression": lambda: prune.information_density(prune.patch_similarity(keys)),
    }


def product(x: Tensor) -> Tensor:
    return x @ x.T


def peak_mib(name: str, n: int, d: int, k: int) -> float:
    """Peak memory of one selection in a process of its own, above what it holds before the features are made."""
    code = [sys.executable, __file__, "--peak", name, "--tokens", str(n), "--width", str(d), "--keep", str(k)]
    return float(subprocess.run(code, check=True, capture_output=True, text=True).stdout)


def measure_peak(name: str, n: int, d: int, k: int) -> None:
    product(torch.randn(64, 64))  # the libraries load with the first product
    small = torch.randn(64, HEADS * 2)
    for warm in (*selections(small, 8).values(), lambda: product(small)):
        warm()

    def select() -> None:
        x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
        way = (lambda: product(x)) if name == "product" else selections(x, k)[name]
        way()

    print(_memory.peak_mib(select))


def selection_speed(lines: Lines, n: int, d: int, k: int) -> None:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    ways = {"product": lambda: product(x), **selections(x, k)}
    for way in ways.values():
        way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            times[name].append(seconds(way))
    base, held = median(times["product"]), peak_mib("product", n, d, k)
    for name, values in times.items():
        peak = peak_mib(name, n, d, k)
        lines.keep(
            "selection",
            name=name,
            tokens=n,
            width=d,
            keep=k,
            ms=1000 * median(values),
            to_product=median(values) / base,
            peak_mib=peak,
            peak_to_product=peak / held,
        )
    streamed = seconds(lambda: prune.divprune_select(x[:, :256], k, stream=True))
    whole = seconds(lambda: prune.divprune_select(x[:, :256], k, stream=False))
    assert Similarity.of(x[None, :, :8], stream=True).whole is None
    lines.keep("streaming", name="divprune", tokens=n, width=256, keep=k, ms=1000 * streamed, whole_ms=1000 * whole)


def entropy_speed(lines: Lines) -> None:
    """The Gram matrix over heads beside the covariance, eigenvalues included; and ranking by either."""
    q = torch.randn(576, HEADS, 128, generator=torch.Generator().manual_seed(0))
    dual, direct = [], []
    for _ in range(3):
        dual.append(seconds(lambda: prune.token_matrix_entropy(q)))
        direct.append(seconds(lambda: prune.token_matrix_entropy(q, dual=False)))
    same = torch.equal(prune.token_matrix_entropy(q).argsort(), prune.token_matrix_entropy(q, dual=False).argsort())
    lines.keep(
        "entropy",
        tokens=576,
        heads=HEADS,
        width=128,
        ms=1000 * median(dual),
        covariance_ms=1000 * median(direct),
        faster=median(direct) / median(dual),
        same_ranking=same,
    )


def estimator_speed(lines: Lines, wide: int) -> None:
    """ZOO-Prune's three estimators on LLaVA's projector of 1,024 to `wide`."""
    layers = (torch.nn.Linear(1024, wide), torch.nn.GELU(), torch.nn.Linear(wide, wide))
    projector = torch.nn.Sequential(*layers).eval()
    x = torch.randn(576, 1024, generator=torch.Generator().manual_seed(0))
    found, times = {}, {}
    for estimator in ("fd", "jvp", "frobenius"):
        how: Any = estimator
        times[estimator] = seconds(
            lambda how=how: found.update({how: prune.zoo_sensitivity(x, projector, estimator=how)})
        )
    ranks = torch.stack([found[e].argsort().argsort().double() for e in ("fd", "jvp", "frobenius")])
    agree = torch.corrcoef(ranks)
    lines.keep(
        "estimators",
        tokens=576,
        width=wide,
        directions=64,
        **{f"{e}_ms": 1000 * t for e, t in times.items()},
        fd_to_frobenius=times["fd"] / times["frobenius"],
        spearman_fd_frobenius=float(agree[0, 2]),
        spearman_fd_jvp=float(agree[0, 1]),
    )


def llava() -> Any:
    """A LLaVA of about 110 million random weights."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
    )
    tower = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
    )
    config = LlavaConfig(text_config=text, vision_config=tower, image_token_index=31_999)
    return LlavaForConditionalGeneration(config).eval()


def prompts(rows: int) -> dict[str, Any]:
    """Prompts of 576 visual and 40 text tokens."""
    ids = torch.randint(0, 31_000, (rows, 616))
    ids[:, 20:596] = 31_999
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(rows, 3, 336, 336),
    }


class Clock:
    """Seconds that a model's decoder takes in each forward inside the ``with``."""

    def __init__(self, model: Any) -> None:
        self.model, self.began, self.seconds = model, 0.0, 0.0

    def __enter__(self) -> Clock:
        inner = decoder(self.model)
        # In front of the hooks of a method, so that choosing inside the decoder counts.
        before = inner.register_forward_pre_hook(lambda *_: setattr(self, "began", time.perf_counter()), prepend=True)
        behind = inner.register_forward_hook(
            lambda *_: setattr(self, "seconds", time.perf_counter() - self.began), prepend=True
        )
        self.undo = (before, behind)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.undo:
            handle.remove()


@torch.inference_mode()
def prefill_speed(lines: Lines, rows: int) -> None:
    model, inputs = llava(), prompts(rows)
    keep = 0.1
    scorer = prune.VisionSelectorScorer(768).eval()
    methods: dict[str, Any] = {
        "divprune": prune.DivPrune(keep=keep),
        "idpruner": prune.IDPruner(scorer, keep=keep),
        "zoo-prune": prune.ZOOPrune(keep=keep),
        "todre stage 1": prune.ToDRE(keep=keep, tau=0.0),
        "token-correlation-compression": prune.TokenCorrelationCompressor(max_tokens=58),
        "norm": prune.NormTokens(keep=keep),
        "random": prune.RandomTokens(keep=keep),
        "vflowopt": VFlowOpt(keep=keep, params=VFlowParams(m=6.0)),
        "information-horizon": InformationHorizon(keep=keep, layer=8, ratio=0.13),
        "todre both stages": prune.ToDRE(keep=0.5, tau=2.0),
        "entropyprune": prune.EntropyPrune(keep=keep, layer=2),
        "attention": prune.AttentionTopK(keep=keep, layer=2),
    }
    plain_inputs = {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "mm_encoder_outputs": (encoded := encode("bench", model, inputs)).outputs(
            [v.features for v in encoded.visuals]
        ),
    }

    def forward(given: Any) -> None:
        model(**given, use_cache=True, logits_to_keep=1)

    full = prune.prefill_flops(model, 616)
    forward(plain_inputs)
    for name, method in methods.items():
        before = method.tower_layers(model), method.needs_projector_input()
        times: dict[str, list[float]] = {}
        flops, inside, encodes, lengths = 0.0, False, False, [0]
        for step in range(REPEATS + 1):
            with Clock(model) as clock:
                row = {"plain": seconds(lambda: forward(plain_inputs)), "plain decoder": clock.seconds}
            row["tower"] = seconds(
                lambda b=before: encode("bench", model, inputs, tower_layers=b[0], with_projector_input=b[1])
            )
            pruned: list[Any] = []
            row["prepare"] = seconds(lambda m=method, p=pruned: p.append(m.prepare(model, inputs)))
            with method.attach(model, pruned[0]) as trace, Clock(model) as clock:
                row["forward"] = seconds(lambda p=pruned: forward(p[0]))
                row["decoder"] = clock.seconds
            lengths = trace.shortening.lengths or [pruned[0]["input_ids"].shape[1]] * 12
            flops = prune.prefill_flops(model, lengths)
            for what, value in row.items():
                times.setdefault(what, []).extend([value] if step else [])  # the first round warms up
            inside, encodes = bool(trace.shortening.kept), pruned[0].report != ()
        middle = {what: 1000 * median(values) for what, values in times.items()}
        selection = max(0.0, middle["prepare"] - middle["tower"]) if encodes else 0.0
        # A method that leaves the inputs alone has its tower inside the forward.
        rest = middle["forward"] if encodes else middle["forward"] - middle["tower"]
        lines.keep(
            "prefill",
            name=name,
            rows=rows,
            inside=inside,
            lengths=lengths,
            plain_ms=middle["plain"],
            tower_ms=middle["tower"],
            select_ms=selection,
            forward_ms=rest,
            plain_decoder_ms=middle["plain decoder"],
            decoder_ms=middle["decoder"],
            faster=middle["plain"] / (selection + rest),
            fewer_flops=full / flops,
            to_formula=(middle["plain decoder"] / middle["decoder"]) / (full / flops),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=2880)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--keep", type=int, default=288)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        measure_peak(options.peak, options.tokens, options.width, options.keep)
        return
    lines = Lines("prune-speed", "prune")
    for k in (288, 720):
        selection_speed(lines, options.tokens, options.width, k)
    entropy_speed(lines)
    for wide in (1024, 4096):
        estimator_speed(lines, wide)
    for rows in (1, 4):
        prefill_speed(lines, rows)


if __name__ == "__main__":
    main()
