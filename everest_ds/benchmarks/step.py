"""How fast is a step, and how near to the machine's limit? Variants in turn, in one process, as ratios.

A step here is forward pass, loss and backward pass of random clips: what the model's code decides. Optimizer and
communication are the same for every variant, and ``memprof measure`` times them with it.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from everest_ds.benchmarks.parts import milliseconds
from everest_ds.benchmarks.reference_step import ReferenceStep, normalised
from everest_ds.benchmarks.tables import Spread
from everest_ds.config.errors import UserError
from everest_ds.config.finetuning import FinetuneRecipe
from everest_ds.config.load import load_as
from everest_ds.config.schema import Recipe, check
from everest_ds.data.loader import Batch
from everest_ds.memory.arithmetic import FLOPS_PER_MAC, step_flops
from everest_ds.memory.meters import DeviceMeter, StorageMeter
from everest_ds.memory.objectives import random_batch
from everest_ds.models import (
    MaskedAutoencoder,
    VideoClassifier,
    build_network,
    forward_backward_macs,
)
from everest_ds.training import ranks
from everest_ds.training.ops import missing_compiler

Shape = tuple[int, int, int]
"""Of a matrix product: rows, in, out."""

OURS, COMPILED, REFERENCE = "ours", "compiled", "reference style"
_CLASSES = 400  # of Kinetics-400, the paper's data set
_LARGEST_SHAPES = 4  # layers whose products make up nearly all of a step
_PRODUCTS_S = 0.2  # seconds of products of one shape, per round
_PRODUCTS_IN_A_ROW = 100  # on a GPU, where one product takes less than waiting for it


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a benchmark is asked for.

    ``phase`` pretrain or finetune; ``sizes`` such as ``vit_base``; ``batch`` clips per step; ``pairs`` rounds, each of
    which takes one step of every variant and times matrix products; ``precision`` of parameters and activations, fp32
    or bf16, as DeepSpeed does it; ``compiled``: with torch.compile, too; ``profiled``: with a profile; ``overrides`` of
    the recipe's ``model`` group.
    """

    sizes: tuple[str, ...]
    phase: str = "pretrain"
    batch: int = 2
    pairs: int = 5
    precision: str = "fp32"
    compiled: bool = False
    profiled: bool = False
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in ("batch", "pairs"):
            check(getattr(self, key) > 0, f"--{key}", f"must be positive, got {getattr(self, key)}")

    @property
    def tasks(self) -> dict[str, Task]:
        """What is compared, the first with the second."""
        return PHASES[self.phase]

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and activations."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.precision]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a step is for: a kind of recipe with some keys, and whether the reference style has it."""

    kind: type[Recipe]
    keys: tuple[str, ...]
    reference: bool


