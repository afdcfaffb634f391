"""Where fine-tuning starts: a run, one of its checkpoints, or a model of transformers."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path

import attrs

from functrain.cli import toml
from functrain.cli.config import Config, Model
from functrain.errors import ConfigError

STAGE_ORDER = ("dpo", "sft", "pretrain")
_CHECKPOINT = re.compile("step-[0-9]{12}")
# The files of a transformers directory from which the model and its tokenizer are read.
_READ = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template.*",
)


@attrs.frozen
class RunDirectory:
    """The layout of a run directory."""

    path: Path = attrs.field(converter=Path)

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.toml"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer."""
        return self.path / "tokenizer.json"

    @property
    def tokenizer_files(self) -> Path:
        """A directory with the transformers tokenizer, if the run has one."""
        return self.path / "tokenizer"

    @property
    def checkpoints(self) -> Path:
        """The directory of checkpoints, each a directory itself."""
        return self.path / "checkpoints"

    @property
    def used(self) -> Path:
        """A directory of the steps that other runs start from; see `functrain.cli.holding`."""
        return self.path / "used"

    @property
    def metrics(self) -> Path:
        """The metrics, a line of JSON for each logged step."""
        return self.path / "metrics.jsonl"

    @property
    def notes(self) -> Path:
        """What was read, dropped and truncated, one line each."""
        return self.path / "data.txt"

    @property
    def environment(self) -> Path:
        """Where the last sitting computed."""
        return self.path / "environment.json"

    @property
    def report(self) -> Path:
        """The report, as HTML."""
        return self.path / "report.html"


def located(path: Path) -> Path:
    """The path, made absolute where a checkpoint's path lacks its run (`.` or a bare name)."""
    whole = path.absolute()
    kept = _CHECKPOINT.fullmatch(whole.name) and _is_run(whole.parent.parent)
    return whole if kept and not _is_run(path.parent.parent) else path


def _is_run(path: Path) -> bool:
    return RunDirectory(path).config.is_file()


def stage_directory(path: Path) -> Path:
    """The run directory that `path` is, contains (a demo's last stage), or is in (a checkpoint)."""
    path, what = located(path), "not there"
    if path.exists():
        stages = [path / stage for stage in STAGE_ORDER if (path / stage / "checkpoints").is_dir()]
        for found in (path, *stages, path.parent, path.parent.parent, path.absolute().parent):
            if _is_run(found):
                return found
        what = "no run's directory (it has no config.toml)"
    raise ConfigError(
        f"{path}: {what}; expected a run as `functrain pretrain` makes it, or a model of "
        "transformers (config.json and safetensors, or a .gguf file)"
    )


@attrs.frozen(kw_only=True)
class Origin:
    """Where fine-tuning starts: weights, their hash, and the config of the run that made them.

    `checkpoint`: a run's, or a directory or GGUF file that transformers reads; for these `config`
    is None.
    """

    checkpoint: Path
    sha256: str
    config: Config | None = None

    @property
    def shape(self) -> Model | None:
        """The shape of the built-in decoder; None for a transformers model."""
        model = None if self.config is None else self.config.model
        return model if model is None or isinstance(model, Model) else model.shape

    @property
    def run(self) -> RunDirectory:
        """The directory of its run; for a transformers model, one that does not exist."""
        return RunDirectory(self.checkpoint.parent.parent)


def is_model(path: Path) -> bool:
    """Whether it is a transformers model outside any run: a directory, or a GGUF file."""
    if path.is_file():
        return path.suffix == ".gguf"
    if _CHECKPOINT.fullmatch(path.name) or (path / "manifest.json").exists():
        return False
    return (path / "config.json").is_file()


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted({each for pattern in _READ for each in path.glob(pattern) if each.is_file()})


def _stamps(path: Path) -> tuple[tuple[str, int, int], ...]:
    stats = [(each.name, each.stat()) for each in _files(path)]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


@functools.lru_cache(maxsize=8)
def _hash_of(path: Path, _stamps: tuple[tuple[str, int, int], ...]) -> str:
    """The hash of all files that a model is read from, cached by `_stamps` since they are large."""
    hasher = hashlib.sha256()
    for each in _files(path):
        with each.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        hasher.update(f"{each.name}\0{digest}\0".encode())
    return hasher.hexdigest()


_ATTEMPTS = 100


def origin(given: str, key: str = "model.from") -> Origin:
    """The checkpoint that `given` names; `ConfigError`, beginning with `key`, if there is none."""
    path = located(Path(given))
    if not path.exists():
        raise ConfigError(
            f"{key}: {given} is not there (looked from {Path.cwd()}); models are read from the disk"
        )
    if is_model(path):
        return Origin(checkpoint=path, sha256=_hash_of(path, _stamps(path)))
    try:
        run = stage_directory(path)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error
    for _ in range(_ATTEMPTS):
        inside = sorted(RunDirectory(run).checkpoints.glob(f"step-{'[0-9]' * 12}"))
        checkpoint = path if _CHECKPOINT.fullmatch(path.name) else (inside[-1] if inside else None)
        if checkpoint is None:
            raise ConfigError(f"{key}: {given} has no checkpoint yet; train it first")
        try:
            digest = hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()
        except OSError as error:
            # A run in progress may have pruned the newest just now: then there is a newer one.
            if checkpoint == path or checkpoint.is_dir():
                raise ConfigError(
                    f"{key}: {checkpoint} is incomplete: no manifest.json ({error.strerror})"
                ) from error
            continue
        config = toml.read_any(RunDirectory(run).config)
        return Origin(checkpoint=checkpoint, config=config, sha256=digest)
    raise ConfigError(f"{key}: the checkpoints of {given} vanish faster than they can be read")
