"""The traced step: right at every batch, and byte for byte what really happens."""

import dataclasses
import itertools
from collections import Counter
from functools import partial

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from everest_ds.config.finetuning import AugmentConfig, ClassifierConfig
from everest_ds.config.schema import ModelConfig
from everest_ds.data.mixing import Mixing
from everest_ds.memory import trace as tracing
from everest_ds.memory.meters import StorageMeter
from everest_ds.memory.objectives import MIXINGS, heaviest_mixing, random_batch
from everest_ds.memory.trace import Born, Died, Mark, TraceSpec, trace_one_clip, trace_step
from everest_ds.models import MaskedAutoencoder, VideoClassifier
from everest_ds.training.objectives import Classify

# Four blocks in the encoder, two in the decoder: tracing takes as long as the model is deep.
MICRO = ModelConfig(size="vit_micro", image_size=48, decoder_depth=2)
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


@pytest.mark.parametrize("model", VARIANTS, ids=words)
def test_a_step_takes_what_was_traced_from_the_allocator(model):
    """By the allocator's own events, which show what kernels take inside, and that gradients are summed in place.

    A trace, and a meter on real tensors, see those sums as new tensors: with checkpointing they make the peak.
    """
    autoencoder = MaskedAutoencoder(model, checkpoint=partial(checkpoint, use_reentrant=True))
    noise = torch.rand(4, autoencoder.budget.total)
    clips = torch.randint(0, 256, (4, 3, 16, 48, 48), dtype=torch.uint8)
    autoencoder(clips, noise).loss.backward()  # what libraries take on first use
    autoencoder.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        autoencoder(clips, noise).loss.backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    taken = max(itertools.accumulate(event.nbytes() for event in events)) + clips.nbytes + noise.nbytes
    traced = trace_step(TraceSpec(model=model, precision="fp32", device_type="cpu")).plain().freeze().peak(4)
    assert 0.99 * taken < traced < (1.02 if model.checkpointing == "none" else 1.08) * taken


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


CLASSIFIERS = [
    ClassifierConfig(size="vit_micro", image_size=48, classes=10, keep_ratio=keep, attention=attention, **checkpointing)
    for keep, attention, checkpointing in (
        (0.6, "eager", {}),
        (1.0, "fused", {}),
        (0.6, "fused", {"checkpointing": "encoder"}),
    )
]


@pytest.mark.parametrize("model", CLASSIFIERS, ids=words)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_small_batches_tell_every_other_of_a_classifier(model, precision):
    spec = TraceSpec(model=model, precision=precision, mixing="mixup")
    assert trace_step(spec).plain().freeze().peak(5) == direct_peak(spec, 5)


@pytest.mark.parametrize("model", CLASSIFIERS, ids=words)
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.0, 0.0)])
@pytest.mark.parametrize("clips", [1, 4])
def test_a_real_step_of_fine_tuning_holds_what_was_traced(model, mixup, cutmix, clips):
    classifier = VideoClassifier(model, checkpoint=partial(checkpoint, use_reentrant=True))
    classifier.device = torch.device("cpu")  # as an engine has it
    augment = AugmentConfig(mixup=mixup, cutmix=cutmix)
    batch, objective = random_batch(classifier, clips), Classify(augment, 10)
    with StorageMeter() as meter:
        objective(classifier, batch).backward()
    real = meter.peak_bytes - meter.before_bytes + batch.clips.nbytes
    spec = TraceSpec(model=model, precision="fp32", device_type="cpu", mixing=heaviest_mixing(augment))
    traced = (trace_one_clip if clips == 1 else trace_step)(spec)
    assert traced.plain().freeze().peak(clips) == pytest.approx(real, rel=0.005)


@pytest.mark.parametrize(("kind", "mixup", "cutmix"), [("mixup", 0.8, 0.0), ("cutmix", 0.0, 1.0), ("none", 0.0, 0.0)])
def test_mixing_takes_what_the_data_layers_takes(kind, mixup, cutmix):
    augment = AugmentConfig(mixup=mixup, cutmix=cutmix)
    assert heaviest_mixing(augment) == kind
    clips, labels = torch.randint(0, 256, (4, 3, 16, 48, 48), dtype=torch.uint8), torch.arange(4)
    with StorageMeter() as real:
        kept = Mixing(augment, 10)(clips, labels)
    with StorageMeter() as ours:
        kept = MIXINGS[kind](clips)  # noqa: F841 - alive while it is measured
    taken, modelled = (meter.peak_bytes - meter.before_bytes for meter in (real, ours))
    assert modelled == pytest.approx(taken, abs=10_000)  # labels are left out


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, "mixup"),
        ({"cutmix_share": 1.0}, "cutmix"),
        ({"cutmix_share": 1.0, "cutmix": 0.0}, "mixup"),
        ({"mix_probability": 0.0}, "none"),
    ],
)
def test_the_heaviest_mixing_of_a_run_counts(settings, kind):
    assert heaviest_mixing(AugmentConfig(**settings)) == kind


def test_autocast_scores_in_half_precision_as_a_gpu_does():
    def largest_in_embedding(precision):
        trace = trace_step(TraceSpec(model=MICRO, device_type="cuda", precision=precision))
        return max(size for size, module in zip(trace.per_clip, trace.modules, strict=True) if "patch_embed" in module)

    assert largest_in_embedding("autocast") == largest_in_embedding("bf16") == largest_in_embedding("fp32") // 2


def test_cuda_counts_the_workspace_of_flash_attention():
    model = dataclasses.replace(MICRO, attention="fused", checkpointing="full")
    cuda, cpu = (trace_step(TraceSpec(model=model, device_type=device, precision="fp32")) for device in ("cuda", "cpu"))
    assert max(cuda.per_clip) >= max(cpu.per_clip)
    # Six blocks, each a workspace of (rows padded to 128) x heads x (channels padded to 32, + 1) fp32.
    workspace = 128 * 3 * (32 + 1) * 4
    assert cuda.per_clip.count(workspace) - cpu.per_clip.count(workspace) == 6


def test_cuda_counts_what_softmax_takes_in_its_backward_pass():
    model = dataclasses.replace(MICRO, attention="eager")
    cuda, cpu = (
        Counter(trace_step(TraceSpec(model=model, device_type=device, precision="fp32")).per_clip)
        for device in ("cuda", "cpu")
    )
    # The gradient times the output: in each block another matrix of attention, of which the forward pass keeps one.
    more = cuda - cpu
    assert more.total() == 6
    assert all(cpu[size_bytes] >= count for size_bytes, count in more.items())
