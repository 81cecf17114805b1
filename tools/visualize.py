"""Draw what a finished run keeps and reconstructs: ``python tools/visualize.py outputs/demo``."""

import argparse
import sys
from pathlib import Path

from everest_ds.config.errors import one_line_errors
from everest_ds.config.logs import set_up_logging


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Draw original, kept tokens and reconstruction of a run's clips.")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--out", type=Path, help="PNG to write (default: reconstruction.png in the run directory)")
    parser.add_argument("--clips", type=int, default=3, help="clips to draw (default 3)")
    arguments = parser.parse_args()
    set_up_logging()
    with one_line_errors("visualize"):
        from everest_ds.training.pictures import draw_run  # noqa: PLC0415 - torch takes seconds to load

        out = arguments.out or arguments.run / "reconstruction.png"
        draw_run(arguments.run, out, arguments.clips)
        print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