PRETRAINING = {
    "EVEREST": Task(kind=Recipe, keys=("model.method=everest",), reference=True),
    "VideoMAE": Task(kind=Recipe, keys=("model.method=videomae",), reference=True),
}
_CLASSIFIER = f"model.classes={_CLASSES}"
FINETUNING = {
    "kept tokens": Task(kind=FinetuneRecipe, keys=(_CLASSIFIER, "model.keep_ratio=0.6"), reference=False),
    "all tokens": Task(kind=FinetuneRecipe, keys=(_CLASSIFIER, "model.keep_ratio=1.0"), reference=False),
}
PHASES = {"pretrain": PRETRAINING, "finetune": FINETUNING}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to take a step: ``task`` of the phase, ``attention`` eager or fused."""

    task: str
    style: str
    attention: str

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.task}, {self.style}, {self.attention}"


def variants(tasks: Mapping[str, Task], *, compiled: bool) -> list[Variant]:
    """Return what is compared for one size."""
    found = []
    for name, task in tasks.items():
        styles = [(OURS, "eager"), (OURS, "fused")]
        styles += [(REFERENCE, "eager")] * task.reference + [(COMPILED, "fused")] * compiled
        found += [Variant(task=name, style=style, attention=attention) for style, attention in styles]
    return found


@dataclass(kw_only=True, eq=False)
class Runner:
    """A variant ready to run; ``rounds`` takes its seconds.

    ``flops`` of a step by the published count, ``flops_done`` those that our way takes.
    """

    variant: Variant
    model: MaskedAutoencoder | VideoClassifier
    loss: Callable[[], Tensor]
    flops: int
    flops_done: int
    rounds: list[float] = field(default_factory=list)

    def run(self) -> None:
        """Take one step from no gradients."""
        self.model.zero_grad(set_to_none=True)
        self.loss().backward()


@dataclass(frozen=True, kw_only=True)
class Row:
    """A variant's result; ``flops_per_s`` by the published count: recomputation and waste earn nothing.

    ``share`` is of the fastest matrix product of the task's own shapes in the same round, ``done_share`` what it is
    when only the arithmetic that is done counts; ``peak_bytes`` are tensors beyond the parameters, gradients included
    (None: not seen from outside a compiled graph).
    """

    size: str
    variant: Variant
    seconds: Spread
    flops_per_s: Spread
    share: Spread
    done_share: Spread
    peak_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Seconds of one step over those of another, round by round."""

    size: str
    numerator: str
    denominator: str
    spread: Spread


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came out.

    ``product_flops_per_s`` by size and task; ``profiles`` by size, milliseconds by variant and part.
    """

    settings: Settings
    rows: list[Row]
    ratios: list[Ratio]
    product_flops_per_s: dict[str, dict[str, Spread]]
    profiles: dict[str, dict[str, dict[str, float]]]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def measure(settings: Settings, say: Callable[[str], None]) -> Result:
    """Time every variant of every size; ``say`` is told what is done, a line at a time.

    Raises:
        UserError: a setting that can't be.
    """
    if settings.compiled and (missing := missing_compiler()):
        raise UserError(f"--compiled: {missing}")
    result = Result(settings=settings, rows=[], ratios=[], product_flops_per_s={}, profiles={})
    for size in settings.sizes:
        runners = [prepare(variant, size, settings) for variant in variants(settings.tasks, compiled=settings.compiled)]
        shapes = {runner.variant.task: largest_shapes(runner) for runner in runners if runner.variant.style == OURS}
        for runner in runners:
            runner.run()
            say(f"{size}: {runner.variant.name}: ready")
        names = (f"{size}: round {i} of {settings.pairs}" for i in range(1, settings.pairs + 1))
        rates = [_round(runners, shapes, settings.dtype, say, name) for name in names]
        result.rows.extend(_row(size, runner, rates) for runner in runners)
        result.ratios.extend(compare(size, runners, tuple(settings.tasks)))
        by_task = {task: Spread.of([rate[task] for rate in rates]) for task in shapes}
        result.product_flops_per_s[size] = by_task
        if settings.profiled:
            result.profiles[size] = {runner.variant.name: milliseconds(runner.run) for runner in runners}
    return result


def prepare(variant: Variant, size: str, settings: Settings) -> Runner:
    """Build a variant's model on this rank's device, with random clips."""
    task = settings.tasks[variant.task]
    keys = (*task.keys, f"model.size={size}", f"model.attention={variant.attention}")
    config = load_as(task.kind, None, [*settings.overrides, *keys]).model
    torch.manual_seed(0)
    device = ranks.device()
    model = build_network(config, device_type=device.type).to(device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(settings.dtype)
    batch = random_batch(model, settings.batch, torch.Generator().manual_seed(0))
    return Runner(
        variant=variant,
        model=model,
        loss=_loss(variant.style, model, batch),
        flops=settings.batch * step_flops(config),
        flops_done=FLOPS_PER_MAC * settings.batch * forward_backward_macs(build_network, config),
    )


def _loss(style: str, model: MaskedAutoencoder | VideoClassifier, batch: Batch) -> Callable[[], Tensor]:
    clips, noise, labels = (tensor.to(ranks.device()) for tensor in (batch.clips, batch.noise, batch.labels))
    if style == REFERENCE:
        assert isinstance(model, MaskedAutoencoder)
        reference, floats = ReferenceStep(model), normalised(clips, model.mask_token.dtype)
        return lambda: reference(floats, noise)
    network = torch.compile(model) if style == COMPILED else model
    if isinstance(model, MaskedAutoencoder):
        return lambda: network(clips, noise).loss
    return lambda: F.cross_entropy(network(clips).float(), labels)


def _round(
    runners: Sequence[Runner],
    shapes: Mapping[str, Sequence[Shape]],
    dtype: torch.dtype,
    say: Callable[[str], None],
    name: str,
) -> dict[str, float]:
    """Time each variant once; return the rate of the fastest product of each task's shapes, in FLOP/s."""
    rates = {task: max(product_rate(shape, dtype) for shape in of_task) for task, of_task in shapes.items()}
    for runner in runners:
        runner.rounds.append(timed(runner.run))
    seconds = ", ".join(f"{runner.rounds[-1]:.2f} s" for runner in runners)
    say(f"{name}: {seconds}; {', '.join(f'{rate / 1e9:.0f}' for rate in rates.values())} GFLOP/s")
    return rates


