"""One process at a time trains in a run's directory."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager

from functrain.checkpoint.filesystem import OPERATING_SYSTEM
from functrain.cli.directory import LOCK, cleared, failed, unwritten
from functrain.cli.origins import RunDirectory
from functrain.errors import ConfigError


@contextmanager
def held(run: RunDirectory, *, new: bool) -> Generator[None]:
    """Lock a run's directory, so that no other process trains in it; a kill releases the lock.

    Raises `ConfigError` if another process holds it, or has begun what was to be a `new` run. For a
    new run, the remains of a failed beginning are removed.
    """
    with ExitStack() as stack:
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(OPERATING_SYSTEM.locked(run.path / LOCK))
        except BlockingIOError as error:
            raise ConfigError(
                f"{run.path}: another process is training here; wait for it or end it, or give "
                "another --directory"
            ) from error
        except FileExistsError as error:  # though there is no directory: a dangling link
            raise ConfigError(
                f"{error.filename}: a link to what is not there; make that, or give another "
                "--directory"
            ) from error
        except OSError as error:
            raise unwritten(run.path, error) from error
        if new and failed(run):
            cleared(run)
        if new and run.config.exists():
            raise ConfigError(
                f"{run.path}: another process has begun a run here; go on with --resume, or give "
                "another --directory"
            )
        yield
