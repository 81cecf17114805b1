"""Every setting of a run, as frozen dataclasses: type, default, unit, and where the default comes from.

A recipe (YAML) and ``key=value`` overrides fill these; what a DeepSpeed JSON can say (precision, ZeRO, offload,
clipping, optimizer type, monitors) is said there and nowhere here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from everest_ds.config.errors import UserError, nearest
from everest_ds.config.sizes import SIZES, Size

Method = Literal["everest", "videomae"]
Selector = Literal["auto", "rero", "least", "tube", "random"]
Attention = Literal["auto", "fused", "eager"]
Checkpointing = Literal["none", "encoder", "decoder", "full"]
Positions = Literal["flattened", "separable"]
Decoder = Literal["decord", "torchcodec"]
Sampling = Literal["dense", "segments"]
Crop = Literal["multiscale", "resized"]
AdamChoice = Literal["auto", "deepspeed", "apex", "torch"]
OnSaveError = Literal["continue", "stop"]
# A number of clips, or the largest that fits.
MicroBatch = int | Literal["auto"] | None


# Selectors that rank tokens by importance.
IMPORTANCE_SELECTORS = ("rero", "least")
_LARGEST_ALPHA = 16.0
# Beyond these a model can't be built, or takes the machine's memory before anyone can say so. The paper has 1568 tokens
# of 1536 numbers and 174 classes at most; ImageNet-21k has 21841.
LARGEST_TOKENS = 2**17
LARGEST_TOKEN_NUMBERS = 2**16
LARGEST_CLASSES = 100_000
_MOST_BLOCKS = 256
_LARGEST_WIDTH = 2**14
# Processes, batches, clips and operations that nobody means.
_MOST_WORKERS = 1024
_MANY = 10_000
# Host memory for the batches that a rank's data workers prepare ahead: a batch of 256 clips of 16 frames is 1 GiB of
# pinned memory, and the default 4 workers have one each.
AHEAD_BYTES = 4 * 2**30
# Longer than any system waits for anything.
_LONGEST_WAIT_S = 7 * 24 * 3600.0


def setting(default: Any, doc: str, *, source: str = "ours") -> Any:
    """Declare a field with its documentation (unit included) and its default's source."""
    return dataclasses.field(default=default, metadata={"doc": doc, "source": source})


def section(kind: type, doc: str) -> Any:
    """Declare a nested group of settings."""
    return dataclasses.field(default_factory=kind, metadata={"doc": doc, "source": "ours"})


def check(holds: bool, key: str, message: str) -> None:
    """Raise a UserError about ``key`` unless the check holds."""
    if not holds:
        raise UserError(f"{key}: {message}")


def check_most(settings: Any, group: str, **most: float) -> None:
    """Raise a UserError about the first of these settings that is above its bound."""
    for key, bound in most.items():
        value = getattr(settings, key)
        check(value is None or value <= bound, f"{group}.{key}", f"must be at most {bound:g}, got {value}")


