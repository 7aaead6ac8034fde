"""How long a forward pass takes by the number of new positions, measured once for a model on a machine."""

from __future__ import annotations

import bisect
import copy
import hashlib
import json
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmill.errors import LimitError
from tokenmill.models._cache import cache_dir, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POSITIONS = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXT = 256


@dataclass(frozen=True, slots=True)
class CostProfile:
    """Milliseconds of a forward pass with a filled cache, by the number of new positions.

    Times need not rise with the number of positions: kernels have cliffs, and the profile shows them.

    >>> CostProfile((1, 2, 4), (10.0, 12.0, 20.0)).at(3)
    16.0
    """

    positions: tuple[int, ...]
    ms: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.positions or self.positions[0] < 1 or list(self.positions) != sorted(set(self.positions)):
            raise LimitError("CostProfile", "positions", self.positions, "rising numbers of at least 1")
        if len(self.ms) != len(self.positions) or not all(value > 0 for value in self.ms):
            raise LimitError("CostProfile", "ms", self.ms, f"{len(self.positions)} positive numbers")

    def at(self, n: int) -> float:
        """Milliseconds for `n` new positions: linear between the measured numbers, and beyond the last two.

        Below the first measured number the first time is returned.

        Raises:
            LimitError: `n` below 1.
        """
        if n < 1:
            raise LimitError("CostProfile.at", "n", n, "at least 1")
        if n <= self.positions[0] or len(self.positions) == 1:
            return self.ms[0]
        right = min(bisect.bisect_left(self.positions, n), len(self.positions) - 1)
        (x0, x1), (y0, y1) = self.positions[right - 1 : right + 1], self.ms[right - 1 : right + 1]
        return max(y0 + (y1 - y0) * (n - x0) / (x1 - x0), min(self.ms))


def profile(
    model: PreTrainedModel,
    *,
    positions: Sequence[int] | None = None,
    context: int | None = None,
    repeats: int = 7,
    refresh: bool = False,
) -> CostProfile:
    """Measure, or read from the user's cache, what a forward pass costs by the number of new positions.

    The median of `repeats` passes for each number, taken in turns. The cache's key is the model's config, dtype and
    attention, whether it is packed, the processor, torch's version and its number of threads.

    Args:
        model: a causal language model.
        positions: the numbers of new positions, rising; ``None`` takes 1 to 128 in doublings, as far as they fit
            into half the model's positions.
        context: tokens that are in the key-value cache before; ``None`` takes 256, or what the model leaves room for.
        repeats: passes for each number.
        refresh: measure even when the cache has an answer.

    Raises:
        LimitError: bad numbers, or more positions than the model has.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = max(longest // 2, 1) if longest else POSITIONS[-1] + CONTEXT
    wanted = tuple(n for n in POSITIONS if n <= room) if positions is None else tuple(positions)
    if context is None:
        context = min(CONTEXT, longest - wanted[-1]) if longest and wanted else CONTEXT
    if not wanted or wanted[0] < 1 or list(wanted) != sorted(set(wanted)):
        raise LimitError("models.profile", "positions", wanted, "rising numbers of at least 1")
    for parameter, value in (("context", context), ("repeats", repeats)):
        if value < 1:
            raise LimitError("models.profile", parameter, value, "at least 1")
    if longest is not None and context + wanted[-1] > longest:
        limit = f"at most {longest - wanted[-1]}, so that {wanted[-1]} more fit into the model's {longest} positions"
        raise LimitError("models.profile", "context", context, limit)
    key = {**_key(model), "positions": list(wanted), "context": context}
    path = (
        cache_dir() / "profiles" / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.json"
    )
    known = None if refresh else _read(path)
    if known is not None:
        return known
    measured = CostProfile(wanted, _measure(model, wanted, context, repeats))
    write_json(path, {**key, "repeats": repeats, **asdict(measured)})
    return measured


def _key(model: PreTrainedModel) -> dict[str, Any]:
    import torch

    from tokenmill.models._packed import is_packed

    config = model.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype"):
        config.pop(volatile, None)
    return {
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "dtype": str(model.dtype),
        "attn": model.config._attn_implementation,
        "packed": is_packed(model),
        "device": _device_name(model.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _device_name(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    fields = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    facts = {key.strip(): value.strip() for key, value in fields.items()}
    # Virtual machines often call every processor by one name; family, model and stepping tell them apart.
    numbers = "/".join(facts.get(key, "?") for key in ("cpu family", "model", "stepping"))
    return f"{facts['model name']} ({numbers})" if "model name" in facts else platform.processor() or platform.machine()


def _read(path: Path) -> CostProfile | None:
    try:
        data = json.loads(path.read_text())
        return CostProfile(tuple(data["positions"]), tuple(data["ms"]))
    except (OSError, ValueError, KeyError, TypeError):  # nothing there, or not whole: measure
        return None


def _measure(model: PreTrainedModel, positions: tuple[int, ...], context: int, repeats: int) -> tuple[float, ...]:
    import torch
    from transformers import DynamicCache

    vocab = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (1, context + positions[-1]), generator=generator).to(model.device)
    times: dict[int, list[float]] = {n: [] for n in positions}
    with torch.no_grad():
        filled = DynamicCache(config=model.config)
        model(input_ids=ids[:, :context], past_key_values=filled, use_cache=True, logits_to_keep=1)
        for turn in range(repeats + 1):
            for n in positions:
                cache = copy.deepcopy(filled)
                new = ids[:, context : context + n]
                where = torch.arange(context, context + n, device=model.device)[None]
                _wait(model.device)
                began = time.perf_counter()
                model(input_ids=new, position_ids=where, past_key_values=cache, use_cache=True)
                _wait(model.device)
                if turn > 0:  # the first turn warms up
                    times[n].append((time.perf_counter() - began) * 1e3)
    return tuple(statistics.median(times[n]) for n in positions)


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