def timed(work: Callable[[], Any]) -> float:
    """Seconds that something takes, the device waited for."""
    get_accelerator().synchronize()
    start = time.perf_counter()
    work()
    get_accelerator().synchronize()
    return time.perf_counter() - start


def largest_shapes(runner: Runner) -> list[Shape]:
    """Return the (rows, in, out) of the linear layers that take most of a step's arithmetic."""
    seen: Counter[Shape] = Counter()

    def record(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.Linear)
        shape = (args[0].numel() // layer.in_features, layer.in_features, layer.out_features)
        seen[shape] += math.prod(shape)

    # Not the tubelet embedding, a subclass: its input is patches, of which it multiplies some.
    layers = [layer for layer in runner.model.modules() if type(layer) is nn.Linear]
    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    runner.run()
    for hook in hooks:
        hook.remove()
    return [shape for shape, _ in seen.most_common(_LARGEST_SHAPES)]


def product_rate(shape: Shape, dtype: torch.dtype) -> float:
    """FLOP/s of the plain matrix product of a (rows, in) and an (in, out) matrix: the fastest of a few."""
    rows, inner, columns = shape
    left, right = (torch.rand(*sides, device=ranks.device()).to(dtype) for sides in ((rows, inner), (inner, columns)))
    product = left @ right
    number = 1 if ranks.on_cpu() else _PRODUCTS_IN_A_ROW

    def multiply() -> None:
        for _ in range(number):
            torch.matmul(left, right, out=product)

    seconds: list[float] = []
    while sum(seconds) < _PRODUCTS_S:
        seconds.append(timed(multiply))
    return number * FLOPS_PER_MAC * rows * inner * columns / min(seconds)


def _row(size: str, runner: Runner, rates: Sequence[Mapping[str, float]]) -> Row:
    speeds = [runner.flops / seconds for seconds in runner.rounds]
    shares = [speed / rate[runner.variant.task] for speed, rate in zip(speeds, rates, strict=True)]
    return Row(
        size=size,
        variant=runner.variant,
        seconds=Spread.of(runner.rounds),
        flops_per_s=Spread.of(speeds),
        share=Spread.of(shares),
        done_share=Spread.of([share * runner.flops_done / runner.flops for share in shares]),
        peak_bytes=None if runner.variant.style == COMPILED else peak_bytes(runner),
    )


def peak_bytes(runner: Runner) -> int:
    """Peak of the tensors of a step beyond what is there before: activations and gradients."""
    runner.model.zero_grad(set_to_none=True)
    device = ranks.device()
    if device.type == "cpu":
        with StorageMeter() as meter:
            runner.run()
        return meter.peak_bytes - meter.before_bytes
    before = torch.get_device_module(device).memory_allocated(device)
    with DeviceMeter(device) as allocator:
        runner.run()
    return allocator.peaks.allocated_bytes - int(before)


def compare(size: str, runners: Sequence[Runner], tasks: Sequence[str]) -> list[Ratio]:
    """The first task against the second, and each task against its other ways, all by its faster attention."""
    best = {task: _fastest(runners, task) for task in tasks}
    first, second = best.values()
    pairs = [(first, second)]
    pairs += [(best[runner.variant.task], runner) for runner in runners if runner not in best.values()]
    return [
        Ratio(
            size=size,
            numerator=a.variant.name,
            denominator=b.variant.name,
            spread=Spread.of([x / y for x, y in zip(a.rounds, b.rounds, strict=True)]),
        )
        for a, b in pairs
    ]


def _fastest(runners: Sequence[Runner], task: str) -> Runner:
    ours = [runner for runner in runners if (runner.variant.task, runner.variant.style) == (task, OURS)]
    return min(ours, key=lambda runner: Spread.of(runner.rounds).median)
