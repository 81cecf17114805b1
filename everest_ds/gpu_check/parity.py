"""The official implementations' numbers on this device; ways of training that must agree; and the same bits twice."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from everest_ds.gpu_check import golden
from everest_ds.gpu_check.cases import Asked, Case, NotHereError, Values, WrongError
from everest_ds.gpu_check.settings import STAGES, Setting
from everest_ds.training import ranks
from everest_ds.training.engine import supports
from everest_ds.training.measure import Run

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Errors that are allowed, see golden.error. The largest that were seen on a CPU, with one thread or two: 1e-6 in fp32,
# 5.2e-2 in bf16, 2.0e-3 in fp16; each in a gradient or a logit.
BOUNDS = {"fp32": 1e-5, "bf16": 1e-1, "fp16": 1e-2}
# The share of chosen tokens that must be the fixture's. In half precision importance is that of rounded weights.
_SAME_INDICES = {"fp32": 1.0, "bf16": 0.9, "fp16": 0.9}
_STEPS = 5
# A near-tie of two tokens may fall the other way between two orders of summation: about 1e-4 of one step's loss.
_LOSS_BOUND = 5e-4
_TINY_MODEL = ("model.image_size=48", "optim.base_lr=0.1")


def cases(asked: Asked) -> Iterator[Case]:
    """Fixtures, ways of training, bits."""
    ranks.start()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    for precision, attention in itertools.product(_DTYPES, ("fused", "eager")):
        for name in ("everest_pretrain", "videomae_pretrain", "everest_finetune"):
            run = partial(_fixture, name, asked.device, precision, attention)
            yield Case(name=f"{name}, {precision}, {attention}", run=run)
    reference: list[float] = []
    for place, (name, setting) in enumerate(_ways()):
        run = partial(_five_steps, setting, asked, reference, is_reference=place == 0)
        yield Case(name=f"five steps: {name}", run=run)
    for name, precision, attention, choice in _DETERMINISM:
        run = partial(_bits, precision, attention, choice, asked, claimed=name in _CLAIMED)
        yield Case(name=f"five steps twice: {name}", run=run)


def _fixture(name: str, device: str, precision: str, attention: str) -> Values:
    if not supports(precision):
        raise NotHereError(f"this device has no {precision}")
    way = {"device": device, "dtype": _DTYPES[precision], "attention": attention}
    found = golden.classifier(**way) if name == "everest_finetune" else golden.autoencoder(name, **way)  # type: ignore[arg-type]
    bound, least = BOUNDS[precision], _SAME_INDICES[precision]
    values = {"bound": bound, "same_indices": found.same_indices, **found.errors}
    if found.worst > bound:
        raise WrongError(f"an error of {found.worst:.1e}, more than {bound:.0e}", values)
    if found.same_indices < least:
        raise WrongError(
            f"{found.same_indices:.1%} of the chosen tokens are the fixture's, less than {least:.0%}", values
        )
    return values


def _ways() -> Iterator[tuple[str, Setting]]:
    """Ways to train the same model; all others are held against the first."""

    def way(name: str, *keys: str, zero: str = "zero0") -> tuple[str, Setting]:
        return name, Setting(
            name=name, size="vit_micro", clips=4, keys=(*_TINY_MODEL, *keys), zero=zero, precision="fp32"
        )

    for zero in STAGES:
        yield way(f"{zero}, fused", "model.attention=fused", zero=zero)
    yield way("zero0, eager", "model.attention=eager")
    yield way("zero0, checkpointing full", "model.attention=fused", "model.checkpointing=full")


def _five_steps(setting: Setting, asked: Asked, reference: list[float], *, is_reference: bool) -> Values:
    losses = _train(setting, asked)[0]
    if is_reference:
        reference.extend(losses)
    elif not reference:
        raise NotHereError("there is nothing to compare with: the first way failed")
    apart = golden.largest(abs(a / b - 1) for a, b in zip(losses, reference, strict=True))
    values = {"bound": _LOSS_BOUND, "last_loss": losses[-1], "losses_apart": apart}
    if apart > _LOSS_BOUND:
        raise WrongError(f"losses differ by {apart:.1e} of themselves, more than {_LOSS_BOUND:.0e}", values)
    return values


def _train(setting: Setting, asked: Asked) -> tuple[list[float], list[Tensor]]:
    """Take five steps; return losses and weights."""
    run = Run.start(setting.recipe(asked), setting.ds_config())
    losses = [float(run.step()) for _ in range(_STEPS)]
    weights = [parameter.detach().clone() for parameter in run.built.engine.module.parameters()]
    run.built.engine.destroy()
    return losses, weights


@contextlib.contextmanager
def _without_cudnn() -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


_DETERMINISM: tuple[tuple[str, str, str, Callable[[], contextlib.AbstractContextManager[None]]], ...] = (
    ("bf16, fused", "bf16", "fused", contextlib.nullcontext),
    ("bf16, fused, cuDNN's attention off", "bf16", "fused", _without_cudnn),
    ("bf16, eager", "bf16", "eager", contextlib.nullcontext),
    ("bf16, fused, deterministic algorithms", "bf16", "fused", _deterministic),
    ("fp32, fused", "fp32", "fused", contextlib.nullcontext),
)
# What docs/reliability.md expects.
_CLAIMED = ("bf16, eager", "bf16, fused, deterministic algorithms")


def _bits(
    precision: str,
    attention: str,
    choice: Callable[[], contextlib.AbstractContextManager[None]],
    asked: Asked,
    *,
    claimed: bool,
) -> Values:
    """Train twice from the same start, and compare the weights bit by bit."""
    keys = (*_TINY_MODEL, f"model.attention={attention}")
    setting = Setting(name="bits", size="vit_micro", clips=4, keys=keys, precision=precision)
    with choice():
        (_, ours), (_, again) = _train(setting, asked), _train(setting, asked)
    same = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    if claimed and not same:
        raise WrongError("the same steps gave other bits; docs/reliability.md expects the same", {"same_bits": same})
    return {"same_bits": same}
