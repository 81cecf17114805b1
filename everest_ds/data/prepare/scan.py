"""Looking at every file of a set: which are good to train on, which are bad and why."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from everest_ds.config.progress import CountLine
from everest_ds.data.decode import require_decoder
from everest_ds.data.manifest import UNLISTABLE, can_list, format_manifest
from everest_ds.data.prepare import jobs
from everest_ds.data.prepare.examine import Examined, examine
from everest_ds.data.prepare.folder import Record, WorkFolder, status_of
from everest_ds.data.prepare.sources import Source

GOOD, BAD, SUMMARY = "good.csv", "bad.csv", "summary.json"
# Raise it whenever the same file would get another record.
_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How many processes work, and how many seconds one file may take."""

    workers: int
    limit_s: float


def scan(source: Source, out: Path, limits: Limits, *, decoder: str = "decord") -> dict[str, Any]:
    """Look at every video, write OUT/files.jsonl, good.csv, bad.csv and summary.json, and return the summary.

    A second call looks again only at files that are new, that have changed, or that took too long.

    Args:
        source: the videos.
        out: new, or that of an earlier call for the same source.
        limits: processes and seconds.
        decoder: data.decoder, the reader that training will use.

    Raises:
        UserError: ``out`` holds something else or can't be written, or the decoder's library is missing.
    """
    require_decoder(decoder)
    settings = {"command": "scan", "version": _VERSION, "source": source.name, "base": source.base, "decoder": decoder}
    with WorkFolder(out, settings) as folder:
        records = _records(source, folder, limits, decoder)
        folder.finish(records.values())
        good = [entry for entry in source.entries if records[entry.path]["reason"] is None]
        folder.write(GOOD, format_manifest(good))
        folder.write(BAD, format_bad(records.values()))
        summary = summarise(list(records.values()))
        folder.write(SUMMARY, json.dumps(summary, indent=1) + "\n")
    return summary


def _records(source: Source, folder: WorkFolder, limits: Limits, decoder: str) -> dict[str, Record]:
    """Return the records of all files, in the source's order."""
    paths = source.paths
    status = {path: status_of(path) for path in paths}
    records = {path: record for path in paths if (record := folder.unchanged(path, status[path]))}
    todo = [path for path in paths if path not in records]
    with CountLine("files looked at", speaks=bool(todo)) as progress:
        look = partial(_look, decoder=decoder)
        outcomes = jobs.run(look, todo, workers=limits.workers, limit_s=limits.limit_s)
        for done, (path, result) in enumerate(outcomes, start=1):
            found = Examined(reason=result.reason, passing=True) if isinstance(result, jobs.Lost) else result
            facts = asdict(found)
            settled = not facts.pop("passing")
            records[path] = folder.add(path, status[path], settled=settled, **facts)
            progress(done, len(todo))
    return {path: records[path] for path in paths}


def _look(path: str, decoder: str) -> Examined:
    return examine(path, decoder) if can_list(path) else Examined(reason=UNLISTABLE)


def format_bad(records: Iterable[Record]) -> str:
    """Return a table of the files that have something wrong with them, and what."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["path", "reason"])
    table.writerows([record["path"], record["reason"]] for record in records if record["reason"] is not None)
    return text.getvalue()


def summarise(records: Sequence[Record]) -> dict[str, Any]:
    """Return counts over all files, and over the good ones their codecs, sizes, frames, hours and bytes."""
    good = [record for record in records if record["reason"] is None]
    return {
        "files": len(records),
        "good": len(good),
        "bad": len(records) - len(good),
        "rewrite_helps": sum(record["rewrite_helps"] for record in records),
        "codecs": _counted(record["codec"] for record in good),
        "sizes": _counted(f"{record['width']}x{record['height']}" for record in good),
        "frames": sum(record["frames"] for record in good),
        "hours": round(sum(record["duration_s"] or 0 for record in good) / 3600, 3),
        "bytes": sum(record["size_bytes"] or 0 for record in good),
    }


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())
