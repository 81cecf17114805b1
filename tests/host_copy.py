"""Clips copied ahead, as on a device, where there is none: ``host_copy.py run/pretrain.py ...`` trains so on CPUs."""

import runpy
import sys

import torch

from everest_ds.data.to_device import DeviceBatches


class HostCopy:
    """A copy into one of two buffers, which stands there at once."""

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []
        self.turn, self.under_way = 0, False

    def start(self, clips: torch.Tensor) -> None:
        assert not self.under_way
        self.buffers = self.buffers or [torch.zeros_like(clips) for _ in range(2)]
        self.turn, self.under_way = 1 - self.turn, True
        self.buffers[self.turn].copy_(clips)

    def finish(self) -> torch.Tensor:
        assert self.under_way
        self.under_way = False
        return self.buffers[self.turn]


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    right = DeviceBatches.on
    DeviceBatches.on = lambda device, source: DeviceBatches(source, HostCopy())
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        DeviceBatches.on = right
