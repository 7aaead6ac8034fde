"""VFlowOpt's search: settings under which the last prompt token's final state stays as it was."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmill.errors import LimitError, MissingExtraError
from tokenmill.hf.hidden import last_hidden
from tokenmill.prune._baselines import check_choices

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tokenmill.prune.vflowopt import VFlowOpt


@dataclass(frozen=True, slots=True, kw_only=True)
class VFlowParams:
    """The searched settings: threshold t, entropy's weight alpha, cell side m, and shares r0, r1, r2.

    ``r2=None`` is solved from the budget.
    """

    t: float = 0.0
    alpha: float = 0.0
    m: float = 4.0
    r0: float | None = None
    r1: float = 1.0
    r2: float | None = None


@torch.no_grad()
def flow_objective(model: PreTrainedModel, prompts: Sequence[Mapping[str, Any]]) -> Callable[[VFlowOpt], float]:
    """Mean cosine between the last prompt token's final state with and without pruning, as a function of the method.

    The states without pruning are computed once.

    Args:
        model: the model.
        prompts: inputs of one row each; labels are not needed.

    Returns:
        ``objective(method)`` in [-1, 1], 1 when nothing changes. A prompt whose state is not finite counts as 0 and
        ``objective.bad`` counts it.

    Raises:
        LimitError: no prompts.
    """
    if not prompts:
        raise LimitError("flow_objective", "prompts", 0, "at least 1")
    full = [_last_state(model, prompt) for prompt in prompts]

    @torch.no_grad()
    def objective(method: VFlowOpt) -> float:
        total = 0.0
        for prompt, want in zip(prompts, full, strict=True):
            pruned = method.prepare(model, prompt)
            with method.attach(model, pruned):
                got = _last_state(model, pruned)
            cosine = float(F.cosine_similarity(got.float(), want.float(), dim=0))
            if math.isfinite(cosine):
                total += cosine
            else:
                objective.bad += 1  # pyright: ignore[reportFunctionMemberAccess]
        return total / len(prompts)

    objective.bad = 0  # pyright: ignore[reportFunctionMemberAccess]
    return objective


def _last_state(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    with last_hidden(model) as found:
        model(**inputs, use_cache=False, logits_to_keep=1)
    return found[-1][0, -1]


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a search found: settings, their value, every evaluation, and what it was run on."""

    params: VFlowParams
    value: float
    trials: tuple[tuple[VFlowParams, float], ...]
    keep: float
    seed: int

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        half = path.with_suffix(".tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        half.write_text(json.dumps(asdict(self), indent=1) + "\n")
        half.replace(path)

    @classmethod
    def load(cls, path: Path) -> SearchResult:
        """Read what `save` wrote."""
        data = json.loads(path.read_text())
        data["params"] = VFlowParams(**data["params"])
        data["trials"] = tuple((VFlowParams(**p), v) for p, v in data["trials"])
        return cls(**{f.name: data[f.name] for f in fields(cls)})


def search_space(rho: float, *, side: float = 24.0) -> dict[str, tuple[float, float]]:
    """Bounds of the searched settings for a budget (step 7; its rule for other budgets is reconstructed)."""
    most = min(1.0, 1.5 * rho)
    return {
        "r0": (rho, most),
        "r1": (min(1.0, 0.8 * rho / most), 1.0),
        "t": (0.0, 50.0),
        "m": (min(3.0, side), side),
        "alpha": (-1.0, 1.0),
    }


def optimize(
    model: PreTrainedModel | None,
    prompts: Sequence[Mapping[str, Any]],
    budget: float,
    space: Mapping[str, tuple[float, float]] | None = None,
    n_calls: int = 300,
    n_init: int = 27,
    seed: int = 42,
    *,
    method: VFlowOpt | None = None,
    objective: Callable[[VFlowOpt], float] | None = None,
    sampler: str = "gp",
    on_trial: Callable[[int, float], None] | None = None,
) -> SearchResult:
    """Search t, alpha, m, r0 and r1 for the largest objective under a budget (step 7).

    Args:
        model: the model; ``None`` only with an objective of one's own.
        prompts: see `flow_objective`.
        budget: share of visual tokens in the mean over layers.
        space: bounds by name; ``None``: `search_space`.
        n_calls: evaluations.
        n_init: random ones among them, before the model of the objective counts.
        seed: of the search.
        method: what the settings are put into; ``None``: ``VFlowOpt(keep=budget)``.
        objective: maximised; ``None``: `flow_objective`.
        sampler: ``"gp"`` (Gaussian process), ``"tpe"`` or ``"random"``.
        on_trial: called with the number of evaluations and the best value.

    Raises:
        LimitError: bad numbers.
        MissingExtraError: Optuna is not installed.
    """
    from tokenmill.prune.vflowopt import VFlowOpt

    if n_calls < 1:
        raise LimitError("optimize", "n_calls", n_calls, "at least 1")
    if objective is None and model is None:
        raise LimitError("optimize", "model", None, "a model, or an objective of one's own")
    study, failed = _study(sampler, seed, n_init)
    base = method if method is not None else VFlowOpt(keep=budget)
    judge = objective if objective is not None else flow_objective(cast("PreTrainedModel", model), prompts)
    bounds = dict(space if space is not None else search_space(budget))
    trials: list[tuple[VFlowParams, float]] = []
    for number in range(n_calls):
        trial = study.ask()
        params = VFlowParams(**{name: trial.suggest_float(name, *limits) for name, limits in bounds.items()})
        try:
            value = judge(base.with_params(params))
        except LimitError:  # a budget that these shares cannot meet
            study.tell(trial, state=failed)
            continue
        study.tell(trial, value)
        trials.append((params, value))
        if on_trial is not None:
            on_trial(number + 1, max(v for _, v in trials))
    if not trials:
        raise LimitError("optimize", "space", bounds, "one in which some shares meet the budget")
    best, value = max(trials, key=lambda pair: pair[1])
    return SearchResult(best, value, tuple(trials), budget, seed)


def _study(sampler: str, seed: int, n_init: int) -> tuple[Any, Any]:
    """An Optuna study that maximises, and the state that a failed trial is told."""
    check_choices("optimize", sampler=(sampler, ("gp", "tpe", "random")))
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("vflowopt.optimize", "optuna", "prune") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if sampler == "gp":
        chosen: Any = optuna.samplers.GPSampler(seed=seed, n_startup_trials=n_init)
    elif sampler == "tpe":
        chosen = optuna.samplers.TPESampler(seed=seed, n_startup_trials=n_init)
    else:
        chosen = optuna.samplers.RandomSampler(seed=seed)
    return optuna.create_study(direction="maximize", sampler=chosen), optuna.trial.TrialState.FAIL
