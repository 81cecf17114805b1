"""ZeRO-1 and 2 in a step: gradients move into buckets, are reduced, and this rank's share is kept.

Source throughout: DeepSpeed runtime/zero/stage_1_and_2.py, the function named at each step.
"""

from __future__ import annotations

from itertools import groupby

from everest_ds.memory.setting import FP32_BYTES, NORM_BYTES, FlatGroup, Piece, ZeroSetting, groups_of
from everest_ds.memory.states import Item
from everest_ds.memory.step import Step
from everest_ds.memory.trace import Parameter, StepTrace


class StepZero12(Step):
    """Stages 1 and 2. They differ in what is sent, not (with the shipped configurations) in what is held."""

    def __init__(self, trace: StepTrace, setting: ZeroSetting, items: list[Item]) -> None:
        super().__init__(trace, setting, items)
        self.groups = [FlatGroup(group, setting.ranks) for group in groups_of(trace.parameters)]
        self.pieces: dict[str, list[Piece]] = {}
        for group in self.groups:
            self.pieces |= group.pieces()
        self.buffers: list[int] = []
        self.bucket: list[Parameter] = []
        self.kept: int | None = None  # the block that holds this rank's share of a pass's gradients
        self.accumulated: int | None = None  # the same, over passes

    @property
    def _immediate(self) -> bool:
        # process_gradients: stage 1 without overlap_comm reduces after the backward pass.
        return self.setting.stage == 2 or (self.setting.overlap_comm and self.last_pass)

    def gradient_ready(self, parameter: Parameter) -> None:
        """process_gradients, reduce_independent_p_g_buckets_and_remove_grads."""
        if not self.buffers and self.setting.contiguous_gradients:
            size = self.setting.reduce_bucket * self.setting.element_bytes
            self.buffers = [self.timeline.born(size, "reduce buckets") for _ in range(1 + self.setting.overlap_comm)]
        if self._immediate:
            self._put_in_bucket(parameter)

    def _put_in_bucket(self, parameter: Parameter) -> None:
        if sum(p.elements for p in self.bucket) + parameter.elements > self.setting.reduce_bucket:
            self._reduce()
        if self.setting.contiguous_gradients and parameter.elements <= self.setting.reduce_bucket:
            self.release_gradient(parameter)
        self.bucket.append(parameter)

    def _reduce(self) -> None:
        """reduce_ipg_grads: average_tensor sends the bucket; this rank's parameters are copied out of it."""
        self._send()
        for parameter in self.bucket:
            mine = [piece for piece in self.pieces[parameter.name] if piece.rank == self.setting.rank]
            if mine and self.setting.offload_optimizer:
                self._to_host(mine[0])
            elif mine and self.setting.contiguous_gradients:
                self._keep()
            if parameter.name in self.gradients:
                self.release_gradient(parameter)
        self.bucket = []

    def _send(self) -> None:
        """average_tensor: slices that go to one rank are merged; several slices are flattened into a copy."""
        slices = [piece.rank for parameter in self.bucket for piece in self.pieces[parameter.name]]
        if len(list(groupby(slices))) > 1:
            size = sum(p.elements for p in self.bucket) * self.setting.element_bytes
            self.timeline.flash(size, "reduce message")

    def _keep(self) -> None:
        """copy_grads_in_partition: one buffer for all parameters that reach into this rank's partition."""
        if self.kept is None:
            owned = (pieces for pieces in self.pieces.values() if any(p.rank == self.setting.rank for p in pieces))
            size = sum(pieces[0].parameter.elements for pieces in owned) * self.setting.element_bytes
            self.kept = self.timeline.born(size, "gradients (partition)")

    def _to_host(self, piece: Piece) -> None:
        """set_norm_for_param_grad_in_gpu and async_inplace_copy_grad_to_fp32_buffer_from_gpu."""
        self.timeline.flash(piece.elements * NORM_BYTES, "gradient norm")
        if self.setting.precision != "fp32":
            self.timeline.flash(piece.elements * FP32_BYTES, "fp32 gradients")

    def backward_done(self) -> None:
        """independent_gradient_partition_epilogue; stage 1 waits for the last pass."""
        if self.setting.stage == 1 and not self.last_pass:
            return
        if not self._immediate:
            for group in self.groups:
                for parameter in group.parameters:
                    self._put_in_bucket(parameter)
        self._reduce()
        for block in self.buffers:
            self.timeline.gone(block)
        self.buffers = []
        if self.accumulated is not None and self.kept is not None:
            self.timeline.gone(self.kept)  # added to what the pass before left
        else:
            self.accumulated = self.kept
        self.kept = None

    def optimizer_step(self) -> None:
        """step: norms, then per group a flat copy of the gradients, cast to fp32, and Adam."""
        if self.setting.offload_optimizer:
            return
        mine = [p for pieces in self.pieces.values() for p in pieces if p.rank == self.setting.rank]
        self.timeline.flash(max((p.elements for p in mine), default=0) * NORM_BYTES, "gradient norm")
        for number, group in enumerate(self.groups):
            flat = self.timeline.born(group.partition * self.setting.element_bytes, "gradients (flat)")
            if self.setting.precision != "fp32":
                fp32 = self.timeline.born(group.partition * FP32_BYTES, "fp32 gradients")
                self.timeline.gone(flat)
                flat = fp32
            if number == len(self.groups) - 1 and self.accumulated is not None:
                self.timeline.gone(self.accumulated)
            self.timeline.gone(flat)
