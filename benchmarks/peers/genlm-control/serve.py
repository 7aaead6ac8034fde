"""genlm-control's AWRS behind a pipe: one JSON request a line on standard input, one JSON answer a line.

Request: {"prompt_ids", "predicate", "n_particles", "max_tokens", "seed"}; answer: {"ms", "log_ml", "posterior",
"checks", "tokens"}. The first line names the folder of the model and its dtype. Runs in the environment of
requirements.txt and imports nothing of tokenmill.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from genlm.backend import load_model_by_name  # pyright: ignore[reportMissingImports]
from genlm.control import AWRS, EOS, Potential, PromptedLLM  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import predicates  # pyright: ignore[reportMissingImports]


class Check(Potential):
    """A predicate on text over bytes, with the partial character at the end held back; counts its calls."""

    def __init__(self, name: str) -> None:
        super().__init__(list(range(256)))
        self.holds, self.calls = getattr(predicates, name), 0

    def _score(self, context: Any) -> float:
        self.calls += 1
        data = bytes(context)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                return float("-inf")
            text = data[: error.start].decode()
        return 0.0 if self.holds(text) else float("-inf")

    async def complete(self, context: Any) -> float:
        return self._score(context)

    async def prefix(self, context: Any) -> float:
        return self._score(context)


async def answer(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Run SMC once and say what came out."""
    llm = PromptedLLM(model, prompt_ids=request["prompt_ids"])
    check = Check(request["predicate"])
    sampler = AWRS(llm, check.coerce(llm, f=b"".join), seed=request["seed"])
    model.clear_cache()
    start = time.perf_counter()
    found = await sampler.smc(request["n_particles"], request.get("ess_threshold", 0.5), request["max_tokens"])
    ms = (time.perf_counter() - start) * 1e3
    tokens = sum(sum(token is not EOS for token in context) for context in found.contexts)
    posterior = {}
    for context, p in zip(found.contexts, found.normalized_weights, strict=True):
        text = b"".join(bytes(t) if not hasattr(t, "byte_string") else t.byte_string for t in context if t is not EOS)
        posterior[text.hex()] = posterior.get(text.hex(), 0.0) + float(p)
    return {"ms": ms, "log_ml": float(found.log_ml), "posterior": posterior, "checks": check.calls, "tokens": tokens}


def main() -> None:
    about = json.loads(sys.stdin.readline())
    torch.set_num_threads(about["threads"])
    model = load_model_by_name(
        about["folder"],
        backend="hf",
        llm_opts={"hf_opts": {"torch_dtype": getattr(torch, about["dtype"]), "device_map": "cpu"}},
    )
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(asyncio.run(answer(model, json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
