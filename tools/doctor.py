"""Can this machine train, and what is to be fixed: ``python tools/doctor.py [--json] [--quick]``."""

import argparse
import contextlib
import json
import sys
from pathlib import Path

# Runs from a checkout that was not installed, too, and says so.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from everest_ds.config.errors import EXIT_USER_ERROR
from everest_ds.training.doctor import page
from everest_ds.training.doctor.checks import examine
from everest_ds.training.doctor.findings import Finding, can_train


def main() -> int:
    """Run the command; the exit code is 0 if this machine can train, else 2."""
    parser = argparse.ArgumentParser(description="Can this machine train, with what, and what is to be fixed?")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    parser.add_argument("--quick", action="store_true", help="without reading a video and without ops of offload")
    arguments = parser.parse_args()
    findings = examine(quick=arguments.quick)
    if arguments.json:
        print(json.dumps(page.as_json(findings), indent=2))
    else:
        show(findings)
    return 0 if can_train(findings) else EXIT_USER_ERROR


def show(findings: list[Finding]) -> None:
    """Write the page."""
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            from rich.console import Console  # noqa: PLC0415 - may be missing

            Console().print(page.table(findings))
            print("", *page.fixes(findings), page.verdict(findings), sep="\n")
            return
    print(*page.lines(findings), "", *page.fixes(findings), page.verdict(findings), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
