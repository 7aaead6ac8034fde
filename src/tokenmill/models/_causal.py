"""The type of a loaded model, for type checkers alone: a transformers model that can generate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    class CausalModel(PreTrainedModel):
        """What `models.load` and `models.tiny` return; at run time the class is the model's own."""

        def generate(self, *args: Any, **kwargs: Any) -> Any: ...
