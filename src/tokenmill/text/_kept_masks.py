"""Masks over a vocabulary that are remembered, the ones used last, as bits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np
from numpy.typing import NDArray


class KeptMasks:
    """Masks (V,) bool by what they depend on: ``kept`` of them, V / 8 bytes each."""

    def __init__(self, size: int, *, kept: int) -> None:
        self._size, self._kept = size, kept
        self._bits: OrderedDict[Hashable, NDArray[np.uint8]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], NDArray[np.bool_]]) -> NDArray[np.bool_]:
        """The mask of ``key``, made when it is not there; a new array each time."""
        if key in self._bits:
            self._bits.move_to_end(key)
        else:
            self._bits[key] = np.packbits(make())
            if len(self._bits) > self._kept:
                self._bits.popitem(last=False)
        return np.unpackbits(self._bits[key], count=self._size).view(np.bool_)
