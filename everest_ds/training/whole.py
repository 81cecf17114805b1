"""The whole fp32 tensors behind an engine, parameter by parameter, whatever ZeRO has made of them.

They are what all stages and numbers of ranks have in common: a state that was read from one engine can be written into
any other. Reading and writing are collective calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from everest_ds.training.engine import dynamic_scaler

MASTER = "weight"
"""The kind of tensor that isn't the optimizer's: the fp32 weights themselves."""
# Where DeepSpeed's optimizers keep this rank's part of the masters: ZeRO 1 and 2, ZeRO 3, BF16_Optimizer.
_PARTITIONS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition")
_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class WholeState:
    """An engine's master weights, the optimizer's tensors of each, and its count of steps.

    Args:
        engine: DeepSpeed's, with an optimizer.
    """

    def __init__(self, engine: Any) -> None:
        self.parameters: dict[str, nn.Parameter] = dict(engine.module.named_parameters())
        self._places = _places_of(engine)
        self._engine = engine

    @property
    def kinds(self) -> list[str]:
        """Tensors of each parameter: the master, and what the optimizer has by now, such as ``exp_avg``."""
        self._places.link()
        state = self._inner.state
        of_optimizer = {
            key
            for holder in self._places.holders
            for key, value in state.get(holder, {}).items()
            if torch.is_tensor(value) and value.shape == holder.shape
        }
        return [MASTER, *sorted(of_optimizer)]

    @property
    def _inner(self) -> Any:
        return self._places.inner

    def shape(self, name: str) -> torch.Size:
        """Return the whole shape of a parameter."""
        parameter = self.parameters[name]
        return getattr(parameter, "ds_shape", parameter.shape)

    def group(self, name: str) -> int:
        """Return which parameters are best read and written one after another: those of one number."""
        return self._places.group(self.parameters[name]) if name in self.parameters else 0

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield the kind and parameter of every tensor, and the tensor (of the parameter's shape, fp32).

        It may share the engine's memory. A collective call.
        """
        kinds = self.kinds
        for name, parameter in sorted(self.parameters.items(), key=lambda item: self.group(item[0])):
            for kind in kinds:
                yield kind, name, self._places.read(name, parameter, kind).float().reshape(self.shape(name))
        self._places.close()

    def allocate(self) -> None:
        """Let the optimizer make its tensors, as its first step does: by a step that changes nothing."""
        for group in self._inner.param_groups:
            group["lr"] = 0.0
        self._places.step()

    def write(self, name: str, kind: str, value: Tensor) -> None:
        """Put in a tensor (of the parameter's shape); before, :meth:`allocate`, and at the end :meth:`finish`."""
        parameter = self.parameters[name]
        self._places.write(name, parameter, kind, value.to(parameter.device).flatten())

    def finish(self) -> None:
        """Give the parameters that compute the values of their masters."""
        self._places.close()
        self._places.finish(self.parameters)

    @property
    def steps(self) -> int:
        """Steps that the optimizer has taken, for its bias correction: fewer than the run's where some were skipped."""
        counters = [*self._inner.state.values(), *self._inner.param_groups]
        return max((int(holder["step"]) for holder in counters if "step" in holder), default=0)

    @steps.setter
    def steps(self, steps: int) -> None:
        _set_steps((*self._inner.state.values(), *self._inner.param_groups), steps)
        if steps:
            _repeat_bias_correction(self._inner, self._places.holders[0], steps)

    @property
    def scaler(self) -> dict[str, float]:
        """State of what looks for fp16's loss scale; empty where nothing does."""
        scaler = dynamic_scaler(self._engine)
        return {} if scaler is None else {name: getattr(scaler, name) for name in _SCALER_STATE}

    @scaler.setter
    def scaler(self, state: dict[str, float]) -> None:
        scaler = dynamic_scaler(self._engine)
        for name in _SCALER_STATE:
            if scaler is not None and name in state:
                setattr(scaler, name, state[name])


def _set_steps(holders: Iterable[dict[str, Any]], steps: int) -> None:
    for holder in holders:
        if "step" in holder:
            old = holder["step"]
            holder["step"] = torch.full_like(old, steps) if torch.is_tensor(old) else steps


