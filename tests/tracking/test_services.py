"""Trackers beside a training: told everything, in their own words, and never in its way."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest

from functrain.errors import ConfigError
from functrain.tracking import services
from functrain.tracking.beside import Beside
from functrain.tracking.services import TrackedRun, opened, prefixed

RECORDS = [(0, {"eval_loss": 3.0}), (1, {"loss": 2.5, "rewards/margins": 0.1}), (2, {"loss": 2.0})]


class Told:
    """Remembers; fails or waits where it is told to."""

    def __init__(self, *, fails_at: int | None = None, gate: threading.Event | None = None) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []
        self.closed = False
        self._fails_at, self._gate = fails_at, gate

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._gate is not None:
            self._gate.wait(30)
        if step == self._fails_at:
            raise OSError("the network is down")
        self.seen.append((step, dict(metrics)))

    def close(self) -> None:
        self.closed = True


def test_everything_is_told_in_its_order_and_the_end_waits_for_it() -> None:
    told, said = Told(), []
    beside = Beside("a service", lambda: told, said.append)
    beside.ready()
    for step, metrics in RECORDS:
        beside.log(step, metrics)
    beside.close()
    assert told.seen == RECORDS
    assert told.closed
    assert said == []


def test_metrics_are_those_of_the_call() -> None:
    told, values = Told(), {"loss": 1.0}
    beside = Beside("a service", lambda: told, lambda _text: None)
    beside.log(1, values)
    values["loss"] = 2.0
    beside.close()
    assert told.seen == [(1, {"loss": 1.0})]


def test_a_service_that_fails_is_left_alone_and_that_is_said_once() -> None:
    told, said = Told(fails_at=1), []
    beside = Beside("a service", lambda: told, said.append)
    for step in range(20):
        beside.log(step, {"loss": 1.0})
        time.sleep(0.005)
    beside.close()
    beside.close()
    assert [step for step, _ in told.seen] == [0]
    assert len(said) == 1
    assert "a service: OSError: the network is down; it is told no more" in said[0]


@pytest.mark.parametrize("failure", [OSError("no key"), SystemExit(1), KeyboardInterrupt()])
def test_a_service_that_cannot_be_opened_is_said_and_nothing_stops(failure: BaseException) -> None:
    said: list[str] = []

    def open_() -> Any:
        raise failure

    beside = Beside("a service", open_, said.append)
    beside.ready()
    beside.log(1, {"loss": 1.0})
    beside.close()
    assert len(said) == 1
    assert type(failure).__name__ in said[0]


def test_what_the_user_can_mend_is_an_error_before_the_first_step() -> None:
    def open_() -> Any:
        raise ConfigError("tracker x: missing")

    with pytest.raises(ConfigError, match="missing"):
        Beside("x", open_, lambda _text: None).ready()


def test_no_step_waits_for_a_slow_service_and_the_end_only_so_long() -> None:
    gate, said = threading.Event(), []
    told = Told(gate=gate)
    beside = Beside("a service", lambda: told, said.append, patience=0.2)
    before = time.monotonic()
    for step in range(100):
        beside.log(step, {"loss": 1.0})
    handed = time.monotonic() - before
    beside.close()
    assert handed < 5  # a gate of 30 s is never waited for
    assert told.seen == []
    assert len(said) == 1
    assert "has not taken everything in 0.2 s" in said[0]
    gate.set()


def test_the_names_are_those_of_dashboards() -> None:
    assert prefixed({"loss": 1.0, "eval_loss": 2.0, "rewards/margins": 3.0}) == {
        "train/loss": 1.0,
        "eval/loss": 2.0,
        "train/rewards/margins": 3.0,
    }


def test_an_unknown_service_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'tensorbord' is unknown; did you mean 'tensorboard'"):
        opened("tensorbord", TrackedRun(directory=Path()))


@pytest.mark.parametrize("service", sorted(services.SERVICES))
def test_a_package_that_is_not_there_is_named(
    service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, service, None)
    with pytest.raises(ConfigError, match=rf"pip install {service}"):
        opened(service, TrackedRun(directory=tmp_path))


def _run(tmp_path: Path, **changes: Any) -> TrackedRun:
    config = {"train.steps": 2, "model.width": 16}
    return TrackedRun(directory=tmp_path, name="a-run", config=config, **changes)


def _through(service: str, run: TrackedRun, records: Any) -> None:
    said: list[str] = []
    beside = Beside(service, lambda: opened(service, run), said.append)
    beside.ready()
    for step, metrics in records:
        beside.log(step, metrics)
    beside.close()
    assert said == []


def test_tensorboard_reads_what_it_is_told_and_a_resumed_run_is_one_curve(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = _run(tmp_path)
    _through("tensorboard", run, [*RECORDS, (3, {"loss": 9.0})])
    # Killed after step 3, with a checkpoint of step 2: step 3 is made again.
    _through(
        "tensorboard", attrs.evolve(run, step=2), [(3, {"loss": 1.5}), (4, {"loss": math.nan})]
    )
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    curve = [(each.step, each.value) for each in found.Scalars("train/loss")]
    assert curve[:3] == [(1, 2.5), (2, 2.0), (3, 1.5)]
    assert curve[3][0] == 4
    assert math.isnan(curve[3][1])
    assert [(each.step, each.value) for each in found.Scalars("eval/loss")] == [(0, 3.0)]


def _in_a_process(program: str, tmp_path: Path) -> str:
    """These libraries leave threads and environment behind; each is tried in a process of its own.

    It is told two steps, and two more under the identity that the first have left.
    """
    body = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "import attrs\n"
        "from functrain.tracking.beside import Beside\n"
        "from functrain.tracking.services import TrackedRun, opened\n"
        "def through(service, run, records):\n"
        "    beside = Beside(service, lambda: opened(service, run), sys.exit)\n"
        "    beside.ready()\n"
        "    for step, metrics in records: beside.log(step, metrics)\n"
        "    beside.close()\n"
        "run = TrackedRun(directory=Path(sys.argv[1]), name='a-run', config={'train.steps': 2})\n"
    )
    command = [sys.executable, "-c", body + program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


TWICE = (
    "through({0!r}, run, [(1, {{'loss': 2.5}}), (2, {{'loss': 2.0, 'eval_loss': 3.0}})])\n"
    "through({0!r}, attrs.evolve(run, step=2), [(3, {{'loss': 1.5}})])\n"
)


def test_wandb_writes_offline_under_one_identity(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    program = "os.environ['WANDB_MODE'] = 'offline'\n" + TWICE.format("wandb") + "print()\n"
    _in_a_process(program, tmp_path)
    identity = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    written = list((tmp_path / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    assert len(written) == 2
    data = b"".join(path.read_bytes() for path in written)
    assert b"train/loss" in data
    assert b"eval/loss" in data


def test_mlflow_has_one_run_with_every_step(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    program = (
        TWICE.format("mlflow")
        + "import json, mlflow\n"
        + "uri = f'sqlite:///{run.directory.parent}/mlflow.db'\n"
        + "client = mlflow.MlflowClient(tracking_uri=uri)\n"
        + "where = client.get_experiment_by_name('functrain').experiment_id\n"
        + "(found,) = client.search_runs([where])\n"
        + "curve = client.get_metric_history(found.info.run_id, 'train/loss')\n"
        + "print(json.dumps([[[m.step, m.value] for m in curve], found.data.params, "
        + "found.info.status]))\n"
    )
    directory = tmp_path / "run"
    directory.mkdir()
    curve, params, status = json.loads(_in_a_process(program, directory))
    assert curve == [[1, 2.5], [2, 2.0], [3, 1.5]]
    assert params == {"train.steps": "2"}
    assert status == "FINISHED"


def test_mlflow_is_told_through_a_server_and_one_that_is_gone_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    store = f"sqlite:///{tmp_path}/server.db"
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    server = subprocess.Popen(
        [*command, "--backend-store-uri", store],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    said: list[str] = []
    try:
        _wait_for(uri)
        beside = Beside("mlflow", lambda: opened("mlflow", _run(tmp_path)), said.append)
        beside.ready()
        beside.log(1, {"loss": 2.5})
        client = mlflow.MlflowClient(tracking_uri=uri)
        identity = json.loads((tmp_path / "trackers.json").read_text())["mlflow"]
        for _ in range(200):
            curve = client.get_metric_history(identity, "train/loss")
            if curve:
                break
            time.sleep(0.1)
        assert [(each.step, each.value) for each in curve] == [(1, 2.5)]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    beside.log(2, {"loss": 2.0})
    beside.close()
    assert len(said) == 1
    assert "tracker mlflow: " in said[0]


def _wait_for(uri: str) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"no server at {uri}")


def test_trackio_has_one_run_with_every_step(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    program = (
        "os.environ['TRACKIO_DIR'] = sys.argv[1] + '/trackio'\n" + TWICE.format("trackio")
    ) + "print()\n"
    _in_a_process(program, tmp_path)
    with sqlite3.connect(tmp_path / "trackio" / "functrain.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    values = {step: json.loads(text) for _, step, text in rows}
    assert {step: each["train/loss"] for step, each in values.items()} == {1: 2.5, 2: 2.0, 3: 1.5}
