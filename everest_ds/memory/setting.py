"""What ZeRO's memory depends on, read from a resolved DeepSpeed configuration, and how it cuts parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from everest_ds.config.batches import ACCUMULATION
from everest_ds.config.ds_config import precision, zero_stage
from everest_ds.config.ds_zero import NVME, SWAP_BUFFERS
from everest_ds.memory.trace import Parameter

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
FP32_BYTES = 4
NORM_BYTES = 8  # gradient norms accumulate in float64 (DeepSpeed runtime/zero/utils.py, get_norm_dtype)
# DeepSpeed aligns flat buffers to two elements per rank (stage_1_and_2.py, nccl_start_alignment_factor).
_ALIGNMENT = 2
# What is smaller than a page of asynchronous I/O stays in memory, and files end at whole units (swap_tensor/utils.py,
# MIN_AIO_BYTES and AIO_ALIGNED_BYTES).
_LEAST_SWAPPED_BYTES = 2**20
_SWAP_UNIT_BYTES = 1024


@dataclass(frozen=True, kw_only=True)
class ZeroSetting:
    """DeepSpeed's settings that decide about memory; names and defaults are DeepSpeed's (runtime/zero/config.py).

    Sizes of buckets and thresholds count elements. ``rank`` is the rank whose memory is asked for. ``swap_buffers``:
    how many, 0 where the optimizer isn't on NVMe; ``hpz``: ranks that share a second copy of the parameters.
    """

    stage: int
    precision: str
    ranks: int
    rank: int = 0
    on_cpu: bool = False
    accumulation: int = 1
    reduce_bucket: int = 500_000_000
    overlap_comm: bool = False
    contiguous_gradients: bool = True
    offload_optimizer: bool = False
    offload_param: bool = False
    pin_memory: bool = False
    prefetch_bucket: int = 50_000_000
    persistence_threshold: int = 100_000
    max_live: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    sub_group: int = 1_000_000_000
    swap_buffers: int = 0
    least_swapped_bytes: int = _LEAST_SWAPPED_BYTES
    swap_unit: int = _SWAP_UNIT_BYTES // FP32_BYTES
    hpz: int = 1

    @property
    def element_bytes(self) -> int:
        """Bytes of one parameter or gradient element."""
        return ELEMENT_BYTES[self.precision]

    @classmethod
    def read(cls, ds: dict[str, Any], *, ranks: int, on_cpu: bool, rank: int = 0) -> ZeroSetting:
        """Read a resolved DeepSpeed configuration."""
        zero = ds.get("zero_optimization", {})
        optimizer, param = (zero.get(f"offload_{name}") or {} for name in ("optimizer", "param"))
        stage = zero_stage(ds)
        given = {
            "reduce_bucket": "reduce_bucket_size",
            "contiguous_gradients": "contiguous_gradients",
            "prefetch_bucket": "stage3_prefetch_bucket_size",
            "persistence_threshold": "stage3_param_persistence_threshold",
            "max_live": "stage3_max_live_parameters",
            "max_reuse_distance": "stage3_max_reuse_distance",
            "sub_group": "sub_group_size",
            "hpz": "zero_hpz_partition_size",
        }
        numbers = {ours: zero[theirs] for ours, theirs in given.items() if theirs in zero}
        return cls(
            stage=stage,
            precision=precision(ds),
            ranks=ranks,
            rank=rank,
            on_cpu=on_cpu,
            accumulation=ds.get(ACCUMULATION, 1),
            # Unset, DeepSpeed overlaps under stage 3 alone (zero/config.py, overlap_comm_valid).
            overlap_comm=zero.get("overlap_comm", stage == 3),
            offload_optimizer=optimizer.get("device", "none") != "none",
            offload_param=param.get("device", "none") != "none",
            pin_memory=not on_cpu and bool(optimizer.get("pin_memory") or param.get("pin_memory")),
            **(numbers | (_swapping(optimizer, ds.get("aio") or {}) if optimizer.get("device") == NVME else {})),
        )

    def swaps(self, elements: int) -> bool:
        """Whether that many fp32 elements are worth a file (swap_tensor/optimizer_utils.py, is_swappable_tensor)."""
        return bool(self.swap_buffers) and elements * FP32_BYTES >= self.least_swapped_bytes

    def in_swap_units(self, elements: int) -> int:
        """Elements rounded up to whole units of a file (_io_aligned_numel)."""
        return -(-elements // self.swap_unit) * self.swap_unit

    def swapped_gradient(self, elements: int) -> int:
        """Elements of a gradient that go to NVMe; the rest waits in memory (_adjust_for_misaligned_lengths)."""
        return elements // self.swap_unit * self.swap_unit if self.swaps(elements) else 0


def _swapping(optimizer: dict[str, Any], aio: dict[str, Any]) -> dict[str, int]:
    return {
        "swap_buffers": optimizer.get("buffer_count", SWAP_BUFFERS),
        "least_swapped_bytes": max(_LEAST_SWAPPED_BYTES, aio.get("block_size", 0)),
        "swap_unit": _SWAP_UNIT_BYTES * aio.get("intra_op_parallelism", 1) // FP32_BYTES,
    }


@dataclass(frozen=True)
class Piece:
    """The part of a parameter that one rank owns under ZeRO-1 and 2: elements, and of which parameter."""

    parameter: Parameter
    rank: int
    elements: int


@dataclass(frozen=True)
class FlatGroup:
    """A parameter group flattened, padded to 2 x ranks elements, and cut into equal partitions (stages 1 and 2).

    Source: stage_1_and_2.py, DeepSpeedZeroOptimizer.__init__ and initialize_gradient_partition.
    """

    parameters: tuple[Parameter, ...]
    ranks: int

    @property
    def elements(self) -> int:
        """Elements without padding."""
        return sum(p.elements for p in self.parameters)

    @property
    def padded(self) -> int:
        """Elements with padding."""
        unit = _ALIGNMENT * self.ranks
        return -(-self.elements // unit) * unit

    @property
    def partition(self) -> int:
        """Elements of one rank's partition."""
        return self.padded // self.ranks

    def pieces(self) -> dict[str, list[Piece]]:
        """By parameter name, the pieces that partition boundaries cut it into, in order."""
        found: dict[str, list[Piece]] = {}
        start = 0
        for parameter in self.parameters:
            end = start + parameter.elements
            for rank in range(start // self.partition, (end - 1) // self.partition + 1):
                low, high = max(start, rank * self.partition), min(end, (rank + 1) * self.partition)
                found.setdefault(parameter.name, []).append(Piece(parameter, rank, high - low))
            start = end
        return found


def groups_of(parameters: Sequence[Parameter]) -> list[tuple[Parameter, ...]]:
    """The optimizer's parameter groups, in its order."""
    numbers = sorted({p.group for p in parameters})
    return [tuple(p for p in parameters if p.group == number) for number in numbers]


def share(parameter: Parameter, ranks: int) -> int:
    """Elements of a parameter that each rank holds under ZeRO-3, padding included (partition_parameters.py)."""
    return -(-parameter.elements // ranks)


def sub_groups(parameters: Sequence[Parameter], setting: ZeroSetting) -> list[tuple[Parameter, ...]]:
    """Each optimizer group cut once it holds ``sub_group`` elements (stage3.py, _create_fp16_sub_groups)."""
    result: list[tuple[Parameter, ...]] = []
    for group in groups_of(parameters):
        current: list[Parameter] = []
        for parameter in group:
            current.append(parameter)
            if sum(share(p, setting.ranks) for p in current) >= setting.sub_group or parameter is group[-1]:
                result.append(tuple(current))
                current = []
    return result
