"""What a process holds outside tensors, and what attention keeps: numbers for the planner, by card."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from everest_ds.gpu_check.cases import Asked, Case, NotHereError, Values
from everest_ds.gpu_check.settings import Setting
from everest_ds.memory.meters import StorageMeter
from everest_ds.training import ranks
from everest_ds.training.measure import Run

PRODUCTS, PROCESS = "first products", "memory of a process"
ATTENTION = "attention"
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_SIDE = 1024
_SMALL, _STEPS = Setting(name="small", size="vit_small", clips=8), 2
_ELEMENTS = 2**20
# Visible and kept tokens of EVEREST, and all of them; the widths of a head of ViT-S to L, of ViT-H and of ViT-g.
_TOKENS, _HEAD_WIDTHS = (156, 470, 1568), (64, 80, 88)
_CLIPS, _HEADS = 8, 12


def cases(asked: Asked) -> Iterator[Case]:
    """The driver's part first: a process has one first time."""
    yield Case(name=PRODUCTS, run=partial(_products, asked))
    yield Case(name="first collective", run=partial(_first_collective, asked))
    yield Case(name=PROCESS, run=partial(_process, asked))
    for precision, tokens, width in itertools.product(_DTYPES, _TOKENS, _HEAD_WIDTHS):
        if not asked.tiny or tokens == _TOKENS[0]:
            name = f"{ATTENTION} {precision}, {tokens} tokens, heads of {width}"
            yield Case(name=name, run=partial(_attention, asked.device, _DTYPES[precision], tokens, width))


def _products(asked: Asked) -> Values:
    """Bytes outside the allocator, and those of workspaces in it, after each thing that is done for the first time."""
    _needs_gpu(asked)
    device = torch.device("cuda")
    torch.zeros(1, device=device)
    found: Values = {"after": {"context": _outside(device)}}
    for name, dtype in _DTYPES.items():
        left = torch.rand(_SIDE, _SIDE, device=device).to(dtype).requires_grad_()
        before = torch.cuda.memory_allocated(device)
        product = left @ left.detach()
        forward = torch.cuda.memory_allocated(device) - before - product.nbytes
        found["after"][f"{name} product, forward"] = _outside(device)
        product.sum().backward()
        assert left.grad is not None
        both = torch.cuda.memory_allocated(device) - before - product.nbytes - left.grad.nbytes
        found["after"][f"{name} product, backward"] = _outside(device)
        found[f"{name}_forward_workspace_bytes"], found[f"{name}_backward_workspace_bytes"] = forward, both - forward
        del left, product
    workspaces = sum(value for key, value in found.items() if key.endswith("workspace_bytes"))
    return {"libraries_bytes": workspaces, **found}


def _process(asked: Asked) -> Values:
    """Bytes outside the allocator once a small model has been trained, when every kernel of a step is loaded."""
    _needs_gpu(asked)
    ranks.start()
    run = Run.start(_SMALL.recipe(asked), _SMALL.ds_config())
    for _ in range(_STEPS):
        run.step()
    outside = _outside(ranks.device())
    run.built.engine.destroy()
    return {"context_bytes": outside}


def _first_collective(asked: Asked) -> Values:
    """Bytes outside the allocator that NCCL takes for one rank; with others it takes more."""
    _needs_gpu(asked)
    ranks.start()
    device = ranks.device()
    before = _outside(device)
    dist.all_reduce(torch.ones(_ELEMENTS, device=device))
    return {"ranks": 1, "outside_bytes": _outside(device) - before}


def _needs_gpu(asked: Asked) -> None:
    if asked.device == "cpu":
        raise NotHereError("a CPU has no driver that counts memory")


def _outside(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free) - int(torch.cuda.memory_reserved(device))


def _attention(device: str, dtype: torch.dtype, tokens: int, width: int) -> Values:
    """Which kernel torch chooses; bytes beyond inputs, output and gradients."""
    shape = (_CLIPS, _HEADS, tokens, width)
    q, k, v = (torch.rand(shape, device=device).to(dtype).requires_grad_() for _ in range(3))
    chosen = SDPBackend(torch._fused_sdp_choice(q, k, v)).name
    kept, taken = (_on_cpu if device == "cpu" else _on_gpu)(q, k, v)
    bytes_of_one = q.nbytes
    return {
        "backend": chosen,
        "clips": _CLIPS,
        "heads": _HEADS,
        "kept_bytes": kept - bytes_of_one,
        "backward_bytes": taken - 3 * bytes_of_one,
    }


def _on_gpu(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int]:
    """Bytes that a forward pass leaves, and the peak of the backward pass beyond them."""
    F.scaled_dot_product_attention(q, k, v).sum().backward()  # workspaces that stay
    for tensor in (q, k, v):
        tensor.grad = None
    before = torch.cuda.memory_allocated()
    out = F.scaled_dot_product_attention(q, k, v)
    kept = torch.cuda.memory_allocated() - before
    gradient = torch.ones_like(out)
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    out.backward(gradient)
    return kept, torch.cuda.max_memory_allocated() - start


def _on_cpu(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int]:
    with StorageMeter() as meter:
        before = meter.current_bytes
        out = F.scaled_dot_product_attention(q, k, v)
        kept = meter.current_bytes - before
        gradient = torch.ones_like(out)
        start = meter.peak_bytes = meter.current_bytes
        out.backward(gradient)
        return kept, meter.peak_bytes - start
