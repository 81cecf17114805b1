"""The demo behind ``make demo``."""

import argparse
import sys
from pathlib import Path

from everest_ds.config.errors import one_line_errors
from everest_ds.config.logs import set_up_logging


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Pre-train a tiny EVEREST model on synthetic motion videos.")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="folder to write to (default outputs)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the demo recipe's")
    arguments = parser.parse_args()
    set_up_logging()
    with one_line_errors("demo"):
        from everest_ds.training.doctor.first_look import first_look  # noqa: PLC0415 - torch takes seconds to load

        first_look()
        # Only now: it needs the packages that were looked at.
        from everest_ds.training.demo import run_demo  # noqa: PLC0415

        run_demo(arguments.outputs.resolve(), arguments.overrides)
    return 0


if __name__ == "__main__":
    sys.exit(main())
