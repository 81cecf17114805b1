"""What DeepSpeed 0.19 has a key for and a run here can't have, or can't have on a CPU: refused before a rank starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from everest_ds.config.batches import AUTO
from everest_ds.config.errors import UserError


def _given(value: Any) -> bool:
    return value is not None


def _asked_for(value: Any) -> bool:
    """Whether a section or switch asks for anything: ``{"enabled": false}``, as many files have it, doesn't."""
    asked = value.get("enabled", value) if isinstance(value, dict) else value
    return bool(asked) and asked != AUTO


def _unless(*allowed: Any) -> Callable[[Any], bool]:
    return lambda value: value is not None and value not in allowed


@dataclass(frozen=True, kw_only=True)
class _Refusal:
    """A row: why a key is refused, which values of it are, and whether on CPUs alone."""

    why: str
    refused: Callable[[Any], bool] = _asked_for
    on_cpu_only: bool = False


def _gone(what: str) -> _Refusal:
    return _Refusal(why=f"DeepSpeed 0.19 has no {what} any more; remove it")


_MICS = _Refusal(
    why="DeepSpeed 0.19 has no MiCS any more; ds_configs/zero3_hpz.json keeps parameter traffic within a node",
    refused=_given,
)
_KERNELS = _Refusal(why="its kernels need CUDA; remove it", on_cpu_only=True)
_WHOLE_MODEL = _Refusal(why="every rank has a whole model and whole clips here; remove it", refused=_given)
_WHOLE_ACTIVATIONS = _Refusal(
    why="cuts activations over the ranks that share one model, and here every rank has a whole one; remove it"
)
_NOT_FINITE = _Refusal(why="steps that aren't finite would be taken; remove it", refused=_unless(True))
_OUR_CHECKPOINTS = _Refusal(
    why="checkpoints are this project's own, of that section use_node_local_storage alone is read; remove it",
    refused=_given,
)
_OUR_READING = "videos are read as the recipe says (data.*); remove it"
_FP32_MASTERS = _Refusal(why="the optimizer keeps weights and moments in fp32, and so do checkpoints; remove it")
_UNUSED = "DeepSpeed 0.19 reads it and does nothing with it; remove it"
_WHOLE_CHECKPOINTS = "is for checkpoints of DeepSpeed's, and here they are whole; remove it"
_SUPER_OFFLOAD = _Refusal(why="is for SuperOffload, which is not tried here; remove it", refused=_given)

