from __future__ import annotations

import logging
import pickle
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory
from video_files import moving_frames, write_video

from everest_ds.config.errors import UserError
from everest_ds.config.schema import DataConfig
from everest_ds.data import dataset as dataset_module
from everest_ds.data.dataset import ClipDataset, Failure, Key, Sample
from everest_ds.data.loader import (
    BadCounts,
    BadSamples,
    Batch,
    ClipLoader,
    StepSampler,
    build_loader,
    collate,
    epoch_order,
    evaluation_batches,
)
from everest_ds.data.manifest import Entry


def make(entries: list[Entry], workers: int = 0, clips_per_video: int = 1, **data: Any) -> ClipDataset:
    config = DataConfig(workers=workers, clips_per_video=clips_per_video, **{"stride": 2, "prefetch": 2, **data})
    return ClipDataset(entries, config, frames=8, image_size=32, tokens=64, seed=3)


def take(loader: ClipLoader, count: int) -> list[Batch]:
    return [batch for batch, _ in zip(loader, range(count), strict=False)]


def assert_same(a: Iterable[Batch], b: Iterable[Batch]) -> None:
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one.clips, other.clips)
        assert torch.equal(one.noise, other.noise)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.index, other.index)
        assert (one.bad, one.lost) == (other.bad, other.lost)


def keys(count: int, videos: int = 50, **settings: Any) -> list[list[Key]]:
    sampler = StepSampler(videos, **{"seed": 5, "micro_batch": 4, **settings})
    return [batch for batch, _ in zip(sampler, range(count), strict=False)]


class TestStepSampler:
    def test_an_epoch_takes_each_video_at_most_once_in_its_own_order(self) -> None:
        sampler = StepSampler(50, seed=5, micro_batch=4)
        assert sampler.steps_per_epoch == 12
        batches = keys(24)
        for epoch in (0, 1):
            mine = [key for batch in batches[12 * epoch : 12 * epoch + 12] for key in batch]
            assert {e for e, _ in mine} == {epoch}
            assert [video for _, video in mine] == epoch_order(50, 5, epoch)[:48].tolist()
            assert len(set(mine)) == 48
        assert epoch_order(50, 5, 0).tolist() != epoch_order(50, 5, 1).tolist() != list(range(50))
        assert epoch_order(50, 5, 0).tolist() != epoch_order(50, 6, 0).tolist()
        assert sorted(epoch_order(50, 5, 7)) == list(range(50))

    @pytest.mark.parametrize("ranks", [1, 2, 3, 6])
    def test_a_steps_samples_are_the_same_for_any_split(self, ranks: int) -> None:
        passes = 6 // ranks
        whole = keys(4, micro_batch=24)  # four steps of 24, one rank, one pass
        by_rank = [keys(4 * passes, ranks=ranks, rank=r, accumulation=passes) for r in range(ranks)]
        for step, expected in enumerate(whole):
            turns = range(step * passes, (step + 1) * passes)
            found = [key for turn in turns for rank in range(ranks) for key in by_rank[rank][turn]]
            assert found == expected

    def test_two_passes_of_one_rank_are_two_ranks(self) -> None:
        alone = keys(24, accumulation=2)
        first, second = (keys(12, ranks=2, rank=rank) for rank in (0, 1))
        assert alone[0::2] == first
        assert alone[1::2] == second

    @pytest.mark.parametrize("step", [0, 1, 5, 6, 7, 20])
    def test_resuming_continues_where_it_stopped(self, step: int) -> None:
        shape = {"accumulation": 2, "ranks": 2, "rank": 1, "micro_batch": 4}
        assert keys(10, first_step=step, **shape) == keys(2 * step + 10, **shape)[2 * step :]

    def test_bounded(self) -> None:
        sampler = StepSampler(50, seed=5, micro_batch=4, accumulation=3, first_step=2, last_step=7)
        batches = list(sampler)
        assert len(batches) == 15
        assert batches == list(sampler)
        assert list(StepSampler(50, seed=5, micro_batch=4, first_step=7, last_step=7)) == []

    def test_views_of_a_video_share_a_micro_batch(self) -> None:
        sampler = StepSampler(50, seed=5, micro_batch=4, clips_per_video=2)
        assert sampler.steps_per_epoch == 25
        assert all(len(batch) == 2 for batch in keys(10, clips_per_video=2))

    def test_too_few_videos(self) -> None:
        StepSampler(8, seed=0, micro_batch=4, clips_per_video=2, ranks=2, accumulation=2)
        with pytest.raises(UserError) as caught:
            StepSampler(7, seed=0, micro_batch=4, clips_per_video=2, ranks=2, accumulation=2, key="data.val")
        assert str(caught.value) == (
            "data.val: 7 videos are fewer than the 8 that one step of 16 clips takes; "
            "lower the global batch (train.global_batch, or train.micro_batch x ranks) to 14 or less, or list more "
            "videos"
        )

    def test_views_that_do_not_fit(self) -> None:
        with pytest.raises(UserError, match=r"^train.micro_batch: 5 clips do not divide .* data.clips_per_video = 2"):
            StepSampler(50, seed=0, micro_batch=5, clips_per_video=2)


