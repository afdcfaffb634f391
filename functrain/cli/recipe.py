"""The demo's three runs as configs: about a million parameters, in minutes on two cores."""

from __future__ import annotations

from pathlib import Path

from functrain.cli.config import (
    DPO,
    SFT,
    Data,
    Evaluation,
    Model,
    Optimizer,
    Preference,
    Pretrain,
    Schedule,
    Start,
    Text,
    Train,
)
from functrain.errors import ConfigError, did_you_mean

# The bits depend on the number of threads, so the demo fixes it: everyone gets the same run.
THREADS = 2


def recipe(directory: str, *, seed: int, scale: str) -> tuple[Pretrain, SFT, DPO]:
    """Pretraining, fine-tuning and preference optimisation under `directory`.

    `scale` is `full`, or `tiny` for tests, with the same three stages in a few seconds each.
    """
    scales = {"full": _full, "tiny": _tiny}
    if scale not in scales:
        raise ConfigError(f"scale: {scale!r} is unknown; {did_you_mean(scale, scales)}")
    return scales[scale](Path(directory), seed)


def _full(path: Path, seed: int) -> tuple[Pretrain, SFT, DPO]:
    optimizer = Optimizer(weight_decay=0.1, betas=(0.9, 0.95))
    return (
        Pretrain(
            directory=str(path / "pretrain"),
            model=Model(width=128, layers=4, heads=4, kv_heads=2),
            data=Text(time=256),
            optimizer=optimizer,
            schedule=Schedule(
                name="warmup_stable_decay", peak=2e-3, warmup=50, decay=700, min_ratio=0.02
            ),
            train=_train(steps=1500, batch_size=4, seed=seed, save_every=125),
            evaluation=Evaluation(every=250),
        ),
        SFT(
            directory=str(path / "sft"),
            model=Start(from_=str(path / "pretrain")),
            data=Data(time=320),
            optimizer=optimizer,
            schedule=Schedule(name="cosine", peak=1e-3, warmup=20),
            train=_train(steps=300, batch_size=8, seed=seed, save_every=50),
            evaluation=Evaluation(every=100),
        ),
        DPO(
            directory=str(path / "dpo"),
            model=Start(from_=str(path / "sft")),
            preference=Preference(loss="sigmoid", beta=0.1),
            data=Data(time=320),
            optimizer=optimizer,
            schedule=Schedule(name="cosine", peak=3e-4, warmup=10),
            train=_train(steps=80, batch_size=16, seed=seed, save_every=20),
            evaluation=Evaluation(every=20),
        ),
    )


def _train(*, steps: int, batch_size: int, seed: int, save_every: int) -> Train:
    """`save_every`: about twenty seconds of steps on two cores."""
    return Train(
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        save_every=save_every,
        threads=THREADS,
        device="cpu",
    )


def _tiny(path: Path, seed: int) -> tuple[Pretrain, SFT, DPO]:
    train = Train(steps=12, batch_size=4, seed=seed, save_every=3, threads=1, device="cpu", keep=2)
    evaluation, schedule = Evaluation(every=6, limit=4), Schedule(peak=1e-2, warmup=2)
    return (
        Pretrain(
            directory=str(path / "pretrain"),
            model=Model(width=16, layers=1, heads=2, kv_heads=1, dropout=0.1),
            data=Text(time=32, limit=400),
            schedule=schedule,
            train=train,
            evaluation=evaluation,
        ),
        SFT(
            directory=str(path / "sft"),
            model=Start(from_=str(path / "pretrain")),
            data=Data(time=96, limit=400),
            schedule=schedule,
            train=train,
            evaluation=evaluation,
        ),
        DPO(
            directory=str(path / "dpo"),
            model=Start(from_=str(path / "sft")),
            data=Data(time=96, limit=400),
            schedule=schedule,
            train=train,
            evaluation=evaluation,
        ),
    )
