"""Every visual pruner with settings that drop something on the tiny models, and the baselines."""

from __future__ import annotations

from typing import Any

import torch

from tokenmill import prune
from tokenmill.prune.information_horizon import InformationHorizon, PruneSchedule
from tokenmill.prune.vflowopt import VFlowOpt, VFlowParams


def scorer(width: int = 32) -> prune.VisionSelectorScorer:
    """A scorer with weights large enough that it prefers something."""
    made = prune.VisionSelectorScorer(width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for weight in made.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    return made.eval()


def cases() -> dict[str, Any]:
    """Name -> method."""
    return {
        "divprune": prune.DivPrune(keep=0.3),
        "divprune newline": prune.DivPrune(keep=0.3, newline="keep"),
        "idpruner": prune.IDPruner(scorer(), keep=0.3),
        "idpruner zoo": prune.IDPruner(keep=0.4, importance="zoo"),
        "zoo-prune": prune.ZOOPrune(keep=0.4),
        "zoo-prune fd": prune.ZOOPrune(keep=0.4, estimator="fd", m=8),
        "entropyprune": prune.EntropyPrune(keep=0.3, layer=1),
        "entropyprune late": prune.EntropyPrune(keep=0.5, layer=3, source="key", score="trace"),
        "information-horizon": InformationHorizon(keep=0.5, layer=2),
        "information-horizon stages": InformationHorizon(
            schedule=PruneSchedule(((1, 0.5, "dart"), (2, 0.3, "divprune"), (3, 0, "drop_all")))
        ),
        "todre": prune.ToDRE(keep=0.5, tau=0.9, depth=0.5),
        "todre some rows": prune.ToDRE(keep=0.5, tau=0.55, depth=0.5, objective="k_center"),
        "vflowopt": VFlowOpt(keep=0.5, params=VFlowParams(m=2.0, t=1.0, alpha=0.3)),
        "vflowopt no recycling": VFlowOpt(keep=0.5, recycle=False),
        "token-correlation-compression": prune.TokenCorrelationCompressor(alpha=0.3, max_tokens=5),
        "random": prune.RandomTokens(keep=0.5),
        "norm": prune.NormTokens(keep=0.3),
        "norm-diverse": prune.NormTokens(keep=0.3, diverse=True),
        "attention": prune.AttentionTopK(keep=0.3, layer=2),
    }
