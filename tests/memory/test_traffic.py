"""What a step sends, against the formulas of the ZeRO paper and of the collectives."""

import pytest
from launching import DS_CONFIGS

from everest_ds.config.ds_config import load_ds_config
from everest_ds.config.load import load_recipe
from everest_ds.memory.plan import Plan, plan
from everest_ds.memory.traffic import messages, passed_on, sent_bytes

MODEL = ("model.size=vit_micro", "model.image_size=48", "train.micro_batch=1")


def planned(stage: str, ranks: int, *keys: str, **zero: int) -> Plan:
    ds = load_ds_config(DS_CONFIGS / f"{stage}.json")
    if zero:
        ds["zero_optimization"] |= zero
    return plan(load_recipe(None, [*MODEL, *keys]), ds, ranks=ranks, device_type="cpu")


def parameter_bytes(of: Plan) -> int:
    return of.trace.elements * of.setting.element_bytes


@pytest.mark.parametrize(("stage", "volume"), [("zero0", 2), ("zero1", 3), ("zero2", 3)])
def test_volumes_in_parameters(stage, volume):
    """Of many ranks: an all-reduce passes on two times its message, gathering the parameters once."""
    of = planned(stage, 1024)
    assert sent_bytes(of) == pytest.approx(volume * parameter_bytes(of), rel=0.01)


def test_stage_3_sends_what_the_paper_says_when_nothing_stays_whole():
    """Rajbhandari et al. 2020, 7.2.2: two gathers and one reduce-scatter, each the parameters once."""
    of = planned(
        "zero3",
        4,
        stage3_max_reuse_distance=0,
        stage3_max_live_parameters=0,
        stage3_prefetch_bucket_size=0,
        stage3_param_persistence_threshold=0,
    )
    volume = 3 * parameter_bytes(of) * 3 / 4
    last = max(p.elements for p in of.trace.parameters) * of.setting.element_bytes
    # The module that ends the forward pass begins the backward pass: what it has gathered is used twice.
    assert volume - last <= sent_bytes(of) <= 1.01 * volume


def test_reuse_saves_stage_3_a_gather():
    near, far = (
        planned("zero3", 4, stage3_max_reuse_distance=distance, stage3_prefetch_bucket_size=0)
        for distance in (1, 10**9)
    )
    assert sent_bytes(far) < 0.8 * sent_bytes(near)


def test_passes_of_a_step():
    """Stage 2 reduces every pass's gradients, stages 0 and 1 their sum; parameters travel once, but under stage 3."""
    for stage, gradients, parameters in (("zero0", 1, None), ("zero1", 1, 1), ("zero2", 3, 1), ("zero3", 3, 3)):
        one, three = (planned(stage, 2, f"train.global_batch={2 * passes}") for passes in (1, 3))
        sizes = [{m.name: m.size_bytes for m in messages(of)} for of in (one, three)]
        assert sizes[1]["gradients"] == gradients * sizes[0]["gradients"]
        if parameters is not None:
            # Under stage 3 small parameters stay whole from pass to pass.
            assert sizes[1]["parameters"] == pytest.approx(parameters * sizes[0]["parameters"], rel=0.02)


def test_one_rank_sends_nothing():
    of = planned("zero3", 1)
    assert [message.name for message in messages(of)] == ["gradients"]  # which DeepSpeed reduces all the same
    assert sent_bytes(of) == 0


@pytest.mark.parametrize(
    ("collective", "ranks", "expected"),
    [("all_reduce", 2, 100), ("all_reduce", 4, 150), ("reduce_scatter", 4, 75), ("all_gather", 4, 300)],
)
def test_what_leaves_a_rank(collective, ranks, expected):
    """Rings: n - 1 steps, each of a share of the whole; an all-reduce takes twice as many."""
    assert passed_on(collective, 100, ranks) == expected
    assert passed_on(collective, 100, 1) == 0
