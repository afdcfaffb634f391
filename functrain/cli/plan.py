"""`functrain plan`: memory per worker and time per step of a config, before it is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import attrs
import torch
from torch import Tensor, nn

from functrain import models, objectives, planning
from functrain.activations import Recompute
from functrain.cli.checks import one_of, positive
from functrain.cli.config import DPO, Config, Pretrain
from functrain.cli.directory import is_tokens
from functrain.cli.origins import is_model, origin
from functrain.cli.restoring import bare, decoder
from functrain.cli.steps import optimizer
from functrain.cli.summary import table
from functrain.data import ByteTokenizer
from functrain.distributed import World
from functrain.errors import ConfigError
from functrain.planning import Cluster, Job, Layout, Plan
from functrain.precision import policy
from functrain.trees import Tensors

HERE = "here"


@attrs.frozen(kw_only=True)
class Machines:
    """The machine options of the command, as given."""

    workers: int
    per_node: int
    device: str = attrs.field(validator=one_of((*planning.DEVICES, HERE)))
    utilisation: float | None
    memory: float | None = attrs.field(validator=positive)
    tflops: float | None = attrs.field(validator=positive)
    inside: float | None = attrs.field(validator=positive)
    between: float | None = attrs.field(validator=positive)
    latency: float | None = attrs.field(validator=positive)

    def cluster(self, config: Config, world: World) -> Cluster:
        """The cluster that the options describe; all workers must call this."""
        precision = policy(config.train.precision)
        if self.utilisation is not None and (self.device == HERE or self.tflops is not None):
            raise ConfigError(
                "utilisation: it is of a device's peak, and what a worker comes to is "
                f"{'measured' if self.tflops is None else 'given by tflops'}; leave it out"
            )
        more: dict[str, Any] = {
            "memory": _times(self.memory, 2**30),
            "flops": _times(self.tflops, 1e12),
            "utilisation": self.utilisation,
            "inside": _times(self.inside, 1e9),
            "between": _times(self.between, 1e9),
            "latency": _times(self.latency, 1e-6),
        }
        more = {name: value for name, value in more.items() if value is not None}
        if self.device == HERE:
            found = planning.here(world, precision)
            return attrs.evolve(found, workers=self.workers, per_node=self.per_node, **more)
        return planning.cluster(
            self.device,
            self.workers,
            precision,
            per_node=self.per_node,
            **more,
        )


def _times(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit


def planned(config: Config, machines: Machines, world: World) -> str:
    """What a config takes on these machines, as a table; every worker must call this."""
    if not isinstance(config, Pretrain) and config.lora.options():
        raise ConfigError("lora.rank: a plan is for models that are trained whole; leave it out")
    cluster = machines.cluster(config, world)
    _check_shares(config, cluster.workers)
    job = _job(config)
    found = planning.plan(job, cluster, canonical=config.train.reduction == "canonical")
    return shown(found, config, machines)


def _check_shares(config: Config, workers: int) -> None:
    """Raise `ConfigError`, suggesting valid numbers, if micro-batches cannot be shared equally."""
    given, rows = config.train.microbatches, config.train.batch_size
    if given % workers == 0:
        return
    several = -(-given // workers) * workers
    raise ConfigError(
        f"train.microbatches: {given} cannot be shared out to {workers} workers, for they are "
        "those of the whole batch; give a multiple that divides train.batch_size: "
        f"--train.microbatches {several} --train.batch-size {-(-rows // several) * several}"
    )


def _job(config: Config) -> Job:
    architecture, params, buffers = _bare(config)
    made = optimizer(config.optimizer, config.schedule.peak, architecture)
    preference = config.preference if isinstance(config, DPO) else None
    pairs = None if preference is None or preference.unpaired else preference
    coupled = pairs is not None and any(objectives.LOSSES[n].coupled for n in pairs.mix)
    return Job(
        architecture=architecture,
        params=params,
        buffers=buffers,
        optimizer=made,
        rows=config.train.batch_size,
        time=config.data.time,
        microbatches=config.train.microbatches,
        precision=policy(config.train.precision),
        checkpoint=config.train.checkpointed,
        recompute=cast(Recompute, config.train.recompute),
        sides=1 if preference is None else 2,
        paired=pairs is not None
        and config.train.reduction == "fast"
        and not (coupled and config.train.microbatches == 1),
        reference=preference is not None
        and preference.cache is None
        and (preference.unpaired or any(objectives.LOSSES[n].reference for n in preference.mix)),
        average=config.train.ema_decay is not None,
    )


def _bare(config: Config) -> tuple[nn.Module, dict[str, Tensor], Tensors]:
    """The model of a config, without weights; its data need not exist yet."""
    if isinstance(config, Pretrain):
        vocabulary = config.data.vocabulary
        if vocabulary is None and is_tokens(config.data.train):
            raise ConfigError("data.vocabulary: missing; say how many token ids there are")
        shape, size = config.model, vocabulary or ByteTokenizer().vocabulary
        return models.bare(lambda: decoder(shape, size))
    path = Path(config.model.from_)
    if path.is_dir() and is_model(path):
        return models.bare(lambda: models.skeleton(path, torch.float32))
    found = origin(config.model.from_)
    if found.config is None:
        raise ConfigError(
            f"model.from: {path} is a GGUF file, of which a plan knows no shapes; give a directory "
            "with the config.json of that model"
        )
    return bare(found, found.config)


def shown(plan: Plan, config: Config, machines: Machines) -> str:
    """A plan as text for the terminal."""
    work, cluster, job = plan.work, plan.cluster, plan.job
    own = job.microbatches // cluster.workers
    where = "this machine" if machines.device == HERE else machines.device
    layouts = {"replicated": plan.replicated, "sharded": plan.sharded}
    head = ("", *layouts)
    both = list(layouts.values())
    names = list(dict.fromkeys(name for each in both for name in each.memory))
    rows = [
        *((f"{name}, GiB", *(_gib(each.memory.get(name, 0)) for each in both)) for name in names),
        ("memory of a worker, GiB", *(_gib(each.bytes) for each in both)),
        (f"… of {_gib(cluster.memory)}", *(_part(each, cluster) for each in both)),
        *(
            (f"{name}, s", *(_time(each.seconds[name]) for each in both))
            for name in plan.replicated.seconds
        ),
        ("a step, s", *(_time(each.step) for each in both)),
        ("tokens a second", *(f"{each.tokens_per_second:,.0f}" for each in both)),
        ("… a day", *(f"{each.tokens_per_second * 86_400:.3g}" for each in both)),
    ]
    lines = [
        f"{config.stage}: {work.numbers:,} parameters, {cluster.workers:,} workers ({where}, "
        f"{cluster.per_node} to a node), {config.train.precision}, {config.train.reduction}",
        f"a step: {job.rows:,} rows of {job.time:,} tokens"
        f"{' a side' if job.sides > 1 else ''}, {job.microbatches:,} micro-batches, "
        f"{own:,} for each worker; {work.flops * job.microbatches:.3g} operations",
        f"a worker: {cluster.flops / 1e12:.3g} TFLOP/s, memory {cluster.traffic / 1e9:.3g} GB/s, "
        f"exchanges {cluster.bandwidth / 1e9:.3g} GB/s and {cluster.latency * 1e6:.3g} µs for each "
        "doubling of the workers",
        table(head, rows),
    ]
    return "\n".join(lines)


def _gib(count: float) -> str:
    return f"{count / 2**30:,.2f}"


def _part(layout: Layout, cluster: Cluster) -> str:
    part = layout.bytes / cluster.memory
    return f"{part:.0%}" if part <= 1 else f"{part:.0%}: does not fit"


def _time(seconds: float) -> str:
    return f"{seconds:.3g}"
