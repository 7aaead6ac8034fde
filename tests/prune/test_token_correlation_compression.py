from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch

from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.hf.tower import TowerLayer
from tokenmill.hf.vision import encode
from tokenmill.prune import (
    TokenCorrelationCompressor,
    information_density,
    iqr_outliers,
    patch_similarity,
    sample_local,
)
from tokenmill.prune._attention import cls_attention, patch_attention

from . import vlms


def layer(keys: torch.Tensor, seed: int = 0) -> TowerLayer:
    """A tower layer with these keys (B, H, N, d) and random queries."""
    g = torch.Generator().manual_seed(seed)
    b, h, _, d = keys.shape
    return TowerLayer(torch.randn(keys.shape, generator=g), keys, torch.randn(b, h, d, generator=g), d**-0.5)


def groups(sizes: list[int], d: int = 40) -> torch.Tensor:
    """Keys (1, 1, N, d): groups of copies, orthogonal to each other."""
    return torch.eye(d)[torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))][None, None]


@pytest.mark.prop("token-correlation-compression", 1)
def test_a_blank_crop_keeps_the_minimum() -> None:
    keys = torch.ones(1, 2, 20, 5)
    blank = TowerLayer(keys, keys, torch.ones(1, 2, 5), 1.0)
    x = torch.randn(1, 20, 7)
    out = TokenCorrelationCompressor(min_tokens=3)(x, blank, blank)
    assert out.density.tolist() == [0.0]
    assert out.counts.tolist() == [3]


@pytest.mark.prop("token-correlation-compression", 2)
def test_orthogonal_keys_keep_everything() -> None:
    keys = layer(groups([1] * 16))
    x = torch.randn(1, 16, 7)
    out = TokenCorrelationCompressor()(x, keys, keys)
    assert out.density.tolist() == [1.0]
    assert torch.equal(out.items[0][1], x[0])
    assert out.ratio == 1.0


@pytest.mark.prop("token-correlation-compression", 3)
@pytest.mark.parametrize(("size", "count"), [(4, 5), (2, 10), (5, 4), (10, 2)])
def test_the_threshold_of_lookalikes_is_sharp(size: int, count: int) -> None:
    n = size * count
    sim = patch_similarity(groups([size] * count))
    below, at = (size - 1.5) / n, (size - 1) / n
    assert float(information_density(sim, 0.7, max(below, 0.0))[0]) == (0.0 if below >= 0 else 1.0)
    assert float(information_density(sim, 0.7, at)[0]) == 1.0


def test_hand_checked_density() -> None:
    sim = patch_similarity(groups([6, 1, 1, 1, 1]))
    density, redundant = information_density(sim, 0.7, 0.4)
    assert float(density) == pytest.approx(0.4)
    assert redundant[0].tolist() == [True] * 6 + [False] * 4
    assert float(information_density(sim, 0.7, 0.5)[0]) == 1.0


@pytest.mark.prop("token-correlation-compression", 4)
def test_density_is_monotone() -> None:
    keys = torch.randn(1, 2, 40, 4, generator=torch.Generator().manual_seed(0))
    sim = patch_similarity(keys)
    by_alpha = [float(information_density(sim, a / 20, 0.1)[0]) for a in range(1, 21)]
    by_beta = [float(information_density(sim, 0.5, b / 20)[0]) for b in range(20)]
    for curve in (by_alpha, by_beta):
        assert curve == sorted(curve)
        assert all(0 <= d <= 1 and abs(d * 40 - round(d * 40)) < 1e-4 for d in curve)
    assert by_alpha[0] < by_alpha[-1]


@pytest.mark.prop("token-correlation-compression", 5)
def test_permutations_and_scales_of_keys() -> None:
    g = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 1, 30, 6, generator=g)
    shuffle = torch.randperm(30, generator=g)
    density, redundant = information_density(patch_similarity(keys), 0.3)
    turned, moved = information_density(patch_similarity(keys[:, :, shuffle]), 0.3)
    assert float(density) == float(turned)
    assert torch.equal(redundant[:, shuffle], moved)
    scaled = keys * (torch.rand(1, 1, 30, 1, generator=g) + 0.1)
    assert torch.allclose(patch_similarity(scaled), patch_similarity(keys), atol=1e-6)
    one, other = layer(keys), TowerLayer(keys, keys[:, :, shuffle], layer(keys).cls_query, 6**-0.5)
    assert torch.allclose(cls_attention(one)[:, shuffle], cls_attention(other), atol=1e-6)