REFUSED: dict[str, _Refusal] = {
    "activation_checkpointing.contiguous_memory_optimization": _WHOLE_ACTIVATIONS,
    "activation_checkpointing.cpu_checkpointing": _Refusal(
        why="on a CPU DeepSpeed 0.19 empties what it means to keep; remove it: it is on the host anyway",
        on_cpu_only=True,
    ),
    "activation_checkpointing.partition_activations": _WHOLE_ACTIVATIONS,
    "amp": _Refusal(why="DeepSpeed 0.19 has no amp any more; use bf16, fp16 or torch_autocast"),
    "autotuning": _Refusal(
        why="would end the run after some steps; train.micro_batch=auto and 'memprof fit' find the batch"
    ),
    "bf16.bf16_master_weights_and_grads": _FP32_MASTERS,
    "bf16.bf16_optimizer_states": _FP32_MASTERS,
    "bf16.check_grad_overflow": _NOT_FINITE,
    "bfloat16": _Refusal(why="DeepSpeed calls it bf16 now; rename the section"),
    "checkpoint.checkpoint_serialization": _OUR_CHECKPOINTS,
    "checkpoint.load_universal": _OUR_CHECKPOINTS,
    "checkpoint.parallel_write": _OUR_CHECKPOINTS,
    "checkpoint.tag_validation": _OUR_CHECKPOINTS,
    "checkpoint.writer": _OUR_CHECKPOINTS,
    "compile": _Refusal(why="train.compile=true of the recipe compiles the model; DeepCompile is not tried here"),
    "compression_training": _gone("compression"),
    "curriculum_learning": _gone("curriculum learning"),
    "data_efficiency": _Refusal(why=_OUR_READING),
    "data_parallel_size": _WHOLE_MODEL,
    "dataloader_drop_last": _Refusal(
        why="videos that fill no whole batch are always left out of an epoch; remove it", refused=_unless(True)
    ),
    "datastates_ckpt": _Refusal(why="checkpoints are this project's own; remove it"),
    "disable_allgather": _Refusal(why=_UNUSED),
    "disable_python_gc": _Refusal(why="the training loop leaves collecting garbage to Python; remove it"),
    "eigenvalue": _gone("quantised training"),
    "elasticity": _Refusal(
        why="DeepSpeed 0.19 has no elastic training any more; train.micro_batch=auto keeps the global batch"
    ),
    "expert_parallel": _Refusal(why="the models have no experts; remove it"),
    "fp16.auto_cast": _Refusal(why="would round the noise that selects tokens; remove it"),
    "fp16.fp16_master_weights_and_grads": _FP32_MASTERS,
    "gradient_allreduce_op": _Refusal(
        why="a gradient is the mean over the clips, on any number of ranks; remove it", refused=_unless("mean")
    ),
    "graph_harvesting": _gone("graph harvesting"),
    "hybrid_engine": _Refusal(why="is for language models that generate while they train; remove it"),
    "managed_gradient_accumulation": _Refusal(
        why="the training loop has DeepSpeed count the passes of a step; remove it", refused=_unless(True)
    ),
    "nebula": _gone("Nebula"),
    "optimizer.legacy_fusion": _Refusal(why=_UNUSED),
    "optimizer.params.adam_w_mode": _Refusal(why="weight decay is AdamW's here; remove it", refused=_unless(True)),
    "optimizer.params.torch_adam": _Refusal(why="optim.implementation=torch of the recipe takes torch's; remove it"),
    "pipeline": _WHOLE_MODEL,
    "progressive_layer_drop": _gone("progressive layer dropping"),
    "quantize_training": _gone("quantised training"),
    "scheduler": _Refusal(why="the schedule is the recipe's (optim.*); remove it from the JSON", refused=_given),
    "seed": _Refusal(why="the seed is the recipe's; remove it and set train.seed", refused=_given),
    "seq_parallel_communication_data_type": _WHOLE_MODEL,
    "sequence_parallel_size": _WHOLE_MODEL,
    "sparse_attention": _gone("sparse attention"),
    "sparse_gradients": _gone("sparse gradients"),
    "tensor_parallel": _WHOLE_MODEL,
    "use_data_before_expert_parallelism": _Refusal(why="the models have no experts; remove it"),
    "vocabulary_size": _Refusal(why="the models have no vocabulary; remove it", refused=_given),
    "weight_quantization": _Refusal(why="is for inference; remove it"),
    "zero_optimization.allgather_partitions": _Refusal(why=_UNUSED, refused=_unless(True)),
    "zero_optimization.compute_grad_norm": _NOT_FINITE,
    "zero_optimization.elastic_checkpoint": _Refusal(why=_WHOLE_CHECKPOINTS),
    "zero_optimization.legacy_stage1": _gone("other stage 1"),
    "zero_optimization.load_from_fp32_weights": _Refusal(why=_WHOLE_CHECKPOINTS, refused=_unless(True)),
    "zero_optimization.mics_hierarchical_params_gather": _MICS,
    "zero_optimization.mics_shard_size": _MICS,
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": _SUPER_OFFLOAD,
    "zero_optimization.offload_optimizer.ratio": _Refusal(
        why="the optimizer is offloaded as a whole; remove it", refused=_unless(1)
    ),
    "zero_optimization.offload_optimizer.super_offload": _Refusal(why=_SUPER_OFFLOAD.why),
    "zero_optimization.pipeline_loading_checkpoint": _Refusal(why=_WHOLE_CHECKPOINTS),
    "zero_optimization.zenflow": _Refusal(
        why="ZenFlow splits the optimizer in two, which checkpoints don't know; remove it", refused=_given
    ),
    "zero_optimization.zero_quantized_gradients": _KERNELS,
    "zero_optimization.zero_quantized_nontrainable_weights": _KERNELS,
    "zero_optimization.zero_quantized_weights": _KERNELS,
    "zero_optimization.zeropp_loco_param": _Refusal(why="DeepSpeed 0.19 has no LoCo any more; remove it"),
}


def check_refused(ds: dict[str, Any], *, on_cpu: bool) -> None:
    """Refuse what a run can't have; a key whose value asks for nothing else than a run does anyhow is taken out.

    Raises:
        UserError: something is asked for that can't be had.
    """
    for key, row in REFUSED.items():
        if row.on_cpu_only and not on_cpu:
            continue
        *sections, last = key.split(".")
        inside: Any = ds
        for section in sections:
            inside = inside.get(section) if isinstance(inside, dict) else None
        if not isinstance(inside, dict) or last not in inside:
            continue
        if row.refused(inside[last]):
            raise UserError(f"ds_config {key}: {row.why}")
        del inside[last]
