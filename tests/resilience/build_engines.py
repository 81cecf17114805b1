"""Builds engines and takes a step with each: ``build_engines.py JOBS OUT``.

JOBS holds a ``recipe`` and ``ds_configs``; OUT gets a pair for each: ``built``, ``refused`` and the line, or ``failed``
and the trace.
"""

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

import deepspeed
from torch.nn import functional

from everest_ds.config.errors import UserError
from everest_ds.config.load import build
from everest_ds.config.schema import Recipe
from everest_ds.training import ranks
from everest_ds.training.exhaustion import is_out_of_memory
from everest_ds.training.measure import Run


def outcome(recipe, ds_config):
    try:
        run = Run.start(recipe, ds_config)
        run.step()
        run.built.engine.destroy()
    except UserError as error:
        return "refused", str(error)
    except Exception as error:
        # A run says what the planner counts.
        return ("refused", "out of memory") if is_out_of_memory(error) else ("failed", traceback.format_exc())
    return "built", ""


jobs = json.loads(Path(sys.argv[1]).read_text())
ranks.start()
os.chdir(tempfile.mkdtemp(prefix="engines-"))  # monitors write where they are
found = []
for ds_config in jobs["ds_configs"]:
    linear = functional.linear
    found.append(outcome(build(Recipe, jobs["recipe"]), ds_config))
    functional.linear = linear  # ZeRO-3 puts its own there for good
    deepspeed.comm.configure(enabled=False)  # once on, the comms logger stays
Path(sys.argv[2]).write_text(json.dumps(found))
