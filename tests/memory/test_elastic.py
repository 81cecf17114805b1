"""A global batch on 1 to 64 ranks: always that batch, and one step up is too much by the planner."""

import dataclasses

import pytest
import torch
from launching import DS_CONFIGS

from everest_ds.config.batches import largest_divisor
from everest_ds.config.ds_config import load_ds_config
from everest_ds.config.errors import UserError
from everest_ds.config.finetuning import FinetuneRecipe
from everest_ds.config.load import load_as, load_recipe
from everest_ds.memory.elastic import choose, elastic, with_micro_batch
from everest_ds.memory.plan import plan

MICRO = ["model.size=vit_micro", "model.image_size=64"]
GLOBAL = 960  # 2^6 x 3 x 5
MIB = 2**20
FILES = {name: load_ds_config(DS_CONFIGS / f"{name}.json") for name in ("zero0", "zero2", "zero2_offload")}
WORLDS = [ranks for ranks in range(1, 65) if GLOBAL % ranks == 0]


def recipe(*keys, batch=GLOBAL):
    return load_recipe(None, [*MICRO, f"train.global_batch={batch}", *keys])


@pytest.mark.parametrize(("views", "files"), [(1, FILES), (3, {"zero2": FILES["zero2"]})])
def test_any_number_of_ranks_makes_the_batch_with_the_largest_passes_that_fit(views, files):
    capacity, worlds = 1000 * MIB, [ranks for ranks in WORLDS if GLOBAL % (ranks * views) == 0]
    asked = recipe(f"data.clips_per_video={views}")
    rows = elastic(asked, files, world_sizes=worlds, capacity_bytes=capacity)
    assert [(row.ranks, row.ds_config) for row in rows] == [(ranks, name) for ranks in worlds for name in files]
    assert len({row.micro_batch for row in rows}) > 5
    for row in rows:
        assert row.micro_batch * row.accumulation * row.ranks == row.global_batch == GLOBAL
        assert row.micro_batch % views == 0
        assert row.fits
        share = GLOBAL // row.ranks

        def peak(micro, row=row):
            return plan(with_micro_batch(asked, micro), files[row.ds_config], ranks=row.ranks).predicted_peak_bytes

        assert peak(row.micro_batch) == row.predicted_peak_bytes <= capacity
        above = [size for size in range(row.micro_batch + views, share + 1, views) if share % size == 0]
        if above:
            assert peak(above[0]) > capacity
    # Neither was everything that fits, nor nothing.
    assert {row.accumulation == 1 for row in rows} == {True, False}


def test_where_not_even_the_smallest_fits_it_is_what_is_planned():
    found = choose(recipe("data.clips_per_video=2"), FILES["zero0"], ranks=4, capacity_bytes=MIB)
    assert (found.batches.micro, found.batches.accumulation, found.fits) == (2, 120, False)
    assert found.needed_bytes > MIB


def test_one_clip_has_a_plan_of_its_own():
    """Kernels skip copies where a dimension is one, so it takes less than the line through larger batches says."""
    asked = recipe("model.attention=eager")
    needed = {m: plan(with_micro_batch(asked, m), FILES["zero2"], ranks=8).predicted_peak_bytes for m in (1, 2)}
    found = choose(asked, FILES["zero2"], ranks=8, capacity_bytes=needed[2] - 1)
    assert (found.batches.micro, found.needed_bytes, found.fits) == (1, needed[1], True)


def test_on_a_cpu_the_optimizer_on_the_host_counts():
    asked, ds = recipe(batch=64), FILES["zero2_offload"]
    on_cpu = choose(asked, ds, ranks=1, capacity_bytes=2**40, device_type="cpu")
    assert on_cpu.needed_bytes == on_cpu.plan.process_peak_bytes > on_cpu.plan.predicted_peak_bytes
    limit = on_cpu.plan.predicted_peak_bytes  # the device's part alone would fit
    assert choose(asked, ds, ranks=1, capacity_bytes=limit, device_type="cpu").batches.micro < 64


def test_fine_tuning_is_planned_as_such():
    asked = load_as(FinetuneRecipe, None, [*MICRO, "model.classes=10", "train.global_batch=64"])
    found = choose(asked, FILES["zero2"], ranks=2, capacity_bytes=2**40)
    assert (found.batches.micro, found.batches.accumulation, found.fits) == (32, 1, True)
    averaged = dataclasses.replace(asked, train=dataclasses.replace(asked.train, ema_decay=0.9))
    more = choose(averaged, FILES["zero2"], ranks=2, capacity_bytes=2**40)
    assert more.needed_bytes - found.needed_bytes == pytest.approx(4 * found.plan.trace.elements, abs=512)


def test_planning_leaves_no_trace_in_the_process():
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    choose(recipe("model.image_size=80"), FILES["zero2"], ranks=2, capacity_bytes=2**50)  # traced here alone
    assert torch.equal(torch.get_rng_state(), state)
    assert (torch.get_default_dtype(), torch.is_grad_enabled()) == (dtype, True)


@pytest.mark.parametrize(
    ("keys", "ds", "told"),
    [
        (["train.global_batch=null"], {}, "train.micro_batch=auto: give train.global_batch"),
        (["train.global_batch=100"], {}, "global batch 100 is not a multiple of ranks 8 = 8"),
        (["data.clips_per_video=7"], {}, "960 is not a multiple of ranks 8 x data.clips_per_video 7 = 56"),
        ([], {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps = 2 leaves nothing to choose"),
        ([], {"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu = 4 leaves nothing to choose"),
        ([], {"train_batch_size": 64}, "train_batch_size = 64 contradicts train.global_batch = 960"),
    ],
)
def test_what_leaves_no_choice_is_refused(keys, ds, told):
    with pytest.raises(UserError, match=told):
        choose(recipe(*keys), ds, ranks=8, capacity_bytes=2**40)


def test_auto_is_no_number_for_a_plan():
    with pytest.raises(UserError, match="auto is chosen when training starts"):
        plan(recipe("train.micro_batch=auto"), FILES["zero0"], ranks=8)


def test_divisors():
    assert [largest_divisor(60, limit) for limit in (0, 1, 7, 60, 10**18)] == [0, 1, 6, 60, 60]
    assert [largest_divisor(60, limit, 4) for limit in (3, 11, 19, 59)] == [0, 4, 12, 20]
