"""The ruler itself: what counts as memory and what doesn't."""

import torch

from everest_ds.memory.meters import Leftover, StorageMeter, states_bytes
from everest_ds.memory.storages import held_bytes

KIB = 1024
CPU = torch.device("cpu")


def new(kib: int) -> torch.Tensor:
    return torch.zeros(kib * KIB, dtype=torch.uint8)


def test_views_and_parameters_are_not_new_memory():
    weight = torch.nn.Parameter(torch.zeros(64 * KIB))
    with StorageMeter() as meter:
        views = [weight[:10], weight.view(64, -1).t(), weight.detach(), weight.data.narrow(0, 5, 5)]
    assert len(views) == 4
    assert meter.peak_bytes == meter.before_bytes


def test_a_peak_that_has_passed_is_remembered():
    with StorageMeter() as meter:
        kept = new(100)
        gone = new(1000)
        del gone
        after = new(200)
    assert meter.peak_bytes - meter.before_bytes == 1100 * KIB
    assert meter.current_bytes - meter.before_bytes == kept.numel() + after.numel()


def test_what_autograd_saves_counts_until_the_backward_pass_frees_it():
    leaf = torch.ones(100 * KIB, requires_grad=True)
    with StorageMeter() as meter:
        loss = leaf.exp().sum()
        saved = meter.current_bytes - meter.before_bytes
        loss.backward()
    assert saved == 4 * 100 * KIB + 4
    assert meter.current_bytes - meter.before_bytes == 4 * 100 * KIB + 4  # the gradient instead


def test_tensors_without_memory_do_not_count():
    before = held_bytes()
    with StorageMeter() as meter:
        ghost = torch.zeros(10**9, device="meta")
    assert ghost.device.type == "meta"
    assert meter.peak_bytes == meter.before_bytes
    assert held_bytes() - before < KIB


def test_held_bytes_counts_a_shared_storage_once():
    before = held_bytes()
    kept = new(512)
    views = [kept[:1], kept[5:]]
    assert len(views) == 2
    assert held_bytes() - before == 512 * KIB


def test_what_was_there_before_counts_while_it_is_left():
    """Weights that were read before the model was built go once they are in it."""
    stays, goes = torch.zeros(1000), torch.zeros(500)
    before = Leftover(CPU)
    view, later = stays[:10], torch.zeros(250)
    held = states_bytes(CPU)
    assert held - before.still_bytes() == later.nbytes
    still = before.still_bytes()
    del goes, stays
    assert still - before.still_bytes() == 500 * 4  # the view keeps the other storage
    assert states_bytes(CPU) - before.still_bytes() == later.nbytes
    assert view.numel() == 10
