"""A command whose reader is gone goes on; what it prints goes nowhere."""

import subprocess
import sys

import pytest

PRINTS = """
import os, sys
from everest_ds.config.logs import set_up_logging
set_up_logging()
set_up_logging()
print("first", file=sys.{stream}, flush=True)
sys.stdin.readline()
for _ in range(2):
    print("more", file=sys.{stream}, flush=True)
os.write({other}, b"still here")
"""


@pytest.mark.parametrize("unbuffered", [[], ["-u"]], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(("stream", "other"), [("stdout", 2), ("stderr", 1)])
def test_a_reader_that_is_gone_ends_nothing(stream, other, unbuffered, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    process = subprocess.Popen(
        [sys.executable, *unbuffered, "-c", PRINTS.format(stream=stream, other=other)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    streams = {"stdout": process.stdout, "stderr": process.stderr}
    read = streams.pop(stream)
    (left,) = streams.values()
    assert read.readline() == b"first\n"
    read.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert left.read() == b"still here"
    assert process.wait() == 0
