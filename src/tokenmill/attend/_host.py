"""A cache whose keys and values lie on the host, for methods that read few of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from tokenmill.hf.layers import StatefulLayer, stateful_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HostLayer(StatefulLayer):
    """`StatefulLayer` that keeps keys and values on the CPU; what a method keeps beside them stays on the device.

    A forward with several queries gets copies on their device; one with a single query gets the host's tensors, and
    whoever attends moves what it reads.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See `StatefulLayer.update`."""
        device = key_states.device
        keys, values = super().update(key_states.cpu(), value_states.cpu(), *args, **kwargs)
        if key_states.shape[-2] == 1:
            return keys, values
        return keys.to(device), values.to(device)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows ``indices``, wherever they lie."""
        super().batch_select_indices(indices.cpu() if isinstance(indices, torch.Tensor) else indices)


def host_cache(model: PreTrainedModel) -> Cache:
    """An empty cache for ``past_key_values=``: full layers on the host, sliding ones where the model is."""
    cache = stateful_cache(model)
    cache.layers = [HostLayer() if type(layer) is StatefulLayer else layer for layer in cache.layers]
    return cache
