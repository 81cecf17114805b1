"""A training command with little memory: ``limited.py BUDGET run/pretrain.py ...``.

The process may take BUDGET bytes beyond what it holds once its libraries are loaded, and ``train.capacity`` says so.
From the first step on the kernel enforces it: RLIMIT_DATA, the limit on private writable memory, which is where tensors
are, leaves what the resident set (RSS) then leaves of the capacity. It refuses the block that would pass that. (Linux
ignores RLIMIT_RSS, and a control group takes rights that a test doesn't have everywhere.)

At the end ``peak RSS N of M bytes`` goes to stderr.
"""

import resource
import runpy
import sys
from pathlib import Path

import everest_ds.training.pretrain  # noqa: F401 - before anything is measured
from everest_ds.memory.meters import ResidentMeter, resident_bytes
from everest_ds.training import job

unlimited = job.train


def limited(training, stop):
    left = capacity - resident_bytes()
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + left, resource.RLIM_INFINITY))
    return unlimited(training, stop)


def data_bytes() -> int:
    """What RLIMIT_DATA counts."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))


meter = ResidentMeter()
capacity = meter.start_bytes + int(sys.argv[1])
sys.argv = [*sys.argv[2:], f"train.capacity={capacity}B"]
job.train = limited
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    job.train = unlimited
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(f"peak RSS {meter.start_bytes + meter.growth_bytes()} of {capacity} bytes", file=sys.stderr)
