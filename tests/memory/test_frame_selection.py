"""Frame selection in the memory accounting: the candidates' bytes are there, and a real step agrees."""

import dataclasses
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from everest_ds.config.schema import FrameSelectionConfig, ModelConfig
from everest_ds.memory.meters import StorageMeter
from everest_ds.memory.trace import TraceSpec, trace_one_clip, trace_step
from everest_ds.models import MaskedAutoencoder

OFF = ModelConfig(size="vit_micro", image_size=48, decoder_depth=1, keep_ratio=0.5)
ON = dataclasses.replace(OFF, frame_selection=FrameSelectionConfig(alpha=1.5))


@pytest.mark.parametrize("batch", [1, 4])
def test_a_real_step_holds_what_was_traced(batch):
    model = MaskedAutoencoder(ON, checkpoint=partial(checkpoint, use_reentrant=True))
    shape = (batch, 3, ON.candidate_frames, 48, 48)
    clips, noise = torch.randint(0, 256, shape, dtype=torch.uint8), torch.rand(batch, model.budget.clip_noise)
    with StorageMeter() as meter:
        loss = model(clips, noise).loss
        loss.backward()
    real = meter.peak_bytes - meter.before_bytes + clips.nbytes + noise.nbytes
    traced = (trace_one_clip if batch == 1 else trace_step)(TraceSpec(model=ON, precision="fp32", device_type="cpu"))
    # A few scalars and the states of random generators are outside the trace.
    assert traced.plain().freeze().peak(batch) == pytest.approx(real, rel=0.005)


def test_a_step_with_frame_selection_holds_the_candidate_clips():
    batch, more_frames = 8, ON.candidate_frames - ON.frames
    peaks = [trace_step(TraceSpec(model=model, device_type="cpu")).plain().freeze().peak(batch) for model in (OFF, ON)]
    assert peaks[1] - peaks[0] >= batch * 3 * more_frames * 48 * 48
