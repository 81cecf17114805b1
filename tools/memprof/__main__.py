"""Memory and speed, planned and measured: ``python tools/memprof plan|fit|compare|paper|nodes|scaling|measure ...``."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from everest_ds.config.errors import one_line_errors

# Subcommand -> module of this folder (with add_arguments(parser) and run(arguments)) and what it answers.
COMMANDS = {
    "plan": ("tools.memprof.plan", "what one rank needs, itemised, without running anything"),
    "fit": ("tools.memprof.fit", "the largest micro-batch per ZeRO stage and checkpointing mode, and the fastest"),
    "compare": ("tools.memprof.compare", "models, methods, batch sizes and ZeRO stages side by side; --report"),
    "paper": ("tools.memprof.paper", "every published GFLOP and memory figure beside ours"),
    "nodes": ("tools.memprof.nodes", "what fit chooses for large models on GPUs of several sizes"),
    "scaling": ("tools.memprof.scaling", "a model of many GPUs: memory, bytes sent, where the network is too slow"),
    "measure": ("tools.memprof.measure", "really run steps: predicted beside measured beside residual"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; the exit code is 0 done, 2 the user's mistake."""
    # Planning needs no device, and torch's remarks about missing ones help nobody here.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("torch").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(prog="memprof", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, (_, description) in COMMANDS.items():
        subparsers.add_parser(name, help=description, description=description, add_help=False)
    command = parser.parse_known_args(argv)[0].command
    with one_line_errors("memprof"):
        module = importlib.import_module(COMMANDS[command][0])
        own = argparse.ArgumentParser(prog=f"memprof {command}", description=COMMANDS[command][1])
        module.add_arguments(own)
        rest = (sys.argv[1:] if argv is None else argv)[1:]
        return int(module.run(own.parse_args(rest)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
