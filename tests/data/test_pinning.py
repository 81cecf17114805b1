"""Batches that can't be pinned: torch's own loader and thread; the accelerator and the pinning are pretended."""

from __future__ import annotations

import threading
import time
import traceback
from typing import Any

import psutil
import pytest
import torch

from everest_ds.config.errors import RankError
from everest_ds.config.schema import DataConfig
from everest_ds.data.dataset import ClipDataset
from everest_ds.data.loader import Batch, StepSampler, build_loader
from everest_ds.data.manifest import Entry
from everest_ds.data.watch import Batches


class Killing(BaseException):
    """Goes through the thread's ``except Exception``, as an error in receiving a batch goes past it."""


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Let torch's loader, of any version, believe in an accelerator."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self)
    for module, name, value in (
        (torch.accelerator, "is_available", True),
        (torch.accelerator, "current_accelerator", torch.device("cuda")),
        (torch.accelerator, "current_device_index", 0),
        (torch.accelerator, "set_device_index", None),
        (torch.cuda, "is_available", True),
        (torch.cuda, "current_device", 0),
    ):
        monkeypatch.setattr(module, name, lambda *_, value=value: value, raising=False)
    # Python 3.11 mixes up two threads that parse lines for their traces ("AST constructor recursion depth mismatch").
    monkeypatch.setattr(traceback, "_extract_caret_anchors_from_line_segment", lambda *_: None, raising=False)
    return monkeypatch


def load(videos: list[Entry], **data: Any) -> Batches:
    config = DataConfig(workers=2, stride=2, prefetch=1, **data)
    dataset = ClipDataset(videos, config, frames=8, image_size=32, tokens=16, seed=3)
    return iter(build_loader(dataset, StepSampler(12, seed=3, micro_batch=4, last_step=9), device="cuda"))


def failing(error: BaseException) -> Any:
    def pin_memory(*_: Any) -> Any:
        raise type(error)(*error.args)

    return pin_memory


def thread_of_pinning() -> threading.Thread:
    (thread,) = (thread for thread in threading.enumerate() if "_pin_memory_loop" in thread.name)
    return thread


def test_pinned_batches_arrive(videos: list[Entry], pretended: pytest.MonkeyPatch) -> None:
    batches = load(videos)
    first = next(batches)
    assert isinstance(first, Batch)
    assert thread_of_pinning().is_alive()
    assert len([first, *batches]) == 9


def test_a_thread_that_ends_ends_the_run_at_once_and_says_why(
    videos: list[Entry], pretended: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    batches = load(videos)
    next(batches)
    pretended.setattr(torch.Tensor, "pin_memory", failing(Killing("too many open files")))
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        list(batches)
    assert time.monotonic() - start < 10  # data.timeout_s is 120
    assert str(caught.value) == (
        "data.prefetch: batches can't be put into pinned memory any more (Killing: too many open files); lower it, "
        "data.workers or train.micro_batch, or raise the limit (ulimit -n, ulimit -l)"
    )
    assert "Traceback" not in capfd.readouterr().err


def test_memory_that_can_not_be_pinned_is_one_line(videos: list[Entry], pretended: pytest.MonkeyPatch) -> None:
    text = "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"
    pretended.setattr(torch.Tensor, "pin_memory", failing(RuntimeError(text)))
    with pytest.raises(RankError, match=r"pinned memory any more \(RuntimeError: CUDA error: out of memory\); lower"):
        next(load(videos))


def test_other_errors_in_the_thread_keep_their_trace(videos: list[Entry], pretended: pytest.MonkeyPatch) -> None:
    text = "CUDA error: an illegal memory access was encountered"
    pretended.setattr(torch.Tensor, "pin_memory", failing(RuntimeError(text)))
    with pytest.raises(RuntimeError, match=f"in pin memory thread for device 0(.|\n)*Traceback(.|\n)*{text}"):
        next(load(videos))


def test_a_thread_that_ends_with_a_worker_is_replaced_with_it(
    videos: list[Entry], pretended: pytest.MonkeyPatch
) -> None:
    """It may meet a killed worker's closed connection before anyone knows that the worker is dead."""

    def connection_lost(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        pretended.setattr(torch.Tensor, "pin_memory", lambda self, *_: self)
        threading.Timer(0.3, kill_workers).start()
        raise Killing("connection reset")

    batches = load(videos)
    found = [next(batches)]
    pretended.setattr(torch.Tensor, "pin_memory", connection_lost)
    while len(found) < 9:
        if (batch := batches.poll()) is not None:
            found.append(batch)
    with pytest.raises(StopIteration):
        batches.poll()


def kill_workers() -> None:
    for child in psutil.Process().children():
        if child.name().startswith("pt_data_worker"):
            child.kill()


def test_ends_of_other_threads_are_told_as_before(
    videos: list[Entry], pretended: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    next(load(videos))
    error = ValueError("mine")
    thread = threading.Thread(target=failing(error))
    thread.start()
    thread.join()
    assert [end.exc_value.args for end in told] == [error.args]