@pytest.mark.parametrize(("videos", "batch", "ranks"), [(10, 3, 1), (10, 3, 2), (11, 3, 2), (3, 4, 2), (1, 2, 3)])
def test_evaluation_takes_every_video_and_keeps_ranks_in_step(videos: int, batch: int, ranks: int) -> None:
    by_rank = [evaluation_batches(videos, batch=batch, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert len({tuple(map(len, batches)) for batches in by_rank}) == 1
    assert all(1 <= len(keys) <= batch for batches in by_rank for keys in batches)
    taken = [key for batches in by_rank for keys in batches for key in keys]
    assert set(taken) == {(0, video) for video in range(videos)}
    assert len(taken) - videos < ranks


def test_collate() -> None:
    def sample(index: int, *bad: Failure) -> Sample:
        return Sample(
            torch.full((2, 3, 4, 8, 8), abs(index), dtype=torch.uint8), torch.rand(2, 5), index, index, [*bad]
        )

    bad = [Failure(f"{i}.mp4", "gone") for i in range(3)]
    batch = collate([sample(4), sample(7, bad[0]), sample(-1, bad[1], bad[2])])
    assert batch.clips.shape == (6, 3, 4, 8, 8)
    assert batch.clips.dtype == torch.uint8
    assert batch.clips[:, 0, 0, 0, 0].tolist() == [4, 4, 7, 7, 1, 1]
    assert batch.noise.shape == (6, 5)
    assert batch.index.tolist() == batch.labels.tolist() == [4, 4, 7, 7, -1, -1]
    assert batch.index.dtype == batch.labels.dtype == torch.int64
    assert batch.bad == bad
    assert batch.lost == 1
    assert_same([pickle.loads(pickle.dumps(batch))], [batch])


def test_pinning_keeps_the_shape_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: pinned.append(self) or self)
    sample = Sample(torch.zeros(1, 3, 2, 4, 4, dtype=torch.uint8), torch.rand(1, 5), 1, 1, [Failure("a.mp4", "gone")])
    batch = pin_memory(collate([sample]))
    assert isinstance(batch, Batch)
    assert batch.bad == [Failure("a.mp4", "gone")]
    assert isinstance(batch.bad[0], Failure)
    assert len(pinned) == 4


def test_memory_is_pinned_for_accelerators_only(videos: list[Entry]) -> None:
    batches = evaluation_batches(4, batch=2)
    assert build_loader(make(videos), batches)._start(batches).pin_memory is False
    assert build_loader(make(videos), batches, device="cuda")._start(batches).pin_memory is True


class TestLoading:
    def test_workers_change_nothing(self, videos: list[Entry]) -> None:
        entries = [*videos, Entry("/nowhere/a.mp4", 0), Entry("/nowhere/b.mp4", 0)]
        sampler = StepSampler(len(entries), seed=3, micro_batch=4, clips_per_video=2, accumulation=2)
        settings = [{"workers": 0}, {"workers": 1, "prefetch": 4}, {"workers": 2}]
        alone, one, two = (
            take(build_loader(make(entries, clips_per_video=2, **setting), sampler), 10) for setting in settings
        )
        assert len(alone) == 10
        assert sum(len(batch.bad) for batch in alone) > 0
        assert_same(alone, one)
        assert_same(alone, two)

    def test_ranks_passes_and_resuming_change_nothing(self, videos: list[Entry]) -> None:
        def load(count: int, **split: int) -> list[Batch]:
            return take(build_loader(make(videos), StepSampler(12, seed=3, micro_batch=3, **split)), count)

        alone = load(8, accumulation=2)  # two steps an epoch
        first, second = (load(4, ranks=2, rank=rank) for rank in (0, 1))
        assert_same(alone[0::2], first)
        assert_same(alone[1::2], second)
        assert_same(alone[6:], load(2, accumulation=2, first_step=3))

    def test_batches(self, videos: list[Entry]) -> None:
        sampler = StepSampler(12, seed=3, micro_batch=4, last_step=5)
        batches = list(build_loader(make(videos), sampler))
        assert len(batches) == 5
        assert all(batch.clips.shape == (4, 3, 8, 32, 32) for batch in batches)
        assert all(batch.noise.shape == (4, 64) for batch in batches)
        assert [[(i // 3, v) for v in b.index.tolist()] for i, b in enumerate(batches)] == list(sampler)
        assert all(torch.equal(batch.labels, batch.index) for batch in batches)

    def test_the_global_generators_are_left_alone(self, videos: list[Entry]) -> None:
        torch.manual_seed(0)
        before = torch.get_rng_state()
        take(build_loader(make(videos), evaluation_batches(12, batch=4)), 3)
        assert torch.equal(torch.get_rng_state(), before)

    def test_workers_use_one_thread_and_ignore_requests_to_stop(
        self, videos: list[Entry], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def spying(path: str, *rest: Any) -> Any:
            numbers = (signal.SIGINT, signal.SIGTERM)
            ignored = all(signal.getsignal(number) is signal.SIG_IGN for number in numbers)
            raise dataset_module.DecodeError(path, f"{torch.get_num_threads()} {ignored}")

        monkeypatch.setattr(dataset_module, "decode", spying)
        (batch,) = take(build_loader(make(videos, workers=1), [[(0, 0)]]), 1)
        assert {failure.reason for failure in batch.bad} == {"1 True"}

    @pytest.mark.parametrize("workers", [0, 1])
    def test_bugs_keep_their_trace(self, videos: list[Entry], monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
        def broken(*_: Any) -> Any:
            raise RuntimeError("a bug")

        monkeypatch.setattr(dataset_module, "decode", broken)
        with pytest.raises(RuntimeError, match="a bug"):
            take(build_loader(make(videos, workers=workers), [[(0, 7)]]), 1)


class TestEvaluation:
    def load(self, entries: list[Entry], workers: int = 0, **views: int) -> list[Batch]:
        data = DataConfig(workers=workers, stride=2, prefetch=2)
        dataset = ClipDataset.for_evaluation(entries, data, frames=8, image_size=32, **views)
        return list(build_loader(dataset, evaluation_batches(len(entries), batch=5)))

    def test_all_views_of_a_video_are_in_one_batch(self, videos: list[Entry]) -> None:
        batches = self.load(videos, clips=2, crops=3)
        assert [len(batch.clips) for batch in batches] == [30, 30, 12]
        assert [batch.noise.shape for batch in batches] == [(30, 0), (30, 0), (12, 0)]
        found = torch.cat([batch.index for batch in batches])
        assert found.tolist() == [video for video in range(12) for _ in range(6)]
        assert torch.equal(torch.cat([batch.labels for batch in batches]), found)

    def test_workers_change_nothing(self, videos: list[Entry]) -> None:
        assert_same(self.load(videos, clips=2), self.load(videos, workers=2, clips=2))

    def test_unreadable_videos_count_once_whatever_the_views(self, videos: list[Entry]) -> None:
        entries = [*videos[:7], Entry("/nowhere.mp4", 3), *videos[7:]]
        counted = BadSamples(max_share=0.1, clips_per_video=6, lost_ends=False, key="data.test")
        for batch in self.load(entries, clips=2, crops=3):
            counted.add(batch)
            counted.check()
        assert counted.counts == BadCounts(tried=13, bad=1, lost=1)


class TestBadFiles:
    def test_bad_files_among_good_ones(self, videos: list[Entry], bad_files: dict[str, Path], tmp_path: Path) -> None:
        one = write_video(tmp_path / "one.mp4", moving_frames(1))
        entries = [*videos, *(Entry(str(path), 99) for path in bad_files.values()), Entry(str(one), 50)]
        dataset = make(entries, workers=2)
        sampler = StepSampler(len(entries), seed=3, micro_batch=5, last_step=4)
        counted = BadSamples(max_share=0.5)
        for batch in build_loader(dataset, sampler):
            counted.add(batch)
            counted.check()
            assert batch.lost == 0
            readable = [*range(12), 19]
            assert set(batch.index.tolist()) <= set(readable)
            assert set(batch.labels.tolist()) <= {*range(12), 50}
        assert set(counted.reasons) == {str(path) for path in bad_files.values()}
        assert counted.counts.bad >= 7
        assert counted.counts.tried == 20 + counted.counts.bad

    def test_nothing_but_bad_files(self, tmp_path: Path) -> None:
        entries = [Entry(str(tmp_path / f"{i}.mp4"), i) for i in range(40)]
        counted = BadSamples(max_share=1.0)
        (batch,) = take(build_loader(make(entries, workers=1), StepSampler(40, seed=0, micro_batch=4)), 1)
        counted.add(batch)
        with pytest.raises(UserError) as caught:
            counted.check()
        message = str(caught.value)
        assert message.startswith("data.train: no readable video was found for 4 sample(s), after ")
        assert message.count("(no such file or directory)") == 10
        assert f"... and {len(counted.reasons) - 10} more" in message

    def batch(self, good: int, bad: list[str], lost: int = 0, views: int = 1) -> Batch:
        index = torch.cat([torch.arange(good), torch.full((lost,), -1)]).repeat_interleave(views)
        clips = torch.zeros(len(index), 3, 2, 4, 4, dtype=torch.uint8)
        return Batch(clips, torch.zeros(len(index), 5), index, index, [Failure(p, "torn") for p in bad], lost)

    def test_the_share_is_judged_from_twenty_videos_on(self) -> None:
        counted = BadSamples(max_share=0.1)
        counted.add(self.batch(good=8, bad=["a", "b", "c"]))
        counted.check()  # 3 of 11: too early
        counted.add(self.batch(good=8, bad=[]))
        counted.check()  # 3 of 19
        counted.add(self.batch(good=1, bad=[]))
        with pytest.raises(UserError) as caught:
            counted.check()
        assert str(caught.value) == (
            "data.train: 3 of 20 videos tried are unreadable, above data.max_bad_share = 0.1: "
            "a (torn), b (torn), c (torn); repair them or take them out of the manifest"
        )
        counted.add(self.batch(good=10, bad=[]))
        counted.check()  # 3 of 30 is not above a tenth

    def test_zero_share_and_full_share(self) -> None:
        strict, lenient = BadSamples(max_share=0.0), BadSamples(max_share=1.0)
        strict.add(self.batch(good=30, bad=[]))
        strict.check()
        for counted in (strict, lenient):
            counted.add(self.batch(good=1, bad=["a"] * 50))
        lenient.check()
        with pytest.raises(UserError):
            strict.check()

    def test_views_count_once(self) -> None:
        counted = BadSamples(max_share=0.1, clips_per_video=4)
        counted.add(self.batch(good=3, bad=["a"], lost=1, views=4))
        assert counted.counts == BadCounts(tried=4, bad=1, lost=1)

    def test_evaluation_tolerates_lost_samples(self) -> None:
        counted = BadSamples(max_share=0.1, lost_ends=False)
        counted.add(self.batch(good=30, bad=["a"], lost=1))
        counted.check()

    def test_ranks_can_decide_together(self) -> None:
        counted = BadSamples(max_share=0.1)
        counted.add(self.batch(good=30, bad=[]))
        counted.check()
        with pytest.raises(UserError, match=r"9 of 60 videos tried are unreadable.*: see the other ranks' logs"):
            counted.check(BadCounts(tried=60, bad=9, lost=0))

    def test_each_file_is_logged_once(self, caplog: pytest.LogCaptureFixture) -> None:
        counted = BadSamples(max_share=1.0)
        with caplog.at_level(logging.WARNING):
            counted.add(self.batch(good=1, bad=["a", "b", "a"]))
            counted.add(self.batch(good=1, bad=["b", "c"]))
            counted.name()
            counted.name({})
        assert [record.getMessage() for record in caplog.records] == [
            f"unreadable video {path}: torn" for path in "abc"
        ]
        assert counted.counts.bad == 5
