"""Prepare a set of videos: ``python tools/prepare_videos.py scan|rewrite SOURCE --out DIR``."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from everest_ds.config.errors import UserError, one_line_errors
from everest_ds.config.logs import set_up_logging
from everest_ds.data.prepare.rewrite import MANIFEST, Encoding, rewrite
from everest_ds.data.prepare.scan import BAD, GOOD, Limits, scan
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
    for command in (look, copy):
        command.add_argument("source", type=Path, metavar="SOURCE", help="a manifest, or a folder of videos")
        command.add_argument("--root", type=Path, help="folder that a manifest's relative paths start from")
        command.add_argument("--out", type=Path, required=True, metavar="DIR", help="new, or that of an earlier call")
        command.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: the cores)")
        command.add_argument("--limit-s", type=float, default=300, help="seconds that one file may take (default 300)")
    return parser.parse_args()


def limits_of(arguments: argparse.Namespace) -> Limits:
    """Return the number of processes and the time limit, checked."""
    for flag, value in (("--workers", arguments.workers), ("--limit-s", arguments.limit_s)):
        if value <= 0:
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
        print(f"bad:  {summary['wrong_frames']} of them by random access alone: rewrite makes good copies of those")
    print(f"lists: {arguments.out / GOOD}, {arguments.out / BAD}")


def run_rewrite(arguments: argparse.Namespace) -> None:
    """Rewrite, and print how many copies there are."""
    encoding = Encoding(short_side=arguments.short_side, gop=arguments.gop, crf=arguments.crf)
    source = read_source(arguments.source, arguments.root)
    counts = rewrite(source, arguments.out, limits_of(arguments), encoding)
    print(f"{counts['files']} files: {counts['copies']} copies, {counts['bad']} bad")
    print(f"lists: {arguments.out / MANIFEST}, {arguments.out / BAD}")


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
            {"scan": run_scan, "rewrite": run_rewrite}[arguments.command](arguments)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            return _INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
