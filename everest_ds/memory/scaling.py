"""A model of training on many GPUs: memory, what is sent, and when the network takes longer than the arithmetic.

It is arithmetic on three things: the planned memory (plan.py), the bytes that leave a rank (traffic.py), and the matrix
products of a step (arithmetic.py), at stated rates. It knows nothing of latencies, stragglers or a busy network.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from everest_ds.config.errors import UserError
from everest_ds.config.load import load_recipe
from everest_ds.memory.arithmetic import FLOPS_PER_MAC, step_macs
from everest_ds.memory.compare import plan_any_batch
from everest_ds.memory.gpus import Gpu
from everest_ds.memory.plan import Plan
from everest_ds.memory.traffic import messages

# Of a step's products two thirds are the backward pass's, beside which gradients can travel.
_BACKWARD_SHARE = 2 / 3
# Elements that a rank sends, in parameters of the model (Rajbhandari et al. 2020, section 7.1 and 7.2).
_ZERO_PAPER = {0: 2, 1: 2, 2: 2, 3: 3}
_LARGEST_BATCH = 1 << 16
_BITS = 8
_GIGA = 1e9


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of equal GPUs. ``link_bytes_per_s`` between the GPUs of a node, one direction.

    ``gigabits``: networks to consider, Gb/s out of a node (all its cards together). ``utilisation``: share of the peak
    rate that a step's products reach. ``worthwhile``: the share of the step that arithmetic must be, for scaling to
    count as not broken.
    """

    gpu: Gpu
    gpus_per_node: int = 8
    link_bytes_per_s: float = 300e9
    gigabits: tuple[int, ...] = (200, 400)
    utilisation: float = 0.4
    worthwhile: float = 0.8

    def __post_init__(self) -> None:
        for name in ("utilisation", "worthwhile"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"--{name}: must be in (0, 1], got {getattr(self, name):g}")
        if self.gpus_per_node < 1 or self.link_bytes_per_s <= 0 or not all(rate > 0 for rate in self.gigabits):
            raise UserError("cluster: GPUs per node and rates must be positive")

    @property
    def flops_per_s(self) -> float:
        """Of one GPU, as used."""
        return self.gpu.rates["bf16" if "bf16" in self.gpu.rates else "fp16"] * self.utilisation

    def seconds(self, sent_bytes: int, gpus: int, gigabits: int) -> float:
        """Time for a collective in which every rank passes on ``sent_bytes``.

        In a ring through all GPUs, node by node, one GPU of each node passes its bytes on to the next node: what leaves
        a node is what leaves a rank. The slowest link is the ring's pace.
        """
        link = self.link_bytes_per_s
        if gpus > self.gpus_per_node:
            link = min(link, gigabits * _GIGA / _BITS)
        return sent_bytes / link


@dataclass(frozen=True, kw_only=True)
class ScalingRow:
    """One configuration on a number of GPUs; bytes and seconds are those of one GPU and one optimizer step.

    ``exposed_s``, ``efficiency`` and ``least_micro_batch`` are per network (Gb/s): the communication that nothing hides
    (see :func:`exposed`), arithmetic's share of the step, and the smallest micro-batch at which that is worthwhile
    (0: none is). ``alone_s``: the communication, were nothing hidden. ``largest_micro_batch``: that fits, 0 if none.
    """

    model: str
    method: str
    ds_config: str
    zero: int
    gpus: int
    micro_batch: int
    parameters: int
    predicted_peak_bytes: int
    fits: bool
    largest_micro_batch: int
    sent_bytes: int
    zero_paper_sent_bytes: int
    compute_s: float
    clips_per_s: float
    alone_s: dict[int, float]
    exposed_s: dict[int, float]
    efficiency: dict[int, float]
    least_micro_batch: dict[int, int]

    @property
    def global_batch(self) -> int:
        """Clips per optimizer step."""
        return self.micro_batch * self.gpus

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self) | {"global_batch": self.global_batch}


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """What is asked: every model, method, DeepSpeed configuration and number of GPUs, at one micro-batch."""

    models: tuple[str, ...]
    methods: tuple[str, ...]
    ds_configs: Mapping[str, Mapping[str, Any]]
    gpus: tuple[int, ...]
    micro_batch: int
    cluster: Cluster
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.micro_batch < 1:
            raise UserError(f"--micro-batch: must be positive, got {self.micro_batch}")
        for number in self.gpus:
            if number < 1 or (number > self.cluster.gpus_per_node and number % self.cluster.gpus_per_node):
                raise UserError(f"--gpus: {number} isn't whole nodes of {self.cluster.gpus_per_node} GPUs")

    def rows(self, progress: Callable[[str], None] = lambda _: None) -> Iterator[ScalingRow]:
        """Plan and reckon, one row after another.

        Raises:
            UserError: an unknown model or method, or a DeepSpeed JSON that can't be.
        """
        for model in self.models:
            for method in self.methods:
                keys = [f"model.size={model}", f"model.method={method}", "model.attention=fused"]
                recipe = load_recipe(None, [*keys, *self.overrides])
                for name, ds_config in self.ds_configs.items():
                    progress(f"{method} {model}, {name}")
                    for gpus in self.gpus:
                        planned = plan_any_batch(recipe, ds_config, ranks=gpus)
                        yield row_of(planned, name, self.micro_batch, self.cluster)


