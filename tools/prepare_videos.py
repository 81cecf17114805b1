"""Prepare a set of videos: ``python tools/prepare_videos.py scan|rewrite|shards SOURCE --out DIR``."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from everest_ds.config.errors import UserError, one_line_errors
from everest_ds.config.logs import set_up_logging
from everest_ds.data.manifest import format_manifest
from everest_ds.data.prepare.rewrite import MANIFEST, Encoding, rewrite
from everest_ds.data.prepare.scan import BAD, GOOD, Limits, scan
from everest_ds.data.prepare.shards import index, write_shards
from everest_ds.data.prepare.sources import read_source

_INTERRUPTED = 130


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Prepare a set of videos. An interrupted command goes on when it is given again."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    look = commands.add_parser("scan", help="look at every file: what it holds, whether training can read it")
    look.add_argument("--decoder", default="decord", help="data.decoder of the training to come (default decord)")
    copy = commands.add_parser("rewrite", help="write small H.264 copies that are quick and safe to train on")
    copy.add_argument("--short-side", type=int, default=256, help="pixels at most (default 256); nothing is enlarged")
    copy.add_argument("--gop", type=int, default=12, help="frames between key frames at most (default 12)")
    copy.add_argument("--crf", type=int, default=18, help="libx264's quality, 0 (lossless) to 51 (default 18)")
    pack = commands.add_parser("shards", help="pack videos into WebDataset shards, with a manifest of them")
    pack.add_argument("--shard-mib", type=int, default=1024, help="size of a shard, MiB (default 1024)")
    found = commands.add_parser("index", help="write a manifest of WebDataset shards that are there already")
    found.add_argument("shards", nargs="+", metavar="SHARD", help="paths or URLs of tar files")
    found.add_argument("--out", type=Path, required=True, metavar="FILE.csv", help="the manifest")
    for command in (look, copy, pack):
        command.add_argument("source", type=Path, metavar="SOURCE", help="a manifest, or a folder of videos")
        command.add_argument("--root", help="folder that a manifest's relative paths start from")
        command.add_argument("--out", type=Path, required=True, metavar="DIR", help="new, or that of an earlier call")
    for command in (look, copy):
        command.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: the cores)")
        command.add_argument("--limit-s", type=float, default=300, help="seconds that one file may take (default 300)")
    return parser.parse_args()


def limits_of(arguments: argparse.Namespace) -> Limits:
    """Return the number of processes and the time limit, checked."""
    for flag, value in (("--workers", arguments.workers), ("--limit-s", arguments.limit_s)):
        # Nor a number that is none.
        if not value > 0:
            raise UserError(f"{flag}: must be positive, got {value:g}")
    return Limits(workers=arguments.workers, limit_s=arguments.limit_s)


def run_scan(arguments: argparse.Namespace) -> None:
    """Scan, and print what was found."""
    source = read_source(arguments.source, arguments.root)
    summary = scan(source, arguments.out, limits_of(arguments), decoder=arguments.decoder)
    print(f"{summary['files']} files: {summary['good']} good, {summary['bad']} bad")
    if summary["good"]:
        print(f"good: {summary['hours']:g} hours, {summary['frames']} frames, {summary['bytes'] / 1e9:.3g} GB")
        print(f"      {listed(summary['codecs'])}; {listed(summary['sizes'])}")
    if summary["bad"]:
        print(f"bad:  {summary['rewrite_helps']} whole, of which rewrite makes copies that training can read")
    print(f"lists: {arguments.out / GOOD}, {arguments.out / BAD}")


def run_rewrite(arguments: argparse.Namespace) -> None:
    """Rewrite, and print how many copies there are."""
    encoding = Encoding(short_side=arguments.short_side, gop=arguments.gop, crf=arguments.crf)
    source = read_source(arguments.source, arguments.root)
    counts = rewrite(source, arguments.out, limits_of(arguments), encoding)
    print(f"{counts['files']} files: {counts['copies']} copies, {counts['bad']} bad")
    print(f"lists: {arguments.out / MANIFEST}, {arguments.out / BAD}")


def run_shards(arguments: argparse.Namespace) -> None:
    """Pack, and print how much."""
    if arguments.shard_mib < 1:
        raise UserError(f"--shard-mib: must be positive, got {arguments.shard_mib}")
    source = read_source(arguments.source, arguments.root)
    counts = write_shards(source, arguments.out, shard_bytes=arguments.shard_mib * 2**20)
    print(f"{counts['videos']} videos in {counts['shards']} shards: {arguments.out / MANIFEST}")


def run_index(arguments: argparse.Namespace) -> None:
    """Write a manifest of shards."""
    if os.path.lexists(arguments.out):
        raise UserError(f"--out: {arguments.out} is there already; name another file")
    entries = index(arguments.shards, below=arguments.out.absolute().parent)
    try:
        unfinished = arguments.out.with_name(f"{arguments.out.name}.unfinished")
        unfinished.write_text(format_manifest(entries), encoding="utf-8")
        unfinished.replace(arguments.out)
    except OSError as error:
        raise UserError(f"--out: cannot write {arguments.out}: {error.strerror}") from error
    print(f"{len(entries)} videos in {len(arguments.shards)} shards: {arguments.out}")


COMMANDS = {"scan": run_scan, "rewrite": run_rewrite, "shards": run_shards, "index": run_index}


def listed(counts: dict[str, Any], most: int = 5) -> str:
    """Return counts as text, the first ones by name."""
    shown = [f"{name} ({count})" for name, count in list(counts.items())[:most]]
    return ", ".join(shown + [f"{len(counts) - most} others"] * (len(counts) > most))


def main() -> int:
    """Run the command."""
    arguments = parse_arguments()
    set_up_logging()
    with one_line_errors("prepare_videos"):
        try:
            COMMANDS[arguments.command](arguments)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            return _INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
