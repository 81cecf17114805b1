"""The scaling model as a Markdown page: assumptions first, then one table per question."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from everest_ds.memory.gpus import GB
from everest_ds.memory.scaling import Scaling, ScalingRow, cores_for

TITLE = "# Scaling: what many GPUs should do"
_PERCENT = 100


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A configuration that was run: bytes of a rank's messages in a step."""

    ranks: int
    ds_config: str
    predicted_bytes: int
    measured_bytes: int

    @property
    def error(self) -> float:
        """(predicted - measured) / measured; 0 where nothing is sent."""
        return (self.predicted_bytes - self.measured_bytes) / max(self.measured_bytes, 1)


@dataclass(frozen=True, kw_only=True)
class Page:
    """What the page is made of; ``global_batch`` is kept over all numbers of GPUs in one table."""

    command: str
    asked: Scaling
    rows: Sequence[ScalingRow]
    checked: Sequence[Checked]
    checked_model: str
    global_batch: int
    clips_per_s_per_core: float

    def markdown(self) -> str:
        """The page."""
        parts = (
            self._head(),
            *(self._section(*section) for section in self._sections()),
            self._check() if self.checked else [],
        )
        return "\n".join(line for part in parts for line in part)

    def _sections(self) -> Iterator[tuple[str, str, Iterable[list[str]]]]:
        few, ours, many = self._few(), self.asked.micro_batch, max(self.asked.gpus)
        networks = self.asked.cluster.gigabits
        yield (
            f"Memory per GPU, micro-batch {ours}",
            f"GB (1e9 bytes) at {_listed(few)} GPUs; **bold**: does not fit {self.asked.cluster.gpu.name}. In brackets "
            f"the largest micro-batch that fits at {many} GPUs.",
            self._by_stage(lambda rows: " / ".join(map(_memory, rows)) + f" ({rows[-1].largest_micro_batch})", few),
        )
        yield (
            "Sent per GPU and step",
            f"GB that leave a GPU in a step of one pass, at {many} GPUs; in brackets what the ZeRO paper's formula "
            "gives. DeepSpeed's stages 1 and 2 all-reduce gradients where the paper reduce-scatters them, and then "
            "gather the parameters as the paper does: half as much again. Stage 3 sends less than the paper's where "
            "parameters that were gathered for the forward pass are still whole in the backward pass.",
            self._by_stage(lambda rows: f"{_gb(rows[0].sent_bytes)} ({_gb(rows[0].zero_paper_sent_bytes)})", (many,)),
        )
        for rate in networks:
            yield (
                f"Time at {rate} Gb/s per node, micro-batch {ours}",
                f"Arithmetic's seconds, then for each stage the communication's seconds at {many} GPUs and in brackets "
                "what of them nothing can hide.",
                self._times(rate, many),
            )
        yield (
            "Where scaling breaks",
            f"The smallest micro-batch at which arithmetic is {_PERCENT * self.asked.cluster.worthwhile:.0f} % of the "
            f"step at {many} GPUs, on {_listed(networks)} Gb/s per node (-: at none). Below it, more GPUs mostly wait.",
            self._by_stage(lambda rows: " / ".join(str(n or "-") for n in rows[0].least_micro_batch.values()), (many,)),
        )
        yield (
            f"A global batch of {self.global_batch}, kept",
            f"The largest number of GPUs, in whole nodes, at which the micro-batch, {self.global_batch} / GPUs, is not "
            "below that, on the same networks.",
            self._by_stage(self._most_gpus, (many,)),
        )
        yield (
            f"Global batches on {many} GPUs",
            "From the least that is worth it (as above, slowest network) to the most that fits, in clips. Whether so "
            "large a batch still learns as well per clip is another question, which this model knows nothing of: the "
            "published recipes go up to 1024.",
            self._by_stage(lambda rows: _batches(rows[0]), (many,)),
        )
        yield (
            "The feed",
            f"Clips per second that a node of {self.asked.cluster.gpus_per_node} trains on, and the cores that read "
            f"them at {self.clips_per_s_per_core:g} clips/s per core.",
            self._feed(),
        )

    def _head(self) -> list[str]:
        cluster = self.asked.cluster
        return [
            TITLE,
            "",
            f"Written by `{self.command}`. A model, not a measurement: nothing here ran on a GPU. It assumes",
            "",
            f"- {cluster.gpu.name}: {cluster.gpu.memory_bytes / GB:g} GB, "
            f"{cluster.flops_per_s / cluster.utilisation / 1e12:g} TFLOP/s at its peak ({cluster.gpu.source}), "
            f"{_PERCENT * cluster.utilisation:.0f} % of which training reaches;",
            f"- {cluster.gpus_per_node} GPUs per node, {cluster.link_bytes_per_s / GB:g} GB/s from one to the next, "
            f"and {_listed(cluster.gigabits)} Gb/s from a node to the next, all its cards together;",
            "- collectives in rings, without latency, on a network that is otherwise idle; one pass per step;",
            "- at best, gradients hide behind the backward pass, and ZeRO-3's parameters behind both passes; the "
            "parameters that ZeRO-1 and 2 gather after the optimizer step hide behind nothing;",
            f"- the DeepSpeed configurations {', '.join(self.asked.ds_configs)}, half precision, fused attention and "
            f"no checkpointing of activations{self._but()}.",
            "",
        ]

    def _but(self) -> str:
        return f", but for {', '.join(self.asked.overrides)}" if self.asked.overrides else ""

    def _section(self, title: str, text: str, table: Iterable[list[str]]) -> list[str]:
        head, *lines = table
        rule = ["---" if column < 2 else "---:" for column in range(len(head))]
        return [f"## {title}", "", text, "", *(f"| {' | '.join(line)} |" for line in (head, rule, *lines)), ""]

    def _by_stage(self, cell: Callable[[list[ScalingRow]], str], gpus: tuple[int, ...]) -> Iterator[list[str]]:
        """A line per model and method, a column per DeepSpeed configuration, of the rows at some numbers of GPUs."""
        names = list(self.asked.ds_configs)
        yield ["model", "method", *names]
        for model, method in self._networks():
            yield [model, method, *(cell(self._at(model, method, name, gpus)) for name in names)]

    def _times(self, rate: int, gpus: int) -> Iterator[list[str]]:
        names = list(self.asked.ds_configs)
        yield ["model", "method", "arithmetic", *names]
        for model, method in self._networks():
            rows = [self._at(model, method, name, (gpus,))[0] for name in names]
            times = (f"{row.alone_s[rate]:.3f} ({row.exposed_s[rate]:.3f})" for row in rows)
            yield [model, method, f"{rows[0].compute_s:.3f}", *times]

    def _feed(self) -> Iterator[list[str]]:
        yield ["model", "method", "clips/s per node", "cores per node"]
        per_node = self.asked.cluster.gpus_per_node
        for model, method in self._networks():
            row = next(r for r in self.rows if (r.model, r.method) == (model, method))
            clips = per_node * row.micro_batch / row.compute_s
            yield [model, method, f"{clips:,.0f}", f"{cores_for(clips, self.clips_per_s_per_core):,}"]

    def _check(self) -> list[str]:
        worst = max(abs(row.error) for row in self.checked)
        table = [["ranks", "DeepSpeed", "predicted", "counted", "error"]]
        for row in self.checked:
            sizes = (f"{row.predicted_bytes:,}", f"{row.measured_bytes:,}")
            table.append([str(row.ranks), row.ds_config, *sizes, f"{row.error:+.3%}"])
        return self._section(
            "Checked",
            f"What CPU ranks really gave to collectives in a step, {self.checked_model}, by DeepSpeed's comms logger: "
            f"bytes of a rank's messages. Largest error {worst:.3%}.",
            table,
        )

    def _most_gpus(self, rows: list[ScalingRow]) -> str:
        most = (self.global_batch // batch if batch else 0 for batch in rows[0].least_micro_batch.values())
        node = self.asked.cluster.gpus_per_node
        return " / ".join(str(gpus - gpus % node if gpus > node else gpus) for gpus in most)

    def _few(self) -> tuple[int, ...]:
        gpus = sorted(self.asked.gpus)
        return tuple(dict.fromkeys((gpus[0], gpus[len(gpus) // 2], gpus[-1])))

    def _networks(self) -> Iterator[tuple[str, str]]:
        yield from dict.fromkeys((row.model, row.method) for row in self.rows)

    def _at(self, model: str, method: str, name: str, gpus: tuple[int, ...]) -> list[ScalingRow]:
        found = {row.gpus: row for row in self.rows if (row.model, row.method, row.ds_config) == (model, method, name)}
        return [found[number] for number in gpus]


def _memory(row: ScalingRow) -> str:
    text = f"{row.predicted_peak_bytes / GB:.1f}"
    return text if row.fits else f"**{text}**"


def _batches(row: ScalingRow) -> str:
    least, most = max(row.least_micro_batch.values()), row.largest_micro_batch
    worthwhile = least and least <= most and all(row.least_micro_batch.values())
    return (
        f"{least * row.gpus:,} to {most * row.gpus:,}" if worthwhile else f"none is worth it, up to {most * row.gpus:,}"
    )


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / GB:.2f}"


def _listed(numbers: Iterable[int]) -> str:
    return " / ".join(str(number) for number in numbers)
