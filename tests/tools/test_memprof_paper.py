"""memprof paper: published figures beside ours. Compute is close; memory is honest about what holds where."""

import pytest
from launching import DS_CONFIGS

from everest_ds.config.ds_config import load_ds_config
from everest_ds.config.load import load_recipe
from everest_ds.memory.official import official_plan
from everest_ds.memory.paper import Setting, claims_rows, gflops_rows, keep_ratio_note, memory_rows
from everest_ds.memory.published import COMPUTE, MEMORY

ZERO2 = load_ds_config(DS_CONFIGS / "zero2.json")
TABLE3 = [figure for figure in MEMORY if figure.table == 3]


@pytest.fixture(scope="module")
def gflops():
    return gflops_rows()


@pytest.fixture(scope="module")
def eager():
    """Every cell of Table 3 as the official code trains, decoder depths 4 and 12."""
    return memory_rows(ZERO2, figures=TABLE3, attentions=["eager"])


def cell(rows, method, model, batch, depth):
    (row,) = (
        r
        for r in rows
        if (r["method"], r["model"], r["global_batch"], r["decoder_depth"]) == (method, f"vit_{model}", batch, depth)
    )
    return row


def holds(rows, videomae_depth, everest_depth):
    setting = str(Setting(videomae_depth, everest_depth, "eager"))
    return [claim["holds"] for claim in claims_rows(rows) if claim["setting"] == setting]


def test_every_published_gflop_figure_is_reproduced(gflops):
    assert len(gflops) == len(COMPUTE) == 25
    assert {row["table"] for row in gflops} == {1, 10, 12}
    for row in gflops:
        assert row["ours"] == pytest.approx(row["published"], rel=0.006), row


def test_table_1_is_of_another_keep_ratio_than_table_7(gflops):
    note = keep_ratio_note(gflops)
    assert "(6.3, 21.5, 60.8) is that of a keep ratio of 0.4" in note
    assert "5.737, 19.78, 57.92" in note


def test_all_cells_of_table_3_are_there(eager):
    assert len(eager) == 24 * 2
    for row in eager:
        assert (row["ours_gb"] is None) == (row["predicted_gb"] > 640)
        if row["published_gb"] is not None:
            assert row["residual_gb"] == pytest.approx(row["predicted_gb"] - row["published_gb"], abs=0.06)


def test_the_headline_at_depth_12(eager):
    both = [cell(eager, method, "large", 256, 12) for method in ("videomae", "everest")]
    assert 3.3 <= both[0]["ours_gb"] / both[1]["ours_gb"] <= 4.5


def test_the_out_of_memory_pattern_at_depth_12(eager):
    for method, model, batch in ((f.method, f.model.removeprefix("vit_"), f.global_batch) for f in TABLE3):
        if (method, model, batch) == ("videomae", "small", 1024):
            continue  # the one cell that differs, below
        published = next(f for f in TABLE3 if (f.method, f.model, f.global_batch) == (method, f"vit_{model}", batch))
        ours = cell(eager, method, model, batch, 12)["ours_gb"]
        assert (ours is None) == (published.published_gb is None), (method, model, batch)


def test_where_claims_hold_and_where_not(eager):
    # The ratio, VideoMAE B and L out of memory, VideoMAE elsewhere fitting, EVEREST fitting, all 24 cells.
    assert holds(eager, 12, 12) == [True, True, False, True, False]
    assert holds(eager, 4, 4) == [False, False, True, True, False]
    assert holds(eager, 12, 4) == [False, True, False, True, False]
    # The cell that depth 12 gets wrong fits at depth 4: no one depth gives all of Table 3.
    assert cell(eager, "videomae", "small", 1024, 12)["ours_gb"] is None
    assert cell(eager, "videomae", "small", 1024, 4)["ours_gb"] < 443.6


def test_with_fused_attention_everything_fits_and_the_gap_narrows(eager):
    large = [f for f in TABLE3 if f.model == "vit_large"]
    fused = memory_rows(ZERO2, figures=large, attentions=["fused"], depths=[12])
    assert all(row["ours_gb"] is not None for row in fused)

    def ratio(rows):
        videomae, everest = (cell(rows, method, "large", 256, 12)["predicted_gb"] for method in ("videomae", "everest"))
        return videomae / everest

    assert 1.5 < ratio(fused) < 2.5 < ratio(eager)


def test_fine_tuning_of_table_5():
    rows = memory_rows(ZERO2, figures=[f for f in MEMORY if f.table == 5], attentions=["eager"])
    assert [row["decoder_depth"] for row in rows] == [None, None]
    for row in rows:
        assert row["ours_gb"] == pytest.approx(row["published_gb"], rel=0.15)


# Node totals over 8 GPUs in GB at global batches of 128, 256, 512, 1024: an independent trace of the official
# models. Ours cuts patches once and scores tokens with them, so EVEREST needs a little less; and it counts what softmax
# takes within its backward pass, so VideoMAE needs up to 6 % more.
@pytest.mark.parametrize(
    ("method", "size", "depth", "theirs"),
    [
        ("videomae", "vit_large", 12, (314, 583, 1120, 2196)),
        ("videomae", "vit_large", 4, (160, 279, 516, 989)),
        ("everest", "vit_large", 4, (81, 119, 197, 351)),
    ],
)
def test_the_papers_setting_agrees_with_an_independent_trace(method, size, depth, theirs):
    """Here, where these models are traced anyway: traces are remembered."""
    keys = [f"model.method={method}", f"model.size={size}", f"model.decoder_depth={depth}", "train.global_batch=128"]
    planned = official_plan(load_recipe(None, keys), ranks=8)
    ours = [8 * planned.peak(batch) / 1e9 for batch in (16, 32, 64, 128)]
    assert ours == pytest.approx(theirs, rel=0.07)
