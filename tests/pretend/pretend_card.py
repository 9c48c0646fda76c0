"""A pretend card: a device of torch's own kind for others' devices, with the processor's numbers.

A tensor there is one of the processor's in a shell that says another device. As on a real card, a
function that is given tensors of both raises RuntimeError, and none there is read as an array. What
a real card alone can show (its memory, speed and rounding) this cannot."""

from __future__ import annotations

import os

import torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _DummyBackendModule
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as set_up


class Module(_DummyBackendModule):
    """What torch asks of `torch.pretend`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


set_up("pretend", Module())
CARD, CPU = torch.device("pretend", 0), torch.device("cpu")
LIBRARY = torch.library.Library("aten", "IMPL")
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}  # go from one device to the other
# A tensor there may be asked for places that the processor names, as on a real card.
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
INDEXED |= {aten._index_put_impl_.default}
ALIKE = aten._has_compatible_shallow_copy_type.default  # may the one's content be the other's?


class OnCard(torch.Tensor):
    """A tensor on the card; `values`: what it holds, on the processor."""

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> OnCard:
        about = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        about |= {"dtype": values.dtype, "device": CARD}
        with torch._C._InferenceMode(False):  # torch lets no shell be a view there
            self = torch.Tensor._make_wrapper_subclass(cls, values.shape, **about)
        self.values = values
        return self

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return call(function, args, kwargs or {})

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, other: OnCard) -> None:
        torch.Tensor.data.__set__(self, other)
        self.values = other.values

    def untyped_storage(self):
        return self.values.untyped_storage()

    def tolist(self):
        return self.cpu().tolist()

    def __format__(self, form: str) -> str:
        return format(self.detach().cpu(), form)

    def __repr__(self, **_) -> str:
        return f"OnCard({self.detach().cpu()})"

    def __reduce_ex__(self, protocol: int):
        return self.detach().cpu().__reduce_ex__(protocol)  # no file knows such a device


def call(function, args: tuple, kwargs: dict):
    """The function on the processor. What it makes is on the card, unless it copies from there."""
    if function is ALIKE:
        return all(isinstance(one, OnCard) for one in args)
    given: dict[int, OnCard] = {}  # by their values: what changes in place is what was given
    others: list[torch.Tensor] = []
    to = [CARD]

    def bare(one):
        if isinstance(one, OnCard):
            given[id(one.values)] = one
            return one.values
        if isinstance(one, torch.Tensor):
            others.append(one)
        elif isinstance(one, torch.device):
            to.append(one)
            return CPU
        elif isinstance(one, list | tuple):
            return type(one)([bare(part) for part in one])
        return one

    def shell(one):
        if not isinstance(one, torch.Tensor) or (own := given.get(id(one))) is None:
            return OnCard(one) if isinstance(one, torch.Tensor) else one
        assert own.shape == one.shape, f"{function} changed a shape in place: not pretended here"
        return own

    values = [bare(one) for one in args]
    named = {name: bare(one) for name, one in kwargs.items()}
    check(function, list(given.values()), others, args)
    found = function(*values, **named)
    if to[-1].type != CARD.type:
        return found
    return shell(found) if isinstance(found, torch.Tensor) else tree_map(shell, found)


def check(function, cards: list, others: list, args: tuple) -> None:
    """RuntimeError where tensors of both devices meet; a processor's number (no dimension) may."""
    if not cards or not (others := [one for one in others if one.dim()]) or function in COPIES:
        return
    if function in INDEXED and isinstance(args[0], OnCard):
        places = {id(one) for one in args[1]}
        others = [one for one in others if id(one) not in places]
    if others:
        shapes = " and ".join(str(tuple(one.shape)) for one in others)
        why = "Expected all tensors to be on the same device"
        raise RuntimeError(f"{why}, but {function} got {shapes} on the processor, others on a card")


def made(function):
    """The function, which makes a tensor from nothing, on the card."""
    return lambda *args, **named: call(function, args, named | {"device": CARD})


def copied(source: torch.Tensor, to: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    bare = [one.values if isinstance(one, OnCard) else one for one in (to, source)]
    bare[0].copy_(bare[1])
    return to


# From nothing: these, and what torch makes of these (zeros, ones, randn, ...).
for name in ("empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step"):
    packet, _, overload = name.partition(".")
    LIBRARY.impl(name, made(getattr(getattr(aten, packet), overload or "default")), "PrivateUse1")
LIBRARY.impl("_copy_from", copied, "PrivateUse1")


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **more):
    """torch's own, which takes the slow way on a device that it does not know: here the
    processor's, where that is possible."""
    if dropout_p or query.dim() != 4 or not isinstance(query, OnCard):
        return SLOW(query, key, value, attn_mask, dropout_p, is_causal, **more)
    if more.pop("enable_gqa", False):
        times = query.shape[1] // key.shape[1]
        key, value = (one.repeat_interleave(times, 1) for one in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        hidden = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = hidden.masked_fill_(attn_mask.logical_not(), -torch.inf)
    fast = aten._scaled_dot_product_flash_attention_for_cpu
    return fast(query, key, value, is_causal=is_causal, attn_mask=attn_mask, **more)[0]


SLOW = torch.nn.functional.scaled_dot_product_attention


def install(loading) -> None:
    """The package's models (module `loading`), and what trains them, are on the card from now on.
    Accelerate and the Trainer read the variable."""
    from transformers import TrainingArguments

    after = TrainingArguments.__post_init__

    def on_card(arguments) -> None:
        arguments.use_cpu = False
        after(arguments)

    TrainingArguments.__post_init__ = on_card
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(CARD)
    torch.autograd.set_multithreading_enabled(False)  # a thread a device needs a real one
    torch.nn.functional.scaled_dot_product_attention = attention
    loading.device = lambda: CARD
