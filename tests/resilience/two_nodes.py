"""Two "nodes" on this machine: network namespaces with a cable between them, or loopback addresses without them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from killing import Running
from launching import ROOT, Console

PORT = 29500


@dataclass(frozen=True, kw_only=True)
class Node:
    """``enter``: what comes before a command that runs there; ``host``: the name that it finds."""

    address: str
    host: str
    enter: tuple[str, ...] = ()


@dataclass(frozen=True)
class Nodes:
    """Both, and a port of the first that is free."""

    nodes: tuple[Node, Node]
    port: int

    @property
    def apart(self) -> bool:
        """Whether each has a network and a name of its own."""
        return self.nodes[0].host != self.nodes[1].host

    def start(self, launcher: str, command: list[str], folders: list[Path]) -> list[OnNode]:
        """Start two ranks on each node, by DeepSpeed's launcher or torch's."""
        words = {"deepspeed": self._deepspeed, "torchrun": self._torchrun}[launcher]
        places = enumerate(zip(self.nodes, folders, strict=True))
        return [OnNode(node, [*words(number, folder), *command], folder) for number, (node, folder) in places]

    def _deepspeed(self, number: int, folder: Path) -> list[str]:
        hostfile = folder / "hostfile"
        hostfile.write_text("".join(f"{node.address} slots=2\n" for node in self.nodes))
        place = ("--no_ssh", "--node_rank", str(number), "--hostfile", str(hostfile))
        return ["-m", "deepspeed.launcher.runner", *place, *self._master("_")]

    def _torchrun(self, number: int, folder: Path) -> list[str]:
        place = ("--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "2")
        return ["-m", "torch.distributed.run", *place, *self._master("-")]

    def _master(self, dash: str) -> list[str]:
        return [f"--master{dash}addr", self.nodes[0].address, f"--master{dash}port", str(self.port)]


class OnNode(Running):
    """A launcher on one node, in a folder of its own, with its whole family; to kill it is to lose the node."""

    def __init__(self, node: Node, command: list[str], folder: Path) -> None:
        self.begin([*node.enter, sys.executable, *command], 2, folder / "log.txt", folder, OMP_NUM_THREADS="1")


class NodesConsole(Console):
    """Commands one after another on the ranks of both nodes, by torchrun."""

    def __init__(self, nodes: Nodes, folders: list[Path], folder: Path) -> None:
        super().__init__(4, folder)
        folder.mkdir()
        script = [str(ROOT / "tests/console.py"), str(folder), "0", str(os.getpid())]
        self._running = nodes.start("torchrun", script, folders)
        self._process = self._running[0].process

    def close(self) -> None:
        """End the processes."""
        super().close()
        for node in self._running:
            node.kill()


@contextlib.contextmanager
def two_nodes() -> Iterator[Nodes]:
    """Both nodes; afterwards whatever still runs on them is killed, and nothing of them is left."""
    names = [f"everest-{os.getpid()}-{number}" for number in range(2)]
    try:
        if _lay_cable(names):
            yield Nodes((_node(names[0], 0), _node(names[1], 1)), PORT)
            return
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        one, other = (Node(address=f"127.0.0.{number + 1}", host=socket.gethostname()) for number in range(2))
        yield Nodes((one, other), port)
    finally:
        for name in names:
            _remove(name)


def _lay_cable(names: list[str]) -> bool:
    ends = [(f"everest{number}", name) for number, name in enumerate(names)]
    commands = [["netns", "add", name] for name in names]
    commands.append(
        ["link", "add", ends[0][0], "netns", names[0], "type", "veth", "peer", *(ends[1][0], "netns", names[1])]
    )
    for number, (end, name) in enumerate(ends):
        commands.append(["-n", name, "addr", "add", f"{_address(number)}/24", "dev", end])
        commands += [["-n", name, "link", "set", interface, "up"] for interface in (end, "lo")]
    return all(_done("ip", *command) for command in commands)


def _node(name: str, number: int) -> Node:
    inside, host = ("ip", "netns", "exec", name), f"node{number}"
    named = (*inside, "unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host)
    if _done(*named, "true"):
        return Node(address=_address(number), host=host, enter=named)
    return Node(address=_address(number), host=socket.gethostname(), enter=inside)


def _address(number: int) -> str:
    return f"10.77.0.{number + 1}"


def _remove(name: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # without iproute2
        found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
        for pid in found.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _done("ip", "netns", "delete", name)


def _done(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0
    except FileNotFoundError:
        return False
