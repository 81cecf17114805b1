"""Named GPUs: memory and dense peak rates from their data sheets; and how a capacity is written.

GB is 1e9 bytes, GiB is 2**30. Data sheets say GB, and a named GPU has what its data sheet says: a little less than the
driver reports (an "80 GB" A100 shows some 79 GiB), so a plan that fits a named GPU fits the card.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from everest_ds.config.errors import UserError, nearest

GB = 10**9
GIB = 2**30
MIB = 2**20
_UNITS = {"GB": GB, "GIB": GIB, "MB": 10**6, "MIB": MIB, "TB": 10**12, "TIB": 2**40, "B": 1}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([A-Za-z]+)\s*")
_TERA = 10**12
_OTHER_KINDS = ("PCIE", "NVL", "MIG")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One row: ``rates`` are dense peaks in FLOP/s by precision, accumulating in fp32; a precision it lacks is absent.

    Rates of fp32 are those of the CUDA cores: torch's matrix products use TF32 only when told to.
    """

    name: str
    memory_bytes: int
    rates: Mapping[str, float]
    source: str


def _gpu(name: str, gigabytes: int, source: str, *, fp32: float, fp16: float, bf16: float | None) -> Gpu:
    teraflops = {"fp32": fp32, "fp16": fp16} | ({} if bf16 is None else {"bf16": bf16})
    rates = {precision: rate * _TERA for precision, rate in teraflops.items()}
    return Gpu(name=name, memory_bytes=gigabytes * GB, rates=rates, source=source)


_A100 = "NVIDIA A100 Tensor Core GPU data sheet (SXM)"
_HOPPER = "bf16 and fp16 printed with sparsity as 1,979 TFLOPS: half of it is dense"

# Sparse rates on the sheets are twice the dense ones and not used.
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("A100-40", 40, _A100, fp32=19.5, fp16=312, bf16=312),
        _gpu("A100-80", 80, _A100, fp32=19.5, fp16=312, bf16=312),
        _gpu("H100", 80, f"NVIDIA H100 data sheet (SXM); {_HOPPER}", fp32=67, fp16=989.5, bf16=989.5),
        _gpu("H200", 141, f"NVIDIA H200 data sheet (SXM); {_HOPPER}", fp32=67, fp16=989.5, bf16=989.5),
        _gpu(
            "A6000",
            48,
            "NVIDIA RTX A6000 data sheet; tensor rate printed with sparsity as 309.7 TFLOPS: half of it is dense",
            fp32=38.7,
            fp16=154.8,
            bf16=154.8,
        ),
        _gpu("RTX3090", 24, "NVIDIA Ampere GA102 whitepaper, appendix A, fp32 accumulate", fp32=35.6, fp16=71, bf16=71),
        _gpu(
            "RTX4090",
            24,
            "NVIDIA Ada architecture whitepaper, appendix A, fp32 accumulate",
            fp32=82.6,
            fp16=165.2,
            bf16=165.2,
        ),
        _gpu("L40S", 48, "NVIDIA L40S data sheet", fp32=91.6, fp16=362.05, bf16=362.05),
        _gpu("V100-32", 32, "NVIDIA V100 data sheet (SXM2); no bf16", fp32=15.7, fp16=125, bf16=None),
    )
}


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """A device's memory, bytes; ``gpu`` if it was given by name. ``str()`` says which unit is meant."""

    size_bytes: int
    text: str
    gpu: Gpu | None = None

    @property
    def unit(self) -> tuple[str, int]:
        """The unit to report in, with its bytes: binary where the capacity was given so, else GB."""
        return ("GiB", GIB) if self.text.upper().endswith("IB") else ("GB", GB)

    @property
    def card(self) -> str | None:
        """The GPU's name, if it was given by name."""
        return None if self.gpu is None else self.gpu.name

    def __str__(self) -> str:
        both = f"{self.size_bytes / GB:.1f} GB = {self.size_bytes / GIB:.1f} GiB"
        return f"{self.text} ({both}{'' if self.gpu is None else ', data sheet'})"


def gib(size_bytes: float) -> str:
    """Bytes as messages show them."""
    return f"{size_bytes / GIB:.2f} GiB"


def size(size_bytes: float) -> str:
    """Bytes as people read them, small or large."""
    return gib(size_bytes) if abs(size_bytes) >= GIB else f"{size_bytes / MIB:.1f} MiB"


def parse_capacity(text: str, *, key: str = "capacity") -> Capacity:
    """Read "80GiB", "80GB", "81920MiB" or the name of a GPU ("A100-80", "rtx 4090"); ``key`` is what was set to it.

    Raises:
        UserError: none of these, or not positive.
    """
    gpu = named_gpu(text)
    if gpu is not None:
        return Capacity(size_bytes=gpu.memory_bytes, text=gpu.name, gpu=gpu)
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise UserError(f"{key}: '{text}' is neither a size such as 80GiB or 80GB nor a known GPU{gpu_hint(text)}")
    size = float(match[1]) * unit
    if not 1 <= size < math.inf:
        raise UserError(f"{key}: must be positive, got '{text}'")
    return Capacity(size_bytes=int(size), text=text.strip())


def named_gpu(text: str) -> Gpu | None:
    """Return the GPU of that name ("A100-80", "rtx 4090"), or None."""
    name = _by_plain_name().get(_plain(text))
    return None if name is None else GPUS[name]


def gpu_hint(text: str) -> str:
    """Return what may have been meant, after a name that isn't known."""
    longer = [name for plain, name in _by_plain_name().items() if _plain(text) and plain.startswith(_plain(text))]
    if longer:
        return f"; did you mean {' or '.join(longer)}?"
    return nearest(text.upper(), GPUS) or f": {', '.join(GPUS)}"


def same_card(name: str, driver_name: str) -> bool:
    """Say whether a name is of the card that the driver calls so: the same, or a row's ("A100-80") that it goes with.

    Rows are of cards in sockets: a PCIe or NVL card, or a part of a card (MIG), has other rates and other memory.
    """
    if name == driver_name:
        return True
    if name not in GPUS or any(other in driver_name.upper() for other in _OTHER_KINDS):
        return False
    return all(_plain(part) in _plain(driver_name) for part in name.split("-"))


def gpu_of_card(driver_name: str) -> Gpu | None:
    """Return the row of :data:`GPUS` for what the driver calls a card; None where no row is of it."""
    return next((gpu for gpu in GPUS.values() if same_card(gpu.name, driver_name)), None)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).upper()


def _by_plain_name() -> dict[str, str]:
    return {_plain(name): name for name in GPUS}
