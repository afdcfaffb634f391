"""Two nodes that meet over a network of their own, which is cut in the middle of a run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from tests.cli import test_cli_workers as workers

alone = workers.alone


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@attrs.frozen
class Node:
    """A network namespace with an end of a cable."""

    name: str
    cable: str
    address: str

    def joined(self) -> None:
        """Make it, with the cable's end, which is in the first namespace."""
        ip("link", "set", self.cable, "netns", self.name)
        ip("-n", self.name, "address", "add", f"{self.address}/24", "dev", self.cable)
        for each in (self.cable, "lo"):
            ip("-n", self.name, "link", "set", each, "up")

    def torchrun(self, config: Path, first: str, *options: str) -> subprocess.Popen[str]:
        """Its part of a run of four workers."""
        command = ["ip", "netns", "exec", self.name, sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes=2", "--nproc-per-node=2", "--max-restarts=0", "--rdzv-backend=c10d"]
        command += ["--rdzv-id=run", f"--rdzv-endpoint={first}:29400", "--monitor-interval=0.1"]
        command += [f"--local-addr={self.address}", f"--rdzv-conf=is_host={self.address == first}"]
        with config.with_suffix(f".{self.name}").open("w") as said:
            return subprocess.Popen(
                [*command, "-m", "functrain", "pretrain", str(config), *options],
                stdout=said,
                stderr=said,
                text=True,
                env={
                    **os.environ,
                    "GLOO_SOCKET_IFNAME": self.cable,
                    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                    "PYTHONPATH": str(Path(__file__).parents[2]),
                },
                start_new_session=True,
            )


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    """Two nodes with a cable between them."""
    if shutil.which("ip") is None:
        pytest.skip("no `ip` (iproute2) to make network namespaces with")
    number = os.getpid() % 10_000
    found = tuple(
        Node(f"ft{side}{number}", f"ftv{side}{number}", f"10.77.0.{host}")
        for host, side in ((1, "a"), (2, "b"))
    )
    try:
        for node in found:
            ip("netns", "add", node.name)
        ip("link", "add", found[0].cable, "type", "veth", "peer", "name", found[1].cable)
        for node in found:
            node.joined()
    except subprocess.CalledProcessError as error:
        _gone(found)
        pytest.skip(f"no network namespaces can be made here: {error.stderr.decode().strip()}")
    yield found[0], found[1]
    _gone(found)


def _gone(nodes: tuple[Node, ...]) -> None:
    for node in nodes:
        subprocess.run(["ip", "netns", "delete", node.name], check=False, capture_output=True)


def _said(config: Path, node: Node) -> str:
    return config.with_suffix(f".{node.name}").read_text()


def _failures(config: Path, node: Node) -> list[str]:
    return [line for line in _said(config, node).splitlines() if line.startswith("functrain: ")]


@pytest.mark.long
@pytest.mark.parametrize("sharded", [(), ("--train.sharded",)], ids=["replicated", "sharded"])
def test_a_node_cut_off_is_an_error_on_both_and_started_again_it_ends_the_same(
    sharded: tuple[str, ...], tmp_path: Path, nodes: tuple[Node, Node], alone: Any
) -> None:
    """The workers of both say so within their timeout; torch's own agents may wait for longer."""
    config, directory = workers._config(tmp_path, "run", 30)
    config.write_text(config.read_text().replace("timeout = 30.0", "timeout = 8.0"))
    one, other = nodes
    running = [node.torchrun(config, one.address, *sharded) for node in nodes]
    try:
        workers._reached(running[0], directory, 6)
        ip("-n", other.name, "link", "set", other.cable, "down")
        cut = time.monotonic()
        while not all(len(_failures(config, node)) == 2 for node in nodes):
            assert time.monotonic() < cut + 40, [_said(config, node) for node in nodes]
            time.sleep(0.1)
    finally:
        for process in running:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    said = [line for node in nodes for line in _failures(config, node)]
    for rank, line in enumerate(sorted(said)):
        assert line.startswith(f"functrain: worker {rank} of 4, step ")
        assert "after at most 8 s" in line
        assert "Start all workers again, from the newest checkpoint" in line
    assert all("does not answer" in line for line in _failures(config, other))
    assert all("Last heard of: workers 0, 1, 2, 3" in line for line in _failures(config, one))

    ip("-n", other.name, "link", "set", other.cable, "up")
    again = [node.torchrun(config, one.address, *sharded, "--resume") for node in nodes]
    for node, process in zip(nodes, again, strict=True):
        assert process.wait(120) == 0, _said(config, node)
    assert workers._last(directory) == alone
