"""``memory.json``: like is held against like."""

import pytest
from launching import DS_CONFIGS

from everest_ds.config.ds_config import load_ds_config
from everest_ds.config.load import load_recipe
from everest_ds.memory.gpus import size
from everest_ds.memory.plan import plan
from everest_ds.memory.record import Measured, as_record, held_items, in_a_line, seen_held_bytes, seen_peak_bytes

RECIPE = load_recipe(None, ["model.size=vit_micro", "model.image_size=48", "train.micro_batch=4"])
OFFLOAD = load_ds_config(DS_CONFIGS / "zero2_offload.json")


def planned(device, ds=OFFLOAD):
    return plan(RECIPE, ds, ranks=2, device_type=device)


def test_on_a_gpu_the_allocator_sees_neither_context_nor_host():
    of_gpu = planned("cuda")
    outside = of_gpu.overheads.context_bytes + of_gpu.overheads.communication_bytes
    assert of_gpu.predicted_peak_bytes - seen_peak_bytes(of_gpu) == outside
    items = held_items(of_gpu)
    assert "Adam moments" in items["host"]
    assert "Adam moments" not in items["device"]
    assert sum(items["device"].values()) == seen_held_bytes(of_gpu) < of_gpu.states_bytes
    assert items["device"]["clips (this pass's and the next's)"] == 4 * 2 * 3 * 16 * 48 * 48


def test_on_a_cpu_the_host_is_the_device():
    of_cpu = planned("cpu")
    assert seen_peak_bytes(of_cpu) == of_cpu.predicted_peak_bytes + sum(of_cpu.host.values())
    assert list(held_items(of_cpu)) == ["device"]
    assert sum(held_items(of_cpu)["device"].values()) == seen_held_bytes(of_cpu) == of_cpu.states_bytes


def test_the_peak_is_that_of_the_rank_that_needed_most():
    of_cpu = planned("cpu")
    held = held_items(of_cpu)
    held["device"]["parameters"] += 100
    held["device"]["other"] = 28
    held_bytes = of_cpu.states_bytes + 128
    ranks = [
        Measured(rank=rank, held_bytes=held_bytes, held=held, peak_bytes=of_cpu.process_peak_bytes * (rank + 1))
        for rank in range(2)
    ]
    record = as_record(of_cpu, ranks, steps=(3, 5))
    assert record["steps"] == [3, 5]
    assert (record["measured"]["by"], record["measured"]["peak_rank"]) == ("resident set", 1)
    difference = record["difference"]
    assert difference["held"]["bytes"] == 128
    assert difference["held"]["share"] == pytest.approx(128 / held_bytes)
    assert (difference["peak"]["bytes"], difference["peak"]["share"]) == (of_cpu.process_peak_bytes, 0.5)
    off = {name: pair["bytes"] for name, pair in difference["items"]["device"].items() if pair["bytes"]}
    assert off == {"parameters": 100, "other": 28}
    assert [rank["rank"] for rank in record["per_rank"]] == [0, 1]
    peak = of_cpu.process_peak_bytes
    assert in_a_line(record).endswith(f"; the resident set grew by {size(2 * peak)}, predicted {size(peak)} of tensors")
    record["measured"]["peak_reserved_bytes"] = 3 * 2**30
    assert in_a_line(record).endswith("(+50.0%), reserved 3.00 GiB")
