"""Where checkpoints are kept: on storage that all nodes share, or a copy on each node's own."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everest_ds.config.ds_config import node_local_storage
from everest_ds.config.errors import UserError
from everest_ds.config.place import on_this_node, several_nodes
from everest_ds.training import ranks
from everest_ds.training.run_dir import RunDir

_FLAG = "ds_config checkpoint.use_node_local_storage"
_MOST_NAMED = 8


@dataclass(frozen=True)
class Writers:
    """The ranks that write one copy of each checkpoint together, this rank among them: all, or those of its node."""

    ranks: range

    @classmethod
    def of(cls, ds_config: dict[str, Any]) -> Writers:
        """Return those that a DeepSpeed configuration asks for (``checkpoint.use_node_local_storage``)."""
        return cls(on_this_node() if node_local_storage(ds_config) else range(ranks.world_size()))

    @property
    def index(self) -> int:
        """This rank's place among them."""
        return self.ranks.index(ranks.rank())

    @property
    def leads(self) -> bool:
        """Whether this rank does what one of them does for all."""
        return self.index == 0

    def check_storage(self, folder: Path) -> None:
        """See whether the writers of a copy, and they alone, share a folder, which is there; a collective call.

        Raises:
            UserError: they don't, so that copies would be torn or would overwrite each other.
        """
        if not several_nodes():
            return
        with contextlib.ExitStack() as stack:
            mark = ""
            if self.leads:
                mark = stack.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix=".who-sees-")).name
            marks = ranks.gather(mark)
            seen = [rank for rank, name in enumerate(marks) if name and (folder / Path(name).name).exists()]
            found = ranks.gather((seen, self.ranks.start))
        lonely = [rank for rank, (seen, leader) in enumerate(found) if leader not in seen]
        if lonely:
            raise UserError(
                f"train.output_dir: what {ranks.host_of(found[lonely[0]][1])} writes into {folder} is not there on "
                f"{_hosts(lonely)}: choose storage that all nodes share, or set {_FLAG}"
            )
        crowded = [rank for rank, (seen, leader) in enumerate(found) if seen != [leader]]
        if crowded:
            raise UserError(
                f"train.output_dir: {_hosts(crowded)} share {folder}, and would overwrite each other's checkpoints: "
                f"choose storage of each node's own, or remove {_FLAG}"
            )

    def check_source(self, source: RunDir | None) -> None:
        """See whether all ranks have found a run to continue, those of a copy the same, or none; a collective call.

        Raises:
            UserError: some node has none, because it is new, or another.
        """
        found = ranks.gather((self.ranks.start, None if source is None else str(source.path)))
        having = [rank for rank, (_, path) in enumerate(found) if path is not None]
        lacking = [rank for rank, (_, path) in enumerate(found) if path is None]
        if having and lacking:
            there = f"{ranks.host_of(having[0])}:{found[having[0]][1]}"
            raise UserError(f"train.resume: no run to continue on {_hosts(lacking)}; copy {there} there")
        if len(set(found)) > len({leader for leader, _ in found}):
            paths = sorted({path for _, path in found})
            raise UserError(f"train.resume: ranks would continue different runs, {', '.join(paths)}")

    def held_by_all(self, digests: dict[str, str], folder: Path) -> list[str]:
        """Return those of a leader's checkpoints that every copy's leader has; a collective call.

        Args:
            digests: of what each of this rank's checkpoints holds, by name, in the order wanted. One name can stand
                for two ways that a run went, on a node that was away meanwhile.
            folder: that they are in.

        Raises:
            UserError: there is none, though some leader has one.
        """
        found = ranks.gather(list(digests.items()) if self.leads else None)
        held = {rank: set(listed) for rank, listed in enumerate(found) if listed is not None}
        common = [one for one in found[0] if all(one in listed for listed in held.values())]
        if common or len(held) == 1:
            return [name for name, _ in common]
        newest = max(one for listed in held.values() for one in listed)
        having = next(rank for rank, listed in held.items() if newest in listed)
        lacking = [rank for rank, listed in held.items() if newest not in listed]
        raise UserError(
            f"train.resume: no checkpoint is on every node: {newest[0]} is not on {_hosts(lacking)}, or is another; "
            f"copy {ranks.host_of(having)}:{folder / newest[0]} there"
        )


def _hosts(numbers: Iterable[int]) -> str:
    names = list(dict.fromkeys(ranks.host_of(number) for number in numbers))
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
