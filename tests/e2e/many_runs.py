"""Several runs in one launch, each as run/pretrain.py or run/finetune.py makes it: a launch costs 12-15 s.

``deepspeed tests/e2e/many_runs.py SPEC.json``, where SPEC is a list of {"overrides": [...], "ds": {...}}, with
"phase": "finetune" for fine-tuning, and "code" where a run shall not end with 0.
"""

import gc
import json
import sys
from pathlib import Path

from everest_ds.config.load import load_recipe, read_tree
from everest_ds.config.logs import set_up_logging
from everest_ds.training.finetune import finetune
from everest_ds.training.pretrain import pretrain

set_up_logging()
for spec in json.loads(Path(sys.argv[-1]).read_text()):
    if spec.get("phase") == "finetune":
        code = finetune(read_tree(None, spec["overrides"]), spec["ds"])
    else:
        code = pretrain(load_recipe(None, spec["overrides"]), spec["ds"])
    assert code == spec.get("code", 0), (spec, code)
    gc.collect()
