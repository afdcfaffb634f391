"""Reference log-probs computed ahead of training: attached to batches, and cached on disk."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeGuard

import attrs
import orjson
import torch
from torch import Tensor, nn

from functrain import keys
from functrain.architecture import (
    Slots,
    bound,
    check_fit,
    check_reference,
    slots,
)
from functrain.checks import PathLike, as_path, boolean, check_integer
from functrain.data.source import Source
from functrain.descriptions import description, vocabulary_of
from functrain.errors import BatchError, ConfigError, DataError
from functrain.forward import forward_buffers, forward_values
from functrain.gradients import indexing
from functrain.objectives.batches import Batch, split_batch, to_device
from functrain.objectives.layouts import LayoutName, check_layout, laid_out, layout_name
from functrain.objectives.logprobs import HeadMode, head_mode
from functrain.objectives.options import own_tensors
from functrain.objectives.pairs import SIDES, check_pairs, concatenated, last_target
from functrain.objectives.reference import reference_scores
from functrain.objectives.unpaired import UNPAIRED, check_completed
from functrain.precision import POLICIES, Precision, policy
from functrain.state import device_of
from functrain.trees import Tensors, digest
from functrain.writing import append

Attach = Callable[[Batch], Batch]
_FORMAT = "functrain reference log-probs"


def _own_buffers(value: Mapping[str, Tensor]) -> Tensors:
    return own_tensors(value, "buffers")


@attrs.frozen(eq=False)
class AttachReference:
    """A function that adds `reference_logps` to a batch; see `attach_reference`."""

    architecture: nn.Module = attrs.field(repr=False)
    reference: Tensors = attrs.field(repr=False, converter=own_tensors)
    buffers: Tensors = attrs.field(repr=False, converter=_own_buffers)
    precision: Precision = attrs.field(converter=policy)
    by_token: bool = attrs.field(validator=boolean)
    head: HeadMode = attrs.field(validator=head_mode)
    layout: LayoutName = attrs.field(default="padded", validator=layout_name)

    def __attrs_post_init__(self) -> None:
        places = slots(self.architecture)
        check_reference(self.reference, places.params)
        check_fit(self.buffers, places.buffers, "buffers")

    def __call__(self, batch: Batch) -> Batch:
        """The batch with the reference's log-probs of its sides, on the batch's device.

        Raises `BatchError` for what `check` refuses, and for an index that is out of the model's
        range.
        """
        sides = self.check(batch)
        device = device_of(self.reference)
        moved = to_device({side: batch[side] for side in sides}, device)
        places = slots(self.architecture)
        values = forward_values(_widened(self.reference, places), places, self.precision)
        buffers = forward_buffers(self.buffers, places, self.precision)
        with (
            torch.no_grad(),
            torch.inference_mode(False),
            bound(self.architecture, values, buffers, "eval", places=places) as model,
            keys.seeded(0, device),
            torch.autocast(device.type, enabled=False),
            self.precision.context(device),
            indexing(),
        ):
            found = self._scored(model, moved, sides)
        home = batch[sides[0]]["input_ids"].device
        return {**batch, "reference_logps": {s: t.to(home) for s, t in found.items()}}

    def check(self, batch: Batch) -> tuple[str, ...]:
        """The names of the two sides of a batch that are scored.

        Raises `BatchError` unless they are well formed and match each other, as a step requires.
        """
        sides = _sides(batch)
        # The batch's other entries are for its objective to check.
        given = {side: batch[side] for side in sides if side in batch}
        vocabulary = vocabulary_of(self.architecture)
        if sides == SIDES:
            check_pairs(given, vocabulary)
            check_layout(self.layout, given)
            return sides
        check_completed(given, vocabulary)
        if self.layout != "padded":
            raise BatchError(
                f"batch: completions without a pair, and layout={self.layout!r} is for pairs; "
                "attach them with layout='padded'"
            )
        return sides

    def _scored(self, model: nn.Module, batch: Batch, sides: Sequence[str]) -> dict[str, Tensor]:
        """Score the sides; pairs in one forward, as the step does, to have the step's bits."""
        if tuple(sides) == SIDES:
            joined = concatenated(batch["chosen"], batch["rejected"])
            layout = laid_out(self.layout, model, joined)
            scores = reference_scores(
                model, self.reference, joined, head=self.head, layout=layout, paired=True
            )
            halves = (scores.logps if self.by_token else scores.sums).chunk(2)
            return {s: self._cut(half, batch[s]) for s, half in zip(sides, halves, strict=True)}
        found = {}
        for side in sides:
            scores = reference_scores(model, self.reference, batch[side], head=self.head)
            found[side] = scores.logps if self.by_token else scores.sums
        return found

    def _cut(self, half: Tensor, side: Batch) -> Tensor:
        return half[:, : side["input_ids"].shape[1] - 1] if self.by_token else half

    @property
    def fingerprint(self) -> str:
        """A hash of all that the log-probs depend on besides the batch.

        That is the architecture, the values, the precision and the form (`by_token`). Layout and
        head are not in it, since they change log-probs by rounding only.
        """
        hasher = hashlib.sha256(f"{_computing(self.precision)}\0{self.by_token}\0".encode())
        hasher.update(f"{description(self.architecture)}\0".encode())
        for kind, items in (("params", self.reference), ("buffers", self.buffers)):
            for name, tensor in items.items():
                hasher.update(f"{kind}/{name}\0{digest(tensor)}\0".encode())
        return hasher.hexdigest()