@pytest.mark.prop("token-correlation-compression", 6)
def test_outliers_are_numpys() -> None:
    a = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 2, 2, 10.0]])
    assert iqr_outliers(a).nonzero()[:, 1].tolist() == [9]
    assert not iqr_outliers(torch.full((1, 9), 0.3)).any()
    for seed in range(40):
        x = torch.rand(3, 25, generator=torch.Generator().manual_seed(seed)) ** 4
        q1, q3 = np.percentile(x.numpy(), [25, 75], axis=1)
        want = x.numpy() > (q3 + 1.5 * (q3 - q1) + 1e-8)[:, None]
        assert (iqr_outliers(x).numpy() == want).all()
        far = torch.cat([x[:, :24] * 0 + torch.linspace(0, 1, 24), torch.full((3, 1), 99.0)], 1)
        assert iqr_outliers(far).nonzero()[:, 1].tolist() == [24] * 3


@pytest.mark.prop("token-correlation-compression", 7)
def test_draws_follow_the_law_of_successive_sampling() -> None:
    assert successive([0.5, 0.3, 0.2], 2) == pytest.approx([0.839286, 0.675, 0.485714], abs=1e-6)
    p = [0.35, 0.25, 0.15, 0.12, 0.08, 0.05]
    want = successive(p, 2)
    generator = torch.Generator().manual_seed(1)
    many = torch.tensor(p).expand(20_000, -1)
    kept = sample_local(many, torch.full((20_000,), 2), "multinomial", generator)
    assert (kept.sum(1) == 2).all()
    for share, chance in zip(kept.double().mean(0).tolist(), want, strict=True):
        assert abs(share - chance) < 3 * (chance * (1 - chance) / 20_000) ** 0.5 + 1e-9
    zeros = torch.tensor([[0.5, 0.0, 0.5, 0.0]])
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        assert sample_local(zeros, torch.tensor([2]), "multinomial", g)[0].tolist() == [True, False, True, False]
        assert int(sample_local(zeros, torch.tensor([4]), "multinomial", g).sum()) == 4
    with pytest.raises(LimitError, match="generator"):
        sample_local(zeros, torch.tensor([2]), "multinomial")


def successive(p: list[float], n: int) -> list[float]:
    """Inclusion probabilities of drawing n times without putting back, by enumeration."""
    found = [0.0] * len(p)
    for order in permutations(range(len(p)), n):
        chance, left = 1.0, 1.0
        for i in order:
            chance *= p[i] / left
            left -= p[i]
        for i in order:
            found[i] += chance
    return found


@pytest.mark.prop("token-correlation-compression", 8)
def test_deterministic_modes() -> None:
    a = torch.rand(3, 12, generator=torch.Generator().manual_seed(0))
    n = torch.tensor([0, 4, 12])
    kept = sample_local(a, n)
    for row, count in enumerate(n.tolist()):
        assert set(kept[row].nonzero()[:, 0].tolist()) == set(a[row].topk(count).indices.tolist())
    even = sample_local(torch.full((1, 12), 1 / 12), torch.tensor([4]), "systematic")
    assert even[0].nonzero()[:, 0].diff().tolist() == [3, 3, 3]
    with pytest.raises(LimitError, match="N=12"):
        sample_local(a, torch.tensor([0, 0, 13]))


