"""What one GPU does, beside what the project says of it: ``python tools/gpu_check.py [--minutes 8]``."""

import argparse
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

# This checkout's package, whatever else is installed: its parts start its scripts and read its fixtures.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from everest_ds.config.errors import UserError, nearest, one_line_errors
from everest_ds.gpu_check.cases import OUT_OF_TIME, Row
from everest_ds.gpu_check.parts import BY_NAME, MACHINE, PARTS, Part

_LEAST_MINUTES = 0.5


def main() -> int:
    """Run the command; the exit code is 1 if a case failed, 0 if none did or there is no GPU."""
    parser = argparse.ArgumentParser(description="Check memory, parity and speed on one GPU.")
    parser.add_argument("--minutes", type=float, default=8, help="once DeepSpeed's op is built (default 8)")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/gpu-check"), help="folder of page and JSON (default docs/gpu-check)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="small models, a part of the cases: three minutes on two idle cores"
    )
    parser.add_argument("--parts", metavar="A,B", help=f"some of {', '.join(BY_NAME)} (default: all)")
    arguments = parser.parse_args()
    with one_line_errors("gpu_check"):
        check_arguments(arguments)
        chosen = parts(arguments)
        if arguments.device == "cuda" and not has_gpu():
            print("gpu_check: no GPU here: nothing to check (--device cpu --tiny takes the same path)", file=sys.stderr)
            return 0
        # torch and DeepSpeed take seconds to load, and need not be there for what is above.
        from everest_ds.gpu_check import smi  # noqa: PLC0415
        from everest_ds.gpu_check.check import Check, failed  # noqa: PLC0415

        # The processes that it has started end with it.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        check = Check(
            device=arguments.device,
            card=smi.card() if arguments.device == "cuda" else "",
            tiny=arguments.tiny,
            minutes=arguments.minutes,
            out=arguments.out.resolve(),
            command="python " + shlex.join(sys.argv),
            say=say,
            parts=chosen,
        )
        rows = check.run()
    for row in failed(rows):
        say(f"failed: {row.part}: {row.case}: {row.reason}")
    say(f"{counts(rows)}; page and JSON in {arguments.out}")
    return 1 if failed(rows) else 0


def check_arguments(arguments: argparse.Namespace) -> None:
    """Hear of a mistake before anything runs.

    Raises:
        UserError: no time, a CPU without --tiny, or a folder that can't be.
    """
    if arguments.minutes < _LEAST_MINUTES:
        raise UserError(f"--minutes: must be at least {_LEAST_MINUTES:g}, got {arguments.minutes:g}")
    if arguments.device == "cpu" and not arguments.tiny:
        raise UserError("--device cpu: takes hours without --tiny; add it")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {arguments.out} is no folder that can be written to ({error.strerror})") from error


def parts(arguments: argparse.Namespace) -> tuple[Part, ...]:
    """Return the parts that are asked for, in their order; that which describes the machine is always one.

    Raises:
        UserError: no part is called so.
    """
    names = [MACHINE, *(arguments.parts.split(",") if arguments.parts else BY_NAME)]
    for name in names:
        if name not in BY_NAME:
            raise UserError(f"--parts: no part is called '{name}'{nearest(name, BY_NAME)}")
    return tuple(part for part in PARTS if part.name in names)


def counts(rows: Sequence[Row]) -> str:
    """Say how the cases ended, and what to do where time was short."""
    found = Counter(row.status for row in rows)
    short = sum(row.reason == OUT_OF_TIME for row in rows)
    hint = f" ({short} for lack of time: raise --minutes)" if short else ""
    return f"{len(rows)} cases: {found['ok']} ok, {found['failed']} failed, {found['not run']} not run{hint}"


def has_gpu() -> bool:
    """Say whether there is a CUDA device."""
    import torch  # noqa: PLC0415 - as below

    return torch.cuda.is_available()


def say(line: str) -> None:
    """Tell how far it has got."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