def _repeat_bias_correction(inner: Any, holder: Tensor, steps: int) -> None:
    """Bring the state that DeepSpeed's Adam hides on CPUs to where the steps would have brought it.

    It multiplies powers of beta up, step by step; where the count leaps it computes them anew, which rounds
    differently. So the steps are repeated, on a single number.
    """
    if holder.device.type != "cpu" or not isinstance(inner, FusedAdam | DeepSpeedCPUAdam):
        return
    number = torch.zeros(1, requires_grad=True)
    number.grad = torch.zeros(1)
    groups = inner.param_groups
    inner.param_groups = [{**groups[0], "params": [number], "step": 0}]
    for _ in range(steps):
        inner.step()
    inner.param_groups = groups
    del inner.state[number]


def _partitions(optimizer: Any) -> list[Tensor]:
    return next((getattr(optimizer, name) for name in _PARTITIONS if hasattr(optimizer, name)), [])


def masters(engine: Any) -> list[Tensor]:
    """Return what the optimizer works on, on this rank: fp32 masters, or where there are none the parameters."""
    return _places_of(engine).holders


def _places_of(engine: Any) -> _Partitioned | _Undivided:
    optimizer = engine.optimizer
    if not _partitions(optimizer):
        return _Undivided(engine)
    if getattr(optimizer, "swap_optimizer", False):
        return _Swapped(optimizer)
    return _Partitioned(optimizer)


def _zero_gradient(holder: Tensor) -> None:
    if holder.grad is None:
        holder.grad = torch.zeros_like(holder)
    else:
        holder.grad.zero_()


class _Partitioned:
    """ZeRO: each rank holds a part of every group of parameters; DeepSpeed's own functions put them together."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer, self.inner = optimizer, optimizer.optimizer
        self.holders = _partitions(optimizer)
        self._stage_3 = hasattr(optimizer, "fp32_partitioned_groups_flat")

    def link(self) -> None:
        """Let DeepSpeed find the optimizer's tensors.

        ZeRO 1 and 2 look for them once, after the step of the first group of parameters, when the others have none.
        """
        if not self._stage_3:
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def group(self, parameter: Any) -> int:  # noqa: ARG002
        """All at hand."""
        return 0

    def read(self, name: str, parameter: nn.Parameter, kind: str) -> Tensor:  # noqa: ARG002
        if kind == MASTER:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, kind)

    def step(self) -> None:
        for holder in self.holders:
            _zero_gradient(holder)
        if self._stage_3:
            for group in range(len(self.holders)):
                self._optimizer._optimizer_step(group)
            return
        self.inner.step()
        if not getattr(self._optimizer, "cpu_offload", False):  # which keeps its buffers
            for holder in self.holders:
                holder.grad = None

    def write(self, name: str, parameter: Any, kind: str, value: Tensor) -> None:  # noqa: ARG002
        put_master, put_state = safe_set_full_fp32_param, safe_set_full_optimizer_state
        if self._stage_3:
            # Its part ends in padding where the ranks don't divide the parameter; the functions for whole tensors fail.
            put_master, put_state = safe_set_local_fp32_param, safe_set_local_optimizer_state
            value = _part(parameter, value)
        if kind == MASTER:
            put_master(parameter, value)
        else:
            put_state(parameter, value, kind)

    def close(self) -> None:
        """Nothing is open."""

    def finish(self, parameters: dict[str, nn.Parameter]) -> None:  # noqa: ARG002
        if not self._stage_3:
            self._optimizer.update_lp_params()
            return
        self._optimizer.checkpoint_event_prologue()
        for group in range(len(self.holders)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
        self._optimizer.checkpoint_event_epilogue()


class _Swapped(_Partitioned):
    """ZeRO 3 whose optimizer is in files (NVMe), apart from groups of parameters that are small.

    DeepSpeed's functions read, and write, a whole group for every parameter of it. Here a group stays in the swap
    buffers until another is asked for.
    """

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self._open: int | None = None
        self._changed = False

    def group(self, parameter: Any) -> int:
        """Those of one file, that it is read and written once."""
        return int(self._optimizer.grad_position[self._optimizer.get_param_id(parameter)][0])

    def read(self, name: str, parameter: Any, kind: str) -> Tensor:  # noqa: ARG002
        return self._optimizer._fp32_state_allgather(parameter, self._own_part(parameter, kind))

    def write(self, name: str, parameter: Any, kind: str, value: Tensor) -> None:  # noqa: ARG002
        self._own_part(parameter, kind).copy_(_part(parameter, value))
        self._changed = True

    def _own_part(self, parameter: Any, kind: str) -> Tensor:
        group, start, size = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        if self._optimizer._swappable_optimizer_subgroup(group) and group != self._open:
            self.close()
            self._swap_in(group)
        holder = self.holders[group]
        whole = holder if kind == MASTER else self.inner.state[holder][kind]
        return whole.data.narrow(0, start, size)

    def _swap_in(self, group: int) -> None:
        self._optimizer._optimizer_states_and_gradient_swap_in(group)
        self._open = group

    def close(self) -> None:
        """Let go of the group in the swap buffers, and write it if anything of it is new."""
        if self._open is None:
            return
        if self._changed:
            self._optimizer._optimizer_states_and_gradient_swap_out(self._open)
        else:
            self._optimizer._release_swap_buffers(self._open)
        self._open, self._changed = None, False

    def step(self) -> None:
        self._with_each(self._step_group)

    def _step_group(self, group: int) -> None:
        _zero_gradient(self.holders[group])
        self._optimizer._optimizer_step(group)

    def finish(self, parameters: dict[str, nn.Parameter]) -> None:  # noqa: ARG002
        self._optimizer.checkpoint_event_prologue()
        self._with_each(self._optimizer._reassign_or_swap_out_partitioned_parameters)
        self._optimizer.checkpoint_event_epilogue()

    def _with_each(self, work: Callable[[int], None]) -> None:
        """Do something to every group, which is in memory meanwhile."""
        for group in range(len(self.holders)):
            if self._optimizer._swappable_optimizer_subgroup(group):
                self._swap_in(group)
            work(group)
            self._changed = True
            self.close()


def _part(parameter: Any, value: Tensor) -> Tensor:
    """Return this rank's part of a flat tensor, zeros where it is padded."""
    size = parameter.ds_tensor.numel()
    start = size * dist.get_rank(parameter.ds_process_group)
    part = value[start : start + size]
    return nn.functional.pad(part, (0, size - part.numel()))


