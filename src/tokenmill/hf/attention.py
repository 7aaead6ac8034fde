"""Attention functions of our own inside a transformers model: register a pair, attach it, give the model back.

`register` puts an attention function and its mask function under one name in the interfaces of transformers, where it
stays. `attached` switches a model to that name inside a ``with``, for all its layers or for some; the others keep what
the model used before, masks included. What a run changes lives in the caller's ``state`` object, and the link between
a model and its state lives here, keyed by the model's own objects, so that two models never share one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from tokenmill.errors import LimitError, UnsupportedError, unknown_name

from .backends import Backend
from .layout import attention_layers, decoder, layer_types

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

State = TypeVar("State")
Attend = Callable[..., tuple[Tensor, Tensor | None]]
MakeMask = Callable[..., Tensor | None]


def bool_mask(**kwargs: Any) -> Tensor | None:
    """`sdpa_mask` that is always a (B, 1, Q, K) boolean tensor, never ``None``."""
    return sdpa_mask(**{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


MASKS: dict[str, MakeMask] = {"bool": bool_mask, "sdpa": sdpa_mask, "eager": eager_mask}


@dataclass(frozen=True, slots=True)
class Call:
    """What an attention function learns about its call beyond the arguments of transformers.

    Attributes:
        state: the object given to `attached`; ``None`` when the name was set on the model by hand.
        layer_idx: index of the decoder layer.
        inner: ``inner(module, query, key, value, mask, **kwargs)`` runs what this layer would run without us. It takes
            the mask that came in, or any boolean (True = visible) or additive mask of the shapes it is called with.
        past_key_values: the cache of this forward, already updated, or ``None``.
        hidden_states: input of the attention module, (B, Q, hidden).
        position_embeddings: the (cos, sin) of this forward, each (B, Q, rotary).
    """

    state: Any
    layer_idx: int
    inner: Attend
    past_key_values: Cache | None = None
    hidden_states: Tensor | None = None
    position_embeddings: Any = None

    @property
    def cache_layer(self) -> Any:
        """This layer's part of the cache, or ``None`` without a cache."""
        return None if self.past_key_values is None else self.past_key_values.layers[self.layer_idx]


@dataclass(frozen=True, slots=True)
class _Pair:
    attend: Attend
    mask: MakeMask


@dataclass(eq=False)
class _Link:
    """One `attached` block on one model."""

    name: str
    state: Any
    modules: dict[int, nn.Module]
    thread: int = field(default_factory=threading.get_ident)
    # Our mask -> what the layers below us would have received; entries die with the masks.
    below: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    # What the hooks saw of the call that runs in this thread, by id of the module.
    calls: threading.local = field(default_factory=threading.local)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Link:
        return self  # a copied model takes the hooks along; its modules are not ours, so nothing comes of it


@dataclass(eq=False)
class _Chain:
    """The open `attached` blocks on one configuration object, outermost first, over the model's own back-end."""

    config: Any
    original: str | None
    links: list[_Link] = field(default_factory=list)


_PAIRS: dict[str, _Pair] = {}
_CHAINS: dict[int, _Chain] = {}  # id(config) -> chain; a chain holds its config, so the id stays taken
_LOCK = threading.Lock()


