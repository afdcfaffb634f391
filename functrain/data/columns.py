"""Records that were columns (Parquet, `datasets`), where an absent field is a null."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from functrain.checks import PathLike
from functrain.data.files import UnreadableError
from functrain.errors import DataError

_DIALOGUES = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")


def rows(path: PathLike) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file as records, read a group at a time.

    Raises `DataError` where pyarrow is not installed or cannot read the file, and for a value that
    Python cannot hold: text that is not UTF-8, a year after 9999, an unknown time zone.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UnreadableError(
            f"{path}: Parquet is read with pyarrow; pip install 'functrain[data]'"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(os.fspath(path)) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from (record(row) for row in _unpacked(batch))
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        if isinstance(error, OSError) and error.errno:  # a damaged file has none
            raise UnreadableError(f"{path}: cannot be read ({reason})") from error
        raise DataError(f"{path}: no Parquet file that can be read ({reason})") from error
    except (ValueError, OverflowError, KeyError) as error:
        raise DataError(
            f"{path}: holds a value that cannot be read ({type(error).__name__}: {error}); write "
            "the file without its column, or as text in UTF-8"
        ) from error


def _unpacked(batch: Any) -> list[dict[str, Any]]:
    """The rows of a batch; a map is an object, as it would be in JSON, and not a list of pairs.

    But where keys of any map are objects or lists themselves, all are lists of pairs.
    """
    try:
        rows: list[dict[str, Any]] = batch.to_pylist(maps_as_pydicts="lossy")
    except TypeError:
        rows = batch.to_pylist()
    return rows


def are_columns(records: object) -> bool:
    """Whether records are a dataset of Hugging Face's, whose rows come from columns."""
    home = type(records).__module__.partition(".")[0]
    return home == "datasets" and hasattr(records, "features")


def record(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as a record: without nulls at any depth, and with messages as a list of objects.

    A column has a field for whatever any row has, so an absent one is written as null.
    """
    found: dict[str, Any] = _present(row)
    for name in _DIALOGUES:
        if isinstance(found.get(name), dict):
            found[name] = _listed(found[name])
    return found


def _present(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _present(each) for name, each in value.items() if each is not None}
    return [_present(each) for each in value] if isinstance(value, list) else value


def _listed(columns: dict[str, Any]) -> Any:
    """Lists of roles and contents as messages; anything else stays as it is."""
    sizes = {len(each) if isinstance(each, list) else -1 for each in columns.values()}
    if len(sizes) != 1 or sizes == {-1}:
        return columns
    parts = (zip(columns, each, strict=True) for each in zip(*columns.values(), strict=True))
    return [{name: each for name, each in part if each is not None} for part in parts]
