import dataclasses
from pathlib import Path

import pytest

from everest_ds.config.ds_config import Facts, bucket_elements, load_ds_config, precision, resolve_ds_config
from everest_ds.config.ds_zero import check_nvme_paths
from everest_ds.config.errors import UserError
from everest_ds.config.load import load_recipe

GPU = Facts(
    parameters=94_000_000,
    largest=2_400_000,
    width=768,
    ranks=8,
    on_cpu=False,
    bf16_supported=True,
    fp16_supported=True,
)
CPU = Facts(parameters=1_000, largest=100, width=96, ranks=2, on_cpu=True, bf16_supported=True, fp16_supported=False)


NVME = {"device": "nvme", "nvme_path": "/nvme"}
CPU_CHECKPOINTING = {"activation_checkpointing": {"cpu_checkpointing": True}}


def zero(stage: int, **settings) -> dict:
    return {"zero_optimization": {"stage": stage, **settings}}


def resolve(ds: dict, *overrides: str, facts: Facts = GPU):
    return resolve_ds_config(ds, load_recipe(None, overrides or ["train.global_batch=1024"]), facts)


def test_autos_come_from_the_recipe():
    raw = {
        "train_batch_size": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
    }
    ds, batches = resolve(raw, "train.global_batch=1024", "train.micro_batch=32", "optim.base_lr=1.5e-4")
    assert (batches.micro, batches.accumulation, batches.ranks, batches.total) == (32, 4, 8, 1024)
    assert ds["train_micro_batch_size_per_gpu"] == 32
    assert ds["gradient_accumulation_steps"] == 4
    assert ds["optimizer"]["params"]["lr"] == pytest.approx(6e-4)  # base_lr x 1024 / 256
    assert precision(ds) == "bf16"
    assert raw["train_batch_size"] == "auto"  # the caller's dictionary is left alone


def test_buckets_fit_the_model():
    ds, _ = resolve({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}})
    bucket = ds["zero_optimization"]["reduce_bucket_size"]
    assert GPU.largest <= bucket <= GPU.parameters / 4
    assert bucket == bucket_elements(GPU)
    assert bucket % 2 == 0


@pytest.mark.parametrize(("stage", "ranks", "filled"), [(1, 1, False), (2, 1, False), (2, 2, True), (3, 1, True)])
def test_gradients_travel_beside_the_backward_pass_where_somebody_gets_them(stage, ranks, filled):
    facts = dataclasses.replace(GPU, ranks=ranks)
    ds, _ = resolve(zero(stage, overlap_comm="auto"), facts=facts)
    assert ds["zero_optimization"]["overlap_comm"] is filled
    asked, _ = resolve(zero(stage, overlap_comm=not filled), facts=facts)
    assert asked["zero_optimization"]["overlap_comm"] is not filled
    assert "overlap_comm" not in resolve(zero(stage), facts=facts)[0]["zero_optimization"]


