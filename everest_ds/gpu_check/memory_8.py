"""What rank 0 of 8 holds, on one device: through torch's fake process group, which sends nothing.

What other ranks would send is this rank's own part instead: gathered parameters are numbers, and steps are taken.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor

from everest_ds.gpu_check.cases import Asked, Case
from everest_ds.gpu_check.memory import of_settings
from everest_ds.gpu_check.settings import MEMORY_8
from everest_ds.training import ranks

_RANKS = 8


def cases(asked: Asked) -> Iterator[Case]:
    """Every row of the table."""
    join()
    yield from of_settings(MEMORY_8, asked)


def join() -> None:
    """Be rank 0 of 8."""
    # A part of torch's tests: not imported where it isn't needed.
    from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: PLC0415

    world = str(_RANKS)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    dist.init_process_group("fake", rank=0, world_size=_RANKS, store=FakeStore())
    gather, scatter = dist.all_gather_into_tensor, dist.reduce_scatter_tensor

    def all_gather_into_tensor(output_tensor: Tensor, input_tensor: Tensor, *args: Any, **options: Any) -> Any:
        for part in output_tensor.chunk(_RANKS):
            part.copy_(input_tensor)
        return gather(output_tensor, input_tensor, *args, **options)

    def reduce_scatter_tensor(output: Tensor, input: Tensor, *args: Any, **options: Any) -> Any:
        output.copy_(input.chunk(_RANKS)[0])
        return scatter(output, input, *args, **options)

    # Before DeepSpeed looks them up.
    dist.all_gather_into_tensor, dist.reduce_scatter_tensor = all_gather_into_tensor, reduce_scatter_tensor
    ranks.attach_deepspeed()
