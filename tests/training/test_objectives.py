"""What a pass minimises, against arithmetic written out."""

import pytest
import torch

from everest_ds.config.finetuning import AugmentConfig
from everest_ds.data.loader import Batch
from everest_ds.training.objectives import Classify

CLASSES, SMOOTHING = 4, 0.1


class Classifier:
    """Logits that depend on the clip: class k gets the clip's mean grey level times k, over a hundred."""

    device = torch.device("cpu")

    def __call__(self, clips: torch.Tensor) -> torch.Tensor:
        grey = clips.float().flatten(1).mean(dim=1, keepdim=True)
        return (grey * torch.arange(CLASSES) / 100).bfloat16()


def batch(levels: list[int], labels: list[int]) -> Batch:
    clips = torch.stack([torch.full((3, 2, 4, 4), level, dtype=torch.uint8) for level in levels])
    count = len(levels)
    return Batch(clips, torch.empty(count, 0), torch.tensor(labels), torch.arange(count), [], 0)


def smoothed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> float:
    targets = (1 - SMOOTHING) * targets + SMOOTHING / CLASSES
    return -(targets * logits.double().log_softmax(dim=1)).sum(dim=1).mean().item()


def test_labels_are_smoothed_and_the_loss_is_in_fp32():
    asked = batch([40, 200], [3, 1])
    loss = Classify(AugmentConfig(mixup=0, cutmix=0, label_smoothing=SMOOTHING), CLASSES)(Classifier(), asked)
    assert loss.dtype == torch.float32
    assert loss.untyped_storage().nbytes() == 4  # the loop keeps it to the end of the step
    logits = Classifier()(asked.clips)
    expected = smoothed_cross_entropy(logits, torch.nn.functional.one_hot(asked.labels, CLASSES).double())
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_mixed_clips_meet_their_own_mixed_labels():
    """Two clips, one grey level each: what MixUp made of a clip says how its label is mixed."""
    asked = batch([0, 250], [0, 3])
    seen: list[torch.Tensor] = []

    class Seeing(Classifier):
        def __call__(self, clips: torch.Tensor) -> torch.Tensor:
            seen.append(clips)
            return super().__call__(clips)

    torch.manual_seed(0)
    loss = Classify(AugmentConfig(cutmix=0, label_smoothing=SMOOTHING), CLASSES)(Seeing(), asked)
    share = seen[0].float().flatten(1).mean(dim=1) / 250
    assert 0.05 < share[0] < 0.95
    targets = torch.zeros(2, CLASSES, dtype=torch.float64)
    targets[:, 0], targets[:, 3] = 1 - share, share
    assert loss.item() == pytest.approx(smoothed_cross_entropy(Classifier()(seen[0]), targets), rel=5e-3)