def register(name: str, attend: Attend, mask: str | MakeMask = "bool") -> None:
    """Put an attention function and its mask function under one name into transformers; both stay there.

    Args:
        name: a name of our own, for instance ``"tokenmill-hisa"``.
        attend: ``attend(module, query, key, value, attention_mask, *, call, **kwargs)`` -> (output (B, Q, H, D),
            weights or None). query is (B, H, Q, D), key and value (B, G, K, D) after rotation and cache update;
            ``call`` is a `Call`, and ``kwargs`` is whatever transformers passes: ``scaling`` (use it, never
            ``D ** -0.5``), ``dropout``, ``sliding_window``, ``softcap``, ``position_ids`` ...
        mask: ``"bool"`` (always a boolean tensor), ``"sdpa"`` (boolean, or ``None`` where it is trivial), ``"eager"``
            (additive), or a function with the arguments of `transformers.masking_utils.sdpa_mask`.

    Raises:
        LimitError: a name that transformers gives a meaning to or that another function has, an unknown ``mask``.
    """
    reserved = ("flash", "sdpa", "flex", "eager", "paged", "|", "/")
    if not name or any(part in name for part in reserved):
        raise LimitError("register", "name", name, f"a new name without any of {', '.join(reserved)}")
    if isinstance(mask, str) and mask not in MASKS:
        raise unknown_name("register", "mask", mask, MASKS)
    pair = _Pair(attend, MASKS[mask] if isinstance(mask, str) else mask)
    known = _PAIRS.get(name)
    if known is not None and known != pair:
        raise LimitError("register", "name", name, "a new name, and another function has this one")
    if known is None and name in AttentionInterface().valid_keys():
        raise LimitError("register", "name", name, "a new name, and transformers already knows this one")
    _PAIRS[name] = pair
    AttentionInterface.register(name, partial(_attend, name))
    AttentionMaskInterface.register(name, partial(_mask, name))


@contextmanager
def attached(
    model: PreTrainedModel, name: str, *, layers: Iterable[int] | str | None = None, state: State = None
) -> Generator[State, None, None]:
    """Let the decoder's layers attend through the pair ``name``; on exit the model is as it was.

    Blocks nest: the inner one sees the outer one as ``call.inner``, and the layers it leaves out keep the outer one's
    function. A multimodal model keeps its own attention in its towers. One attachment serves one run at a time; a
    thread of the caller (streaming) may do the running.

    Args:
        model: a decoder-only model whose attention goes through AttentionInterface.
        name: given to `register` before.
        layers: indices of the layers to switch, or a layer type (``"full_attention"``); ``None`` means all.
        state: passed to the attention function as ``call.state``, and yielded.

    Raises:
        LimitError: unknown name, no layer or one that the model does not have.
        UnsupportedError: the model cannot be switched, or another thread has attached to it.
    """
    if name not in _PAIRS:
        raise unknown_name("attached", "name", name, _PAIRS)
    chosen = _choose(model, layers)
    link = _Link(name, state, {id(module): module for module in chosen})
    with ExitStack() as undo:
        _push(_configs(model), link)
        undo.callback(_pop, link)
        for module in chosen:
            enter = module.register_forward_pre_hook(partial(_remember, link), with_kwargs=True)
            undo.callback(enter.remove)
            leave = module.register_forward_hook(partial(_forget, link), always_call=True)
            undo.callback(leave.remove)
        yield state


def _choose(model: PreTrainedModel, layers: Iterable[int] | str | None) -> list[Any]:
    modules = {module.layer_idx: module for module in attention_layers(model)}
    if layers is None:
        return list(modules.values())
    if isinstance(layers, str):
        types = layer_types(model)
        chosen = [index for index in modules if types[index] == layers]
        if not chosen:
            raise unknown_name("attached", "layers", layers, {types[index] for index in modules})
    else:
        chosen = sorted(set(layers))
        if not chosen or any(isinstance(index, bool) or index not in modules for index in chosen):
            raise LimitError("attached", "layers", chosen, f"among the model's attention layers {sorted(modules)}")
    return [modules[index] for index in chosen]


def _configs(model: PreTrainedModel) -> list[Any]:
    """Every configuration object that the decoder's layers or the makers of its masks read."""
    inner = decoder(model)
    found = {id(module.config): module.config for module in attention_layers(model)}
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and any(part is inner for part in module.modules()):
            found[id(module.config)] = module.config
    return list(found.values())


def _push(configs: list[Any], link: _Link) -> None:
    with _LOCK:
        for other in (x for c in configs if id(c) in _CHAINS for x in _CHAINS[id(c)].links):
            if other.thread != link.thread and other.modules.keys() & link.modules.keys():
                raise UnsupportedError(
                    "attached",
                    f"another thread has attached {other.name!r} to this model",
                    "Give each thread its own copy of the model.",
                )
        for config in configs:
            chain = _CHAINS.setdefault(id(config), _Chain(config, config._attn_implementation_internal))
            chain.links.append(link)
            config._attn_implementation_internal = link.name


