"""Groups of worker processes for tests: forked from one warm process that has imported torch.

`shared().run("function", size, options)` calls a function of `programs.py` on so many workers and
returns what each made of it: `{"value": …}`, or `{"error": [type, text]}`.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Group:
    """The warm process; each run forks workers of it."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(HERE.parent), str(HERE)])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", str(HERE / "workers.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self._alone: dict[str, Any] = {}

    @property
    def pid(self) -> int:
        """Of the warm process, whose children the workers are."""
        return self._process.pid

    def run(self, function: str, size: int, options: Any = None, **more: Any) -> list[Any]:
        """What every worker came to, by rank."""
        return self._asked({"function": function, "size": size, "options": options, **more})

    def values(self, function: str, size: int, options: Any = None) -> list[Any]:
        """What every worker returned; an error fails the test."""
        found = self.run(function, size, options)
        assert all("value" in each for each in found), found
        return [each["value"] for each in found]

    def alone(self, options: Any) -> Any:
        """What `steps` come to in one process, which many tests compare with: made once."""
        asked = json.dumps(options, sort_keys=True)
        if asked not in self._alone:
            (self._alone[asked],) = self.values("steps", 1, options)
        return self._alone[asked]

    def imports(self, *modules: str) -> None:
        """Let the warm process import them, so that not each worker does."""
        self._asked({"imports": modules})

    def _asked(self, request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the warm process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        assert self._process.stdout is not None
        self._process.stdout.close()


@functools.cache
def shared() -> Group:
    """The group of this process: a warm process takes seconds to start."""
    made = Group()
    atexit.register(made.close)
    return made


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _serve() -> None:
    import programs
    import torch

    torch.set_num_threads(1)
    programs.steps({"steps": 1})  # what torch imports when it is first used
    # And what shards bring, DTensor and with it the compiler: each worker would take seconds.
    _import("torch.distributed.tensor", "torch._dynamo")
    for line in sys.stdin:
        request = json.loads(line)
        if "imports" in request:
            _import(*request["imports"])
            print("null", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            port = free_port()
            children = [
                _started(programs, request, rank, port, Path(folder))
                for rank in range(request["size"])
            ]
            codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            found = []
            for rank, code in enumerate(codes):
                path = Path(folder) / str(rank)
                found.append(json.loads(path.read_text()) if path.exists() else {"exit": code})
        print(json.dumps(found), flush=True)
    os._exit(0)  # to take torch down takes a second


def _import(*modules: str) -> None:
    for module in modules:
        importlib.import_module(module)


def _started(programs: Any, request: Any, rank: int, port: int, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    signal.alarm(120)
    size = request["size"]
    if size > 1:
        named = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in named.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    code = 0
    try:
        found = {"value": getattr(programs, request["function"])(request["options"] or {})}
    except BaseException as error:
        found = {"error": [type(error).__name__, str(error)]}
        if request.get("loud"):
            traceback.print_exc()
        code = 1
    (folder / f".{rank}").write_text(json.dumps(found))
    (folder / f".{rank}").rename(folder / str(rank))
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
