"""Values, keys and texts that settings should not have, and the property: taken, or refused in one line."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import yaml
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from everest_ds.config.errors import UserError

LONGEST_LINE = 600
Value = TypeVar("Value")

# The same examples every time.
fuzz = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


def result_or_line(load: Callable[[], Value], *named: str) -> Value | str:
    """Return what loading gives, or the one line that it is refused with, which has these words in it."""
    try:
        return load()
    except UserError as error:
        line = str(error)
        assert len(line) <= LONGEST_LINE + sum(map(len, named)), line[:2000]
        assert "\n" not in line
        assert line.isprintable() or "\t" in line, line
        assert all(word in line for word in named), line
        return line


def refused(load: Callable[[], Any], *named: str) -> str:
    line = result_or_line(load, *named)
    assert isinstance(line, str), f"taken: {line!r:.200}"
    return line


# Values of a wrong type, size or shape, as YAML and JSON can hold them.
numbers = st.one_of(
    st.integers(),
    st.integers(1000, 6000).map(lambda digits: -(10**digits)),
    st.floats(),
    st.sampled_from([0, -1, 2**31, 2**63, -(2**63), 10**400, 1e-320, 1e308, float("nan"), float("inf")]),
)
words = st.one_of(
    st.text(max_size=20), st.sampled_from(["auto", "AUTO", "", "\0", "\ud800", "x" * 1_000_000, "1" * 5000, "\n" * 50])
)
scalars = st.one_of(st.none(), st.booleans(), numbers, words)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)


def keys_of(kind: type, prefix: str = "") -> list[str]:
    hints = typing.get_type_hints(kind)
    nested = [
        (f"{prefix}{name}", keys_of(hint, f"{prefix}{name}."))
        for name, hint in hints.items()
        if dataclasses.is_dataclass(hint)
    ]
    groups = [key for group, inner in nested for key in (group, *inner)]
    return groups + [f"{prefix}{name}" for name, hint in hints.items() if not dataclasses.is_dataclass(hint)]


def tree_with(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def as_yaml(value: Any) -> str:
    try:
        return yaml.safe_dump(value)
    except ValueError:  # more digits than Python writes
        return ""


def as_json(value: Any) -> str:
    try:
        return json.dumps(value)
    except ValueError:
        return ""


# Keys of the JSON, sections and what is in them.
DS_KEYS = """
train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps optimizer optimizer.type optimizer.params
optimizer.params.lr optimizer.params.betas optimizer.params.eps optimizer.params.weight_decay scheduler
optimizer.params.torch_adam bf16 bf16.enabled fp16 fp16.enabled fp16.loss_scale fp16.auto_cast fp16.initial_scale_power
amp amp.enabled bfloat16 gradient_clipping prescale_gradients gradient_predivide_factor sparse_gradients steps_per_print
wall_clock_breakdown dump_state memory_breakdown zero_allow_untested_optimizer zero_force_ds_cpu_optimizer seed
communication_data_type data_types data_types.grad_accum_dtype zero_optimization zero_optimization.stage
zero_optimization.reduce_bucket_size zero_optimization.allgather_bucket_size zero_optimization.overlap_comm
zero_optimization.contiguous_gradients zero_optimization.stage3_prefetch_bucket_size
zero_optimization.stage3_max_live_parameters zero_optimization.sub_group_size
zero_optimization.stage3_param_persistence_threshold zero_optimization.offload_optimizer
zero_optimization.offload_optimizer.device zero_optimization.offload_optimizer.pin_memory
zero_optimization.offload_optimizer.nvme_path zero_optimization.offload_param zero_optimization.offload_param.device
zero_optimization.offload_optimizer.buffer_count zero_optimization.stage3_max_reuse_distance
zero_optimization.zero_hpz_partition_size zero_optimization.zero_quantized_weights aio.intra_op_parallelism
activation_checkpointing activation_checkpointing.partition_activations activation_checkpointing.number_checkpoints
activation_checkpointing.cpu_checkpointing aio aio.block_size flops_profiler flops_profiler.enabled
flops_profiler.profile_step tensorboard tensorboard.enabled tensorboard.output_path csv_monitor wandb comms_logger
elasticity elasticity.enabled autotuning autotuning.enabled compression_training data_efficiency checkpoint
checkpoint.tag_validation checkpoint.load_universal timers timers.throughput
timers.throughput.enabled torch_autocast torch_autocast.enabled compile compile.backend
""".split()