def _pop(link: _Link) -> None:
    with _LOCK:
        for key, chain in list(_CHAINS.items()):
            if link not in chain.links:
                continue
            # Blocks may end in another order than they began, so the one that ends leaves the middle of the chain.
            chain.links.remove(link)
            chain.config._attn_implementation_internal = chain.links[-1].name if chain.links else chain.original
            if not chain.links:
                del _CHAINS[key]


def _remember(link: _Link, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    hidden = kwargs.get("hidden_states", args[0] if args else None)
    link.calls.__dict__[str(id(module))] = {
        "hidden_states": hidden,
        "past_key_values": kwargs.get("past_key_values"),
        "position_embeddings": kwargs.get("position_embeddings"),
    }


def _forget(link: _Link, module: nn.Module, _args: Any, _output: Any) -> None:
    link.calls.__dict__.pop(str(id(module)), None)


def _links(name: str, config: Any) -> tuple[tuple[_Link, ...], Backend]:
    """The blocks that are open on a configuration up to the last one called ``name``, and what lies below them."""
    chain = _CHAINS.get(id(config))
    if chain is None:
        return (), Backend("sdpa")
    links = tuple(chain.links)
    while links and links[-1].name != name:
        links = links[:-1]
    return links, Backend(chain.original)


def _attend(
    name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    links, base = _links(name, module.config)
    if not links:  # the name was set on the model without `attached`
        call = Call(None, _index(module), partial(_descend, (), base))
        return _PAIRS[name].attend(module, query, key, value, mask, call=call, **kwargs)
    return _run(links, base, module, query, key, value, mask, **kwargs)


def _run(
    links: tuple[_Link, ...],
    base: Backend,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    link = links[-1]
    inner = partial(_descend, links, base)
    if id(module) not in link.modules:
        return inner(module, query, key, value, mask, **kwargs)
    seen = link.calls.__dict__.get(str(id(module)), {})
    call = Call(link.state, _index(module), inner, **seen)
    return _PAIRS[link.name].attend(module, query, key, value, mask, call=call, **kwargs)


def _descend(
    links: tuple[_Link, ...],
    base: Backend,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run what lies below the last of ``links``, with the mask in the form that it expects."""
    made = links[-1].below.get(mask) if links and mask is not None else None
    if made is not None:
        mask = made.get()
    if len(links) > 1:
        return _run(links[:-1], base, module, query, key, value, mask, **kwargs)
    return base.attend(module, query, key, value, mask, own_mask=made is not None, **kwargs)


def _index(module: nn.Module) -> int:
    index = module.layer_idx
    assert isinstance(index, int)
    return index


class _Lazy:
    """A mask that is made when a layer first asks for it: most methods never do."""

    def __init__(self, make: Callable[[], Tensor | None]) -> None:
        self._make: Callable[[], Tensor | None] | None = make
        self._mask: Tensor | None = None

    def get(self) -> Tensor | None:
        if self._make is not None:
            self._mask, self._make = self._make(), None
        return self._mask


def _mask(name: str, **kwargs: Any) -> Tensor | None:
    links, base = _links(name, kwargs.get("config"))
    return _make_mask(links, base, kwargs) if links else _PAIRS[name].mask(**kwargs)


def _make_mask(links: tuple[_Link, ...], base: Backend, kwargs: dict[str, Any]) -> Tensor | None:
    if not links:
        return base.mask(**kwargs)
    mask = _PAIRS[links[-1].name].mask(**kwargs)
    if mask is not None:
        # Static caches hand out the very counter that their update moves on.
        later = {k: v.clone() if k == "q_offset" and isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        links[-1].below[mask] = _Lazy(partial(_make_mask, links[:-1], base, later))
    return mask
