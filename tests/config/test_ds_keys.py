"""Keys of a DeepSpeed JSON: what is read, what is refused, what older files call otherwise; and the same by memprof."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import deepspeed
import pytest
from deepspeed import DeepSpeedConfig
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import DeepSpeedMonitorConfig
from deepspeed.runtime import config as theirs
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from launching import DS_CONFIGS

from everest_ds.config.ds_config import Facts, load_ds_config, resolve_ds_config
from everest_ds.config.ds_keys import SECTIONS, todays_keys
from everest_ds.config.ds_refused import REFUSED
from everest_ds.config.errors import UserError
from everest_ds.config.load import load_recipe
from everest_ds.memory.plan import plan
from everest_ds.training.engine import check_ds_config

GPUS = Facts(
    parameters=94_000_000, largest=2_400_000, width=768, ranks=8, on_cpu=False, bf16_supported=True, fp16_supported=True
)
CPUS = dataclasses.replace(GPUS, on_cpu=True)
TINY = load_recipe(None, ["model.size=vit_micro", "model.image_size=16", "train.micro_batch=1"])
# Of DeepSpeed's fields, other names of one that is there: ds_keys translates them.
ALIASES = {"cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory", "stage3_gather_fp16_weights_on_model_save"}

# What deepspeed.initialize looks for by itself.
BEFORE_CONFIG = set(re.findall(r'"(\w+)" in config\b', inspect.getsource(deepspeed.initialize)))


def resolve(ds: dict[str, Any], facts: Facts = GPUS) -> dict[str, Any]:
    return resolve_ds_config(ds, load_recipe(None, ["train.global_batch=1024"]), facts)[0]


class Asked(dict):
    """A section of a JSON that remembers what DeepSpeed looks for in it."""

    def __init__(self, *content: Any) -> None:
        super().__init__(*content)
        self.names: set[str] = set()

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)

    def keys(self) -> Asked:  # type: ignore[override]
        return self

    def __copy__(self) -> Asked:
        return self


def asked_for(*sections: str) -> Iterator[tuple[str, set[str]]]:
    """Yield the top level and sections that DeepSpeed reads key by key, and the keys that it looks for."""
    inside = {section: Asked() for section in sections}
    top = Asked({"train_micro_batch_size_per_gpu": 1, **inside})
    DeepSpeedConfig(top)
    yield "", top.names
    yield from ((section, section_asked.names) for section, section_asked in inside.items())


def test_every_key_that_deepspeed_looks_for_is_in_a_table():
    """A newer DeepSpeed with another key has it decided here: a run goes by it, or it is refused."""
    sections = ("activation_checkpointing", "aio", "checkpoint", "data_types", "flops_profiler", "torch_autocast")
    for section, names in asked_for(*sections):
        assert names - SECTIONS[section] == set(), section
        extra = BEFORE_CONFIG | {"seed"} | set(theirs._REMOVED_TOP_LEVEL_CONFIG_KEYS) if section == "" else set()
        assert SECTIONS[section] - names - extra == set(), section
    assert SECTIONS[""] >= BEFORE_CONFIG


def test_what_deepspeed_has_removed_is_refused():
    assert set(theirs._REMOVED_TOP_LEVEL_CONFIG_KEYS) <= set(REFUSED)
    assert {f"zero_optimization.{name}" for name in theirs._REMOVED_ZERO_CONFIG_KEYS} <= set(REFUSED)


def models() -> dict[str, Any]:
    """By section, DeepSpeed's class that reads it, pydantic's."""
    zero = DeepSpeedZeroConfig
    monitors = {name: field.annotation for name, field in DeepSpeedMonitorConfig.model_fields.items()}
    offloads = {f"zero_optimization.{name}": zero.model_fields[name] for name in ("offload_param", "offload_optimizer")}
    return monitors | {
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
        "zero_optimization": zero,
        "zero_optimization.leaf_module": zero.model_fields["leaf_module"].annotation,
        **{name: field.annotation.__args__[0] for name, field in offloads.items()},
    }


@pytest.mark.parametrize("section", models())
def test_every_field_of_a_section_is_in_a_table(section):
    fields = {field.alias or name for name, field in models()[section].model_fields.items()} - ALIASES
    gone = set(theirs._REMOVED_ZERO_CONFIG_KEYS) if section == "zero_optimization" else set()
    assert fields == SECTIONS[section] - gone


@pytest.mark.parametrize(
    ("ds", "told"),
    [
        ({"stage": 3}, "'stage' belongs into 'zero_optimization'"),
        ({"offload_optimizer": {"device": "cpu"}}, "'offload_optimizer' belongs into 'zero_optimization'"),
        ({"max_grad_norm": 1.0}, "'max_grad_norm': DeepSpeed calls it 'gradient_clipping'"),
        ({"loss_scale": 0}, "'loss_scale' belongs into 'fp16'"),
        ({"device": "cpu"}, "belongs into 'zero_optimization.offload_optimizer' or 'zero_optimization.offload_param'"),
        ({"enabled": True}, "'enabled' belongs into a section, such as 'bf16'"),
        ({"zero_optimisation": {}}, "unknown key 'zero_optimisation'; did you mean 'zero_optimization'?"),
        ({"gradient_cliping": 1.0}, "did you mean 'gradient_clipping'?"),
        ({"brand_new_section": {}}, "unknown key 'brand_new_section', which nothing reads; remove it"),
        ({"zero_optimization": {"stagee": 2}}, "unknown key 'stagee' in 'zero_optimization'; did you mean 'stage'?"),
        ({"zero_optimization": {"gradient_clipping": 1}}, "belongs to the top level, not into 'zero_optimization'"),
        ({"zero_optimization": {"device": "cpu"}}, "offload_param', not into 'zero_optimization'"),
        ({"zero_optimization": {"offload_param": {"devise": "cpu"}}}, "did you mean 'device'?"),
        ({"activation_checkpointing": {"partitioned_activations": True}}, "did you mean 'partition_activations'?"),
        ({"activation_checkpointing": {"enabled": True}}, "'enabled' belongs into a section"),
        ({"aio": {"thread_count": 1}}, "'thread_count' in 'aio': DeepSpeed calls it 'aio.intra_op_parallelism'"),
        ({"flops_profiler": {"profile_steps": 3}}, "did you mean 'profile_step'?"),
        ({"timers": {"throughputs": {}}}, "did you mean 'throughput'?"),
        ({"checkpoint": {"folder": "x"}}, "unknown key 'folder' in 'checkpoint'"),
        ({"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1.0}}}, "DeepSpeed calls it 'gradient_clipping'"),
        ({"optimizer": {"params": {"momentum": 0.9}}}, "unknown key 'momentum' in 'optimizer.params'"),
    ],
)
def test_keys_that_nothing_reads_are_refused_with_their_file(tmp_path, ds, told):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(ds))
    for load, where in ((lambda: load_ds_config(file), f"ds_config {file}: "), (lambda: resolve(ds), "ds_config: ")):
        with pytest.raises(UserError) as caught:
            load()
        assert str(caught.value).startswith(where)
        assert told in str(caught.value)


@pytest.mark.parametrize(
    ("ds", "told"),
    [
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler: the schedule is the recipe's"),
        ({"seed": 1}, "seed: the seed is the recipe's"),
        ({"amp": {"enabled": True}}, "amp: DeepSpeed 0.19 has no amp any more; use bf16"),
        ({"amp": {"opt_level": "O1"}}, "amp: DeepSpeed 0.19 has no amp"),
        ({"sparse_gradients": True}, "sparse_gradients: DeepSpeed 0.19 has no sparse gradients"),
        ({"autotuning": {"enabled": True}}, "autotuning: would end the run"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel: every rank has a whole model"),
        ({"pipeline": {"stages": 2}}, "pipeline: every rank has a whole model"),
        ({"data_efficiency": {"enabled": True}}, "data_efficiency: videos are read as the recipe says"),
        ({"dataloader_drop_last": False}, "dataloader_drop_last: videos that fill no whole batch"),
        ({"checkpoint": {"tag_validation": "Warn"}}, "checkpoint.tag_validation: checkpoints are this project's own"),
        ({"compile": {"deepcompile": True}}, "compile: train.compile=true of the recipe"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op: a gradient is the mean"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation: the training loop has DeepSpeed"),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "bf16.check_grad_overflow: steps that aren't"),
        ({"bf16": {"bf16_optimizer_states": True}}, "bf16.bf16_optimizer_states: the optimizer keeps weights"),
        ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, "compute_grad_norm: steps that aren't"),
        (
            {"zero_optimization": {"stage": 2, "allgather_partitions": False}},
            "allgather_partitions: DeepSpeed 0.19 reads",
        ),
        ({"zero_optimization": {"stage": 1, "legacy_stage1": True}}, "legacy_stage1: DeepSpeed 0.19 has no other"),
        ({"optimizer": {"params": {"torch_adam": True}}}, "optimizer.params.torch_adam: optim.implementation=torch"),
        ({"zero_optimization": {"stage": 2, "allgather_bucket_size": 1001}}, "expected an even number from 2"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "5e8"}}, "reduce_bucket_size: expected a whole"),
        ({"zero_optimization": {"contiguous_gradients": "false"}}, "contiguous_gradients: expected true or false"),
        ({"fp16": {"initial_scale_power": 10**18}}, "initial_scale_power: expected a whole number from 0 to 127"),
        ({"fp16": {"loss_scale": 1e39}}, "loss_scale: expected a number from 0 to 2**127"),
        ({"fp16": {"min_loss_scale": 0}}, "min_loss_scale: expected a whole number from 1"),
        ({"log_level": "chatty"}, "log_level: expected debug, info, warning, error or critical"),
        ({"comms_logger": {"prof_ops": "all_reduce"}}, "prof_ops: expected a list of texts"),
    ],
)
def test_what_a_run_cannot_go_by_is_refused_by_the_planner_too(ds, told):
    for judge in (lambda: resolve(ds), lambda: plan(TINY, ds, ranks=1)):
        with pytest.raises(UserError) as caught:
            judge()
        assert told in str(caught.value)


def test_what_is_off_asks_for_nothing():
    off = {name: {"enabled": False} for name in ("amp", "elasticity", "compression_training", "data_efficiency")}
    off |= {"sparse_gradients": False, "dataloader_drop_last": True, "compile": {}, "scheduler": None}
    off |= {"comms_logger": {"enabled": False, "verbose": True}, "gradient_allreduce_op": "mean"}
    asked = resolve(off | {"optimizer": {"params": {"torch_adam": False, "adam_w_mode": True, "lr": "auto"}}})
    assert set(asked) & set(off) == set()
    assert set(asked["optimizer"]["params"]) == {"lr"}


# As Hugging Face's documentation, DeepSpeed's examples and accelerate's templates have them.
BROUGHT = {
    "transformers_zero3": {
        "fp16": {
            "enabled": "auto",
            "loss_scale": 0,
            "loss_scale_window": 1000,
            "initial_scale_power": 16,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        "bf16": {"enabled": "auto"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True},
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 1e9,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 2000,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": False,
    },
    "transformers_zero2": {
        "zero_optimization": {
            "stage": 2,
            "allgather_partitions": True,
            "allgather_bucket_size": 2e8,
            "overlap_comm": True,
            "reduce_scatter": True,
            "reduce_bucket_size": 5e8,
            "contiguous_gradients": True,
            "cpu_offload": True,
        },
        "zero_allow_untested_optimizer": True,
        "prescale_gradients": False,
    },
    "accelerate": {
        "zero_optimization": {
            "stage": 3,
            "stage3_gather_16bit_weights_on_model_save": "auto",
            "offload_optimizer": {"device": "auto"},
            "offload_param": {"device": "auto"},
        },
        "zero_force_ds_cpu_optimizer": False,
        "data_types": {"keep_in_fp32_modules": "auto"},
    },
    "deepspeed_examples": {
        "optimizer": {"type": "Adam", "params": {"torch_adam": False, "adam_w_mode": True, "lr": "auto"}},
        "zero_optimization": {"stage": 1, "elastic_checkpoint": False, "load_from_fp32_weights": True},
        "communication_data_type": "fp32",
        "activation_checkpointing": {"partition_activations": False, "number_checkpoints": 4, "profile": False},
        "flops_profiler": {"enabled": True, "profile_step": 1, "module_depth": -1, "top_modules": 3, "detailed": True},
        "tensorboard": {"enabled": False, "output_path": "out", "job_name": "run"},
        "wandb": {"enabled": False, "project": "mine"},
        "aio": {"block_size": 1048576, "queue_depth": 8, "single_submit": False, "overlap_events": True},
        "sparse_gradients": False,
        "elasticity": {"enabled": False},
        "memory_breakdown": False,
        "dump_state": False,
    },
}


@pytest.mark.parametrize("facts", [GPUS, CPUS], ids=["gpus", "cpus"])
@pytest.mark.parametrize("name", BROUGHT)
def test_files_that_people_bring_are_taken(tmp_path, name, facts):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(BROUGHT[name]))
    ds = resolve(load_ds_config(file), facts)
    check_ds_config(ds)
    # As the run directory has it: what was resolved can be given again.
    file.write_text(json.dumps(ds))
    assert resolve(load_ds_config(file), facts) == ds


@pytest.mark.parametrize("file", sorted(DS_CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_files_are_taken_without_a_word(file, caplog):
    with caplog.at_level(logging.WARNING):
        resolve(load_ds_config(file))
    assert caplog.text == ""


def test_whole_numbers_are_whole_however_written():
    zero = resolve({"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e8, "sub_group_size": 1e9}})
    sizes = [zero["zero_optimization"][name] for name in ("reduce_bucket_size", "sub_group_size")]
    assert sizes == [500_000_000, 1_000_000_000]
    assert all(isinstance(size, int) for size in sizes)


def test_old_names_become_todays_with_a_warning(tmp_path, caplog):
    file = tmp_path / "old.json"
    zero = {"stage": 3, "cpu_offload": True, "cpu_offload_param": True, "cpu_offload_use_pin_memory": True}
    file.write_text(json.dumps({"zero_optimization": zero | {"prefetch_bucket_size": 7}}))
    with caplog.at_level(logging.WARNING):
        ds = load_ds_config(file)
    pinned = {"device": "cpu", "pin_memory": True}
    now = {"stage": 3, "offload_optimizer": pinned, "offload_param": pinned, "stage3_prefetch_bucket_size": 7}
    assert ds == {"zero_optimization": now}
    assert (
        f'{file}: zero_optimization.cpu_offload is an old name; it is read as offload_optimizer with "device": "cpu"'
        in (caplog.text)
    )


def test_old_names_plan_as_todays():
    old = {"zero_optimization": {"stage": 2, "cpu_offload": True}}
    now = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    planned, as_now = (plan(TINY, ds, ranks=2) for ds in (old, now))
    assert (planned.host, planned.device) == (as_now.host, as_now.device)
    assert planned.host


@pytest.mark.parametrize(
    ("zero", "told"),
    [
        ({"cpu_offload": True, "offload_optimizer": {"device": "none"}}, "is an old name of offload_optimizer, which"),
        ({"max_live_parameters": 1, "stage3_max_live_parameters": 1}, "is an old name of stage3_max_live_parameters"),
        ({"cpu_offload": "yes"}, "cpu_offload: expected true or false, got 'yes'"),
    ],
)
def test_old_names_that_contradict_are_refused(zero, told):
    with pytest.raises(UserError, match=told):
        todays_keys({"zero_optimization": zero})


def test_an_old_switch_that_is_off_is_nothing():
    assert todays_keys({"zero_optimization": {"stage": 2, "cpu_offload": False}}) == (
        {"zero_optimization": {"stage": 2}},
        {},
    )
