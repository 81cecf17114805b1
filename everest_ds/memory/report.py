"""A comparison as one self-contained HTML page (no scripts, nothing fetched), with CSV files beside it."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

from everest_ds.config.errors import UserError
from everest_ds.memory.charts import Bar, Series, bar_chart, css_class, line_chart
from everest_ds.memory.compare import GPUS_PER_NODE, Row
from everest_ds.memory.gpus import Capacity
from everest_ds.memory.report_style import PARTS, style

PAGE, TABLE, BREAKDOWN = "index.html", "compare.csv", "breakdown.csv"
_GENERATOR = '<meta name="generator" content="everest_ds memprof">'
# The page promises to load nothing: the browser holds it to that.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_METHOD_NAMES = {"everest": "EVEREST", "videomae": "VideoMAE"}


def write_report(folder: Path, rows: Sequence[Row], *, capacity: Capacity, ranks: int) -> Path:
    """Write the page and the CSV files into ``folder``; an earlier report there is replaced.

    Returns:
        The page's path.

    Raises:
        UserError: the folder holds something else, or can't be written.
    """
    try:
        _refuse_foreign(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PAGE).write_text(page(rows, capacity=capacity, ranks=ranks), encoding="utf-8")
        _write_csv(folder / TABLE, [row.as_json() for row in rows])
        _write_csv(folder / BREAKDOWN, list(_breakdown(rows)))
    except OSError as error:
        raise UserError(f"--report {folder}: {error.strerror}") from error
    return folder / PAGE


def page(rows: Sequence[Row], *, capacity: Capacity, ranks: int) -> str:
    """The whole page as HTML."""
    classes = {part: css_class(part) for part in PARTS}
    sections = [
        _head(rows, capacity, ranks),
        "<h2>Memory against batch size</h2>",
        "<p class='soft'>Predicted peak of one GPU; both axes logarithmic. Hollow marks don't fit.</p>",
        f"<div class='charts'>{''.join(_charts(rows, capacity))}</div>",
        "<h2>Every configuration</h2>",
        *_tables(rows, capacity),
        "<h2>What the memory is</h2>",
        _legend(classes),
        *_breakdowns(rows, capacity),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{_GENERATOR}'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>Memory of EVEREST and VideoMAE pre-training</title><style>{style(classes)}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def part_of(item: str) -> str:
    """The part of memory, a key of :data:`PARTS`, that an item of a plan's breakdown belongs to."""
    rules = (
        (("CUDA context", "communication library", "workspace"), "outside tensors"),
        (("bucket", "message", "staging", "on their way"), "communication buffers"),
        (("Adam", "master"), "optimizer states"),
        (("gradient",), "gradients"),
        (("saved activations: encoder", "saved activations: embedding"), "encoder activations"),
        (("saved activations",), "decoder activations"),
        (("parameters", "position tables"), "parameters"),
    )
    return next((part for words, part in rules if any(w in item for w in words)), "inputs and temporaries")


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--report {folder}: is a file; give a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    earlier = folder / PAGE
    if not earlier.is_file() or _GENERATOR not in earlier.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"--report {folder}: holds files that aren't a memprof report; give a new or an empty folder")


