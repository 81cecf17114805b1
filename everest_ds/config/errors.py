"""The one exception that means "the user made a mistake", and how a command ends on it."""

from __future__ import annotations

import contextlib
import difflib
import reprlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from everest_ds.config import place

EXIT_USER_ERROR = 2
_EXIT_INTERRUPTED = 130
# Ten unreadable videos with their paths and reasons fit; nobody reads more.
LONGEST_MESSAGE = 4000
_LONGEST_VALUE = 200
# What a rank waits that leaves the word to its node's first, which may still be importing: launchers end all ranks
# where one has ended.
_SILENT_RANK_S = 5.0
_CUT = " ... "


class UserError(Exception):
    """A mistake that its message explains in one line: what is wrong, where, and what to do.

    Whatever outside files put into the message, it stays one line of printable characters and of some length.
    ``exit_code``: what a command ends with; ``linger_s``: how long it waits before, having said why.
    """

    exit_code = EXIT_USER_ERROR
    linger_s = 0.0

    def __init__(self, message: str = "") -> None:
        super().__init__(_one_line(message))


class RankError(UserError):
    """One that this rank alone has met, so that it must speak whatever its number."""


def shown(value: Any) -> str:
    """Return a value as messages show it: as Python writes it, but short, however large or deep it is."""
    return shortened(_SHORT.repr(value), _LONGEST_VALUE)


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple = 2, 3, 4, 4
        self.maxstring = self.maxother = 80

    def repr_int(self, x: int, level: int) -> str:  # noqa: ARG002 - its base's
        # Python refuses to write thousands of digits.
        return repr(x) if abs(x) < 10**self.maxlong else f"a number of {x.bit_length()} bits"


_SHORT = _Short()


def shortened(text: str, longest: int) -> str:
    """Return a text, its middle left out where it is longer: the end says what to do."""
    if len(text) <= longest:
        return text
    end = longest // 4
    return text[: longest - end - len(_CUT)] + _CUT + text[-end:]


def _one_line(message: str) -> str:
    printable = message.isprintable()
    line = message if printable else "".join(map(_printable, " ".join(message.splitlines())))
    return shortened(line, LONGEST_MESSAGE)


def _printable(character: str) -> str:
    return character if character.isprintable() else repr(character)[1:-1]


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.5) -> str:
    """Return ``"; did you mean 'x'?"`` for the known word most like it (0 to 1), or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean '{close[0]}'?" if close else ""


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn a :class:`UserError` into one line on stderr and its exit code, without a trace; Ctrl-C into 130.

    Under a launcher every rank of a node meets the same mistake; the node's first rank alone reports it. A trace, that
    of a bug, comes after a line with the rank whose it is.
    """
    try:
        yield
    except UserError as error:
        speaks = place.local_rank() == 0 or isinstance(error, RankError)
        if speaks:
            message = " ".join(str(error).split())
            print(f"{program}: error: {place.speaker()}{message}", file=sys.stderr, flush=True)
        time.sleep(error.linger_s if speaks else max(error.linger_s, _SILENT_RANK_S))
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(_EXIT_INTERRUPTED) from None
    except Exception as error:
        if speaker := place.speaker():
            print(f"{program}: error: {speaker}{type(error).__name__}, as follows", file=sys.stderr, flush=True)
        raise
