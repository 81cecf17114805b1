"""The keys of a DeepSpeed JSON that a run goes by, and what their values may be.

Those of DeepSpeed 0.19 that a run can't go by are in :mod:`everest_ds.config.ds_refused`; whatever is in neither table
is unknown (:mod:`everest_ds.config.ds_keys`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from everest_ds.config.batches import ACCUMULATION, AUTO, GLOBAL, MICRO
from everest_ds.config.errors import UserError, shown

# 2**127 is the largest power of two in fp32, in which losses are scaled.
_LARGEST_SCALE_POWER = 127
_LARGEST_SCALE = 2**_LARGEST_SCALE_POWER

_LARGEST_WHOLE = 2**63 - 1
# Elements; the bytes of a larger one don't fit into 64 bits.
_LARGEST_BUCKET = 2**56


class _Rule(NamedTuple):
    """What a value is expected to be, in words and as a check; ``whole``: a number such as 5e8 becomes a whole one."""

    wanted: str
    holds: Callable[[Any], bool]
    whole: bool = False


def check_plain_values(ds: dict[str, Any]) -> None:
    """Check values that DeepSpeed takes as they come, or reads otherwise than the planner would.

    What is null is taken out, as if it were absent; a whole number that is written as a fraction (5e8) becomes one.

    Raises:
        UserError: a value is of another kind or size.
    """
    for key, rule in RULES.items():
        if rule is None:
            continue
        *sections, last = key.split(".")
        inside = ds
        for depth, section in enumerate(sections, 1):
            inside = {} if inside.get(section) is None else inside[section]
            if not isinstance(inside, dict):
                raise UserError(f"ds_config {'.'.join(sections[:depth])}: expected an object, got {shown(inside)}")
        value = inside.get(last)
        if value is None:
            inside.pop(last, None)
        elif value != AUTO and not rule.holds(value):
            raise UserError(f"ds_config {key}: expected {rule.wanted}, got {shown(value)}")
        elif rule.whole and isinstance(value, float):
            inside[last] = int(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(wanted: str, fits: Callable[[float], bool]) -> _Rule:
    return _Rule(wanted, lambda value: _is_number(value) and float(value).is_integer() and fits(value), whole=True)


def _one_of(*words: str) -> _Rule:
    return _Rule(f"{', '.join(words[:-1])} or {words[-1]}", lambda value: value in words)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


_TRUTH = _Rule("true or false", lambda value: isinstance(value, bool))
_COUNT = _whole("a whole number from 1 to 2**63", lambda value: 1 <= value <= _LARGEST_WHOLE)
_SIZE = _whole("a whole number from 0 to 2**63", lambda value: 0 <= value <= _LARGEST_WHOLE)
_BUCKET = _whole("a whole number from 1 to 2**56", lambda value: 1 <= value <= _LARGEST_BUCKET)
_EVEN = _whole("an even number from 2 to 2**56", lambda value: 2 <= value <= _LARGEST_BUCKET and value % 2 == 0)
_TEXT = _Rule("a text", lambda value: isinstance(value, str))
_TEXTS = _Rule("a list of texts", _are_texts)
_TYPE = _one_of("fp32", "bf16", "fp16")
_HALF = _one_of("bfloat16", "bf16", "torch.bfloat16", "float16", "fp16", "half", "torch.float16")
_POWER = _whole(f"a whole number from 0 to {_LARGEST_SCALE_POWER}", lambda value: 0 <= value <= _LARGEST_SCALE_POWER)
_LEAST_SCALE = _whole(
    f"a whole number from 1 to 2**{_LARGEST_SCALE_POWER}", lambda v: 1 <= v <= 2**_LARGEST_SCALE_POWER
)
_SCALE = _Rule(
    f"a number from 0 to 2**{_LARGEST_SCALE_POWER}",
    lambda value: _is_number(value) and 0 <= value <= _LARGEST_SCALE,
)
_FROM_0 = _Rule("a number from 0 on", lambda value: _is_number(value) and value >= 0)
_ABOVE_0 = _Rule("a number above 0", lambda value: _is_number(value) and value > 0)

RULES: dict[str, _Rule | None] = {
    "activation_checkpointing.cpu_checkpointing": _TRUTH,
    "activation_checkpointing.number_checkpoints": _COUNT,
    "activation_checkpointing.profile": _TRUTH,
    "activation_checkpointing.synchronize_checkpoint_boundary": _TRUTH,
    "aio.block_size": _COUNT,
    "aio.intra_op_parallelism": _COUNT,
    "aio.overlap_events": _TRUTH,
    "aio.queue_depth": _COUNT,
    "aio.single_submit": _TRUTH,
    "aio.use_gds": _TRUTH,
    "bf16.enabled": _TRUTH,
    "bf16.immediate_grad_update": _TRUTH,
    "checkpoint.use_node_local_storage": _TRUTH,
    "comet.api_key": _TEXT,
    "comet.enabled": _TRUTH,
    "comet.experiment_key": _TEXT,
    "comet.experiment_name": _TEXT,
    "comet.mode": _TEXT,
    "comet.online": _TRUTH,
    "comet.project": _TEXT,
    "comet.samples_log_interval": _COUNT,
    "comet.workspace": _TEXT,
    "comms_logger.debug": _TRUTH,
    "comms_logger.enabled": _TRUTH,
    "comms_logger.prof_all": _TRUTH,
    "comms_logger.prof_ops": _TEXTS,
    "comms_logger.verbose": _TRUTH,
    "communication_data_type": _TYPE,
    "csv_monitor.enabled": _TRUTH,
    "csv_monitor.job_name": _TEXT,
    "csv_monitor.output_path": _TEXT,
    "data_types.buffer_dtype": _TYPE,
    "data_types.grad_accum_dtype": _TYPE,
    "data_types.keep_in_fp32_modules": _TEXTS,
    "data_types.param_dtype": _TYPE,
    "dump_state": _TRUTH,
    "flops_profiler.detailed": _TRUTH,
    "flops_profiler.enabled": _TRUTH,
    "flops_profiler.module_depth": _whole("a whole number from -1 on", lambda value: value >= -1),
    "flops_profiler.output_file": _TEXT,
    "flops_profiler.profile_step": _COUNT,
    "flops_profiler.recompute_fwd_factor": _FROM_0,
    "flops_profiler.top_modules": _COUNT,
    "fp16.consecutive_hysteresis": _TRUTH,
    "fp16.enabled": _TRUTH,
    "fp16.hysteresis": _COUNT,
    "fp16.initial_scale_power": _POWER,
    "fp16.loss_scale": _SCALE,
    "fp16.loss_scale_window": _COUNT,
    "fp16.min_loss_scale": _LEAST_SCALE,
    ACCUMULATION: None,  # the three numbers of a batch: config/batches.py
    "gradient_clipping": _FROM_0,
    "gradient_predivide_factor": _ABOVE_0,
    "log_level": _one_of("debug", "info", "warning", "error", "critical"),
    "memory_breakdown": _TRUTH,
    "optimizer.params.betas": None,  # these four are the recipe's: config/ds_config.py
    "optimizer.params.bias_correction": _TRUTH,
    "optimizer.params.eps": None,
    "optimizer.params.lr": None,
    "optimizer.params.weight_decay": None,
    "optimizer.type": _TEXT,
    "prescale_gradients": _TRUTH,
    "steps_per_print": _COUNT,
    "tensorboard.enabled": _TRUTH,
    "tensorboard.job_name": _TEXT,
    "tensorboard.output_path": _TEXT,
    "timers.throughput.enabled": _TRUTH,
    "timers.throughput.synchronized": _TRUTH,
    "torch_autocast.dtype": _HALF,
    "torch_autocast.enabled": _TRUTH,
    "torch_autocast.lower_precision_safe_modules": _TEXTS,
    GLOBAL: None,
    MICRO: None,
    "wall_clock_breakdown": _TRUTH,
    "wandb.enabled": _TRUTH,
    "wandb.group": _TEXT,
    "wandb.project": _TEXT,
    "wandb.team": _TEXT,
    "zero_allow_untested_optimizer": _TRUTH,
    "zero_force_ds_cpu_optimizer": _TRUTH,
    "zero_optimization.allgather_bucket_size": _EVEN,
    "zero_optimization.contiguous_gradients": _TRUTH,
    "zero_optimization.enable_sanity_checks": _TRUTH,
    "zero_optimization.ignore_unused_parameters": _TRUTH,
    "zero_optimization.leaf_module.classes": _TEXTS,
    "zero_optimization.leaf_module.name_suffixes": _TEXTS,
    "zero_optimization.leaf_module.names": _TEXTS,
    "zero_optimization.log_trace_cache_warnings": _TRUTH,
    "zero_optimization.memory_efficient_linear": _TRUTH,
    "zero_optimization.offload_optimizer.buffer_count": _SIZE,
    "zero_optimization.offload_optimizer.device": _one_of("none", "cpu", "nvme"),
    "zero_optimization.offload_optimizer.fast_init": _TRUTH,
    "zero_optimization.offload_optimizer.nvme_path": None,  # config/ds_zero.py, and the two below
    "zero_optimization.offload_optimizer.pin_memory": _TRUTH,
    "zero_optimization.offload_optimizer.pipeline_read": _TRUTH,
    "zero_optimization.offload_optimizer.pipeline_write": _TRUTH,
    "zero_optimization.offload_param.buffer_count": _SIZE,
    "zero_optimization.offload_param.buffer_size": _SIZE,
    "zero_optimization.offload_param.device": _one_of("none", "cpu", "nvme"),
    "zero_optimization.offload_param.max_in_cpu": _SIZE,
    "zero_optimization.offload_param.nvme_path": _TEXT,
    "zero_optimization.offload_param.pin_memory": _TRUTH,
    "zero_optimization.overlap_comm": _TRUTH,
    "zero_optimization.override_module_apply": _TRUTH,
    "zero_optimization.parameter_alignment": _TRUTH,
    "zero_optimization.reduce_bucket_size": _BUCKET,
    "zero_optimization.reduce_scatter": _TRUTH,
    "zero_optimization.round_robin_gradients": _TRUTH,
    "zero_optimization.save_muon_momentum_buffer_in_memory": _TRUTH,
    "zero_optimization.stage": None,
    "zero_optimization.stage3_allgather_sequential": _TRUTH,
    # Whole weights are what a run leaves in any case (model.safetensors).
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _TRUTH,
    "zero_optimization.stage3_max_live_parameters": _SIZE,
    "zero_optimization.stage3_max_reuse_distance": _SIZE,
    "zero_optimization.stage3_model_persistence_threshold": _SIZE,
    "zero_optimization.stage3_module_granularity_threshold": _SIZE,
    "zero_optimization.stage3_param_persistence_threshold": _SIZE,
    "zero_optimization.stage3_prefetch_bucket_size": _SIZE,
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": _TRUTH,
    "zero_optimization.sub_group_size": _COUNT,
    "zero_optimization.use_multi_rank_bucket_allreduce": _TRUTH,
    "zero_optimization.zero_hpz_partition_size": None,
    "zero_optimization.zero_quantized_gradients": _TRUTH,
    "zero_optimization.zero_quantized_nontrainable_weights": _TRUTH,
    "zero_optimization.zero_quantized_weights": _TRUTH,
}
