"""The scoring benchmark: ties decide nothing, and ways of scoring agree as far as their precision lets them."""

import torch

from everest_ds.benchmarks import scoring
from everest_ds.benchmarks.scoring_report import report


def test_ties_with_the_cut_are_nobodys_mistake():
    exact = torch.tensor([[5.0, 4.0, 3.0, 3.0, 1.0]], dtype=torch.float64)
    kept = torch.tensor([[0, 1, 2]])
    assert scoring.swapped(exact, kept, torch.tensor([[1, 0, 3]])) == 0
    assert scoring.swapped(exact, kept, torch.tensor([[0, 2, 4]])) == 1
    assert scoring.swapped(exact, kept, torch.tensor([[2, 3, 4]])) == 2
    assert scoring.swapped(exact, kept, torch.tensor([[0, 2, 3]])) == 1  # lost above the cut


def test_differences_keep_what_fp64_keeps_and_official_embeddings_nearly():
    said: list[str] = []
    result = scoring.measure(scoring.Settings(size="vit_micro", clips=4, batch=1, pairs=1), said.append)
    found = {(row.kind, row.way): row for row in result.agreements}
    assert {kind for kind, _ in found} == {"synthetic", "real"}
    for kind in ("synthetic", "real"):
        ours, official, bf16 = (
            found[kind, way]
            for way in ("differences in fp16 (ours on a GPU)", "embeddings in fp16 (official)", "embeddings in bf16")
        )
        assert found[kind, "differences in fp32 (ours on a CPU and in fp32)"].largest_error < 2e-6
        assert ours.mean_error < official.mean_error < bf16.mean_error
        assert ours.differing <= official.differing <= bf16.differing
    assert found["synthetic", "embeddings in bf16"].differing > 1
    assert 0 < result.cost.share_now < 1
    assert result.arithmetic["H100"][1] < result.arithmetic["H100"][0]
    text = "\n".join(report(result, command="python tools/benchmark.py scoring"))
    assert text.count("| synthetic | ") == text.count("| real | ") == len(scoring.WAYS)
