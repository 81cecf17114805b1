"""``memprof plan``: what one rank needs, itemised, without running anything."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from rich.table import Table

from everest_ds.memory.gpus import size
from tools.memprof import common

if TYPE_CHECKING:
    from everest_ds.memory.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subcommand's flags."""
    common.add_run_arguments(parser)
    parser.add_argument("--world-size", type=int, default=1, help="ranks")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="what ranks compute on")
    parser.add_argument("--sources", action="store_true", help="list every state with its formula and source")


def run(arguments: argparse.Namespace) -> int:
    """Plan and print."""
    recipe, ds_config = common.recipe_from(arguments), common.ds_config_from(arguments)
    # torch takes seconds to import: after the checks that don't need it.
    from everest_ds.memory.plan import plan  # noqa: PLC0415

    planned = plan(recipe, ds_config, ranks=arguments.world_size, device_type=arguments.device)
    if arguments.json:
        common.print_json(as_json(planned))
        return 0
    common.show(items_table(planned))
    if arguments.world_size > 1:
        common.show(traffic_table(planned))
    if arguments.sources:
        common.show(sources_table(planned))
    if planned.device_type == "cpu":
        print(together(planned))
    return 0


def as_json(planned: Plan) -> dict[str, object]:
    """The fields that scripts rely on."""
    from everest_ds.memory.processes import together_bytes  # noqa: PLC0415 - torch, as above
    from everest_ds.memory.traffic import messages, sent_bytes  # noqa: PLC0415 - torch, as above

    return {
        "predicted_peak_bytes": planned.predicted_peak_bytes,
        "device": planned.device,
        "host": planned.host,
        "nvme": planned.nvme,
        **({"together_bytes": together_bytes(planned)} if planned.device_type == "cpu" else {}),
        "messages": [dataclasses.asdict(m) | {"sent_bytes": m.sent_bytes} for m in messages(planned)],
        "sent_bytes": sent_bytes(planned),
        "config": planned.describe(),
    }


def items_table(planned: Plan) -> Table:
    """What the device and the host hold at the peak."""
    table = Table(title=f"{planned.name}: one rank")
    table.add_column("item")
    table.add_column("where")
    table.add_column("bytes", justify="right")
    table.add_column("", justify="right")
    for where, items in (("device", planned.device), ("host", planned.host), ("nvme", planned.nvme)):
        for name, size_bytes in items.items():
            table.add_row(name, where, f"{size_bytes:,}", size(size_bytes))
    table.add_section()
    table.add_row("peak", "device", f"{planned.predicted_peak_bytes:,}", size(planned.predicted_peak_bytes))
    for where, items in (("host", planned.host), ("nvme", planned.nvme)):
        if items:
            total = sum(items.values())
            table.add_row("held", where, f"{total:,}", size(total))
    return table


def together(planned: Plan) -> str:
    """What ranks on the CPU of one machine take."""
    from everest_ds.memory.processes import LAUNCHER_BYTES, RANK_BYTES, together_bytes  # noqa: PLC0415 - as above

    own, launcher = size(RANK_BYTES), size(LAUNCHER_BYTES)
    return (
        f"ranks of this machine together: {size(together_bytes(planned))}, with {own} of interpreter and "
        f"libraries each and {launcher} of the launcher"
    )


def traffic_table(planned: Plan) -> Table:
    """What the rank sends in an optimizer step."""
    from everest_ds.memory.traffic import messages  # noqa: PLC0415 - torch, as above

    table = Table(title="sent per step: messages as DeepSpeed's comms logger counts them, and what leaves the rank")
    for column in ("what", "collective", "messages", "leaves the rank"):
        table.add_column(column, justify="right" if column in ("messages", "leaves the rank") else "left")
    for message in messages(planned):
        sizes = (size(message.size_bytes), size(message.sent_bytes))
        table.add_row(message.name, message.collective, *sizes)
    return table


def sources_table(planned: Plan) -> Table:
    """What is held between steps, with formula and source."""
    table = Table(title="held between steps (n parameters, p this rank's partition, b bytes per element)")
    for column in ("item", "where", "bytes", "formula", "source in DeepSpeed"):
        table.add_column(column, justify="right" if column == "bytes" else "left", overflow="fold")
    for item in planned.states:
        table.add_row(item.name, item.place, f"{item.size_bytes:,}", item.formula, item.source)
    return table
