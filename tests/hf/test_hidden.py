from __future__ import annotations

from typing import Any

import pytest
import torch

from tokenmill import hf
from tokenmill.models import tiny


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@torch.no_grad()
def test_what_is_captured_gives_the_logits(kind: str) -> None:
    model: Any = tiny(kind)
    ids = torch.arange(1, 9)[None]
    with hf.last_hidden(model) as captured:
        out = model(input_ids=ids, output_hidden_states=True)
        model(input_ids=ids[:, :3], logits_to_keep=1)
    assert [tuple(x.shape) for x in captured] == [(1, 8, 32), (1, 3, 32)]
    assert torch.equal(captured[0], out.hidden_states[-1])
    assert torch.equal(model.get_output_embeddings()(captured[0]), out.logits)


def test_no_hook_is_left_also_after_an_error() -> None:
    model = tiny("llama")
    with pytest.raises(IndexError), hf.last_hidden(model) as captured:
        model(input_ids=torch.tensor([[99]]))
    assert not model.model._forward_hooks
    model(input_ids=torch.tensor([[1]]))
    assert captured == []
