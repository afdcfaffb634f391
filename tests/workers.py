"""Groups of worker processes for tests: forked from one warm process that has imported torch.

`shared().run("function", size, options)` calls a function of `programs.py` on so many workers and
returns what each made of it: `{"value": …}`, or `{"error": [type, text]}`.
"""

from __future__ import annotations

import atexit
import contextlib
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
    """The warm process; each run forks workers of it.

    Once a request is interrupted, or the process has died, the next request starts another one.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._imported: dict[str, None] = {}
        self._alone: dict[str, Any] = {}

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            path = os.pathsep.join([str(HERE.parent), str(HERE)])
            self._process = subprocess.Popen(
                [sys.executable, "-W", "error", str(HERE / "workers.py"), *self._imported],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                cwd=HERE,
                start_new_session=True,  # so that it can be killed with its workers
                text=True,
            )
        return self._process

    @property
    def pid(self) -> int:
        """Of the warm process, whose children the workers are."""
        return self._running().pid

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
        self._imported.update(dict.fromkeys(modules))
        self._asked({"imports": modules})

    def _asked(self, request: Any) -> Any:
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                raise ChildProcessError("the warm process of the workers has ended")
            return json.loads(answer)
        except BaseException:  # a test's timeout too: nobody else is to read its answer
            self.kill()
            self._ended(process)
            raise

    def kill(self) -> None:
        """Kill the warm process and the workers; who waits for an answer has an error then."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the warm process."""
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        try:
            process.stdin.close()
            process.wait(30)
        except (OSError, subprocess.TimeoutExpired):
            self.kill()
        self._ended(process)

    def _ended(self, process: subprocess.Popen[str]) -> None:
        self._process = None
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what it has not read is lost
                pipe.close()


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
    _import("torch.distributed.tensor", "torch._dynamo", *sys.argv[1:])
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
