"""Where a step's milliseconds go, by kind of work."""

from __future__ import annotations

from collections.abc import Callable

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from everest_ds.training import ranks

# Part of a step -> beginnings of the names of torch's operators.
PARTS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::linear", "aten::_addmm", "aten::convolution", "aten::mkldnn"),
    "attention": (
        *("aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::_scaled_dot", "aten::_flash", "aten::_effic"),
        "aten::_cudnn_attention",
    ),
    "norms": ("aten::native_layer_norm",),
    "activation function": ("aten::gelu",),
    "sums for biases": ("aten::sum",),
    "copies, casts, gathers": (
        *("aten::copy_", "aten::cat", "aten::gather", "aten::index", "aten::clone", "aten::embedding", "aten::fill_"),
        *("aten::nonzero", "aten::scatter", "aten::_to_copy"),
    ),
    "selection and targets": ("aten::sort", "aten::argsort", "aten::var", "aten::linalg", "aten::mse", "aten::std"),
    "sums and products by element": ("aten::add", "aten::mul", "aten::div", "aten::sub", "aten::sqrt"),
}
REST = "everything else"


def milliseconds(work: Callable[[], None]) -> dict[str, float]:
    """Profile something: milliseconds by part of :data:`PARTS`, on the device that computes."""
    on_cpu = ranks.on_cpu()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (not on_cpu)
    with profile(activities=activities) as profiler:
        work()
    spent = dict.fromkeys([*PARTS, REST], 0.0)
    for event in profiler.key_averages():
        if event.device_type != DeviceType.CPU:
            continue  # a kernel: the operator that started it has its time
        part = next((part for part, names in PARTS.items() if event.key.startswith(names)), REST)
        spent[part] += (event.self_cpu_time_total if on_cpu else event.self_device_time_total) / 1000
    return spent
