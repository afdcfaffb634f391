"""Trackers that teams already watch: TensorBoard, Weights & Biases, MLflow, trackio.

Each wraps the service's own client in `Tracker`'s two methods and imports it when it is opened.
Metrics have the names that dashboards expect: `train/loss`, `eval/loss`. A resumed run continues
under its old identity, which is kept in its directory.
"""

from __future__ import annotations

import importlib
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from functrain.errors import ConfigError, did_you_mean
from functrain.tracking.jsonl import Tracker
from functrain.writing import write


@attrs.frozen(kw_only=True)
class TrackedRun:
    """What a service is told about a run.

    `directory`: the run's, where its identity is kept and local files are written. `config`: flat,
    by key. `step`: the step that the run continues from, 0 at its beginning.
    """

    directory: Path = attrs.field(converter=Path)
    project: str = "functrain"
    name: str = "run"
    config: Mapping[str, Any] = attrs.field(factory=dict)
    step: int = 0

    def identity(self, service: str, make: Callable[[], str]) -> str:
        """The run's id with a service: the recorded one, or a new one that is recorded now."""
        path = self.directory / "trackers.json"
        known: dict[str, str] = json.loads(path.read_bytes()) if path.is_file() else {}
        if service not in known:
            known[service] = make()
            write(path, json.dumps(known, indent=1).encode())
        return known[service]


def prefixed(metrics: Mapping[str, float]) -> dict[str, float]:
    """`loss` as `train/loss`, and `eval_loss` as `eval/loss`."""
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in metrics.items()
    }


def opened(service: str, run: TrackedRun) -> Tracker:
    """Open the tracker of a service, for a new or a resumed run.

    Raises `ConfigError` for a service that is unknown or whose package is not installed, and
    whatever the service's own client raises, for lack of a key or a network, say.
    """
    if service not in SERVICES:
        raise ConfigError(f"tracker: {service!r} is unknown; {did_you_mean(service, SERVICES)}")
    return SERVICES[service](run)


def _package(name: str, service: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"tracker {service}: the package {service} is missing ({error.name}); "
            f"pip install {service}"
        ) from error


class TensorBoard:
    """TensorBoard event files, in `tensorboard` in the run's directory."""

    def __init__(self, run: TrackedRun) -> None:
        _package("tensorboard", "tensorboard")
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        # Drops from the curves what was logged after the step that the run continues from.
        purge = run.step + 1 if run.step else None
        self._writer = writer(log_dir=str(run.directory / "tensorboard"), purge_step=purge)
        if not run.step:
            lines = [f"    {key} = {value!r}" for key, value in run.config.items()]
            self._writer.add_text("config", "\n".join(lines), 0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a scalar for each metric."""
        for name, value in prefixed(metrics).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandB:
    """Weights & Biases; with `WANDB_MODE=offline` it writes only to the run's directory."""

    def __init__(self, run: TrackedRun) -> None:
        wandb = _package("wandb", "wandb")
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.identity("wandb", lambda: uuid.uuid4().hex[:8]),
            resume="allow",
            dir=str(run.directory),
            config=dict(run.config),
            settings=wandb.Settings(silent=True),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row."""
        self._run.log(prefixed(metrics), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MLflow:
    """MLflow at `MLFLOW_TRACKING_URI`; without one, a database `mlflow.db` beside the run."""

    def __init__(self, run: TrackedRun) -> None:
        mlflow = _package("mlflow", "mlflow")
        database = run.directory.absolute().parent / "mlflow.db"
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{database}"
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        self._entities = importlib.import_module("mlflow.entities")
        known = self._client.get_experiment_by_name(run.project)
        where = known.experiment_id if known else self._client.create_experiment(run.project)

        def begun() -> str:
            found = self._client.create_run(where, run_name=run.name)
            identity: str = found.info.run_id
            params = [
                self._entities.Param(key, str(value)[:500]) for key, value in run.config.items()
            ]
            self._client.log_batch(identity, params=params)
            return identity

        self._run = run.identity("mlflow", begun)
        self._client.update_run(self._run, status="RUNNING")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics as one batch."""
        at = int(time.time() * 1000)
        values = [
            self._entities.Metric(name, value, at, step)
            for name, value in prefixed(metrics).items()
        ]
        self._client.log_batch(self._run, metrics=values)

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run)


class Trackio:
    """trackio's local database, or the Space that its environment names."""

    def __init__(self, run: TrackedRun) -> None:
        trackio = _package("trackio", "trackio")
        name = run.identity("trackio", lambda: f"{run.name}-{uuid.uuid4().hex[:8]}")
        self._run = trackio.init(
            project=run.project, name=name, resume="allow", config=dict(run.config), embed=False
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row."""
        self._run.log(prefixed(metrics), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


SERVICES: dict[str, Callable[[TrackedRun], Tracker]] = {
    "mlflow": MLflow,
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WandB,
}
