"""The one exception that means "the user made a mistake", and how a command ends on it."""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
from collections.abc import Iterable, Iterator

EXIT_USER_ERROR = 2
_EXIT_INTERRUPTED = 130


class UserError(Exception):
    """A mistake that its message explains in one line: what is wrong, where, and what to do.

    ``exit_code``: what a command ends with.
    """

    exit_code = EXIT_USER_ERROR


class RankError(UserError):
    """One that this rank alone has met, so that it must speak whatever its number."""


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.5) -> str:
    """Return ``"; did you mean 'x'?"`` for the known word most like it (0 to 1), or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean '{close[0]}'?" if close else ""


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn a :class:`UserError` into one line on stderr and its exit code, without a trace; Ctrl-C into 130.

    Under a launcher every rank of a node meets the same mistake; the node's first rank alone reports it.
    """
    try:
        yield
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, RankError):
            message = " ".join(str(error).split())
            where = f"[rank {rank}] " if rank != "0" else ""
            print(f"{program}: error: {where}{message}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(_EXIT_INTERRUPTED) from None
