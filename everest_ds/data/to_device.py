"""Clips on their way to the device: the next batch's are copied while the device computes with this one's.

Only clips: noise and labels are small, and go with the work that reads them (training/objectives.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from everest_ds.data.loader import Batch

BUFFERS = 2  # one is read, one is written


class Source(Protocol):
    """Gives batches; see :class:`everest_ds.data.watch.Batches`."""

    def __next__(self) -> Batch: ...

    def poll(self) -> Batch | None:
        """Return the next batch, or None if it isn't there yet."""

    def close(self) -> None:
        """End."""


class Copy(Protocol):
    """Puts clips on the device, a batch at a time, in turn: ``start``, then ``finish``.

    ``buffers``: what it keeps there.
    """

    buffers: list[Tensor]

    def start(self, clips: Tensor) -> None:
        """Begin to copy; nothing is waited for."""

    def finish(self) -> Tensor:
        """Return the copy, for work that the device is given from now on, up to the next ``finish``."""


class SideStream:
    """Copies on a stream of its own, into two buffers in turn, which stay: no allocator has to wait for a stream.

    Args:
        device: an accelerator.
        backend: torch's module for it, such as ``torch.cuda``.
    """

    def __init__(self, device: torch.device, backend: Any = None) -> None:
        self._device = device
        self._backend = backend or torch.get_device_module(device)
        self._stream = self._backend.Stream(device)
        self.buffers: list[Tensor] = []
        self._turn = self._clips = 0

    def start(self, clips: Tensor) -> None:
        """See :class:`Copy`; no more clips than the first time. The host waits for what isn't in pinned memory."""
        if not self.buffers:
            self._allocate(clips)
        self._turn, self._clips = (self._turn + 1) % BUFFERS, len(clips)
        with self._backend.stream(self._stream):
            self.buffers[self._turn][: self._clips].copy_(clips, non_blocking=True)

    def finish(self) -> Tensor:
        """See :class:`Copy`."""
        computing = self._backend.current_stream(self._device)
        computing.wait_stream(self._stream)
        # The other buffer is free once the device has done what it has been given so far: the passes before this one.
        self._stream.wait_stream(computing)
        return self.buffers[self._turn][: self._clips]

    def _allocate(self, clips: Tensor) -> None:
        for _ in range(BUFFERS):
            buffer = torch.empty(clips.shape, dtype=clips.dtype, device=self._device)
            buffer.record_stream(self._stream)  # at the end, a copy may be under way that nobody will read
            self.buffers.append(buffer)
        # Whoever had this memory before may still be at it.
        self._stream.wait_stream(self._backend.current_stream(self._device))


class DeviceBatches(Iterator[Batch]):
    """Batches with their clips on the device; without a copy, as they come.

    Clips are good until the next ``next``. The order of batches is the source's, and an error in reading one comes with
    the ``next`` that asks for it.

    Args:
        source: of batches.
        copy: to the device; None where that is the host.
    """

    def __init__(self, source: Source, copy: Copy | None) -> None:
        self._source, self._copy = source, copy
        self._ahead: Batch | None = None
        self._error: Exception | None = None

    @classmethod
    def on(cls, device: torch.device, source: Source) -> DeviceBatches:
        """Return a source's batches on a device."""
        return cls(source, None if device.type == "cpu" else SideStream(device))

    def __next__(self) -> Batch:
        if self._copy is None:
            return next(self._source)
        if self._error is not None:
            raise self._error
        batch, self._ahead = self._ahead, None
        if batch is None:
            batch = next(self._source)
            self._copy.start(batch.clips)
        return batch._replace(clips=self._copy.finish())

    def prefetch(self) -> None:
        """Begin to copy the next batch if it is there; the host waits for nothing.

        For when the device has been given this batch's work, and before the host waits for that.
        """
        if self._copy is None or self._ahead is not None or self._error is not None:
            return
        try:
            self._ahead = self._source.poll()
        except Exception as error:
            self._error = error
        if self._ahead is not None:
            self._copy.start(self._ahead.clips)

    @property
    def buffers(self) -> list[Tensor]:
        """What stays on the device, for clips; nothing where that is the host."""
        return [] if self._copy is None else self._copy.buffers

    def close(self) -> None:
        """End the source."""
        self._source.close()