def _write_csv(path: Path, rows: Sequence[dict[str, object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _breakdown(rows: Iterable[Row]) -> Iterable[dict[str, object]]:
    for row in rows:
        for item, size_bytes in row.plan.breakdown(row.micro_batch).items():
            yield {
                "model": row.model,
                "method": row.method,
                "ds_config": row.ds_config,
                "checkpointing": row.checkpointing,
                "attention": row.attention,
                "global_batch": row.global_batch,
                "part": part_of(item),
                "item": item,
                "size_bytes": size_bytes,
            }


def _head(rows: Sequence[Row], capacity: Capacity, ranks: int) -> str:
    facts = {
        "Ranks": f"{ranks}, one GPU each; node totals are of {min(ranks, GPUS_PER_NODE)} GPUs",
        "A GPU's memory": escape(str(capacity)),
        "Units": f"{capacity.unit[0]} = {capacity.unit[1]:,} bytes",
        "Precision": ", ".join(dict.fromkeys(row.precision for row in rows)),
        "Fit": f"{sum(row.fits for row in rows)} of {len(rows)} configurations",
        "Data": f"<a href='{TABLE}'>{TABLE}</a>, <a href='{BREAKDOWN}'>{BREAKDOWN}</a>",
    }
    listed = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in facts.items())
    return (
        "<h1>Memory of EVEREST and VideoMAE pre-training</h1>"
        "<p class='soft'>Predicted from a fake-tensor trace of the models and DeepSpeed's own arithmetic; nothing was "
        f"run on a GPU. Fragmentation is not included.</p><dl>{listed}</dl>"
    )


def _charts(rows: Sequence[Row], capacity: Capacity) -> Iterable[str]:
    unit, unit_bytes = capacity.unit
    models = list(dict.fromkeys(row.model for row in rows))
    for name, group in _grouped(rows, lambda r: f"{r.ds_config}, checkpointing {r.checkpointing}, {r.attention}"):
        series = [
            Series(
                name=f"{_METHOD_NAMES[own[0].method]} {_short(own[0].model)}",
                kind=own[0].method,
                marker=models.index(own[0].model),
                points=sorted((r.global_batch, r.predicted_peak_bytes / unit_bytes, r.fits) for r in own),
            )
            for _, own in _grouped(group, lambda r: f"{r.model} {r.method}")
        ]
        limit = capacity.size_bytes / unit_bytes
        drawn = line_chart(
            series,
            limit=limit,
            limit_name=f"out of memory above {limit:.4g} {unit}",
            unit=unit,
            title=f"{unit} per GPU against global batch, {name} attention; the table below has the numbers",
        )
        yield f"<figure><h3>{escape(name)} attention</h3>{drawn}</figure>"


def _tables(rows: Sequence[Row], capacity: Capacity) -> Iterable[str]:
    for name, group in _grouped(rows, lambda r: f"Checkpointing {r.checkpointing}, {r.attention} attention"):
        batches = list(dict.fromkeys(row.global_batch for row in group))
        heads = "".join(f"<th scope='col' class='number'>{batch}</th>" for batch in batches)
        lines, previous = [], ""
        for _, own in _grouped(group, lambda r: " ".join(r.configuration)):
            first = own[0]
            names = (first.model, _METHOD_NAMES[first.method], first.ds_config)
            start = "<tr class='first'>" if f"{names[:2]}" != previous else "<tr>"
            previous = f"{names[:2]}"
            cells = "".join(f"<th scope='row'>{escape(name)}</th>" for name in names)
            lines.append(f"{start}{cells}{''.join(_cell(row, capacity) for row in own)}</tr>")
        yield (
            f"<div class='scroll' tabindex='0' role='region' aria-label='{escape(name, quote=True)}'><table>"
            f"<caption>{escape(name)}. {capacity.unit[0]} per GPU, and per node in small print, by global batch."
            f"</caption><thead><tr><th scope='col'>Model</th><th scope='col'>Method</th><th scope='col'>DeepSpeed"
            f"</th>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        )


def _cell(row: Row, capacity: Capacity) -> str:
    _, unit_bytes = capacity.unit
    numbers = f"{row.predicted_peak_bytes / unit_bytes:.1f} <small>{row.node_total_bytes / unit_bytes:.0f}</small>"
    return f"<td class='number'>{numbers}</td>" if row.fits else f"<td class='number oom'><b>OOM</b> {numbers}</td>"


def _legend(classes: dict[str, str]) -> str:
    entries = "".join(f"<li><i class='{classes[part]}'></i>{escape(part)}</li>" for part in PARTS)
    return (
        "<p class='soft'>What one GPU holds at the moment of its peak. What lives at other moments is not in "
        f"the bar: a gradient that replaces an activation adds nothing.</p><ul class='legend'>{entries}</ul>"
    )


def _breakdowns(rows: Sequence[Row], capacity: Capacity) -> Iterable[str]:
    unit, unit_bytes = capacity.unit
    largest = str(max(row.global_batch for row in rows))
    for batch, group in _grouped(rows, lambda r: str(r.global_batch)):
        bars = [Bar(name=_bar_name(row), segments=_segments(row, unit_bytes), fits=row.fits) for row in group]
        title = f"parts of the peak, {unit} per GPU, at global batch {batch}; {BREAKDOWN} has the numbers"
        drawn = bar_chart(bars, limit=capacity.size_bytes / unit_bytes, unit=unit, title=title)
        micro = group[0].micro_batch
        summary = f"Global batch {batch}: {micro} clip{'s' if micro > 1 else ''} per GPU and pass"
        yield f"<details{' open' if batch == largest else ''}><summary>{summary}</summary>{drawn}</details>"


def _segments(row: Row, unit_bytes: int) -> list[tuple[str, float]]:
    parts = dict.fromkeys(PARTS, 0.0)
    for item, size_bytes in row.plan.breakdown(row.micro_batch).items():
        parts[part_of(item)] += size_bytes / unit_bytes
    return [(part, amount) for part, amount in parts.items() if amount]


def _bar_name(row: Row) -> str:
    rest = [] if row.checkpointing == "none" else [f"ckpt {row.checkpointing}"]
    rest += [] if row.attention == "fused" else [row.attention]
    return ", ".join([f"{_METHOD_NAMES[row.method]} {_short(row.model)}", row.ds_config, *rest])


def _short(model: str) -> str:
    return model.removeprefix("vit_")


def _grouped(rows: Iterable[Row], key: Callable[[Row], str]) -> list[tuple[str, list[Row]]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())
