"""One training step of the real model under fake tensors: which bytes appear and disappear, when, and whose they are.

Nothing is computed and nothing is allocated, so tracing takes a second or two whatever the model's size. Two traces, at
two small micro-batches, give the fixed and the per-clip bytes of every block; :class:`StepTrace` holds the result.
Parameters and optimizer states are not in it: they are ZeRO's (see :mod:`everest_ds.memory.states`).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from everest_ds.config.finetuning import FinetuneRecipe
from everest_ds.config.schema import ModelConfig, Recipe
from everest_ds.memory.autocast import cuda_like_autocast
from everest_ds.memory.kernels import cuda_workspace_bytes
from everest_ds.memory.objectives import Mixing, heaviest_mixing, loss_of, random_batch
from everest_ds.memory.storages import StorageWatch
from everest_ds.memory.timeline import Timeline
from everest_ds.models import MaskedAutoencoder, VideoClassifier, build_network
from everest_ds.models.parameter_groups import parameter_groups

# "autocast": fp32 parameters under fp16 CUDA autocast, as the official code trains; the others are DeepSpeed's.
Precision = Literal["fp32", "bf16", "fp16", "autocast"]
DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "autocast": torch.float32,
}
# Two micro-batches fix a line; one clip is off it (see trace_one_clip).
_BATCHES = (2, 3)


@dataclass(frozen=True, kw_only=True)
class TraceSpec:
    """What a step's activations and the optimizer's groups depend on.

    ``model``: a :class:`ClassifierConfig` traces fine-tuning, another pre-training. ``mixing``: of clips, in
    fine-tuning. ``weight_decay`` and ``layer_decay`` cut the parameters into groups. ``module_marks``: record when
    modules begin and end, as ZeRO-3 gathers and frees parameters by them.
    """

    model: ModelConfig
    precision: Precision = "bf16"
    device_type: str = "cuda"
    mixing: Mixing = "none"
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    module_marks: bool = False

    @classmethod
    def of(
        cls, recipe: Recipe, *, precision: Precision, device_type: str = "cuda", module_marks: bool = False
    ) -> TraceSpec:
        """The step of a recipe's training."""
        return cls(
            model=recipe.model,
            precision=precision,
            device_type=device_type,
            mixing=heaviest_mixing(recipe.augment) if isinstance(recipe, FinetuneRecipe) else "none",
            weight_decay=recipe.optim.weight_decay,
            layer_decay=recipe.optim.layer_decay,
            module_marks=module_marks,
        )


class Parameter(NamedTuple):
    """A parameter: its dotted name, elements, place of its group in the optimizer's list, and its module."""

    name: str
    elements: int
    group: int
    module: str


class Born(NamedTuple):
    """A block appeared: the module that was running, and whether the backward pass had begun."""

    block: int
    size_bytes: int
    module: str
    backward: bool


class Died(NamedTuple):
    """A block is gone."""

    block: int


class Mark(NamedTuple):
    """Something ZeRO reacts to.

    ``gradient`` of parameter ``name`` is complete, in ``block``; ``enter``/``leave`` module ``name`` forward (or in a
    recomputation); ``enter_backward``/``leave_backward``; ``backward`` begins; ``end``.
    """

    kind: str
    name: str = ""
    block: int = -1


Event = Born | Died | Mark


@dataclass(frozen=True)
class StepTrace:
    """A traced step. ``fixed`` and ``per_clip`` are the bytes of each block; ``labels`` say what a block is."""

    spec: TraceSpec
    parameters: tuple[Parameter, ...]
    buffer_bytes: int
    module_order: tuple[str, ...]
    events: tuple[Event, ...]
    fixed: tuple[int, ...]
    per_clip: tuple[int, ...]
    labels: tuple[str, ...]
    modules: tuple[str, ...]

    @property
    def elements(self) -> int:
        """Parameters of the model, elements."""
        return sum(p.elements for p in self.parameters)

    def plain(self) -> Timeline:
        """The step by itself: every gradient kept until the end, no DeepSpeed."""
        timeline = Timeline()
        for event in self.events:
            if isinstance(event, Born):
                self.begin(timeline, event)
            elif isinstance(event, Died):
                timeline.gone(event.block)
        return timeline

    def begin(self, timeline: Timeline, event: Born) -> int:
        """Put a traced block on a timeline; returns its number there."""
        b = event.block
        return timeline.born(self.fixed[b], self.labels[b], self.per_clip[b])

    def saved_bytes(self, module: str, batch: int) -> int:
        """Bytes that a module and those below it keep from the forward for the backward pass."""
        inside = (module, f"{module}.")
        return sum(
            self.fixed[b] + batch * self.per_clip[b]
            for b, path in enumerate(self.modules)
            if self.labels[b].startswith(SAVED) and (path == inside[0] or path.startswith(inside[1]))
        )


SAVED, INPUTS = "saved activations", "inputs"


