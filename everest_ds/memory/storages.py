"""Live tensor storages, counted by weak reference: the one ruler for what is traced and for what really runs.

A storage counts from the operator that returns it until nothing refers to it. Views and aliases share a storage, so
they are never new memory. What an operator's kernel allocates and frees inside itself is not seen.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Observer(Protocol):
    """Hears of storages."""

    def born(self, block: int, size_bytes: int) -> None:
        """A storage appeared; ``block`` numbers it."""

    def died(self, block: int) -> None:
        """A storage is gone."""


class StorageWatch(TorchDispatchMode):
    """Numbers every storage that an operator returns and tells an observer of its birth and death."""

    def __init__(self, observer: Observer, device_type: str) -> None:
        """``device_type``: of the storages that count; fake tensors keep theirs on "meta"."""
        super().__init__()
        self._observer = observer
        self._device_type = device_type
        self._blocks: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        self._next = 0

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, then look at what it returned."""
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self.watch(value)
        return out

    def watch(self, tensor: Tensor) -> int:
        """Start counting a tensor's storage, if it isn't counted already.

        Returns:
            Its block number; -1 if it lies on another device.
        """
        storage = tensor.untyped_storage()
        address = storage._cdata
        if storage.device.type != self._device_type:
            return -1
        if address not in self._blocks:
            block, self._next = self._next, self._next + 1
            self._blocks[address] = block
            self._references[address] = weakref.ref(storage, partial(self._died, address))
            self._observer.born(block, storage.nbytes())
        return self._blocks[address]

    def ignore(self, tensor: Tensor) -> None:
        """Treat a tensor's storage as known, without telling the observer of it."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._blocks:
            self._blocks[storage._cdata] = -1
            self._references[storage._cdata] = weakref.ref(storage, partial(self._died, storage._cdata))

    def _died(self, address: int, _: Any) -> None:
        self._references.pop(address, None)
        block = self._blocks.pop(address, -1)
        if block >= 0:
            self._observer.died(block)


def tensors_in_process() -> Iterable[Tensor]:
    """Yield every dense tensor that Python's garbage collector knows of."""
    for thing in gc.get_objects():
        # type() rather than isinstance(): some lazy proxies answer isinstance by importing what they stand for.
        if issubclass(type(thing), Tensor) and thing.layout == torch.strided:
            yield thing


def storages_in_process(device_type: str = "cpu") -> list[weakref.ref[Any]]:
    """Return weak references to all tensor storages alive in the process on one kind of device, each once."""
    found: dict[int, weakref.ref[Any]] = {}
    for tensor in tensors_in_process():
        storage = tensor.untyped_storage()
        if storage.device.type == device_type:
            found[storage._cdata] = weakref.ref(storage)
    return list(found.values())


def held_bytes(device_type: str = "cpu") -> int:
    """Bytes of all tensor storages alive in the process on one kind of device, each storage once."""
    sizes: dict[int, int] = {}
    for tensor in tensors_in_process():
        storage = tensor.untyped_storage()
        if storage.device.type == device_type:
            sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())