@dataclass(frozen=True, kw_only=True)
class FrameSelectionConfig:
    """Information-intensive frame selection (paper, section 4.2), in pre-training."""

    alpha: float = setting(
        1.0, "candidate frames per trained frame; the more a slot changes, the likelier it is taken; 1: off"
    )

    def __post_init__(self) -> None:
        inside = 1 <= self.alpha <= _LARGEST_ALPHA
        check(inside, "model.frame_selection.alpha", f"must be in [1, {_LARGEST_ALPHA:g}], got {self.alpha}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The clip's shape, the token selection, and the autoencoder."""

    method: Method = setting("everest", "pre-training method: everest (ReRo tokens) or videomae (tube mask)")
    size: str = setting("vit_small", f"encoder size: {', '.join(SIZES)}")
    image_size: int = setting(224, "clip height and width, pixels", source="paper, section 5")
    frames: int = setting(16, "frames per clip", source="paper, section 5")
    tubelet: int = setting(2, "frames per token", source="paper, section 3")
    patch: int | None = setting(None, "token height and width, pixels; null: the size's own", source="ViT")
    keep_ratio: float = setting(0.3, "rho_pre: share of all tokens kept as informative", source="paper, Table 7")
    visible_ratio: float = setting(
        0.1, "rho_pre * rho_post: share of all tokens that the encoder sees", source="paper, section 4.1"
    )
    selector: Selector = setting(
        "auto",
        "how tokens are chosen: rero (most changing), least (least changing, Table 16), tube, random; "
        "auto: rero for everest, tube for videomae",
    )
    frame_selection: FrameSelectionConfig = section(FrameSelectionConfig, "information-intensive frames")
    decoder_depth: int = setting(4, "decoder blocks", source="official EVEREST scripts")
    decoder_width: int | None = setting(None, "decoder channels; null: the size's own, half the encoder's")
    decoder_heads: int | None = setting(None, "decoder attention heads; null: the size's own")
    attention: Attention = setting("auto", "fused (SDPA), eager (materialised), or auto: the faster here")
    checkpointing: Checkpointing = setting("none", "which blocks recompute activations in the backward pass")
    positions: Positions = setting(
        "flattened", "sine-cosine table over the token index (official) or separable in t, y, x"
    )

    def __post_init__(self) -> None:
        check(self.size in SIZES, "model.size", f"unknown size '{self.size}'{nearest(self.size, SIZES)}")
        for key in ("image_size", "frames", "tubelet", "decoder_depth"):
            check(getattr(self, key) > 0, f"model.{key}", f"must be positive, got {getattr(self, key)}")
        row = self.row
        defaults = {"patch": row.patch, "decoder_width": row.decoder_width, "decoder_heads": row.decoder_heads}
        for key, value in defaults.items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)
            check(getattr(self, key) > 0, f"model.{key}", f"must be positive, got {getattr(self, key)}")
        self._check_divisions()
        self._check_sizes()
        self._check_ratios()

    def _check_divisions(self) -> None:
        for key, unit in (("image_size", "patch"), ("frames", "tubelet"), ("decoder_width", "decoder_heads")):
            whole, part = getattr(self, key), getattr(self, unit)
            check(whole % part == 0, f"model.{key}", f"{whole} is not divisible by model.{unit} = {part}")

    def _check_sizes(self) -> None:
        check_most(self, "model", decoder_depth=_MOST_BLOCKS, decoder_width=_LARGEST_WIDTH)
        side = self.image_size // self.patch_pixels
        tokens, numbers = self.candidate_slots * side**2, 3 * self.tubelet * self.patch_pixels**2
        check(tokens <= LARGEST_TOKENS, "model.image_size", f"makes {tokens} tokens; at most {LARGEST_TOKENS}")
        check(
            numbers <= LARGEST_TOKEN_NUMBERS,
            "model.patch",
            f"makes tokens of {numbers} numbers; at most {LARGEST_TOKEN_NUMBERS}",
        )

    def _check_ratios(self) -> None:
        for key in ("keep_ratio", "visible_ratio"):
            ratio = getattr(self, key)
            check(0 < ratio <= 1, f"model.{key}", f"must be in (0, 1], got {ratio}")
        self._check_selection()

    def _check_selection(self) -> None:
        if self.resolved_selector not in IMPORTANCE_SELECTORS:
            check(
                self.frame_selection.alpha == 1,
                "model.frame_selection.alpha",
                f"frames are chosen by the tokens that ReRo keeps in them; not with {self.resolved_selector} selection",
            )
            return
        check(
            self.keep_ratio > self.visible_ratio,
            "model.keep_ratio",
            f"{self.keep_ratio} must be above model.visible_ratio = {self.visible_ratio}: the kept tokens "
            "that are not visible are what is reconstructed",
        )
        check(self.slots >= 2, "model.frames", "ReRo compares a slot with the one before: at least 2 slots")
        alpha = self.frame_selection.alpha
        check(
            alpha == 1 or self.candidate_slots > self.slots,
            "model.frame_selection.alpha",
            f"{alpha} x {self.slots} slots leaves none to choose from; at least {1 + 1 / self.slots:g}",
        )

    @property
    def row(self) -> Size:
        """The size's row in :data:`everest_ds.config.sizes.SIZES`."""
        return SIZES[self.size]

    @property
    def slots(self) -> int:
        """Tubelets in time per clip (the paper's tau)."""
        return self.frames // self.tubelet

    @property
    def candidate_slots(self) -> int:
        """Slots read per clip, of which frame selection takes :attr:`slots` (paper, 4.2: alpha * tau)."""
        return round(self.frame_selection.alpha * self.slots)

    @property
    def candidate_frames(self) -> int:
        """Frames read per clip: what the model is given."""
        return self.candidate_slots * self.tubelet

    @property
    def patch_pixels(self) -> int:
        """Token height and width, resolved (never null)."""
        return self.row.patch if self.patch is None else self.patch

    @property
    def resolved_selector(self) -> str:
        """The selector in use, ``auto`` resolved by the method."""
        return {"everest": "rero", "videomae": "tube"}[self.method] if self.selector == "auto" else self.selector


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which videos, which frames of them, and how they become clips."""

    train: str | None = setting(None, "training manifest: one video per line (path, 'path label' or 'path,label')")
    val: str | None = setting(None, "validation manifest")
    test: str | None = setting(None, "test manifest")
    root: str | None = setting(None, "folder that relative paths in a manifest start from; null: the manifest's own")
    sampling: Sampling = setting(
        "dense", "dense: every stride-th frame; segments: one frame from each of as many equal parts (TSN)"
    )
    stride: int = setting(
        4, "dense sampling: video frames from one frame of a clip to the next", source="paper, Table 7"
    )
    workers: int = setting(4, "decoding processes per rank; 0 decodes in the training process")
    prefetch: int = setting(
        4,
        f"batches each worker prepares ahead, at most: fewer, but one, where a rank's would take more than "
        f"{AHEAD_BYTES // 2**30} GiB",
        source="torch default is 2",
    )
    clips_per_video: int = setting(1, "clips read from one opened file", source="repeated augmentation")
    decoder: Decoder = setting("decord", "frame reader: decord, or torchcodec (an extra; exact seek)")
    flip: bool = setting(True, "mirror half of the clips; off where left and right matter", source="paper, Table 7")
    crop: Crop = setting("multiscale", "random crop: multiscale or resized (RandomResizedCrop)", source="VideoMAE")
    crop_scales: tuple[float, ...] = setting(
        (1.0, 0.875, 0.75, 0.66), "MultiScaleCrop: crop sides as shares of the short side", source="VideoMAE"
    )
    crop_area: tuple[float, float] = setting(
        (0.08, 1.0), "RandomResizedCrop: smallest and largest share of the frame", source="VideoMAE"
    )
    max_bad_share: float = setting(0.1, "share of unreadable videos above which the run ends, judged from 20 videos on")
    timeout_s: float = setting(
        120.0, "seconds that reading one video may take before it is set aside as hanging; 0: no limit; needs workers"
    )

    def __post_init__(self) -> None:
        for key in ("stride", "prefetch", "clips_per_video"):
            check(getattr(self, key) > 0, f"data.{key}", f"must be positive, got {getattr(self, key)}")
        check(self.workers >= 0, "data.workers", f"must not be negative, got {self.workers}")
        check(self.timeout_s >= 0, "data.timeout_s", f"must not be negative, got {self.timeout_s}")
        check_most(
            self, "data", workers=_MOST_WORKERS, prefetch=_MANY, clips_per_video=_MANY, timeout_s=_LONGEST_WAIT_S
        )
        check(0 <= self.max_bad_share <= 1, "data.max_bad_share", f"must be in [0, 1], got {self.max_bad_share}")
        check(len(self.crop_scales) > 0, "data.crop_scales", "needs at least one scale")
        for scale in self.crop_scales:
            check(0 < scale <= 1, "data.crop_scales", f"scales must be in (0, 1], got {scale}")
        low, high = self.crop_area
        check(0 < low <= high <= 1, "data.crop_area", f"must be ascending in (0, 1], got {low}, {high}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule; another optimizer type, offload and clipping are the DeepSpeed JSON's to say."""

    base_lr: float = setting(1.5e-4, "learning rate per 256 clips of global batch", source="paper, Table 7")
    min_lr: float = setting(1e-5, "final learning rate per 256 clips of global batch", source="VideoMAE")
    warmup_lr: float = setting(1e-6, "first learning rate per 256 clips of global batch", source="VideoMAE")
    warmup_epochs: float = setting(40.0, "epochs of linear warm-up", source="paper, Table 7")
    warmup_steps: int | None = setting(None, "steps of linear warm-up; overrides warmup_epochs", source="VideoMAE")
    weight_decay: float = setting(0.05, "AdamW weight decay of matrices; vectors have none", source="paper, Table 7")
    betas: tuple[float, float] = setting((0.9, 0.95), "Adam's averaging factors", source="paper, Table 7")
    eps: float = setting(1e-8, "Adam's epsilon", source="VideoMAE")
    implementation: AdamChoice = setting(
        "auto", "which AdamW: DeepSpeed's fused, NVIDIA apex's, torch's fused; auto: the first that works here"
    )
    layer_decay: float = setting(1.0, "learning-rate factor per layer from the top; 1: none", source="paper, Table 8")

    def __post_init__(self) -> None:
        for key in ("base_lr", "eps", "layer_decay"):
            check(getattr(self, key) > 0, f"optim.{key}", f"must be positive, got {getattr(self, key)}")
        for key in ("min_lr", "warmup_lr", "warmup_epochs", "warmup_steps", "weight_decay"):
            check((getattr(self, key) or 0) >= 0, f"optim.{key}", f"must not be negative, got {getattr(self, key)}")
        check(all(0 <= b < 1 for b in self.betas), "optim.betas", f"must be in [0, 1), got {self.betas}")
        check(self.layer_decay <= 1, "optim.layer_decay", f"must be at most 1, got {self.layer_decay}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batches, and what is written when."""

    output_dir: str = setting("outputs/pretrain", "run directory: configuration, metrics, checkpoints")
    micro_batch: MicroBatch = setting(
        None,
        "clips per rank per pass; null: global_batch / ranks; auto: the largest part of that which memprof says fits",
    )
    global_batch: int | None = setting(None, "clips per optimizer step over all ranks; null: micro_batch x ranks")
    capacity: str | None = setting(
        None,
        "memory of a device that the run may fill: 80GiB, 80GB or a GPU such as A100-80; null: what is free "
        "there less 5 %",
    )
    peak_flops: float | None = setting(
        None,
        "dense FLOP/s of a rank's device in the run's precision, of which MFU is the share (989.5e12); null: the GPU's "
        "data sheet's, if it is known here",
    )
    epochs: int = setting(200, "passes over the manifest", source="paper, Table 7")
    max_steps: int | None = setting(None, "optimizer steps; overrides epochs (the schedule then spans these)")
    save_every_steps: int = setting(0, "steps between checkpoints; 0: at the end only")
    keep_last: int = setting(3, "newest checkpoints to keep; 0: all")
    keep_every_steps: int = setting(0, "keep the checkpoint of every such step, too; 0: none")
    on_save_error: OnSaveError = setting(
        "continue", "when a checkpoint can't be written (a full disk): continue to the next one, or stop"
    )
    log_every_steps: int = setting(10, "steps between lines of metrics.jsonl")
    seed: int = setting(0, "seed of weights, samples, crops and masks")
    compile: bool = setting(
        False, "torch.compile through DeepSpeed: faster steps after minutes of compiling; memprof plans without it"
    )
    resume: str = setting("off", "off, auto (the latest checkpoint in output_dir, if any), or a run directory")
    max_bad_steps: int = setting(10, "steps in a row skipped for a non-finite loss or gradient, then the run stops")
    max_minutes: float = setting(0.0, "minutes after which the run saves and exits with code 75; 0: no limit")

    def __post_init__(self) -> None:
        positive = (
            "micro_batch",
            "global_batch",
            "peak_flops",
            "epochs",
            "max_steps",
            "log_every_steps",
            "max_bad_steps",
        )
        for key in positive:
            value = getattr(self, key)
            check(value in (None, "auto") or value > 0, f"train.{key}", f"must be positive, got {value}")
        for key in ("save_every_steps", "keep_last", "keep_every_steps", "seed", "max_minutes"):
            check(getattr(self, key) >= 0, f"train.{key}", f"must not be negative, got {getattr(self, key)}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run: what a recipe file holds."""

    model: ModelConfig = section(ModelConfig, "clip, tokens, autoencoder")
    data: DataConfig = section(DataConfig, "videos and clips")
    optim: OptimConfig = section(OptimConfig, "optimizer and schedule")
    train: TrainConfig = section(TrainConfig, "length, batches, outputs")
