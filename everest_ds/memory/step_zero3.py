"""ZeRO-3 in a step: parameters are gathered as modules need them, ahead by a bucket, and freed after use.

Source throughout: DeepSpeed runtime/zero/partitioned_param_coordinator.py, partition_parameters.py and stage3.py, the
function named at each step. What is replayed is the steady state, from the third step on: the first two record the
order in which modules run.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from everest_ds.memory.setting import FP32_BYTES, NORM_BYTES, ZeroSetting, share, sub_groups
from everest_ds.memory.states import Item, kept_whole
from everest_ds.memory.step import Step
from everest_ds.memory.trace import Mark, Parameter, StepTrace

_LABEL = "gathered parameters"
_MESSAGE = "all-gather message"
_SECONDARY = "secondary parameters"
_WAITING = "fp32 gradients"


@dataclass
class _Gather:
    """An all-gather under way: the message's block (None: the parameter's own), and what is still to be collected."""

    message: int | None
    waiting: list[Parameter]
    done: bool = False


@dataclass
class _Whole:
    """Which parameters are gathered: their blocks, the modules that use them, and the gathers under way."""

    blocks: dict[str, int | None] = field(default_factory=dict)
    users: dict[str, set[str]] = field(default_factory=dict)
    flying: dict[str, _Gather] = field(default_factory=dict)


class StepZero3(Step):
    """Stage 3."""

    def __init__(self, trace: StepTrace, setting: ZeroSetting, items: list[Item]) -> None:
        super().__init__(trace, setting, items)
        self.own: dict[str, list[Parameter]] = {name: [] for name in trace.module_order}
        for parameter in trace.parameters:
            self.own[parameter.module].append(parameter)
        kinds = ("enter", "enter_backward")
        self.order = [e.name for e in trace.events if isinstance(e, Mark) and e.kind in kinds]
        self.persistent = {p.name for p in self.kept_whole()}
        self.whole = _Whole(users={p.name: set() for p in trace.parameters})
        self.secondary: dict[str, int] = {}
        self.bucket: list[Parameter] = []
        # Per pass, elements of this rank that others were given, by the number of ranks.
        self.gathered: list[Counter[int]] = []
        self.waiting: list[int] = []  # gradients that aren't worth a file, until the optimizer step
        self.on_nvme = {
            p.name
            for group in sub_groups(trace.parameters, setting)
            for p in group
            if setting.swaps(sum(share(q, setting.ranks) for q in group))
        }

    def kept_whole(self) -> list[Parameter]:
        """The parameters that stay gathered from step to step."""
        return kept_whole(self.trace.parameters, self.setting)

    def begin_pass(self) -> None:
        """reset_step."""
        self.queue = deque((p, at) for at, module in enumerate(self.order) for p in self.own[module])
        self.fetched_for: dict[str, int] = {}  # the last moment (index into order) that a parameter was fetched for
        self.at, self.available = 0, 0
        self.active: list[str] = []
        self.gathered.append(Counter())

    def hold(self, item: Item) -> None:
        """Parameters that are kept whole are blocks of their own: the optimizer step frees and gathers them."""
        if item.name != "parameters kept whole":
            super().hold(item)
            return
        for parameter in self.kept_whole():
            self.whole.blocks[parameter.name] = self.timeline.born(self._gathered_bytes(parameter), item.name)

    def _gathered_bytes(self, parameter: Parameter) -> int:
        return share(parameter, self.setting.ranks) * self.setting.ranks * self.setting.element_bytes

    def module_event(self, kind: str, module: str) -> None:
        """parameter_offload.py, the pre- and post-forward and -backward hooks."""
        if kind in ("enter", "enter_backward"):
            if kind == "enter_backward":
                self.active.append(module)
            self._fetch(module)
        else:
            if kind == "leave_backward" and module in self.active:
                self.active.remove(module)
            self._release(module)

    def _fetch(self, module: str) -> None:
        """fetch_sub_module: gather what this module needs, wait for it, gather ahead."""
        needed = self.own[module]
        self._gather([p for p in needed if self._absent(p)])
        for parameter in needed:
            self.whole.users[parameter.name].add(module)
            if parameter.name in self.whole.flying:
                self._collect(parameter)
        fresh = {p.name for p in needed if self.fetched_for.get(p.name, -1) < self.at}
        passed: set[str] = set()
        while self.queue and len(passed) < len(fresh):
            parameter, at = self.queue.popleft()
            self.fetched_for[parameter.name] = at
            passed.add(parameter.name)
        self._prefetch()
        self.at += 1

    def _prefetch(self) -> None:
        limit = min(self.setting.max_live - self.available, self.setting.prefetch_bucket)
        ahead: list[Parameter] = []
        while self.setting.prefetch_bucket and self.queue and sum(p.elements for p in ahead) < limit:
            parameter, at = self.queue.popleft()
            self.fetched_for[parameter.name] = max(self.fetched_for.get(parameter.name, -1), at)
            if self._absent(parameter) and parameter not in ahead:
                ahead.append(parameter)
        self._gather(ahead)

    def _absent(self, parameter: Parameter) -> bool:
        return parameter.name not in self.whole.blocks and parameter.name not in self.whole.flying

    def _gather(self, wanted: list[Parameter]) -> None:
        """__all_gather_params_: those with a secondary copy are gathered from that, the others by themselves."""
        for copied, group in ((True, self.setting.hpz), (False, self.setting.ranks)):
            self._gather_alike([p for p in wanted if (p.name in self.secondary) is copied], group)

    def _gather_alike(self, wanted: list[Parameter], group: int) -> None:
        """all_gather_coalesced: one message for several parameters; a single one is gathered in place."""
        if not wanted:
            return
        self.available += sum(p.elements for p in wanted)
        self.gathered[-1][group] += sum(share(p, self.setting.ranks) for p in wanted) * self.setting.ranks // group
        if self.setting.ranks == 1:
            # _no_gather_coalesced: the partition is the parameter; an offloaded one is copied to the device.
            gathers = [_Gather(None, [p]) for p in wanted]
        else:
            label = _LABEL if len(wanted) == 1 else _MESSAGE
            message = self.timeline.born(sum(self._gathered_bytes(p) for p in wanted), label)
            gathers = [_Gather(message, list(wanted))]
        if self.setting.offload_param and not self.setting.on_cpu:
            size = sum(share(p, self.setting.ranks) for p in wanted) * self.setting.element_bytes
            self.timeline.flash(size, "parameters on their way")
        for gather in gathers:
            for parameter in gather.waiting:
                self.whole.flying[parameter.name] = gather

    def _collect(self, parameter: Parameter) -> None:
        """AllGatherCoalescedHandle.wait copies every parameter out; the message lives until all were asked for."""
        gather = self.whole.flying.pop(parameter.name)
        members = list(gather.waiting)
        if gather.message is None:
            on_device = self.setting.on_cpu or not self.setting.offload_param
            self.whole.blocks[parameter.name] = (
                None if on_device else self.timeline.born(self._gathered_bytes(parameter), _LABEL)
            )
            return
        if not gather.done and len(members) == 1:
            self.whole.blocks[parameter.name] = gather.message
            return
        if not gather.done:
            for member in members:
                size = member.elements * self.setting.element_bytes
                self.whole.blocks[member.name] = self.timeline.born(size, _LABEL)
            gather.done = True
        if not any(flying is gather for flying in self.whole.flying.values()):
            self.timeline.gone(gather.message)

    def _release(self, module: str) -> None:
        """release_sub_module: free what is not used again within the reuse distance."""
        again: set[str] = {p.name for p in self.own[module] if self.fetched_for.get(p.name, -1) > self.at}
        distance = 0
        for later in self.order[self.at :]:
            if distance >= self.setting.max_reuse_distance:
                break
            again |= {p.name for p in self.own[later]}
            distance += sum(p.elements for p in self.own[later])
        for parameter in self.own[module]:
            self.whole.users[parameter.name].discard(module)
            if parameter.name not in again and parameter.name not in self.persistent:
                self._free(parameter)

    def _free(self, parameter: Parameter) -> None:
        if parameter.name in self.whole.blocks and not self.whole.users[parameter.name]:
            self._keep_secondary(parameter)
            block = self.whole.blocks.pop(parameter.name)
            self.available -= parameter.elements
            if block is not None:
                self.timeline.gone(block)

    def _keep_secondary(self, parameter: Parameter) -> None:
        """_partition_param_sec: what is freed is kept once more, cut over the ranks of a node, until the step's end."""
        if self.setting.hpz > 1 and parameter.name not in self.secondary:
            size = self._gathered_bytes(parameter) // self.setting.hpz
            self.secondary[parameter.name] = self.timeline.born(size, _SECONDARY)

    def gradient_ready(self, parameter: Parameter) -> None:
        """reduce_independent_p_g_buckets_and_remove_grads, __add_grad_to_ipg_bucket."""
        held = sum(p.elements for p in self.bucket)
        if self.bucket and held + parameter.elements > self.setting.reduce_bucket:
            self._reduce()
            held = 0
        if self.setting.contiguous_gradients and held + parameter.elements <= self.setting.reduce_bucket:
            self.release_gradient(parameter)
        self.bucket.append(parameter)

    def _reduce(self) -> None:
        """__avg_scatter_grads: reduce_scatter_coalesced sends a padded copy, unless it is one tensor that divides."""
        if not self.bucket:
            return
        copied = len(self.bucket) > 1 or self.bucket[0].elements % self.setting.ranks
        size = sum(self._gathered_bytes(p) for p in self.bucket) if copied else 0
        message = self.timeline.born(size, "reduce message")
        self._to_nvme()
        self.timeline.gone(message)
        for parameter in self.bucket:
            if parameter.name in self.gradients:
                self.release_gradient(parameter)
        self.bucket = []

    def _to_nvme(self) -> None:
        """partition_grads: fp32 copies on the device, written to files; what isn't wholly written stays."""
        if self.setting.precision == "fp32" or not self.last_pass:
            return
        passing = 0
        for parameter in self.bucket:
            if parameter.name in self.on_nvme:
                elements = share(parameter, self.setting.ranks)
                if self.setting.swapped_gradient(elements) == elements:
                    passing += elements
                else:
                    self.waiting.append(self.timeline.born(elements * FP32_BYTES, _WAITING))
        self.timeline.flash(passing * FP32_BYTES, _WAITING)

    def backward_done(self) -> None:
        """independent_gradient_partition_epilogue, release_backward_leftovers."""
        self._reduce()
        for module in reversed(self.active):
            for parameter in self.own[module]:
                self.whole.users[parameter.name].discard(module)
                if parameter.name not in self.persistent:
                    self._free(parameter)

    def optimizer_step(self) -> None:
        """step: everything is partitioned, sub-groups are updated one by one, then whole parameters return."""
        for parameter in self.trace.parameters:
            self.whole.users[parameter.name].clear()
            if parameter.name in self.whole.flying:
                self._collect(parameter)
            self._free(parameter)
        sizes = [share(p, self.setting.ranks) for p in self.trace.parameters]
        if self.setting.precision == "fp16":
            # has_overflow: a boolean for every gradient element, and on CUDA the magnitudes that isinf makes.
            size = sum(sizes) * (1 + (0 if self.setting.on_cpu else self.setting.element_bytes))
            self.timeline.flash(size if not self.setting.offload_optimizer else 0, "overflow check")
        if not self.setting.offload_optimizer:
            self.timeline.flash(max(sizes) * NORM_BYTES, "gradient norm")
            for group in sub_groups(self.trace.parameters, self.setting):
                self._update(sum(share(p, self.setting.ranks) for p in group))
        for block in self.waiting:
            self.timeline.gone(block)
        for parameter in self.kept_whole():
            self.timeline.born(self._gathered_bytes(parameter), "parameters kept whole")
        for block in self.secondary.values():
            self.timeline.gone(block)

    def _update(self, elements: int) -> None:
        """_prepare_fp32_grad_for_sub_group: a flat copy of the gradients, cast to fp32."""
        flat = self.timeline.born(elements * self.setting.element_bytes, "gradients (flat)")
        if self.setting.precision != "fp32":
            fp32 = self.timeline.born(elements * FP32_BYTES, "fp32 gradients")
            self.timeline.gone(flat)
            flat = fp32
        self.timeline.gone(flat)