def _computing(precision: Precision) -> str:
    """What log-probs depend on in a precision: its dtypes, for which the known names stand."""
    known, dtypes = POLICIES.get(precision.name), (precision.autocast, precision.cast)
    if known is not None and dtypes == (known.autocast, known.cast):
        return precision.name
    return f"autocast={precision.autocast} cast={precision.cast}"


def _widened(reference: Tensors, places: Slots) -> Tensors:
    """The reference with trainable params in at least 32 bits, as a step would hold them."""
    narrow = {n for n in places.trainable if reference[n].dtype.itemsize < 4}
    if not narrow:
        return reference
    return Tensors({n: t.float() if n in narrow else t for n, t in reference.items()})


def attach_reference(
    architecture: nn.Module,
    reference: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor] | None = None,
    *,
    precision: str | Precision = "fp32",
    by_token: bool = False,
    head: HeadMode = "auto",
    layout: LayoutName = "padded",
) -> AttachReference:
    """A function that adds `reference_logps` to batches of pairs, or of KTO's examples.

    They are sums over completions, float [examples]; with `by_token`, one per token, float
    [examples, time − 1]. A step then needs no reference of its own:
    `dpo_step(architecture, optimizer)`. Under the step's `precision` and `layout` and on the same
    batch, the bits are those of the online reference of a step that does not compile. `buffers`:
    those that `functrain.split` returned.

    Raises `ArchitectureError` if params or buffers have other names than the architecture's,
    `StateError` for other shapes, integers and tensors on the meta device, and `ConfigError` for an
    unknown `precision`, `head` or `layout`, a `by_token` that is no boolean, and a `reference` or
    `buffers` that is no mapping of tensors.
    """
    buffers = {} if buffers is None else buffers
    return AttachReference(architecture, reference, buffers, precision, by_token, head, layout)


def _sides(batch: Batch) -> tuple[str, ...]:
    for sides in (SIDES, UNPAIRED):
        if isinstance(batch, Mapping) and all(side in batch for side in sides):
            return sides
    raise BatchError(
        "batch: expected chosen and rejected, or completion and mismatched, to score with the "
        "reference"
    )


