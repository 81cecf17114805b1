"""The demo, cut short: everything that `make demo` does but the length of the training."""

from launching import metrics, run


def test_the_demo_trains_draws_and_sums_up(tmp_path, one_rank):
    done = run("tools/demo.py", "--outputs", tmp_path, "train.max_steps=4", "train.log_every_steps=1")
    assert done.returncode == 0, done.stderr
    assert len(metrics(tmp_path / "demo")) == 4
    assert (tmp_path / "demo/reconstruction.png").read_bytes().startswith(b"\x89PNG")
    for line in ("loss ", "clips per second", "peak memory", "run directory", "model.method=videomae"):
        assert line in done.stdout
    one_rank.succeed("tools/visualize.py", tmp_path / "demo", "--out", tmp_path / "again.png", "--clips", "1")
    assert (tmp_path / "again.png").is_file()
    refused = one_rank.run("tools/visualize.py", tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "no model.safetensors here" in refused.stderr