@pytest.mark.prop("token-correlation-compression", 9)
def test_union_of_local_and_global() -> None:
    keys = torch.randn(2, 3, 50, 6, generator=torch.Generator().manual_seed(0))
    low, deep = layer(keys), layer(5 * keys, seed=1)
    x = torch.randn(2, 50, 4)
    out = TokenCorrelationCompressor(alpha=0.2, beta=0.05)(x, low, deep)
    outlier = iqr_outliers(cls_attention(deep))
    assert outlier.any()
    for crop, (at, features) in enumerate(out.items):
        assert (at.diff() > 0).all()
        assert set(outlier[crop].nonzero()[:, 0].tolist()) <= set(at.tolist())
        local = round(float(out.density[crop]) * 50)
        assert len(at) <= max(1, local) + int(outlier[crop].sum())
        assert torch.equal(features, x[crop, at])
    capped = TokenCorrelationCompressor(alpha=0.2, beta=0.05, max_tokens=6)(x, low, deep)
    assert (capped.counts <= 6).all()
    assert (TokenCorrelationCompressor(alpha=0.2, beta=0.05, max_global=0)(x, low, deep).counts <= out.counts).all()
    padded, mask = out.as_padded()
    assert mask.sum(1).tolist() == out.counts.tolist()
    assert torch.equal(padded[1, mask[1]], out.items[1][1])


@pytest.mark.prop("token-correlation-compression", 10)
def test_merged_cells() -> None:
    model, inputs = vlms.model("qwen2_5_vl"), vlms.inputs("qwen2_5_vl")
    method = TokenCorrelationCompressor(alpha=0.3, beta=0.05)
    with torch.no_grad():
        pruned = method.prepare(model, inputs)
        visuals = encode("test", model, inputs, tower_layers=method.tower_layers(model)).visuals
    for visual, kept in zip(visuals, pruned.report, strict=True):
        assert len(kept.keep) <= len(visual)
        low = visual.tower[method.layers_of(model)[0]]
        _, redundant = information_density(patch_similarity(low.keys), 0.3, 0.05)
        # Four patches in a row belong to one token; it is redundant when all of them are.
        cells = redundant.view(-1, 4).all(1)
        assert len(kept.keep) >= max(1, round(float(1 - cells.float().mean()) * len(visual)))
    keys = torch.randn(1, 2, 20, 6, generator=torch.Generator().manual_seed(0))
    one = layer(keys)
    plain, _ = method.masks(one, one)
    grouped, _ = method.masks(one, one, pool=lambda values, _how: values)
    assert torch.equal(plain, grouped)


@pytest.mark.prop("token-correlation-compression", 11)
@pytest.mark.parametrize("mode", ["topk", "multinomial", "systematic"])
def test_crops_do_not_depend_on_each_other(mode: Any) -> None:
    keys = torch.randn(4, 2, 30, 5, generator=torch.Generator().manual_seed(0))
    whole = layer(keys)
    method = TokenCorrelationCompressor(alpha=0.2, beta=0.05, mode=mode)
    together, _ = method.masks(whole, whole)
    assert whole.cls_query is not None
    for crop in range(4):
        at = slice(crop, crop + 1)
        alone = TowerLayer(whole.queries[at], whole.keys[at], whole.cls_query[at], whole.scale)
        assert torch.equal(method.masks(alone, alone, first=crop)[0], together[at])


@pytest.mark.prop("token-correlation-compression", 12)
def test_the_whole_picture_passes() -> None:
    model, inputs = vlms.model("llava_next"), vlms.inputs("llava_next", rows=1)
    method = TokenCorrelationCompressor(alpha=0.2, beta=0.0, max_tokens=2)
    with torch.no_grad():
        kept = method.prepare(model, inputs).report[0].keep.tolist()
        less = method.__class__(alpha=0.2, beta=0.0, max_tokens=2, bypass_global=False).prepare(model, inputs)
    assert kept[:16] == list(range(16))
    newlines = [16 + 9 * r + 8 for r in range(6)]
    assert set(newlines) <= set(kept)
    assert len(kept) <= 16 + 6 + 4 * 2
    assert len(less.report[0].keep) < len(kept)


