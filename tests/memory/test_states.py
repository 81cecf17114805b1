"""What is held between steps: bytes per parameter as known from measurements, and arithmetic that must hold."""

import dataclasses
import json

import pytest

from everest_ds.config.finetuning import ClassifierConfig
from everest_ds.config.schema import ModelConfig
from everest_ds.memory.setting import FlatGroup, ZeroSetting, groups_of
from everest_ds.memory.states import averaged_weights, states
from everest_ds.memory.trace import Parameter, TraceSpec, trace_step
from everest_ds.models import build_network
from everest_ds.models.parameter_groups import parameter_groups

MODEL = ModelConfig(size="vit_micro", image_size=48)


@pytest.fixture(scope="module")
def parameters():
    return trace_step(TraceSpec(model=MODEL)).parameters


def per_parameter(parameters, **setting) -> float:
    items = states(parameters, ZeroSetting(**setting, reduce_bucket=0, persistence_threshold=0))
    return sum(item.size_bytes for item in items) / sum(p.elements for p in parameters)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"stage": 0, "precision": "bf16", "ranks": 2}, 14),  # 2 + 4 + 8
        ({"stage": 0, "precision": "fp32", "ranks": 2}, 12),  # 4 + 8
        ({"stage": 2, "precision": "bf16", "ranks": 2}, 8),  # 2 + (4 + 8) / 2
        ({"stage": 2, "precision": "fp32", "ranks": 4}, 7),  # 4 + (4 + 8) / 4: DeepSpeed copies fp32 parameters too
        ({"stage": 3, "precision": "bf16", "ranks": 2}, 8),  # (2 + 4 + 8 + 2) / 2
        ({"stage": 3, "precision": "fp32", "ranks": 8}, 2.5),  # (4 + 4 + 8 + 4) / 8
    ],
)
def test_bytes_per_parameter(parameters, setting, expected):
    assert per_parameter(parameters, **setting) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("stage", [2, 3])
def test_offload_moves_states_to_the_host(parameters, stage):
    setting = ZeroSetting(
        stage=stage, precision="bf16", ranks=2, offload_optimizer=True, offload_param=stage == 3, reduce_bucket=0
    )
    items = states(parameters, setting)
    host = {item.name for item in items if item.place == "host"}
    assert {"Adam moments", "fp32 master parameters", "fp32 gradients"} <= host
    on_device = sum(item.size_bytes for item in items if item.place == "device" and item.name == "parameters")
    assert (on_device == 0) == (stage == 3)


