"""The scoring benchmark as Markdown."""

from __future__ import annotations

from everest_ds.benchmarks import tables
from everest_ds.benchmarks.scoring import UTILISATION, Agreement, Result


def report(result: Result, *, command: str) -> list[str]:
    """Return the lines of the tables."""
    asked, cost = result.settings, result.cost
    shares = [[f"{card}, bf16, by arithmetic", *map(_percent, pair)] for card, pair in result.arithmetic.items()]
    shares.insert(0, ["here, fp32, measured", _percent(cost.share_before), _percent(cost.share_now)])
    return [
        "# Scoring tokens",
        "",
        f"Written by `{command}` ({tables.machine()}).",
        "",
        f"{asked.size} at its first weights. {asked.clips} synthetic clips (motion videos at the model's size) and "
        f"{asked.clips} of real videos (random starts and crops), scored in several ways. Against scores in fp64: of "
        "1,000 kept tokens, how many are others, exact ties of fp64 left out; in how many clips any is; and by how "
        "much a distance is off, as a share of it (mean, largest). Products round as this machine's do; on a CPU those "
        "in half precision sum in fp32, as tensor cores do.",
        "",
        *tables.markdown(
            ["clips", "scored by", "others of 1,000 kept", "clips", "off, mean", "off, largest"],
            [_cells(agreement, asked.clips) for agreement in result.agreements],
        ),
        "",
        "What choosing tokens takes of a step: cutting into patches, scoring, selecting, embedding the visible ones. "
        "*Before*: all tokens embedded in fp32, and the visible ones taken from those. Measured: forward and backward "
        f"pass of {asked.batch} clips, medians of {asked.pairs} rounds; {cost.step_s:.3f} s a step, "
        f"{cost.before_s:.3f} s before and {cost.now_s:.3f} s now for choosing. By arithmetic: the products alone, in "
        f"half precision at {UTILISATION:.0%} of the data sheet's peak, in fp32 at all of it.",
        "",
        *tables.markdown(["share of a step", "before", "now"], shares),
    ]


def _cells(row: Agreement, clips: int) -> list[str]:
    return [
        row.kind,
        row.way,
        f"{row.differing:.3f}",
        f"{row.clips_differing} of {clips}",
        f"{row.mean_error:.1e}",
        f"{row.largest_error:.1e}",
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
