"""Trackers that a team watches already: TensorBoard, Weights & Biases, MLflow, trackio.

Each is the service's own client behind `Tracker`'s two methods, and is imported when it is opened.
Metrics go by the names that dashboards know: `train/loss`, `eval/loss`. A run that is resumed goes
on under the identity it had, which lies in its directory.
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
    """What a service is told of a run.

    `directory`: the run's, where its identity is kept and what is local is written. `config`: flat,
    by key. `step`: the last one made before, where the run goes on; 0 at its beginning.
    """

    directory: Path = attrs.field(converter=Path)
    project: str = "functrain"
    name: str = "run"
    config: Mapping[str, Any] = attrs.field(factory=dict)
    step: int = 0

    def identity(self, service: str, make: Callable[[], str]) -> str:
        """The run's id with a service: as it was noted, or made and noted now."""
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
    """The tracker of a service, begun or gone on with.

    Raises `ConfigError` for a service that is not known or whose package is not installed, and
    whatever the service's own client raises, for want of a key or a network, say.
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
    """Event files in the run's directory, below `tensorboard`."""

    def __init__(self, run: TrackedRun) -> None:
        _package("tensorboard", "tensorboard")
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        # What was logged after the step that a run goes on from is left out of the curves.
        purge = run.step + 1 if run.step else None
        self._writer = writer(log_dir=str(run.directory / "tensorboard"), purge_step=purge)
        if not run.step:
            lines = [f"    {key} = {value!r}" for key, value in run.config.items()]
            self._writer.add_text("config", "\n".join(lines), 0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """A scalar for each."""
        for name, value in prefixed(metrics).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WandB:
    """Weights & Biases; `WANDB_MODE=offline` writes into the run's directory alone."""

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
        """One batch of metrics."""
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
