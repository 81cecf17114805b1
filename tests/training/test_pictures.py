import pytest
import torch
from torch._subclasses import FakeTensorMode

import everest_ds
from everest_ds.training.pictures import draw, trained_views


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_pictures_show_the_frames_trained_on(tmp_path, alpha):
    model = everest_ds.create_model("vit_micro", image_size=48, frame_selection={"alpha": alpha})
    clips = torch.randint(0, 256, (2, 3, model.config.candidate_frames, 48, 48), dtype=torch.uint8)
    noise = torch.rand(2, model.noise_length)
    with torch.no_grad():
        (original, kept, made), numbers = trained_views(model, clips, noise)
    assert numbers.shape == (2, 16)
    for clip, shown, of_clip in zip(clips, original, numbers, strict=True):
        assert torch.equal(clip[:, of_clip], shown)
    assert kept.shape == made.shape == original.shape
    # A tenth of the clip is seen as it is, a fifth is dimmed or predicted, the rest is grey in both.
    assert ((kept == made).float().mean() - 0.8).abs() < 0.02
    draw(model, clips, noise, tmp_path / "clips.png")
    assert (tmp_path / "clips.png").stat().st_size > 0


def fake_cuda_works() -> bool:
    """torch 2.6 asks the driver for random numbers, even for tensors that hold none."""
    try:
        with FakeTensorMode():
            torch.empty(2, device="cuda").uniform_()
    except RuntimeError:
        return False
    return True


@pytest.mark.skipif(not fake_cuda_works(), reason="fake CUDA tensors need a driver here")
def test_views_stay_on_the_device_that_the_clips_are_on():
    """Fake tensors refuse to mix devices, as real ones do, and need no GPU."""
    with FakeTensorMode() as gpu, torch.device("cuda"):
        model = everest_ds.create_model("vit_micro", image_size=48, frame_selection={"alpha": 1.5})
        clips = torch.empty(2, 3, model.config.candidate_frames, 48, 48, dtype=torch.uint8)
        noise = torch.empty(2, model.noise_length)
    with gpu, torch.no_grad():
        views, numbers = trained_views(model, clips, noise)
    assert {tensor.device.type for tensor in (*views, numbers)} == {"cuda"}
