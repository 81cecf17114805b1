"""A training step's bytes over time: the traced step, and what DeepSpeed holds and does around it.

DeepSpeed works at fixed points of the step: when a parameter's gradient is complete, when a module begins or ends,
after the backward pass, and in the optimizer step. A :class:`Step` replays the trace and acts at those points.
"""

from __future__ import annotations

from everest_ds.memory.setting import FP32_BYTES, ZeroSetting, groups_of
from everest_ds.memory.states import AVERAGE, Item
from everest_ds.memory.timeline import Curve, Timeline
from everest_ds.memory.trace import INPUTS, Born, Mark, Parameter, StepTrace

# Elements that one all-reduce of stage 0 carries (DeepSpeed runtime/engine.py, MEMORY_OPT_ALLREDUCE_SIZE).
_ALLREDUCE_ELEMENTS = 500_000_000
# Of a step's accumulation passes the first finds no gradients and the others do.
_PASSES = 2


class Step:
    """Stage 0: gradients stay whole until the optimizer step. Other stages override what they do differently."""

    def __init__(self, trace: StepTrace, setting: ZeroSetting, items: list[Item]) -> None:
        self.trace, self.setting = trace, setting
        self.items = [item for item in items if item.place == "device"]
        self.timeline = Timeline()
        self.parameters = {p.name: p for p in trace.parameters}
        self.last_pass = True
        self.inputs_held = False
        self.gradients: dict[str, int] = {}  # timeline blocks of gradients that are held whole, by parameter

    def run(self) -> Curve:
        """Replay one step in the steady state. With accumulation, two passes show what many do."""
        for item in self.items:
            self.hold(item)
        for number in reversed(range(min(self.setting.accumulation, _PASSES))):
            self.last_pass = number == 0
            self.begin_pass()
            self._replay()
        self.optimizer_step()
        self.update_average()
        return self.timeline.freeze()

    def begin_pass(self) -> None:
        """A forward pass begins."""

    def _replay(self) -> None:
        blocks: dict[int, int] = {}
        for event in self.trace.events:
            if isinstance(event, Mark):
                self._act(event, blocks)
            elif isinstance(event, Born):
                if self.inputs_held and self.trace.labels[event.block] == INPUTS:
                    continue
                blocks[event.block] = self.trace.begin(self.timeline, event)
            elif event.block in blocks:
                self.timeline.gone(blocks.pop(event.block))
        self.inputs_held = any(self.trace.labels[block] == INPUTS for block in blocks)

    def hold(self, item: Item) -> None:
        """Put something that is held between steps on the timeline."""
        self.timeline.born(item.size_bytes, item.name, item.per_clip_bytes)

    def _act(self, mark: Mark, blocks: dict[int, int]) -> None:
        if mark.kind == "gradient":
            # From here on the gradient is DeepSpeed's: the trace, which keeps it to the end, has no say any more.
            block = blocks.pop(mark.block)
            if mark.name in self.gradients:
                self.timeline.gone(block)  # added to the one of the pass before
            else:
                self.gradients[mark.name] = block
            self.gradient_ready(self.parameters[mark.name])
        elif mark.kind == "end":
            self.backward_done()
        elif mark.kind != "backward":
            self.module_event(mark.kind, mark.name)

    def release_gradient(self, parameter: Parameter) -> None:
        """Drop a gradient that is held whole."""
        self.timeline.gone(self.gradients.pop(parameter.name))

    def gradient_ready(self, parameter: Parameter) -> None:
        """A parameter's gradient is complete and whole."""

    def module_event(self, kind: str, module: str) -> None:
        """A module begins or ends."""

    def backward_done(self) -> None:
        """The backward pass is over: all-reduce the gradients, copied into one flat message.

        Source: runtime/engine.py, allreduce_no_retain and allreduce_bucket.
        """
        if not self.last_pass:
            return
        message = 0
        for parameter in self.trace.parameters:
            message += parameter.elements
            if message > _ALLREDUCE_ELEMENTS:
                self.timeline.flash(message * self.setting.element_bytes, "all-reduce message")
                message = 0
        if message:
            self.timeline.flash(message * self.setting.element_bytes, "all-reduce message")

    def optimizer_step(self) -> None:
        """In fp32 Adam works on the gradients as they are. Otherwise each group is copied to fp32 and flattened.

        Source: runtime/fp16/fused_optimizer.py, FP16_Optimizer.step: a list of fp32 copies, then their
        concatenation (of several: a copy alone is flat already), then the list and the 16-bit gradients go. The flat
        ones stay until every group is updated.
        """
        if self.setting.precision == "fp32":
            return
        flat: list[int] = []
        for group in groups_of(self.trace.parameters):
            copies = [self.timeline.born(p.elements * FP32_BYTES, "fp32 gradients") for p in group]
            if len(copies) > 1:
                flat.append(self.timeline.born(sum(p.elements for p in group) * FP32_BYTES, "fp32 gradients"))
                for block in copies:
                    self.timeline.gone(block)
            else:
                flat += copies
            for parameter in group:
                self.release_gradient(parameter)
        for block in flat:
            self.timeline.gone(block)

    def update_average(self) -> None:
        """In half precision the weights are copied to fp32 on their way into the average (training/average.py)."""
        if self.setting.precision != "fp32" and any(item.name == AVERAGE for item in self.items):
            self.timeline.flash(self.trace.elements * FP32_BYTES, "fp32 weights")
