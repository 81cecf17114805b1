"""Eight ranks, as on one node: they train as one does, hold what was planned, and send what was planned."""

import json
from collections.abc import Iterator

import pytest
from launching import DS_CONFIGS, Console, losses, new_console

from everest_ds.config.ds_config import load_ds_config
from everest_ds.config.load import load_recipe
from everest_ds.memory.plan import plan
from everest_ds.memory.traffic import messages
from tools.memprof.measure import compare, job

RANKS = 8
STAGES = ("zero1", "zero2", "zero3")
MODEL = ("model.size=vit_micro", "model.image_size=48", "model.decoder_depth=1")
TRAINING = (
    "data.stride=1 data.workers=0 data.crop_scales=[0.75] train.global_batch=16 train.max_steps=4 "
    "train.log_every_steps=1 optim.warmup_steps=2 optim.base_lr=0.03"
).split()


@pytest.fixture(scope="module")
def eight_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    with new_console(RANKS, tmp_path_factory.mktemp("consoles") / "eight_ranks") as console:
        yield console


def test_losses_are_those_of_one_rank(eight_ranks, one_rank, motion_videos, tmp_path):
    command = ["run/pretrain.py", *MODEL, *TRAINING, f"data.train={motion_videos}"]
    one_rank.succeed(*command, "--ds_config", DS_CONFIGS / "zero0.json", f"train.output_dir={tmp_path / 'one'}")
    for stage in STAGES:
        place = ["--ds_config", DS_CONFIGS / f"{stage}.json", f"train.output_dir={tmp_path / stage}"]
        eight_ranks.succeed(*command, *place)
        assert len(losses(tmp_path / stage)) == 4
        assert losses(tmp_path / stage) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_states_and_messages_are_those_planned(eight_ranks, tmp_path):
    recipe = load_recipe(None, [*MODEL, "train.micro_batch=1"])
    ds_configs = {stage: load_ds_config(DS_CONFIGS / f"{stage}.json") for stage in STAGES}
    jobs = [job(recipe, ds, steps=1, name=stage) for stage, ds in ds_configs.items()]
    (tmp_path / "jobs.json").write_text(json.dumps({"jobs": jobs, "load_libraries": False}))
    eight_ranks.succeed("everest_ds/training/measure.py", tmp_path / "jobs.json", tmp_path)
    per_rank = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]
    for number, (stage, ds) in enumerate(ds_configs.items()):
        planned = plan(recipe, ds, ranks=RANKS, device_type="cpu")
        measured = [results[number] for results in per_rank]
        result = compare(planned, measured)
        assert result["states_bytes"] == pytest.approx(result["predicted_states_bytes"], rel=0.01), stage
        predicted = {message.collective: message.size_bytes for message in messages(planned)}
        for of_rank in measured:
            sent = {name: size for name, size in of_rank["messages"].items() if name in predicted}
            assert sent == pytest.approx(predicted, rel=0.05), stage
            assert sum(of_rank["messages"].values()) == pytest.approx(sum(predicted.values()), rel=0.05), stage
        assert result["message_bytes"] == pytest.approx(result["predicted_message_bytes"], rel=0.05), stage
