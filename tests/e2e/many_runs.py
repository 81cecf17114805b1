"""Several pre-training runs in one launch, each through everest_ds.training.pretrain: a launch costs 12-15 s.

``deepspeed tests/e2e/many_runs.py SPEC.json``, where SPEC is a list of {"overrides": [...], "ds": {...}}.
"""

import gc
import json
import sys
from pathlib import Path

from everest_ds.config.load import load_recipe
from everest_ds.config.logs import set_up_logging
from everest_ds.training.pretrain import pretrain

set_up_logging()
for spec in json.loads(Path(sys.argv[-1]).read_text()):
    code = pretrain(load_recipe(None, spec["overrides"]), spec["ds"])
    assert code == spec.get("code", 0), (spec, code)
    gc.collect()
