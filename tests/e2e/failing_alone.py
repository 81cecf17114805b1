"""A training command whose engine can't be built on one rank: ``failing_alone.py RANK run/pretrain.py ...``."""

import os
import runpy
import sys

import deepspeed

# DeepSpeed's launcher puts --local_rank first.
arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
rank, sys.argv = arguments[0], arguments[1:]
whole = deepspeed.initialize


def initialize(*given, **named):
    if os.environ["RANK"] == rank:
        raise KeyError("of one rank")
    return whole(*given, **named)


deepspeed.initialize = initialize
runpy.run_path(sys.argv[0], run_name="__main__")
