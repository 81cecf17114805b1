"""The parts, in their order: what says most, and is likeliest to go wrong, comes first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Lets the C library return freed memory at once, so that a process can be held to a limit (mallopt(3)).
_TRIMMED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
# torch 2.9 gave the variable a name without CUDA in it; earlier ones know the old name alone.
_EXPANDABLE = dict.fromkeys(("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"), "expandable_segments:True")
# Without it cuBLAS refuses to be deterministic (docs of torch.use_deterministic_algorithms).
_DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
MACHINE, CONSTANTS = "machine", "constants"
# Until DeepSpeed's op is built the clock doesn't run.
MACHINE_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Part:
    """A row: a module of this package with a function ``cases``, and its place on the page.

    ``share`` of the time that is left for the parts from this one on goes by these numbers; what a part leaves, the
    next ones have.
    """

    name: str
    module: str
    title: str
    says: str
    share: float
    environment: Mapping[str, str] = field(default_factory=dict)


PARTS = (
    Part(name=MACHINE, module="machine", title="The machine", says="", share=0),
    Part(
        name="run",
        module="run",
        title="Does it run",
        says="`run/pretrain.py` on real videos under ZeRO-2: once straight through, and once killed by SIGKILL and "
        "continued with `--resume auto`.",
        share=90,
    ),
    Part(
        name=CONSTANTS,
        module="constants",
        title="Constants",
        says="What the driver reports beyond the allocator's segments, and which attention torch chooses: bytes kept "
        "for the backward pass, and taken within it, beyond inputs, output and gradients.",
        share=30,
    ),
    Part(
        name="memory",
        module="memory",
        title="Memory",
        says="Peaks of one step, GiB: predicted by the planner, and measured by the allocator: *requested* by tensors, "
        "*allocated* in blocks, *active* with blocks that another stream may use, *reserved* in segments. *Driver*: "
        "used on the device at the end, by everything. *Held* between steps. *Error*: predicted against allocated.",
        share=110,
    ),
    Part(
        name="memory-8",
        module="memory_8",
        title="Memory of rank 0 of 8",
        says="The same on one GPU through a process group that sends nothing: what each of eight would hold, without "
        "NCCL's buffers.",
        share=45,
    ),
    Part(
        name="parity",
        module="parity",
        title="Parity",
        says="Golden fixtures of the official implementations, errors relative to each tensor's largest number; five "
        "steps in other ways of training; and the same five steps twice.",
        share=50,
        environment=_DETERMINISTIC,
    ),
    Part(
        name="speed",
        module="speed",
        title="Speed",
        says="Training steps of random clips in bf16 under ZeRO-2, optimizer included. Arithmetic by the published "
        "count: two operations per multiply-accumulate, the backward pass twice the forward. *MFU*: share of the "
        "card's dense data-sheet rate. *Product*: share of a square matrix product timed beside it.",
        share=100,
    ),
    Part(
        name="edge",
        module="edge",
        title="The edge",
        says="With memory capped: the batch that `memprof fit` names, and the largest that runs.",
        share=40,
        environment=_TRIMMED,
    ),
    Part(
        name="edge-expandable",
        module="edge",
        title="The edge, with expandable segments",
        says="The same with `PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`.",
        share=35,
        environment=_TRIMMED | _EXPANDABLE,
    ),
    Part(
        name="feed",
        module="feed",
        title="Feed",
        says="Clips that one core of this machine reads from footage of 640 x 480, and how many the measured speeds "
        "ask for.",
        share=25,
    ),
)
BY_NAME = {part.name: part for part in PARTS}
