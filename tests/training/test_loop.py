"""One optimizer step of the loop, with an engine that is pretended."""

from types import SimpleNamespace
from typing import Any
from weakref import ref

import torch

from everest_ds.data.loader import BadSamples, Batch
from everest_ds.training.loop import optimizer_step
from everest_ds.training.window import Window

PASSES = 4


def batches() -> Any:
    for number in range(PASSES):
        yield Batch(torch.full((2, 3), number), torch.rand(2, 1), torch.zeros(2), torch.tensor([number] * 2), [], 0)


class Loader:
    """Counts, at every ``prefetch``, the clips that are still held."""

    def __init__(self) -> None:
        self.batches = batches()
        self.given: list[Any] = []
        self.held: list[int] = []

    def __next__(self) -> Batch:
        batch = next(self.batches)
        self.given.append(ref(batch.clips))
        return batch

    def prefetch(self) -> None:
        self.held.append(sum(clips() is not None for clips in self.given))


def test_passes_hold_the_clips_of_one_batch_and_judge_the_videos_of_all() -> None:
    judged: list[Any] = []
    engine = SimpleNamespace(
        optimizer=SimpleNamespace(param_groups=[]),
        backward=lambda loss: None,
        step=lambda: None,
        was_step_applied=lambda: True,
    )
    loader = Loader()
    run: Any = SimpleNamespace(
        engine=engine,
        loader=loader,
        step=6,
        config=SimpleNamespace(seed=0),
        schedule=lambda step: 0.1,
        batches=SimpleNamespace(accumulation=PASSES),
        objective=lambda engine, batch: batch.clips.double().mean(),
        bad_samples=BadSamples(0.1),
        bad_steps=SimpleNamespace(judge=lambda *what: judged.extend(what)),
    )
    assert optimizer_step(run, Window(torch.device("cpu"))) == 1.5
    assert loader.held == [1] * PASSES
    step, applied, losses, videos = judged
    assert (step, applied) == (7, True)
    assert losses == [0, 1, 2, 3]
    assert [index.tolist() for index in videos] == [[number] * 2 for number in range(PASSES)]
    assert run.bad_samples.counts.tried == 2 * PASSES
