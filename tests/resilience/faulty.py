"""A training command with faults put in: ``faulty.py RANK STEPS WHAT run/pretrain.py ...``.

At the steps (from 1, such as ``3,4``) on the rank, WHAT: ``loss`` makes the loss not a number, ``gradient`` makes it
finite with an infinite gradient.
"""

import runpy
import sys

import torch

from everest_ds.training import loop, ranks
from everest_ds.training.objectives import Reconstruct

rank, steps, what = int(sys.argv[1]), [int(step) for step in sys.argv[2].split(",")], sys.argv[3]
sys.argv = sys.argv[4:]
count = 0
whole = loop.optimizer_step
right = Reconstruct.__call__


class Steep(torch.autograd.Function):
    """The identity, with an infinite slope."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


def counted(run, window):
    global count  # noqa: PLW0603
    count = run.step + 1
    return whole(run, window)


def wrong(self, engine, batch):
    loss = right(self, engine, batch)
    if count in steps and ranks.rank() == rank:
        return loss * torch.nan if what == "loss" else Steep.apply(loss)
    return loss


loop.optimizer_step, Reconstruct.__call__ = counted, wrong
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    loop.optimizer_step, Reconstruct.__call__ = whole, right