class _Undivided:
    """Stage 0: every rank holds everything; in half precision as masters beside the parameters, often all in one."""

    def __init__(self, engine: Any) -> None:
        optimizer = engine.optimizer
        names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        self._places: dict[str, tuple[Tensor, int]] = {}
        self.inner = getattr(optimizer, "optimizer", optimizer)
        if hasattr(optimizer, "fp32_groups_flat"):
            for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
                start = 0
                for parameter in group:
                    self._places[names[id(parameter)]] = flat, start
                    start += parameter.numel()
        elif hasattr(optimizer, "fp32_groups"):
            for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                self._places |= {names[id(p)]: (master, 0) for p, master in zip(group, masters, strict=True)}
        else:
            self._places = {name: (parameter, 0) for name, parameter in engine.module.named_parameters()}
        self.holders = list({id(holder): holder for holder, _ in self._places.values()}.values())

    def link(self) -> None:
        """Nothing to find."""

    def group(self, parameter: Any) -> int:  # noqa: ARG002
        """All at hand."""
        return 0

    def read(self, name: str, parameter: nn.Parameter, kind: str) -> Tensor:
        holder, start = self._places[name]
        whole = holder if kind == MASTER else self.inner.state[holder][kind]
        return whole.detach().view(-1)[start : start + parameter.numel()]

    def step(self) -> None:
        for holder in self.holders:
            _zero_gradient(holder)
        self.inner.step()
        for holder in self.holders:
            holder.grad = None

    def close(self) -> None:
        """Nothing is open."""

    def write(self, name: str, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        self.read(name, parameter, kind).copy_(value)

    def finish(self, parameters: dict[str, nn.Parameter]) -> None:
        for name, (holder, start) in self._places.items():
            parameter = parameters[name]
            if holder is not parameter:
                master = holder.detach().view(-1)[start : start + parameter.numel()]
                parameter.data.copy_(master.view_as(parameter))