def row_of(planned: Plan, name: str, micro_batch: int, cluster: Cluster) -> ScalingRow:
    """Reckon one configuration."""
    model, setting, capacity = planned.recipe.model, planned.setting, cluster.gpu.memory_bytes
    peak, sent = planned.peak(micro_batch), messages(planned)
    clip_s = FLOPS_PER_MAC * step_macs(model).total / cluster.flops_per_s
    sent_bytes = sum(message.sent_bytes for message in sent)
    networks: dict[int, tuple[float, float]] = {}
    for rate in cluster.gigabits:
        gradients, parameters = (
            sum(cluster.seconds(m.sent_bytes, m.ranks, rate) for m in sent if m.name.startswith(kind))
            for kind in ("gradients", "parameters")
        )
        networks[rate] = gradients, parameters
    hidden = {rate: exposed(*times, micro_batch * clip_s, setting.stage) for rate, times in networks.items()}
    paper = _ZERO_PAPER[setting.stage] * planned.trace.elements * setting.element_bytes
    return ScalingRow(
        model=model.size,
        method=model.method,
        ds_config=name,
        zero=setting.stage,
        gpus=setting.ranks,
        micro_batch=micro_batch,
        parameters=planned.trace.elements,
        predicted_peak_bytes=peak,
        fits=peak <= capacity,
        largest_micro_batch=planned.largest_micro_batch(capacity),
        sent_bytes=sent_bytes,
        zero_paper_sent_bytes=round(paper * (setting.ranks - 1) / setting.ranks),
        compute_s=micro_batch * clip_s,
        clips_per_s=micro_batch * setting.ranks / (micro_batch * clip_s + max(hidden.values())),
        alone_s={rate: sum(times) for rate, times in networks.items()},
        exposed_s=hidden,
        efficiency={rate: micro_batch * clip_s / (micro_batch * clip_s + s) for rate, s in hidden.items()},
        least_micro_batch={
            rate: _least_micro_batch(times, clip_s, setting.stage, cluster.worthwhile)
            for rate, times in networks.items()
        },
    )


def exposed(gradients_s: float, parameters_s: float, compute_s: float, stage: int) -> float:
    """Seconds of communication that arithmetic can't hide, at best.

    Gradients travel beside the backward pass. Under ZeRO-3 parameters travel beside both passes; under ZeRO-1 and 2
    they travel after the optimizer step, beside nothing.
    """
    backward_s = _BACKWARD_SHARE * compute_s
    if stage == 3:
        return max(0.0, gradients_s + parameters_s - compute_s)
    return max(0.0, gradients_s - backward_s) + parameters_s


def _least_micro_batch(times: tuple[float, float], clip_s: float, stage: int, worthwhile: float) -> int:
    """The smallest micro-batch at which arithmetic is a ``worthwhile`` share of the step; 0: none up to a limit."""

    def enough(batch: int) -> bool:
        return batch * clip_s >= worthwhile * (batch * clip_s + exposed(*times, batch * clip_s, stage))

    low, high = 0, 1
    while not enough(high):
        low, high = high, 2 * high
        if high > _LARGEST_BATCH:
            return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def cores_for(clips_per_s: float, clips_per_s_per_core: float) -> int:
    """Cores that read clips as fast as they are trained on."""
    return math.ceil(clips_per_s / clips_per_s_per_core)
