"""The traced step: right at every batch, and byte for byte what really happens."""

import dataclasses
import itertools
from functools import partial

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from everest_ds.config.schema import ModelConfig
from everest_ds.memory import trace as tracing
from everest_ds.memory.meters import StorageMeter
from everest_ds.memory.trace import Born, Died, Mark, TraceSpec, trace_one_clip, trace_step
from everest_ds.models import MaskedAutoencoder

MICRO = ModelConfig(size="vit_micro", image_size=48)
VARIANTS = [
    dataclasses.replace(MICRO, method=method, attention=attention, checkpointing=checkpointing)
    for method, attention, checkpointing in itertools.product(
        ("everest", "videomae"), ("fused", "eager"), ("none", "full")
    )
]


def words(model: ModelConfig) -> str:
    return f"{model.method}-{model.attention}-{model.checkpointing}"


def direct_peak(spec: TraceSpec, batch: int) -> int:
    """Trace this very batch, without any line through others."""
    with FakeTensorMode():
        recorder = tracing._record(tracing._build(spec), spec, batch)
    current = peak = 0
    for event in recorder.events:
        if isinstance(event, Born):
            current += recorder.sizes[event.block]
            peak = max(peak, current)
        elif isinstance(event, Died):
            current -= recorder.sizes[event.block]
    return peak


@pytest.mark.parametrize(("precision", "checkpointing"), [("fp32", "none"), ("bf16", "full"), ("autocast", "none")])
def test_two_small_batches_tell_every_other(precision, checkpointing):
    spec = TraceSpec(model=dataclasses.replace(MICRO, checkpointing=checkpointing), precision=precision)
    curve = trace_step(spec).plain().freeze()
    for batch in (4, 33):
        assert curve.peak(batch) == direct_peak(spec, batch)
    assert trace_one_clip(spec).plain().freeze().peak(1) == direct_peak(spec, 1)


@pytest.mark.parametrize("model", VARIANTS, ids=words)
@pytest.mark.parametrize("batch", [1, 4])
def test_a_real_step_holds_what_was_traced(model, batch):
    autoencoder = MaskedAutoencoder(model, checkpoint=partial(checkpoint, use_reentrant=True))
    noise = torch.rand(batch, autoencoder.budget.total)
    clips = torch.randint(0, 256, (batch, 3, 16, 48, 48), dtype=torch.uint8)
    with StorageMeter() as meter:
        loss = autoencoder(clips, noise).loss
        loss.backward()
    real = meter.peak_bytes - meter.before_bytes + clips.nbytes + noise.nbytes
    traced = (trace_one_clip if batch == 1 else trace_step)(TraceSpec(model=model, precision="fp32", device_type="cpu"))
    # A few scalars and the states of random generators are outside the trace.
    assert traced.plain().freeze().peak(batch) == pytest.approx(real, rel=0.005)


@pytest.mark.parametrize("model", VARIANTS[:2], ids=words)
def test_every_parameter_gets_one_gradient(model):
    trace = trace_step(TraceSpec(model=model, module_marks=True))
    ready = [e.name for e in trace.events if isinstance(e, Mark) and e.kind == "gradient"]
    assert sorted(ready) == sorted(p.name for p in trace.parameters)


def test_modules_are_left_as_often_as_entered():
    trace = trace_step(TraceSpec(model=MICRO, module_marks=True))
    marks = [(e.kind, e.name) for e in trace.events if isinstance(e, Mark)]
    for name in trace.module_order:
        assert marks.count(("enter", name)) == marks.count(("leave", name))
    assert ("enter_backward", "encoder.blocks.0.mlp.fc1") in marks
    assert ("leave_backward", "encoder.blocks.0.mlp.fc1") in marks


def test_checkpointing_keeps_one_tensor_per_block():
    traces = {
        mode: trace_step(
            TraceSpec(model=dataclasses.replace(MICRO, checkpointing=mode), precision="fp32", device_type="cpu")
        )
        for mode in ("none", "encoder")
    }
    kept = {mode: trace.saved_bytes("encoder.blocks", 4) for mode, trace in traces.items()}
    visible, width, depth = 28, 96, 4
    assert kept["encoder"] == depth * 4 * visible * width * 4  # the output of each block: the next one's input
    assert kept["none"] > 15 * kept["encoder"]
    decoders = {mode: trace.saved_bytes("decoder.blocks", 4) for mode, trace in traces.items()}
    assert decoders["none"] == decoders["encoder"]


def test_the_classifier_can_be_traced():
    spec = TraceSpec(model=dataclasses.replace(MICRO, keep_ratio=0.6), classes=10, precision="bf16")
    trace = trace_step(spec)
    assert {p.name for p in trace.parameters} >= {"head.weight", "fc_norm.weight"}
    assert trace.plain().freeze().peak(5) == direct_peak(spec, 5)


def test_cuda_counts_the_workspace_of_flash_attention():
    model = dataclasses.replace(MICRO, attention="fused", checkpointing="full")
    cuda, cpu = (trace_step(TraceSpec(model=model, device_type=device)) for device in ("cuda", "cpu"))
    assert max(cuda.per_clip) >= max(cpu.per_clip)
    # Four blocks on each side, each a workspace of (rows padded to 128) x heads x (channels padded to 32, + 1) fp32.
    workspace = 128 * 3 * (32 + 1) * 4
    assert cuda.per_clip.count(workspace) - cpu.per_clip.count(workspace) == 8