@lru_cache(maxsize=64)
def trace_step(spec: TraceSpec) -> StepTrace:
    """Trace a step of two or more clips, whatever their number; results are remembered.

    Raises:
        RuntimeError: the order of events depends on the micro-batch (a bug: shapes are static).
    """
    with FakeTensorMode():
        model = _build(spec)
        small, large = (_record(model, spec, batch) for batch in _BATCHES)
    if [_shape(e) for e in small.events] != [_shape(e) for e in large.events]:
        raise RuntimeError("the order of allocations depends on the micro-batch; the step has a dynamic shape")
    per_clip = [(b - a) // (_BATCHES[1] - _BATCHES[0]) for a, b in zip(small.sizes, large.sizes, strict=True)]
    fixed = [a - _BATCHES[0] * p for a, p in zip(small.sizes, per_clip, strict=True)]
    return _finish(spec, model, small, fixed, per_clip)


@lru_cache(maxsize=64)
def trace_one_clip(spec: TraceSpec) -> StepTrace:
    """Trace a step of one clip: dimensions of size one let kernels skip copies, so it is off the others' line."""
    with FakeTensorMode():
        model = _build(spec)
        recorder = _record(model, spec, 1)
    return _finish(spec, model, recorder, recorder.sizes, [0] * len(recorder.sizes))


def _finish(spec: TraceSpec, model: nn.Module, recorder: _Recorder, fixed: list[int], per_clip: list[int]) -> StepTrace:
    return StepTrace(
        spec=spec,
        parameters=tuple(_parameters(model, spec)),
        buffer_bytes=sum(b.untyped_storage().nbytes() for b in model.buffers()),
        module_order=tuple(name for name, _ in model.named_modules()),
        events=tuple(recorder.events),
        fixed=tuple(fixed),
        per_clip=tuple(per_clip),
        labels=tuple(_labels(recorder)),
        modules=tuple(recorder.modules),
    )


@lru_cache(maxsize=64)
def count_parameters(model: ModelConfig) -> tuple[tuple[str, int], ...]:
    """Names and elements of a model's parameters, without building it."""
    with FakeTensorMode():
        built = build_network(model)
    return tuple((name, p.numel()) for name, p in built.named_parameters())


class _Recorder:
    """Hears the storage watch, knows which module runs, and writes the event list."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.sizes: list[int] = []
        self.modules: list[str] = []
        self.stack: list[str] = [""]
        self.backward = False
        self.closed = False
        self.inputs: set[int] = set()
        self.gradients: set[int] = set()

    def born(self, block: int, size_bytes: int) -> None:
        self.events.append(Born(block, size_bytes, self.stack[-1], self.backward))
        self.sizes.append(size_bytes)
        self.modules.append(self.stack[-1])

    def died(self, block: int) -> None:
        if not self.closed:
            self.events.append(Died(block))

    def mark(self, kind: str, name: str = "", block: int = -1) -> None:
        self.events.append(Mark(kind, name, block))


class _Watch(StorageWatch):
    """Adds what fake kernels don't show: CUDA workspaces."""

    def __init__(self, recorder: _Recorder, cuda: bool) -> None:
        super().__init__(recorder, "meta")
        self._cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        workspace = cuda_workspace_bytes(func, args) if self._cuda else 0
        scratch = torch.empty(workspace, dtype=torch.uint8) if workspace else None
        if scratch is not None:
            self.watch(scratch)
        return super().__torch_dispatch__(func, types, args, kwargs)


def _build(spec: TraceSpec) -> MaskedAutoencoder | VideoClassifier:
    # DeepSpeed's own checkpoint function is the reentrant kind too, and saves the same: the block's input.
    checkpoint = partial(torch_checkpoint, use_reentrant=True)
    model = build_network(spec.model, device_type=spec.device_type, checkpoint=checkpoint)
    for parameter in model.parameters():
        # As DeepSpeed casts (runtime/engine.py, _cast_module_mixed_precision): parameters, not buffers.
        parameter.data = parameter.data.to(DTYPES[spec.precision])
    return model.train()


def _record(model: MaskedAutoencoder | VideoClassifier, spec: TraceSpec, clips: int) -> _Recorder:
    recorder = _Recorder()
    watch = _Watch(recorder, spec.device_type == "cuda")
    batch = random_batch(model, clips)
    for tensor in (*model.parameters(), *model.buffers()):
        watch.ignore(tensor)
    with contextlib.ExitStack() as stack:
        for handle in _hooks(model, recorder, watch, spec.module_marks):
            stack.callback(handle.remove)
        stack.enter_context(watch)
        # A CPU computes on the loader's own batch; the official code's loop holds the device's copy throughout.
        in_place = spec.device_type == "cpu" or spec.precision == "autocast"
        if in_place:
            recorder.inputs = {watch.watch(t) for t in (batch.clips, batch.noise, batch.labels, batch.index)}
        else:
            watch.ignore(batch.clips)  # in a buffer that stays (states.py, clips_ahead)
        to_device = partial(_to_device, recorder, watch, lambda tensor: in_place or tensor is batch.clips)
        with cuda_like_autocast() if spec.precision == "autocast" else contextlib.nullcontext():
            loss = loss_of(model, batch, to_device=to_device, mixing=spec.mixing)
        recorder.backward = True
        recorder.mark("backward")
        loss.backward()
        recorder.mark("end")
    # The loss and the batch outlive the optimizer step, for training/loop.py still has them: their end isn't heard.
    recorder.closed = True
    for parameter in model.parameters():
        parameter.grad = None
    recorder.events = _deaths_in_order(recorder.events)
    return recorder


def _deaths_in_order(events: list[Event]) -> list[Event]:
    """Sort neighbouring deaths: they commute, and autocast's cached casts die in the order of a hash of addresses."""
    ordered: list[Event] = []
    for dying, run in itertools.groupby(events, key=lambda event: isinstance(event, Died)):
        neighbours = list(run)
        ordered += sorted(neighbours) if dying else neighbours
    return ordered


def _to_device(recorder: _Recorder, watch: StorageWatch, is_there: Callable[[Tensor], bool], tensor: Tensor) -> Tensor:
    """Return the loader's tensor itself or a copy, which the objective drops at its end."""
    moved = tensor if is_there(tensor) else tensor.clone()
    recorder.inputs.add(watch.watch(moved))
    return moved


def _hooks(model: nn.Module, recorder: _Recorder, watch: StorageWatch, module_marks: bool) -> Iterator[Any]:
    """Register what tells the recorder where the step is."""
    for name, parameter in model.named_parameters():
        yield parameter.register_post_accumulate_grad_hook(partial(_gradient, recorder, watch, name))
    for name, module in model.named_modules():
        yield module.register_forward_pre_hook(partial(_enter, recorder, name, module_marks))
        yield module.register_forward_hook(partial(_leave, recorder, name, module_marks))


def _gradient(recorder: _Recorder, watch: StorageWatch, name: str, parameter: Tensor) -> None:
    assert parameter.grad is not None
    block = watch.watch(parameter.grad)
    recorder.gradients.add(block)
    recorder.mark("gradient", name, block)


def _enter(recorder: _Recorder, name: str, marks: bool, _: nn.Module, inputs: Any) -> Any:
    recorder.stack.append(name)
    if not marks:
        return None
    recorder.mark("enter", name)
    state = {"waiting": 0}
    return _on_tensors(lambda t: _Leaving.apply(t, recorder, name, state), inputs)


def _leave(recorder: _Recorder, name: str, marks: bool, *call: Any) -> Any:
    recorder.stack.pop()
    if not marks:
        return None
    recorder.mark("leave", name)
    state = {"entered": False}
    return _on_tensors(lambda t: _Entering.apply(t, recorder, name, state), call[-1])


def _on_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply a function to the tensors of a (nested) tuple, as DeepSpeed's apply_to_tensors_only does."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_on_tensors(function, v) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_on_tensors(function, v) for v in value)
    return value


class _Entering(torch.autograd.Function):
    """Marks the moment before a module's backward pass (DeepSpeed: parameter_offload.py, PreBackwardFunction...)."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, recorder: _Recorder, name: str, state: dict[str, bool]) -> Tensor:
        ctx.facts = recorder, name, state
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        recorder, name, state = ctx.facts
        if not state["entered"]:
            state["entered"] = True
            recorder.mark("enter_backward", name)
        return grads[0], None, None, None


class _Leaving(torch.autograd.Function):
    """Marks the moment after a module's backward pass: when the last of its inputs has a gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, recorder: _Recorder, name: str, state: dict[str, int]) -> Tensor:
        ctx.facts = recorder, name, state
        state["waiting"] += int(tensor.requires_grad)
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        recorder, name, state = ctx.facts
        state["waiting"] -= 1
        if state["waiting"] == 0:
            recorder.mark("leave_backward", name)
        return grads[0], None, None, None


def _parameters(model: nn.Module, spec: TraceSpec) -> Iterator[Parameter]:
    groups = parameter_groups(model, spec.weight_decay, spec.layer_decay)
    group_of = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
    for name, parameter in model.named_parameters():
        yield Parameter(name, parameter.numel(), group_of[id(parameter)], name.rpartition(".")[0])


def _labels(recorder: _Recorder) -> Iterator[str]:
    """Say what each block is, now that its end is known too."""
    births = {e.block: e for e in recorder.events if isinstance(e, Born)}
    began = recorder.events.index(Mark("backward"))
    died_forward = {e.block for e in recorder.events[:began] if isinstance(e, Died)}
    for block, birth in sorted(births.items()):
        if block in recorder.inputs:
            yield INPUTS
        elif block in recorder.gradients:
            yield "gradients"
        elif birth.backward:
            yield f"recomputed: {region(birth.module)}" if birth.module else "temporaries: backward"
        elif block in died_forward:
            yield "temporaries: forward"
        else:
            yield f"{SAVED}: {region(birth.module)}"


def region(module: str) -> str:
    """The part of the model that a module belongs to."""
    parts = module.split(".")
    side = "decoder" if parts[0] == "decoder" else "encoder"
    if "blocks" in parts:
        return f"{side} blocks"
    return "embedding" if parts[0] in ("encoder", "patch_embed", "positions") else "head and loss"


def _shape(event: Event) -> Any:
    return event._replace(size_bytes=0) if isinstance(event, Born) else event
