"""Settings of fine-tuning and evaluation: those of pre-training with other defaults, and what only a classifier has."""

from __future__ import annotations

from dataclasses import dataclass

from everest_ds.config.schema import (
    IMPORTANCE_SELECTORS,
    LARGEST_CLASSES,
    Crop,
    DataConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    TrainConfig,
    check,
    check_most,
    section,
    setting,
)

_MOST_OPERATIONS = 100
_MOST_VIEWS = 1000


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(ModelConfig):
    """The classifier: the encoder's settings, the share of tokens that enters it, its regularisation and its head."""

    keep_ratio: float = setting(
        0.6, "rho_pre: share of all tokens that enters, the most changing ones; 1: all", source="paper, Table 8"
    )
    drop_path: float = setting(0.1, "stochastic depth: rate of the last block, linear from 0", source="paper, Table 8")
    classes: int | None = setting(None, "classes; null: those of the weights' head, or of the training labels")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.drop_path < 1, "model.drop_path", f"must be in [0, 1), got {self.drop_path}")
        check(self.classes is None or self.classes > 1, "model.classes", f"must be at least 2, got {self.classes}")
        check_most(self, "model", classes=LARGEST_CLASSES)

    def _check_selection(self) -> None:
        check(
            self.resolved_selector in IMPORTANCE_SELECTORS,
            "model.selector",
            f"a classifier ranks tokens without noise: {' or '.join(IMPORTANCE_SELECTORS)}, got {self.selector}",
        )
        check(self.frame_selection.alpha == 1, "model.frame_selection.alpha", "frame selection is for pre-training")
        check(self.keep_ratio == 1 or self.slots >= 2, "model.frames", "ReRo compares slots: at least 2")

    @property
    def resolved_selector(self) -> str:
        """The selector in use; whatever method pre-trained the encoder, ``auto`` is ReRo here."""
        return "rero" if self.selector == "auto" else self.selector


@dataclass(frozen=True, kw_only=True)
class FinetuneDataConfig(DataConfig):
    """As in pre-training, with a stronger crop."""

    crop: Crop = setting("resized", "random crop: resized (RandomResizedCrop) or multiscale", source="VideoMAE")


@dataclass(frozen=True, kw_only=True)
class FinetuneOptimConfig(OptimConfig):
    """As in pre-training, with layer-wise decay."""

    base_lr: float = setting(1e-3, "learning rate per 256 clips of global batch", source="paper, Table 8")
    min_lr: float = setting(1e-6, "final learning rate per 256 clips of global batch", source="VideoMAE")
    warmup_epochs: float = setting(5.0, "epochs of linear warm-up", source="paper, Table 8")
    betas: tuple[float, float] = setting((0.9, 0.999), "Adam's averaging factors", source="paper, Table 8")
    layer_decay: float = setting(0.75, "learning-rate factor per layer from the top; 1: none", source="paper, Table 8")


@dataclass(frozen=True, kw_only=True)
class FinetuneTrainConfig(TrainConfig):
    """As in pre-training, and where the weights come from."""

    output_dir: str = setting("outputs/finetune", "run directory: configuration, metrics, checkpoints")
    epochs: int = setting(35, "passes over the manifest", source="paper, Table 8")
    pretrained: str | None = setting(
        None, "--from: a run directory, a model.safetensors, or an official .pth; null: from scratch"
    )
    new_head: bool = setting(False, "start with a fresh head although the weights bring one of other classes")
    ema_decay: float = setting(0.0, "decay of an averaged copy of the weights, which is then evaluated; 0: none")
    validate_every_epochs: float = setting(1.0, "epochs between validations on data.val; 0: at the end only")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.ema_decay < 1, "train.ema_decay", f"must be in [0, 1), got {self.ema_decay}")
        every = self.validate_every_epochs
        check(every >= 0, "train.validate_every_epochs", f"must not be negative, got {every}")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What is done to training clips and labels besides crop and flip."""

    rand_augment_ops: int = setting(2, "RandAugment operations per clip; 0: none", source="RandAugment")
    rand_augment_magnitude: float = setting(9.0, "RandAugment strength, 0 to 10", source="paper, Table 8")
    rand_augment_std: float = setting(0.5, "standard deviation of the strength", source="paper, Table 8")
    erasing: float = setting(0.25, "probability of erasing a rectangle of a clip", source="VideoMAE")
    mixup: float = setting(0.8, "Beta parameter of MixUp; 0: none", source="VideoMAE")
    cutmix: float = setting(1.0, "Beta parameter of CutMix; 0: none", source="VideoMAE")
    mix_probability: float = setting(1.0, "share of passes that are mixed", source="VideoMAE")
    cutmix_share: float = setting(0.5, "share of CutMix among mixed passes, where both are on", source="VideoMAE")
    label_smoothing: float = setting(0.1, "share of the target spread over all classes", source="paper, Table 8")

    def __post_init__(self) -> None:
        ops = self.rand_augment_ops
        check(
            0 <= ops <= _MOST_OPERATIONS, "augment.rand_augment_ops", f"must be in [0, {_MOST_OPERATIONS}], got {ops}"
        )
        strength = self.rand_augment_magnitude
        check(0 <= strength <= 10, "augment.rand_augment_magnitude", f"must be in [0, 10], got {strength}")
        for key in ("rand_augment_std", "mixup", "cutmix"):
            check(getattr(self, key) >= 0, f"augment.{key}", f"must not be negative, got {getattr(self, key)}")
        for key in ("erasing", "mix_probability", "cutmix_share"):
            check(0 <= getattr(self, key) <= 1, f"augment.{key}", f"must be in [0, 1], got {getattr(self, key)}")
        smoothing = self.label_smoothing
        check(0 <= smoothing < 1, "augment.label_smoothing", f"must be in [0, 1), got {smoothing}")


@dataclass(frozen=True, kw_only=True)
class TestConfig:
    """Multi-view testing: softmax averaged over clips x crops of a video."""

    clips: int = setting(5, "clips per video, spread over its length", source="paper, Table 8")
    crops: int = setting(3, "square crops per clip along the long side: 1 (centre) or more", source="paper, Table 8")
    micro_batch: int = setting(1, "videos per rank per pass, all their views at once")

    def __post_init__(self) -> None:
        for key in ("clips", "crops", "micro_batch"):
            check(getattr(self, key) > 0, f"test.{key}", f"must be positive, got {getattr(self, key)}")
        check_most(self, "test", clips=_MOST_VIEWS, crops=_MOST_VIEWS, micro_batch=_MOST_VIEWS)


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(Recipe):
    """A whole fine-tuning run, and how it is tested."""

    model: ClassifierConfig = section(ClassifierConfig, "clip, tokens, classifier")
    data: FinetuneDataConfig = section(FinetuneDataConfig, "videos and clips")
    optim: FinetuneOptimConfig = section(FinetuneOptimConfig, "optimizer and schedule")
    train: FinetuneTrainConfig = section(FinetuneTrainConfig, "length, batches, weights, outputs")
    augment: AugmentConfig = section(AugmentConfig, "augmentation of clips and labels")
    test: TestConfig = section(TestConfig, "multi-view testing")


# What a run is for, and the kind of recipe that describes it.
PHASES: dict[str, type[Recipe]] = {"pretrain": Recipe, "finetune": FinetuneRecipe}


def phase_of(recipe: Recipe) -> str:
    """Return what a recipe is for, a key of :data:`PHASES`."""
    return next(phase for phase, kind in PHASES.items() if type(recipe) is kind)
