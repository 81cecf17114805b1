"""``train.micro_batch=auto`` and advice: what they choose fits under a limit that the kernel enforces, and no more."""

import re

import pytest
from launching import DS_CONFIGS, metrics, new_console

from everest_ds.config.ds_config import load_ds_config
from everest_ds.config.load import load_recipe
from everest_ds.memory.plan import plan
from everest_ds.training.run_dir import RunDir

# A clip takes 320 MiB, in attention's matrices of 2048 x 2048 tokens; parameters and their states take 10.
MODEL = "model.size=vit_micro model.image_size=128 model.method=videomae model.attention=eager".split()
FITS = 2
DS_CONFIG = DS_CONFIGS / "zero2.json"
TRIM = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


@pytest.fixture(scope="module")
def console(tmp_path_factory):
    """A process whose C library returns large blocks to the system when they are freed: see tools/memprof/launch.py."""
    with (
        pytest.MonkeyPatch.context() as patch,
        new_console(1, tmp_path_factory.mktemp("consoles") / "trimmed") as console,
    ):
        for name, value in TRIM.items():
            patch.setenv(name, value)
        yield console


@pytest.fixture(scope="module")
def limited(console, motion_videos, tmp_path_factory):
    """Train with memory for two clips and a part of the third."""
    recipe = load_recipe(None, [*MODEL, "train.micro_batch=2", "train.global_batch=4"])
    planned = plan(recipe, load_ds_config(DS_CONFIG), ranks=1, device_type="cpu")
    needed, more = (planned.needed_bytes(clips) for clips in (FITS, FITS + 1))
    # Libraries take some of it too: see training/micro_batch.py.
    budget = round(needed + 0.6 * (more - needed))

    def train(*keys):
        folder = tmp_path_factory.mktemp("limited") / "run"
        data = (f"data.train={motion_videos}", "data.stride=1", "data.workers=0", "data.crop_scales=[0.75]")
        length = ("train.max_steps=2", "optim.warmup_steps=0", f"train.output_dir={folder}")
        command = ("tests/limited.py", budget, "run/pretrain.py", "--ds_config", DS_CONFIG, *MODEL, *data, *length)
        return console.run(*command, *keys), RunDir(folder)

    return train


def test_auto_chooses_what_fits(limited):
    done, run_dir = limited("train.micro_batch=auto", "train.global_batch=4")
    assert done.returncode == 0, done.stderr[-3000:]
    peak, capacity = map(int, re.search(r"peak RSS (\d+) of (\d+) bytes", done.stderr).groups())
    assert peak <= capacity
    assert [record["step"] for record in metrics(run_dir.path)] == [1, 2]
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("train.micro_batch=auto: "))
    assert re.search(
        r"micro-batch 2 x accumulation 2 x ranks 1; predicted peak 0\.63 GiB per rank of 0\.\d\d GiB "
        rf"\(train.capacity {capacity}B less 0\.\d\d GiB for process and libraries\)",
        line,
    )
    written = load_recipe(run_dir.config).train
    assert (written.micro_batch, written.global_batch) == (FITS, 4)


def test_one_clip_more_is_refused_and_what_is_advised_trains(limited):
    asked = (f"train.micro_batch={FITS + 1}", f"train.global_batch={FITS + 1}")
    done, run_dir = limited(*asked)
    assert done.returncode == 2, done.stderr[-3000:]
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("pretrain: error: "))
    told = re.fullmatch(
        r"pretrain: error: memory: a rank needs 9\d\d\.\d MiB, and there is \d+\.\d MiB per rank "
        r"\(train\.capacity .*\); "
        r"what fits, with 3\d\d\.\d MiB: the same command with (.*); --no-preflight trains all the same",
        line,
    )
    assert told[1] == "train.micro_batch=1"  # of three clips
    assert not run_dir.path.exists()
    done, run_dir = limited(*asked, *told[1].split())
    assert done.returncode == 0, done.stderr[-3000:]
    assert load_recipe(run_dir.config).train.global_batch == FITS + 1


def test_one_clip_more_does_not_fit_and_is_explained(limited):
    done, run_dir = limited(f"train.micro_batch={FITS + 1}", f"train.global_batch={FITS + 1}", "--no-preflight")
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("pretrain: error: "))
    assert line == (
        "pretrain: error: out of memory at micro-batch 3: the planner counts 0.94 GiB per rank; try "
        "train.micro_batch=auto with train.global_batch=3, model.checkpointing=full, a ds_config with more of ZeRO, or "
        "offload; what fits: python tools/memprof fit --method videomae --model vit_micro --world-size 1 --capacity "
        "SIZE --device cpu model.image_size=128 model.attention=eager"
    )
    assert not run_dir.has_checkpoint()