@pytest.mark.prop("token-correlation-compression", 13)
@pytest.mark.parametrize("kind", ["llava", "llava_next", "internvl"])
def test_hooked_attention_is_the_layers_own(kind: str) -> None:
    """Of a tower with a class token, from its eager implementation; our rows leave the class token's key out."""
    model, inputs = vlms.model(kind, attn="eager"), vlms.inputs(kind, rows=1, images=(1,))
    inner = model.model
    found = []
    attentions = [m for m in inner.vision_tower.modules() if hasattr(m, "q_proj")]
    handle = attentions[1].register_forward_hook(lambda _m, _a, out: found.append(out[1]))
    with torch.no_grad():
        (visual,) = encode("test", model, inputs, tower_layers=(1,)).visuals
    handle.remove()
    weights = found[0]
    assert weights is not None
    ours = visual.tower[1]
    rows = weights[:, :, 0, 1:]
    rows = (rows / rows.sum(-1, keepdim=True)).mean(1)
    assert torch.allclose(cls_attention(ours), rows, atol=1e-5)
    patches = weights[:, :, 1:, 1:]
    patches = (patches / patches.sum(-1, keepdim=True)).mean(1)
    assert torch.allclose(patch_attention(ours), patches, atol=1e-5)


def test_qwens_full_layer_is_its_own_attention() -> None:
    model, inputs = vlms.model("qwen2_5_vl", attn="eager"), vlms.inputs("qwen2_5_vl", rows=1, images=(1,))
    found: list[torch.Tensor] = []
    block = model.model.visual.blocks[1].attn
    with torch.no_grad():
        (visual,) = encode("test", model, inputs, tower_layers=(1,)).visuals
        handle = block.proj.register_forward_pre_hook(lambda _m, args: found.append(args[0]))
        values: list[torch.Tensor] = []
        other = block.qkv.register_forward_hook(lambda _m, _a, out: values.append(out))
        model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    handle.remove()
    other.remove()
    tower = visual.tower[1]
    weights = (tower.queries @ tower.keys.transpose(2, 3) * tower.scale).softmax(-1)[0]  # (H, P, P) in token order
    value = values[0].unflatten(-1, (3, 2, -1))[:, 2]  # (P, H, d) in window order
    # The order of tokens against windows, from the encoder's own input.
    module = type(model.model.visual).__module__
    import sys

    windows, _ = sys.modules[module].get_vision_window_index(
        inputs["image_grid_thw"], spatial_merge_size=2, window_size=16, patch_size=4, kwargs={}
    )
    back = torch.argsort(torch.as_tensor(windows))
    patches = (back[:, None] * 4 + torch.arange(4)).flatten()
    mixed = torch.einsum("hpq,qhd->phd", weights, value[patches]).flatten(1)
    assert torch.allclose(mixed, found[0].view(64, -1)[patches], atol=1e-5)


def test_one_token_and_bad_input() -> None:
    density, _ = information_density(torch.ones(1, 1, 1))
    assert float(density) == 1.0
    keys = torch.randn(2, 1, 5, 4)
    keys[1, 0, 2, 2] = torch.nan
    with pytest.raises(LimitError, match=r"crop.* at 1"):
        patch_similarity(keys)
    for name, value in {"alpha": 0.0, "beta": 1.0, "iqr_factor": 0.0, "min_tokens": 0, "max_tokens": 0}.items():
        with pytest.raises(LimitError, match=name):
            TokenCorrelationCompressor(**{name: value})  # pyright: ignore[reportArgumentType]
    with pytest.raises(LimitError, match="low_layer"):
        TokenCorrelationCompressor(low_layer=7).prepare(vlms.model("llava"), vlms.inputs("llava"))
    model, inputs = vlms.model("llava_onevision"), vlms.inputs("llava_onevision")
    with pytest.raises(UnsupportedError, match="class token"):
        TokenCorrelationCompressor(cls="token").prepare(model, inputs)
    with torch.no_grad():
        assert TokenCorrelationCompressor(cls="mean", alpha=0.3).prepare(model, inputs).report


def test_padding_counts_nowhere() -> None:
    keys = torch.cat([groups([6, 1, 1, 1, 1]), torch.ones(1, 1, 5, 40)], 2)
    valid = torch.arange(15)[None] < 10
    density, redundant = information_density(patch_similarity(keys), 0.7, 0.4, valid=valid)
    assert float(density) == pytest.approx(0.4)
    assert not redundant[0, 10:].any()
