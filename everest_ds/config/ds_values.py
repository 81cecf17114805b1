"""Values of a DeepSpeed JSON that DeepSpeed takes as they come, and trips over in the middle of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from everest_ds.config.batches import AUTO
from everest_ds.config.errors import UserError, shown


def check_plain_values(ds: dict[str, Any]) -> None:
    """Check what DeepSpeed has no rules for itself; what is null is taken out, as if it were absent.

    Raises:
        UserError: a value is of another kind or size.
    """
    for key, (wanted, holds) in _RULES.items():
        *sections, last = key.split(".")
        inside: Any = ds
        for section in sections:
            inside = inside.get(section) or {}
            if not isinstance(inside, dict):
                raise UserError(f"ds_config {section}: expected an object, got {shown(inside)}")
        value = inside.get(last)
        if value is None:
            inside.pop(last, None)
        elif value != AUTO and not holds(value):
            raise UserError(f"ds_config {key}: expected {wanted}, got {shown(value)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_Rule = tuple[str, Callable[[Any], bool]]
_TRUTH: _Rule = ("true or false", lambda value: isinstance(value, bool))
_COUNT: _Rule = ("a whole number from 1 on", lambda value: type(value) is int and value > 0)
_TYPE: _Rule = ("fp32, bf16 or fp16", lambda value: value in ("fp32", "bf16", "fp16"))
_RULES: dict[str, _Rule] = {
    "activation_checkpointing.contiguous_memory_optimization": _TRUTH,
    "activation_checkpointing.cpu_checkpointing": _TRUTH,
    "activation_checkpointing.number_checkpoints": _COUNT,
    "activation_checkpointing.partition_activations": _TRUTH,
    "activation_checkpointing.profile": _TRUTH,
    "activation_checkpointing.synchronize_checkpoint_boundary": _TRUTH,
    "aio.block_size": _COUNT,
    "aio.intra_op_parallelism": _COUNT,
    "aio.queue_depth": _COUNT,
    "autotuning.enabled": _TRUTH,
    "checkpoint.load_universal": _TRUTH,
    "checkpoint.use_node_local_storage": _TRUTH,
    "communication_data_type": _TYPE,
    "data_types.grad_accum_dtype": _TYPE,
    "dump_state": _TRUTH,
    "flops_profiler.profile_step": _COUNT,
    "gradient_clipping": ("a number from 0 on", lambda value: _is_number(value) and value >= 0),
    "gradient_predivide_factor": ("a number above 0", lambda value: _is_number(value) and value > 0),
    "memory_breakdown": _TRUTH,
    "prescale_gradients": _TRUTH,
    "sparse_gradients": _TRUTH,
    "steps_per_print": _COUNT,
    "timers.throughput.enabled": _TRUTH,
    "timers.throughput.synchronized": _TRUTH,
    "torch_autocast.enabled": _TRUTH,
    "wall_clock_breakdown": _TRUTH,
    "zero_allow_untested_optimizer": _TRUTH,
    "zero_force_ds_cpu_optimizer": _TRUTH,
}