def test_zero3_keeps_two_buckets_gathered():
    keys = ("stage3_max_live_parameters", "stage3_max_reuse_distance", "sub_group_size")
    ds, _ = resolve(zero(3, **dict.fromkeys(keys, "auto")))
    bucket, parameters = bucket_elements(GPU), GPU.parameters // GPU.ranks
    assert [ds["zero_optimization"][key] for key in keys] == [2 * bucket, bucket, -(-parameters // 8)]
    assert resolve(zero(3, sub_group_size="auto"), facts=CPU)[0]["zero_optimization"]["sub_group_size"] == 2**18


def test_what_runs_on_a_gpu_alone_is_refused_on_a_cpu_alone():
    asked = zero(3, zero_quantized_weights=True, zero_quantized_gradients=True) | CPU_CHECKPOINTING
    assert resolve(asked)[0]["zero_optimization"]["zero_quantized_weights"] is True


@pytest.mark.parametrize(("folder", "told"), [("none", "is not a folder; make it"), ("closed", "can't be written to")])
def test_folders_for_nvme_are_looked_at(tmp_path, monkeypatch, folder, told):
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr("os.access", lambda path, _: path != tmp_path / "closed")  # root may write anywhere
    ds = zero(3, offload_optimizer=NVME | {"nvme_path": str(tmp_path / folder)})
    with pytest.raises(UserError, match=f"offload_optimizer.nvme_path: {tmp_path / folder} {told}"):
        check_nvme_paths(ds)
    check_nvme_paths(zero(3, offload_optimizer=NVME | {"nvme_path": str(tmp_path)}))


def test_bf16_auto_is_off_on_a_cpu():
    ds, _ = resolve({"bf16": {"enabled": "auto"}}, facts=CPU)
    assert precision(ds) == "fp32"


@pytest.mark.parametrize(
    ("ds", "overrides", "facts", "told"),
    [
        ({}, ["train.global_batch=100"], GPU, "global batch 100 is not micro-batch 12 x accumulation 1 x ranks 8 = 96"),
        ({}, ["train.global_batch=4"], GPU, "global batch 4 is not"),
        ({}, ["train.micro_batch=7", "train.global_batch=64"], GPU, "global batch 64 is not micro-batch 7"),
        ({}, ["train.seed=1"], GPU, "set train.global_batch or train.micro_batch"),
        ({"train_batch_size": 64}, ["train.global_batch=128"], GPU, "train_batch_size = 64 contradicts"),
        ({"train_batch_size": "many"}, ["train.seed=1"], GPU, "expected a positive whole number or 'auto'"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, [], GPU, "bf16 and fp16 are both enabled"),
        ({"fp16": {"enabled": True}}, [], CPU, "fp16: this accelerator does not support it"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, [], GPU, "optimizer.params.lr = 0.001 contradicts"),
        ({"optimizer": {"type": "AdamW", "params": {"weight_decay": 0.3}}}, [], GPU, "weight_decay = 0.3 contradicts"),
        ({"optimizer": "AdamW"}, [], GPU, "optimizer: expected an object"),
        ({"bfloat16": {"enabled": True}}, [], GPU, "rename the section"),
        ({"fp16": {"enabled": True, "auto_cast": True}}, [], GPU, "fp16.auto_cast"),
        ({"zero_optimization": {"stage": "two"}}, [], GPU, "stage: expected 0, 1, 2 or 3, got 'two'"),
        ({"zero_optimization": {"stage": 4}}, [], GPU, "stage: expected 0, 1, 2 or 3, got 4"),
        ({"zero_optimization": {"stage": -1}}, [], GPU, "stage: expected 0, 1, 2 or 3, got -1"),
        ({"scheduler": {"type": "WarmupLR"}}, [], GPU, "the schedule is the recipe's"),
        ({"zero_optimization": {"stage": "auto"}}, [], GPU, "zero_optimization.stage: 'auto' can't be filled"),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            [],
            GPU,
            "offload_param: needs ZeRO stage 3",
        ),
        (zero(2, offload_optimizer=NVME), [], GPU, "offload_optimizer: NVMe needs ZeRO stage 3"),
        (zero(3, offload_optimizer={"device": "nvme"}), [], GPU, "offload_optimizer.nvme_path: expected the path"),
        (zero(3, offload_optimizer=NVME | {"buffer_count": 3}), [], GPU, "needs at least 4 buffers, got 3"),
        (zero(3, offload_param=NVME), [], GPU, "offload_param.device: 'nvme' is for the optimizer alone"),
        (zero(2, zero_hpz_partition_size=8), [], GPU, "zero_hpz_partition_size: needs ZeRO stage 3"),
        (zero(3, zero_hpz_partition_size=3), [], GPU, "8 ranks are not groups of 3"),
        (zero(3, zero_hpz_partition_size="auto"), [], GPU, "expected a whole number from 1 on, got 'auto'"),
        (zero(3, mics_shard_size=8), [], GPU, "mics_shard_size: DeepSpeed 0.19 has no MiCS any more"),
        (zero(3, zero_quantized_weights=True), ["train.micro_batch=2"], CPU, "zero_quantized_weights: its kernels"),
        ({"activation_checkpointing": {"partition_activations": True}}, [], GPU, "here every rank has a whole one"),
        (CPU_CHECKPOINTING, ["train.micro_batch=2"], CPU, "cpu_checkpointing: on a CPU"),
    ],
)
def test_contradictions_are_refused(ds, overrides, facts, told):
    with pytest.raises(UserError) as caught:
        resolve(ds, *overrides, facts=facts)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("bf16", "fp16", "facts", "expected"),
    [
        ("auto", "auto", GPU, "bf16"),
        ("auto", True, GPU, "fp16"),
        (True, "auto", GPU, "bf16"),
        (False, "auto", GPU, "fp16"),
        ("auto", "auto", CPU, "fp32"),
    ],
)
def test_auto_precisions_settle_between_themselves(bf16, fp16, facts, expected):
    ds, _ = resolve({"bf16": {"enabled": bf16}, "fp16": {"enabled": fp16}}, facts=facts)
    assert precision(ds) == expected


def test_null_sections_are_absent_ones():
    ds, _ = resolve({"optimizer": None, "zero_optimization": {"stage": 1, "offload_optimizer": None}})
    assert "optimizer" not in ds
    assert ds["zero_optimization"] == {"stage": 1}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{not json", "not a JSON file"),
        ("[1]", "expected a JSON object"),
        ('{"zero_optimisation": {}}', "did you mean 'zero_optimization'"),
        ("[" * 100_000, "not a JSON file"),
    ],
)
def test_files_that_are_no_ds_config(tmp_path: Path, text, told):
    file = tmp_path / "ds.json"
    file.write_text(text)
    with pytest.raises(UserError, match=told):
        load_ds_config(file)


def test_a_missing_ds_config_says_where_some_are(tmp_path):
    with pytest.raises(UserError, match="ds_configs/"):
        load_ds_config(tmp_path / "none.json")
