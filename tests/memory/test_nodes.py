"""What is chosen for nodes, and that the recipes of large models say what the planner says."""

import re
from pathlib import Path

import pytest
from launching import DS_CONFIGS, ROOT

from everest_ds.config.ds_config import load_ds_config
from everest_ds.config.load import load_recipe
from everest_ds.memory.elastic import choose
from everest_ds.memory.fit import at_capacity
from everest_ds.memory.gpus import GB, Capacity, parse_capacity
from everest_ds.memory.nodes import NodeRow, nodes
from tools.memprof.nodes import cells, markdown

LARGE = [ROOT / "run/recipes" / name for name in ("k400_vit_h.yaml", "k400_vit_g.yaml")]
LINE = re.compile(
    r"#   (?P<capacity>\d+GB) +(?P<file>\S+) +train.micro_batch=(?P<ours>\d+): (?P<ours_gb>[\d.]+) GB"
    r" +train.micro_batch=(?P<theirs>\d+): (?P<theirs_gb>[\d.]+) GB"
)


@pytest.fixture(scope="module")
def rows() -> list[NodeRow]:
    ds_configs = {name: load_ds_config(DS_CONFIGS / f"{name}.json") for name in ("zero1",)}
    capacities = [parse_capacity(text) for text in ("4GB", "1.6GB", "10MB")]
    return list(
        nodes(("vit_micro",), ("everest", "videomae"), ds_configs, capacities=capacities, ranks=8, global_batch=512)
    )


def test_every_model_method_and_memory(rows):
    found = [(row.method, row.capacity.text) for row in rows]
    assert found == [(m, c) for m in ("everest", "videomae") for c in ("4GB", "1.6GB", "10MB")]


def test_what_is_chosen_fits_and_makes_the_global_batch(rows):
    for row in rows:
        found = row.as_json()
        if not found["fits"]:
            assert row.capacity.text == "10MB"
            assert cells(row)[3] == "nothing fits"
            continue
        assert found["micro_batch"] * found["accumulation"] * row.ranks == 512
        assert found["predicted_peak_bytes"] <= found["capacity_bytes"]
        assert found["micro_batch"] <= found["max_micro_batch"]


def test_several_passes_take_more_than_one(rows):
    """Where one clip fits in one pass, and no more: several passes hold gradients besides."""
    alone = next(row.fastest for row in rows if row.method == "everest" and row.fastest is not None)
    exact = Capacity(size_bytes=alone.plan.peak(1), text="exact")
    assert at_capacity([alone], exact)[0].max_micro_batch == 1
    ds_configs = {"zero1": load_ds_config(DS_CONFIGS / "zero1.json")}
    (found,) = nodes(("vit_micro",), ("everest",), ds_configs, capacities=[exact], ranks=8, global_batch=512)
    assert found.choice is None or found.choice.fits
    assert found.fastest is None or found.fastest.checkpointing != alone.checkpointing


def test_everest_takes_larger_micro_batches(rows):
    most = {(row.method, row.capacity.text): row.fastest.max_micro_batch for row in rows if row.fastest is not None}
    assert most["everest", "4GB"] > 1.4 * most["videomae", "4GB"]


def test_the_page_has_every_row(rows):
    page = markdown(rows, "--models vit_micro").splitlines()
    assert sum(line.startswith("| vit_micro |") for line in page) == len(rows)
    assert len({line.count("|") for line in page if line.startswith("|")}) == 1


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_recipes_say_what_the_planner_says(path: Path):
    lines = [found for line in path.read_text().splitlines() if (found := LINE.match(line))]
    assert [line["capacity"] for line in lines] == ["80GB", "40GB", "24GB"]
    for line in lines:
        for whose, method in (("ours", "everest"), ("theirs", "videomae")):
            choice = choose(
                load_recipe(path, [f"model.method={method}", "model.attention=fused"]),
                load_ds_config(ROOT / line["file"]),
                ranks=8,
                capacity_bytes=parse_capacity(line["capacity"]).size_bytes,
            )
            assert choice.fits
            assert choice.batches.micro == int(line[whose])
            peak = choice.plan.peak(choice.batches.micro) / GB
            assert peak == pytest.approx(float(line[f"{whose}_gb"]), abs=0.06)