def example_keys(side: Batch) -> list[str]:
    """A hash of each example of a side: tokens, labels, mask, positions, up to its last target."""
    ids, labels = side["input_ids"].cpu(), side["labels"].cpu()
    columns = [ids.to(torch.int64), labels]
    columns += [side[key].cpu().to(torch.int64) for key in _EXTRA if key in side]
    # Positions without a mask could be taken for a mask. Only they are named in the hash, so that
    # all other hashes stay those in caches of earlier versions.
    name = b"position_ids" if "position_ids" in side and "attention_mask" not in side else b""
    ends = (last_target(labels) + 1).tolist()
    found = []
    for row, end in enumerate(ends):
        hasher = hashlib.blake2b(name, digest_size=16)
        for column in columns:
            hasher.update(column[row, :end].contiguous().numpy().data)
            hasher.update(b"\0")
        found.append(hasher.hexdigest())
    return found


_EXTRA = ("attention_mask", "position_ids")


class ReferenceCache:
    """Reference log-probs on disk, by the reference's fingerprint and each example's hash.

        with ReferenceCache("runs/reference.jsonl", functrain.attach_reference(…)) as cache:
            batch = cache(batch)

    A call looks up the known examples and computes the rest, which it writes at once, so that an
    interrupted run continues where it was. A row is scored in the batch in which it first occurs;
    in a batch of another shape its last bits may differ.

    The file is JSON Lines: a header, then `{"example", "logp"}`. If `attach` was made with
    `by_token`, `logp` is a list, of every token after the first up to the last target. A last line
    torn by a kill is removed; a file that is no cache is left as it is.

    Raises `DataError` for a file that is no cache, for a cache of another reference, architecture,
    precision or form, if another process is writing it, and if it cannot be written, as on a full
    disk: it is then as it was before that call. Raises `BatchError` for a non-finite log-prob.
    """

    def __init__(self, path: PathLike, attach: AttachReference) -> None:
        if not isinstance(attach, AttachReference):
            raise ConfigError(
                f"attach: {type(attach).__name__}, expected what functrain.attach_reference makes, "
                "by whose fingerprint the log-probs are known"
            )
        self.path, self.attach = as_path("path", path), attach
        self.computed = 0
        self._known: dict[str, float | list[float]] = {}
        self._file = self._opened()

    def __enter__(self) -> ReferenceCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __len__(self) -> int:
        """The number of known examples."""
        return len(self._known)

    def __call__(self, batch: Batch, *, microbatches: int = 1) -> Batch:
        """The batch with its `reference_logps`, as float64 on the CPU.

        `microbatches`: the number of slices in which unknown examples are computed, as the step
        takes them. Raises `BatchError` as `attach` does, `ConfigError` unless `microbatches` is an
        integer of at least 1, and `DataError` after `close`.
        """
        if self._file.closed:
            raise DataError(
                f"{self.path}: the cache is closed; open it again, ReferenceCache(path, attach)"
            )
        check_integer("microbatches", microbatches)
        sides = self.attach.check(batch)
        rows = {side: example_keys(batch[side]) for side in sides}
        missing = [key for side in sides for key in rows[side] if key not in self._known]
        if missing:
            first = 0
            for part in split_batch({side: batch[side] for side in sides}, microbatches):
                after = first + len(part[sides[0]]["labels"])
                self._compute(part, {side: keys[first:after] for side, keys in rows.items()}, first)
                first = after
        logps = {side: self._tensor(rows[side], batch[side]) for side in sides}
        return {**batch, "reference_logps": logps}

    def _tensor(self, rows: Sequence[str], side: Batch) -> Tensor:
        known: list[Any] = [self._known[key] for key in rows]
        if self.attach.by_token:
            time = side["labels"].shape[1]
            known = [row + [0.0] * (time - 1 - len(row)) for row in known]
        return torch.tensor(known, dtype=torch.float64, device="cpu")

    def close(self) -> None:
        """Make what was written durable, and let another process write.

        Closing twice does nothing. Raises `DataError` if the file cannot be written.
        """
        if self._file.closed:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            self._file.close()

    def _compute(self, batch: Batch, rows: Mapping[str, list[str]], first: int) -> None:
        """Compute and write a slice of a batch; `first`: the index of its first example there."""
        found = self.attach(batch)["reference_logps"]
        _check_finite(found, first)
        fresh: dict[str, float | list[float]] = {}
        for side, names in rows.items():
            values = found[side].double().tolist()
            if self.attach.by_token:
                ends = last_target(batch[side]["labels"]).tolist()
                values = [row[:end] for row, end in zip(values, ends, strict=True)]
            for name, value in zip(names, values, strict=True):
                if name not in self._known:
                    fresh.setdefault(name, value)
        lines = [orjson.dumps({"example": n, "logp": value}) + b"\n" for n, value in fresh.items()]
        self._append(self._file, b"".join(lines))
        self._known |= fresh
        self.computed += len(fresh)

    def _append(self, file: io.FileIO, data: bytes) -> None:
        try:
            append(file, data)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(f"{self.path}: cannot be written ({error.strerror}); what it has stays")

    def _opened(self) -> io.FileIO:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error.strerror})") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read(file)
        except BlockingIOError as error:
            file.close()
            raise DataError(f"{self.path}: another process is writing it") from error
        except OSError as error:
            file.close()
            raise self._unwritable(error) from error
        except BaseException:
            file.close()
            raise
        return file

    def _read(self, file: io.FileIO) -> None:
        file.seek(0)
        data = file.read()
        header = {"format": _FORMAT, "reference": self.attach.fingerprint, "version": 1}
        begun = orjson.dumps(header) + b"\n"
        if data != begun and begun.startswith(data):
            file.truncate(0)
            self._append(file, begun)
            return
        self._check_header(data.partition(b"\n")[0], header)
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines()[1:], start=2):
            self._take(_object(line), f"{self.path}:{number}")
        # Cut only now that this is known to be its cache; another file's end is not ours to cut.
        if whole < len(data):
            file.truncate(whole)

    def _check_header(self, line: bytes, header: Mapping[str, Any]) -> None:
        found = _object(line)
        if found.get("format") != _FORMAT:
            raise DataError(
                f"{self.path}: no cache of functrain, and left as it is; expected a new file, or "
                f"one whose first line says {_FORMAT!r}; give another path"
            )
        if found != header:
            raise DataError(
                f"{self.path}: of another reference, architecture, precision or form than this one "
                f"({self.attach.fingerprint[:12]}…); give another path, or remove the file"
            )

    def _take(self, entry: Mapping[str, Any], where: str) -> None:
        name, value = entry.get("example"), entry.get("logp")
        if entry.keys() != {"example", "logp"} or not isinstance(name, str):
            raise DataError(f"{where}: expected an example and its logp")
        if not self._fits(value):
            expected = "a list of numbers" if self.attach.by_token else "a number"
            raise DataError(f"{where}: logp is {value!r}, expected {expected}")
        self._known[name] = value

    def _fits(self, value: object) -> TypeGuard[float | list[float]]:
        if not self.attach.by_token:
            return type(value) is float
        return isinstance(value, list) and all(type(each) is float for each in value)


def _check_finite(found: Mapping[str, Tensor], first: int) -> None:
    """Raise `BatchError` for non-finite log-probs, which JSON would hold as an unreadable null."""
    for side, logps in found.items():
        bad = ~logps.isfinite()
        bad = bad.any(-1) if bad.ndim == 2 else bad
        if bool(bad.any()):
            example = int(bad.nonzero()[0])
            raise BatchError(
                f"{side}: the reference's log-prob of example {first + example} is "
                f"{float(logps[example].sum())}, expected a finite number; nothing of it is "
                "written; look at the reference's params, or take a wider precision"
            )


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


@attrs.frozen(eq=False)
class Referenced:
    """A source whose batches have `reference_logps`, from `attach_reference` or a cache."""

    source: Source
    attach: Attach

    @property
    def batch_size(self) -> int:
        """The source's batch size."""
        return self.source.batch_size

    def __len__(self) -> int:
        """The source's length."""
        return len(self.source)

    def at(self, position: int, n: int) -> Batch:
        """The source's batch with the reference's log-probs."""
        return self.attach(self.source.at(position, n))