def test_nvme_takes_what_is_large_enough_and_buffers_pass_it_through(parameters):
    elements = sum(-(-p.elements // 2) for p in parameters)
    small = sum(-(-p.elements // 2) for p in groups_of(parameters)[0])  # norms and biases: less than 1 MiB
    large = -(-(elements - small) // 256) * 256  # in whole KiB
    setting = ZeroSetting(stage=3, precision="fp32", ranks=2, offload_optimizer=True, swap_buffers=4, reduce_bucket=0)
    items = {(item.name, item.place): item.size_bytes for item in states(parameters, setting)}
    assert items["fp32 master parameters", "nvme"] == 4 * large
    assert items["Adam moments", "nvme"] == 8 * large
    assert items["swap buffers", "host"] == 4 * 4 * large
    assert items["fp32 master parameters", "host"] == items["fp32 gradients", "host"] == 4 * small
    assert ("Adam moments", "device") not in items
    halves = dataclasses.replace(setting, sub_group=large // 2, least_swapped_bytes=0)
    buffers = {item.name: item.size_bytes for item in states(parameters, halves)}["swap buffers"]
    assert 8 * large <= buffers < 12 * large


def test_gradients_go_to_nvme_in_whole_kib_and_small_ones_wait():
    setting = ZeroSetting(stage=3, precision="bf16", ranks=2, offload_optimizer=True, swap_buffers=4)
    mib = 2**18  # elements
    assert [setting.swapped_gradient(n) for n in (mib - 1, mib, mib + 255, mib + 256)] == [0, mib, mib, mib + 256]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_item_states_formula_and_source(parameters, stage):
    for item in states(parameters, ZeroSetting(stage=stage, precision="bf16", ranks=2, offload_optimizer=stage > 0)):
        assert item.formula
        assert "/" in item.source or item.source.startswith("everest_ds")


CLASSIFIER = ClassifierConfig(size="vit_micro", image_size=48, classes=10)


@pytest.mark.parametrize(
    ("model", "weight_decay", "layer_decay", "groups"),
    [
        (MODEL, 0.05, 1.0, {2}),
        (MODEL, 0.0, 1.0, {1, 2}),  # timm 1.0.20 makes two of equal decay, later ones one
        (CLASSIFIER, 0.05, 1.0, {2}),
        # Four blocks: the embedding, the blocks and the head, two each.
        (CLASSIFIER, 0.05, 0.75, {12}),
    ],
)
def test_groups_are_the_optimizers(model, weight_decay, layer_decay, groups):
    spec = TraceSpec(model=model, weight_decay=weight_decay, layer_decay=layer_decay)
    ours = [[p.name for p in group] for group in groups_of(trace_step(spec).parameters)]
    network = build_network(model)
    names = {id(p): name for name, p in network.named_parameters()}
    theirs = [[names[id(p)] for p in g["params"]] for g in parameter_groups(network, weight_decay, layer_decay)]
    assert ours == theirs
    assert len(ours) in groups


def test_zero2_pads_every_group():
    decayed, plain = (
        trace_step(TraceSpec(model=CLASSIFIER, layer_decay=layer_decay)).parameters for layer_decay in (0.75, 1.0)
    )
    setting = ZeroSetting(stage=2, precision="fp32", ranks=7)
    sizes = [{i.name: i.size_bytes for i in states(parameters, setting)} for parameters in (decayed, plain)]
    groups = [[sum(p.elements for p in group) for group in groups_of(parameters)] for parameters in (decayed, plain)]
    padded = [sum(-(-elements // 14) * 14 for elements in group) for group in groups]
    for size, elements in zip(sizes, padded, strict=True):
        assert size["parameters"] == 4 * elements
        assert size["Adam moments"] == 8 * elements // 7
    assert padded[0] > padded[1]


def test_the_average_of_the_weights_is_whole_on_every_rank(parameters):
    assert averaged_weights(parameters).size_bytes == 4 * sum(p.elements for p in parameters)


def test_partitions_are_padded_and_pieces_fill_them():
    group = FlatGroup(tuple(Parameter(f"p{i}", n, 0, "") for i, n in enumerate((5, 7, 1))), ranks=2)
    assert (group.elements, group.padded, group.partition) == (13, 16, 8)
    pieces = group.pieces()
    assert [(p.rank, p.elements) for p in pieces["p1"]] == [(0, 3), (1, 4)]
    assert sum(p.elements for ps in pieces.values() for p in ps) == 13


def test_settings_of_swapping_are_read():
    offload = {"device": "nvme", "nvme_path": "/nvme", "buffer_count": 6}
    ds = {"zero_optimization": {"stage": 3, "offload_optimizer": offload}, "aio": {"block_size": 2**22}}
    setting = ZeroSetting.read(ds, ranks=4, on_cpu=False)
    assert (setting.offload_optimizer, setting.swap_buffers, setting.least_swapped_bytes) == (True, 6, 2**22)
    offload["device"] = "cpu"
    assert ZeroSetting.read(ds, ranks=4, on_cpu=False).swap_buffers == 0


def test_settings_are_read_from_a_deepspeed_json():
    ds = json.loads('{"bf16": {"enabled": true}, "zero_optimization": {"stage": 3, "reduce_bucket_size": 7}}')
    setting = ZeroSetting.read(ds, ranks=4, on_cpu=False)
    assert (setting.stage, setting.precision, setting.reduce_bucket, setting.overlap_comm) == (3, "bf16", 7, True)
    assert ZeroSetting.read({"zero_optimization": {"stage": 2}}, ranks=1, on_cpu=True).overlap_comm is False
