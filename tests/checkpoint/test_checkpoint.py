"""Checkpoints: what is saved is what is loaded, and what was altered is refused by name."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import attrs
import pytest
import safetensors.torch
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import functrain as ft
from functrain import checkpoint, memory
from functrain.checkpoint import layout, manifest
from functrain.checkpoint.files import hashed
from functrain.checkpoint.filesystem import OPERATING_SYSTEM, FileSystem
from functrain.checkpoint.manifest import as_json, read_manifest, to_bytes
from functrain.errors import SaveWarning

OPTIMIZERS: dict[str, Any] = {
    "adamw": ft.optim.adamw(1e-2),
    "amsgrad": ft.optim.adam(amsgrad=True),
    "sgd": ft.optim.sgd(momentum=0.9),
    "adafactor": ft.optim.adafactor(),
    "muon": ft.optim.muon(),
}


def _trained(name: str = "tied", steps: int = 2, **options: Any) -> tuple[Any, Any, Any]:
    """A step, its first state and a later one."""
    architecture, params, buffers = zoo.split(name)
    step = ft.pretrain_step(architecture, options.pop("optimizer", ft.optim.adamw(1e-2)), **options)
    first = step.init(params, buffers, seed=2**62 + 1)
    state = first
    for count in range(steps):
        state, _ = step(state, zoo.batch(count))
    return step, first, state


@pytest.mark.parametrize("name", sorted(zoo.MODELS))
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("steps", [0, 2])
def test_a_loaded_state_is_the_saved_one(
    name: str, optimizer: str, steps: int, tmp_path: Path
) -> None:
    _, first, state = _trained(
        name, steps, optimizer=OPTIMIZERS[optimizer], precision="fp16", ema_decay=0.9
    )
    assert ft.save(tmp_path, state) == tmp_path / f"step-{steps:012d}"
    for like in (first, state):
        loaded = ft.load(tmp_path, like=like)
        assert ft.fingerprints(loaded) == ft.fingerprints(state)
        assert list(loaded.params) == list(state.params)


@given(
    numbers=st.fixed_dictionaries(
        {"key": st.integers(0, 2**63 - 1), "step": st.integers(0, 10**12 - 1)}
    ),
    samples=st.integers(0, 2**62),
    tokens=st.integers(0, 2**62),
    loader=st.none() | st.text(st.characters(exclude_categories=["Cs"])),
    best=st.floats(),
    rate=st.floats(0, 1),
)
def test_every_number_comes_back(
    numbers: Any,
    samples: int,
    tokens: int,
    loader: str | None,
    best: float,
    rate: float,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    schedule = ft.schedules.reduce_on_plateau(1e-2)
    _, first, state = _trained(schedule=schedule, steps=0)
    plateau = attrs.evolve(state.scheduler.plateau, best=best, learning_rate=rate, bad=3)
    state = attrs.evolve(
        state,
        **numbers,
        cursor=ft.Cursor(samples=samples, tokens=tokens, loader=loader),
        scheduler=attrs.evolve(state.scheduler, plateau=plateau),
    )
    directory = tmp_path_factory.mktemp("run")
    ft.save(directory, state)
    assert ft.fingerprints(ft.load(directory, like=first)) == ft.fingerprints(state)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_every_dtype_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    _, _, state = _trained()
    cast = {name: tensor.to(dtype) for name, tensor in state.params.items()}
    state = attrs.evolve(state, params=ft.trees.Tensors(cast))
    ft.save(tmp_path, state)
    assert ft.fingerprints(ft.load(tmp_path, like=state)) == ft.fingerprints(state)


def test_views_of_one_storage_are_saved_and_loaded(tmp_path: Path) -> None:
    step, first, _ = _trained()
    flat = torch.randn(sum(p.numel() for p in first.params.values()))
    views, at = {}, 0
    for name, param in first.params.items():
        views[name] = flat[at : at + param.numel()].view(param.shape)
        at += param.numel()
    state = step.init(views, first.buffers)
    ft.save(tmp_path, state)
    assert ft.fingerprints(ft.load(tmp_path, like=state)) == ft.fingerprints(state)


def test_the_model_file_holds_the_modules_own_names(tmp_path: Path) -> None:
    _, _, state = _trained()
    path = ft.save(tmp_path, state)
    model = safetensors.torch.load_file(path / "model.safetensors")
    assert sorted(model) == list(state.params)
    other = zoo.model("tied")
    other.load_state_dict(model, strict=False)
    assert torch.equal(other.get_parameter("mix.bias"), state.params["mix.bias"])


def test_params_and_buffers_load_whatever_the_optimizer_was(tmp_path: Path) -> None:
    _, first, state = _trained("normed", optimizer=ft.optim.sgd())
    ft.save(tmp_path, state)
    params, buffers = checkpoint.load_model(tmp_path, first.params, first.buffers)
    assert all(torch.equal(params[n], t) for n, t in state.params.items())
    assert all(torch.equal(buffers[n], t) for n, t in state.buffers.items())
    _, other, _ = _trained("tied")
    with pytest.raises(ft.CheckpointError, match="another architecture"):
        checkpoint.load_model(tmp_path, other.params, other.buffers)


def test_saving_a_step_again_is_fine_where_it_is_the_same(tmp_path: Path) -> None:
    _, first, state = _trained()
    assert ft.save(tmp_path, state) == ft.save(tmp_path, state)
    other = attrs.evolve(state, key=5)
    with pytest.raises(ft.CheckpointError, match="holds another state"):
        ft.save(tmp_path, other)
    assert ft.fingerprint(ft.load(tmp_path, like=first)) == ft.fingerprint(state)


def test_a_killed_save_is_no_checkpoint_and_is_swept_away(tmp_path: Path) -> None:
    _, first, state = _trained()
    torn = tmp_path / ".tmp-step-000000000009"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    assert ft.latest(tmp_path) is None
    with pytest.raises(ft.CheckpointError, match="holds no checkpoint"):
        ft.load(tmp_path, like=first)
    ft.save(tmp_path, state)
    assert not torn.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "step-000000000002"]


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    _, _, state = _trained()
    for count in (3, 1, 20, 4):
        ft.save(tmp_path, attrs.evolve(state, step=count))
    checkpoint.prune(tmp_path, 2)
    assert [int(p.name[5:]) for p in sorted(tmp_path.glob("step-*"))] == [4, 20]
    assert ft.latest(tmp_path) == tmp_path / "step-000000000020"
    with pytest.raises(ft.CheckpointError, match="keep: last=0"):
        checkpoint.prune(tmp_path, 0)


def test_what_could_not_be_read_just_now_is_not_put_aside(tmp_path: Path) -> None:
    """Only what is missing, cut short or altered is damaged; an intact one stays in its place."""

    class Busy(FileSystem):
        def open(self, path: Path) -> int:
            if path.name == "model.safetensors":
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return super().open(path)

    _, first, state = _trained()
    ft.save(tmp_path, state)
    for again in (state, attrs.evolve(state, key=5)):
        with pytest.raises(ft.CheckpointError, match="Too many open files"):
            ft.save(tmp_path, again, filesystem=Busy())
    assert ft.fingerprint(ft.load(tmp_path, like=first)) == ft.fingerprint(state)
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "step-000000000002"}


def test_a_file_named_like_a_checkpoint_is_none(tmp_path: Path) -> None:
    _, first, state = _trained()
    (tmp_path / "step-000000000009").write_text("notes")
    assert ft.latest(tmp_path) is None
    path = ft.save(tmp_path, state)
    assert ft.latest(tmp_path) == path
    assert ft.fingerprint(ft.load(tmp_path, like=first)) == ft.fingerprint(state)


def test_two_runs_may_make_the_directory_above_at_once(tmp_path: Path) -> None:
    class Race(FileSystem):
        def mkdir(self, path: Path) -> None:
            if path.name == "runs":
                path.mkdir()
            super().mkdir(path)

    _, _, state = _trained()
    path = ft.save(tmp_path / "runs" / "mine", state, filesystem=Race())
    assert ft.latest(tmp_path / "runs" / "mine") == path


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_the_umask_says_who_may_save(umask: int, tmp_path: Path) -> None:
    _, _, state = _trained()
    before = os.umask(umask)
    try:
        ft.save(tmp_path, state)
    finally:
        os.umask(before)
    assert (tmp_path / ".lock").stat().st_mode & 0o777 == 0o666 & ~umask


def test_two_runs_in_one_directory_do_not_save_at_once(tmp_path: Path) -> None:
    import fcntl

    _, _, state = _trained()
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ft.CheckpointError, match="another process is saving here"):
            ft.save(tmp_path, state)
    ft.save(tmp_path, state)


FILES = [
    "model.safetensors",
    "buffers.safetensors",
    "optimizer.safetensors",
    "extra.safetensors",
    "state.json",
    "manifest.json",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """Of a run the first state, the last, and its checkpoint."""
    _, first, state = _trained()
    return first, state, ft.save(tmp_path_factory.mktemp("run"), state)


@pytest.mark.parametrize("file", FILES)
@given(data=st.data())
def test_an_altered_file_is_refused(
    file: str, data: st.DataObject, run: tuple[Any, Any, Path]
) -> None:
    first, state, path = run
    original = (path / file).read_bytes()
    bit = data.draw(st.integers(0, 8 * len(original) - 1))
    flipped = bytearray(original)
    flipped[bit // 8] ^= 1 << bit % 8
    cut = original[: data.draw(st.integers(0, len(original) - 1))]
    try:
        for altered in (bytes(flipped), cut):
            (path / file).write_bytes(altered)
            with pytest.raises(ft.CheckpointError, match=str(path)):
                ft.load(path, like=first)
    finally:
        (path / file).write_bytes(original)
    assert ft.fingerprint(ft.load(path, like=first)) == ft.fingerprint(state)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(file: str, tmp_path: Path) -> None:
    _, first, state = _trained()
    path = ft.save(tmp_path, state)
    (path / file).unlink()
    with pytest.raises(ft.CheckpointError, match=rf"{file}: cannot be read .*incomplete"):
        ft.load(path, like=first)
    (path / file).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ft.CheckpointError, match=file):
        ft.load(path, like=first)
    (path / file).unlink()
    os.mkfifo(path / file)
    with pytest.raises(ft.CheckpointError, match=rf"{file}: not a regular file"):
        ft.load(path, like=first)


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    _, first, _ = _trained()
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("nowhere", "does not exist"),
        ("file", "is a file"),
        ("empty", "holds no checkpoint"),
    ):
        with pytest.raises(ft.CheckpointError, match=message):
            ft.load(tmp_path / name, like=first)


def test_a_checkpoint_of_something_else_is_named(tmp_path: Path) -> None:
    _, _, state = _trained(precision="fp16", ema_decay=0.5)
    ft.save(tmp_path, state)
    likes = {
        "another architecture": _trained("normed", precision="fp16", ema_decay=0.5),
        "optimizer 'adamw', and `like` has 'SGD'": _trained(optimizer=ft.optim.sgd()),
        "another precision": _trained(ema_decay=0.5),
        "another ema_decay": _trained(precision="fp16"),
        "another schedule": _trained(
            precision="fp16", ema_decay=0.5, schedule=ft.schedules.reduce_on_plateau(1e-2)
        ),
    }
    for message, (_, like, _) in likes.items():
        with pytest.raises(ft.CheckpointError, match=message):
            ft.load(tmp_path, like=like)


def test_a_step_evolved_from_a_plateau_to_another_schedule_loads_what_it_saved(
    tmp_path: Path,
) -> None:
    """What the plateau has seen stays in the state: the old step may go on from there."""
    plateau, first, state = _trained(schedule=ft.schedules.reduce_on_plateau(1e-2))
    state = plateau.observe(state, 2.5)
    step = attrs.evolve(plateau, schedule=ft.schedules.cosine(1e-2, total=9))
    state, _ = step(state, zoo.batch())
    params, buffers = first.params, first.buffers
    for number, like in enumerate((step.init(params, buffers), plateau.init(params, buffers))):
        loaded = ft.load(ft.save(tmp_path / str(number), state), like=like)
        assert ft.fingerprint(loaded) == ft.fingerprint(state)
        for each in (step, plateau):
            after = [each(one, zoo.batch())[0] for one in (loaded, state)]
            assert ft.fingerprint(after[0]) == ft.fingerprint(after[1])


def test_another_shape_is_named(tmp_path: Path) -> None:
    _, _, state = _trained()
    ft.save(tmp_path, state)
    architecture, params, buffers = ft.split(zoo.Tied(width=8))
    like = ft.pretrain_step(architecture, ft.optim.adamw()).init(params, buffers)
    message = r"params/embedding.weight is float32\[31, 16\], expected float32\[31, 8\]"
    with pytest.raises(ft.CheckpointError, match=message):
        ft.load(tmp_path, like=like)


def test_a_renamed_checkpoint_is_refused(tmp_path: Path) -> None:
    _, first, state = _trained()
    path = ft.save(tmp_path, state)
    path.rename(tmp_path / "step-000000000077")
    with pytest.raises(ft.CheckpointError, match="is of step 2, and its directory says 77"):
        ft.load(tmp_path, like=first)
    (tmp_path / "step-000000000077").rename(tmp_path / "best")
    assert ft.fingerprint(ft.load(tmp_path / "best", like=first)) == ft.fingerprint(state)


def test_the_newest_being_invalid_is_an_error_and_no_older_one_is_taken(tmp_path: Path) -> None:
    _, first, state = _trained()
    ft.save(tmp_path, first)
    path = ft.save(tmp_path, state)
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ft.CheckpointError, match="step-000000000002"):
        ft.load(tmp_path, like=first)
    assert ft.load(tmp_path / "step-000000000000", like=first).step == 0


def test_a_disk_error_is_loud_and_leaves_the_old(tmp_path: Path) -> None:
    _, first, state = _trained()
    ft.save(tmp_path, first)
    (tmp_path / "file").write_text("")
    with pytest.raises(ft.CheckpointError, match="could not be saved"):
        ft.save(tmp_path / "file" / "run", state)
    assert ft.load(tmp_path, like=state).step == 0


def test_inspection_is_plain_data(tmp_path: Path) -> None:
    _, _, state = _trained()
    ft.save(tmp_path, state)
    seen = json.loads(json.dumps(checkpoint.inspect(tmp_path)))
    assert seen["leaves"]["step"] == 2
    tensors = seen["files"]["model.safetensors"]["tensors"]
    assert tensors["embedding.weight"] == {"dtype": "float32", "shape": [31, 16]}
    assert set(seen["files"]) == set(FILES) - {"manifest.json"}


def test_loading_keeps_no_file_open_and_no_map(tmp_path: Path) -> None:
    _, first, state = _trained()
    path = ft.save(tmp_path, state)
    loaded = ft.load(path, like=first)
    (path / "model.safetensors").write_bytes(b"\0" * 10_000)
    assert ft.fingerprint(loaded) == ft.fingerprint(state)


@pytest.mark.parametrize("order", ["fewer first", "more first"])
def test_slots_that_a_class_makes_at_the_first_gradient_come_back(
    order: str, tmp_path: Path
) -> None:
    """`like` may have been trained further than the checkpoint, or not as far."""

    class Routed(zoo.Tied):
        def forward(self, input_ids: Any, attention_mask: Any = None, **rest: Any) -> Any:
            if attention_mask is not None:
                return super().forward(input_ids, attention_mask, **rest)
            return self.head(self.norm(self.embedding(input_ids)))

    architecture, params, buffers = ft.split(Routed())
    step = ft.pretrain_step(architecture, ft.optim.sgd(1e-2, momentum=0.9))
    mask = torch.ones(4, 8, dtype=torch.int64)
    first, _ = step(step.init(params, buffers), zoo.batch())
    second, _ = step(first, zoo.batch() | {"attention_mask": mask})
    assert len(first.optimizer.slots["momentum_buffer"]) < len(params)
    saved, like = (first, second) if order == "fewer first" else (second, first)
    ft.save(tmp_path, saved)
    for form in (like, step.init(params, buffers), saved):
        assert ft.fingerprint(ft.load(tmp_path, like=form)) == ft.fingerprint(saved)


def test_a_loaded_state_is_donated_without_a_copy(tmp_path: Path) -> None:
    step, _, state = _trained()
    ft.save(tmp_path, state)
    loaded = ft.load(tmp_path, like=state)
    addresses = [tensor.data_ptr() for tensor in loaded.params.values()]
    after, _ = step(loaded, zoo.batch(), donate=True)
    assert [tensor.data_ptr() for tensor in after.params.values()] == addresses


def _rewritten(path: Path, **files: bytes) -> None:
    """The checkpoint with other contents, and a manifest that vouches for them."""
    old = read_manifest(OPERATING_SYSTEM, path)
    for name, content in files.items():
        (path / f"{name}.safetensors").write_bytes(content)
    names = [p.name for p in path.iterdir() if p.name != "manifest.json"]
    entries = {name: hashed([memoryview((path / name).read_bytes())]) for name in names}
    (path / "manifest.json").write_bytes(to_bytes(attrs.evolve(old, files=entries)))


def _saved(tmp_path: Path) -> tuple[Any, Path]:
    _, first, state = _trained(steps=1)
    return first, ft.save(tmp_path, state)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model", {"spare": torch.ones(2)}, r"has params/spare; .*another architecture"),
        ("extra", {"surprise": torch.ones(2)}, r"has surprise; .*another version"),
        ("model", {"mix.bias": None}, r"lacks params/mix.bias; .*another architecture"),
        ("model", {"mix.bias": torch.ones(16).double()}, r"params/mix.bias is float64\[16\]"),
        ("optimizer", {"exp_avg/mix.bias": None}, r"lacks optimizer/slots/exp_avg/mix.bias"),
        ("optimizer", {"exp_avg/other": torch.ones(2)}, "'other', which is no parameter"),
    ],
)
def test_a_tensor_too_many_too_few_or_of_another_dtype_is_named(
    file: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    first, path = _saved(tmp_path)
    held = {**safetensors.torch.load_file(path / f"{file}.safetensors"), **change}
    content = safetensors.torch.save(
        {n: t for n, t in held.items() if t is not None}, metadata={"format": "pt"}
    )
    _rewritten(path, **{file: content})
    with pytest.raises(ft.CheckpointError, match=message):
        ft.load(path, like=first)


def test_a_slot_that_is_missing_is_named(tmp_path: Path) -> None:
    first, path = _saved(tmp_path)
    held = safetensors.torch.load_file(path / "optimizer.safetensors")
    kept = {n: t for n, t in held.items() if not n.startswith("exp_avg_sq/")}
    _rewritten(path, optimizer=safetensors.torch.save(kept, metadata={"format": "pt"}))
    with pytest.raises(ft.CheckpointError, match="the optimizer's 'exp_avg_sq' is missing"):
        ft.load(path, like=first)


@pytest.mark.parametrize(
    ("leaf", "value", "message"),
    [
        ("key", -1, "key is -1, expected 0 to 9223372036854775807"),
        ("step", "1", "step is '1', expected int"),
        ("cursor/samples", 1.5, "cursor/samples is 1.5, expected int"),
        ("cursor/loader", 3, "cursor/loader is 3, expected NoneType or str"),
    ],
)
def test_a_number_that_is_none_is_named(
    leaf: str, value: Any, message: str, tmp_path: Path
) -> None:
    first, path = _saved(tmp_path)
    body = json.loads((path / "state.json").read_bytes())
    body["leaves"][leaf] = value
    (path / "state.json").write_bytes(as_json(body))
    _rewritten(path)
    with pytest.raises(ft.CheckpointError, match=message):
        ft.load(path, like=first)


def test_a_manifest_of_another_version_or_of_other_files_is_refused(
    tmp_path: Path,
) -> None:
    first, path = _saved(tmp_path)
    (path / "more.bin").write_bytes(b"more")
    _rewritten(path)
    with pytest.raises(ft.CheckpointError, match=r"'more.bin', expected a plain name"):
        ft.load(path, like=first)
    (path / "more.bin").unlink()
    body = json.loads((path / "manifest.json").read_bytes()) | {"version": 2}
    body.pop("sha256")
    own = hashlib.sha256(as_json(body)).hexdigest()
    (path / "manifest.json").write_bytes(as_json({**body, "sha256": own}))
    with pytest.raises(ft.CheckpointError, match="version 2; this functrain reads"):
        ft.load(path, like=first)
    # Nor is it put aside as damaged: another functrain reads it.
    written = (path / "manifest.json").read_bytes()
    with pytest.raises(ft.CheckpointError, match="version 2; this functrain reads"):
        ft.save(tmp_path, attrs.evolve(first, step=int(path.name.removeprefix("step-"))))
    assert (path / "manifest.json").read_bytes() == written


def test_a_link_to_the_very_file_is_refused(tmp_path: Path) -> None:
    first, path = _saved(tmp_path)
    moved = tmp_path / "model.safetensors"
    (path / "model.safetensors").rename(moved)
    (path / "model.safetensors").symlink_to(moved)
    with pytest.raises(ft.CheckpointError, match=r"model.safetensors: cannot be read"):
        ft.load(path, like=first)


def test_params_of_another_shape_are_not_loaded(tmp_path: Path) -> None:
    _, path = _saved(tmp_path)
    _, params, buffers = ft.split(zoo.Tied(width=8))
    with pytest.raises(ft.CheckpointError, match=r"embedding.weight has shape \[31, 16\]"):
        checkpoint.load_model(path, params, buffers)


def test_an_average_and_a_reference_over_one_storage_are_saved(tmp_path: Path) -> None:
    _, state, _ = _trained(steps=0, ema_decay=0.9)
    state = attrs.evolve(state, reference=state.average)
    assert ft.fingerprint(ft.load(ft.save(tmp_path, state), like=state)) == ft.fingerprint(state)


@pytest.mark.parametrize("best", [math.inf, -math.inf, math.nan, -0.0])
def test_numbers_that_json_has_not_come_back(best: float, tmp_path: Path) -> None:
    """A plateau's best is infinite before the first evaluation."""
    architecture, params, buffers = zoo.split("tied")
    step = ft.pretrain_step(
        architecture, ft.optim.adamw(), schedule=ft.schedules.reduce_on_plateau(1e-2)
    )
    first = step.init(params, buffers)
    plateau = attrs.evolve(first.scheduler.plateau, best=best)
    state = attrs.evolve(first, scheduler=attrs.evolve(first.scheduler, plateau=plateau))
    loaded = ft.load(ft.save(tmp_path, state), like=first)
    assert ft.fingerprint(loaded) == ft.fingerprint(state)


def test_what_a_loader_keeps_may_be_long(tmp_path: Path) -> None:
    """A list of what it has shuffled, say, and conditions: megabytes of either come back."""
    _, first, state = _trained()
    state = attrs.evolve(state, cursor=ft.Cursor(loader="9" * (3 << 20)))
    ft.save(tmp_path, state, conditions={"files": "f" * (2 << 20)})
    assert ft.fingerprint(ft.load(tmp_path, like=first)) == ft.fingerprint(state)


@pytest.mark.parametrize("what", ["loader", "conditions"])
def test_what_is_too_long_to_be_read_is_not_saved(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that is acknowledged can be loaded."""
    monkeypatch.setattr(manifest, "LONGEST_JSON", 1 << 16)
    monkeypatch.setattr(layout, "LONGEST_JSON", 1 << 16)
    _, first, state = _trained()
    for length in (60_000, 70_000):
        options: dict[str, Any] = {"conditions": {"name": "n" * length}}
        if what == "loader":
            state, options = attrs.evolve(state, cursor=ft.Cursor(loader="9" * length)), {}
        if length < 1 << 16:
            ft.save(tmp_path / str(length), state, **options)
            ft.load(tmp_path / str(length), like=first)
            continue
        with pytest.raises(ft.CheckpointError, match=f"{what}.*bytes.*holds 65,536 at most"):
            ft.save(tmp_path / str(length), state, **options)
        assert ft.latest(tmp_path / str(length)) is None


class Counting(nn.Module):
    """A parameter and a buffer that bear the names of counts, and are below 0."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.count = nn.Embedding(zoo.VOCABULARY, 4), nn.Parameter(-torch.ones(4))
        self.head = nn.ModuleDict({"en/count": nn.Linear(4, zoo.VOCABULARY)})
        self.register_buffer("growth_count", -torch.ones(1))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return self.head["en/count"](self.embedding(input_ids) * self.count) * self.growth_count


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 10**12}, r"step is 1000000000000, expected 0 to 999999999999"),
        ({"step": -1}, r"step is -1, expected 0 to"),
        ({"step": True}, r"step is True, expected an integer"),
        ({"key": 2.0}, r"key is 2\.0, expected an integer"),
        ({"cursor": ft.Cursor(samples=2**63)}, r"cursor/samples is 9223372036854775808, expected"),
        ({"cursor": ft.Cursor(tokens=2**64)}, r"cursor/tokens is 18446744073709551616, expected"),
        ({"cursor": ft.Cursor(samples=-1)}, r"cursor/samples is -1, expected"),
        ({"cursor": ft.Cursor(loader="\ud800")}, r"cursor/loader is no text that UTF-8 can hold"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(change: Any, message: str, tmp_path: Path) -> None:
    _, _, state = _trained(steps=0)
    state = attrs.evolve(state, **change)
    with pytest.raises(ft.StateError, match=message):
        ft.save(tmp_path / "run", state)
    with (
        ft.checkpoint.BackgroundWriter(tmp_path / "run") as writer,
        pytest.raises(ft.StateError, match=message),
    ):
        writer.save(state)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": {"loss": None}}, "metrics: 'loss' is None, expected a number"),
        ({"metrics": {"loss": "low"}}, "metrics: 'loss' is 'low', expected a number"),
        ({"metrics": {"loss": torch.ones(2)}}, r"metrics: 'loss' is tensor.*, expected a number"),
        ({"metrics": {3: 1.0}}, "metrics: 3, expected a name"),
        ({"metrics": {"\ud800": 1.0}}, r"metrics: '\\ud800', expected a name"),
        ({"metrics": "low"}, "metrics: 'low', expected a mapping of names to numbers"),
        ({"beside": 3}, "beside: 3, expected a mapping of file names to texts"),
        ({"beside": {"a.txt": 3}}, r"beside: a\.txt is 3, expected a text"),
        ({"beside": {"a.txt": "\ud800"}}, r"beside: a\.txt is no text that UTF-8 can hold"),
        ({"beside": {3: "a"}}, "beside: 3, expected a plain name"),
    ],
)
def test_what_lies_with_a_state_is_looked_at_before_anything_is_written(
    options: Any, message: str, tmp_path: Path
) -> None:
    _, _, state = _trained(steps=0)
    with pytest.raises(ft.CheckpointError, match=message):
        ft.save(tmp_path / "run", state, **options)
    with (
        ft.checkpoint.BackgroundWriter(tmp_path / "run") as writer,
        pytest.raises(ft.CheckpointError, match=message),
    ):
        writer.save(state, **options)
    assert not (tmp_path / "run").exists()


def test_a_parameter_may_have_the_name_of_a_count(tmp_path: Path) -> None:
    architecture, params, buffers = ft.split(Counting())
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2), ema_decay=0.9)
    first = step.init(params, buffers)
    state, _ = step(first, zoo.batch())
    ft.save(tmp_path, state)
    assert ft.fingerprint(ft.load(tmp_path, like=first)) == ft.fingerprint(state)


def _resized(path: Path, file: str, size: int) -> None:
    """The checkpoint with a manifest that gives a file another size."""
    old = read_manifest(OPERATING_SYSTEM, path)
    files = {**old.files, file: attrs.evolve(old.files[file], size=size)}
    (path / "manifest.json").write_bytes(to_bytes(attrs.evolve(old, files=files)))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.safetensors", "bytes of tensors, far more than a state as `like` has"),
        ("README.md", "README.md has 8796093022208 bytes, which no text has"),
    ],
)
def test_a_size_that_cannot_be_is_refused_before_anything_is_read(
    file: str, message: str, tmp_path: Path
) -> None:
    """A sparse file of 8 TiB takes no room on a disk."""
    _, first, state = _trained()
    path = ft.save(tmp_path, state, beside={"README.md": "words"})
    _resized(path, file, 1 << 43)
    (path / file).unlink()
    with pytest.raises(ft.CheckpointError, match=message):
        ft.load(tmp_path, like=first)


def test_what_there_is_no_memory_for_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    _, _, state = _trained()
    ft.save(tmp_path, state)
    monkeypatch.setattr(memory, "empty", refused)
    message = r"buffers.* no memory for what it holds \(scale, \[1\], 4 bytes\)"
    with pytest.raises(ft.CheckpointError, match=message):
        checkpoint.load_tensors(tmp_path, "*")


def test_texts_beside_are_part_of_the_checkpoint(tmp_path: Path) -> None:
    _, first, state = _trained()
    path = ft.save(tmp_path, state, beside={"config.json": "{}", "README.md": "words\n"})
    assert (path / "README.md").read_text() == "words\n"
    assert ft.fingerprint(ft.load(tmp_path, like=first)) == ft.fingerprint(state)
    assert ft.save(tmp_path, state, beside={"config.json": "{}", "README.md": "words\n"}) == path
    message = r"exists and holds this state beside other texts \(config.json\)"
    with pytest.raises(ft.CheckpointError, match=message):
        ft.save(tmp_path, state, beside={"config.json": "[]", "README.md": "words\n"})
    (path / "README.md").write_text("other\n")
    with pytest.raises(ft.CheckpointError, match=r"README.md: its sha256 does not match"):
        ft.load(tmp_path, like=first)


@pytest.mark.parametrize(
    "name",
    ["../x.json", "a/b.json", ".json", "manifest.json", "state.json", "x.py", "", "x.json\n"],
)
def test_a_name_that_no_text_may_have_is_refused(name: str, tmp_path: Path) -> None:
    _, _, state = _trained()
    with pytest.raises(ft.CheckpointError, match="expected a plain name"):
        ft.save(tmp_path, state, beside={name: ""})
    assert ft.latest(tmp_path) is None


def test_a_directory_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first, state = _trained()
    ft.save(tmp_path, state)

    def refused(_: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refused)
    for use in (ft.latest, checkpoint.inspect, lambda path: ft.load(path, like=first)):
        with pytest.raises(ft.CheckpointError, match=r"cannot be read \(Permission denied\)"):
            use(tmp_path)


def _written(directory: Path) -> ft.TrainState:
    """A state with every file of a checkpoint, saved."""
    _, _, state = _trained("normed", precision="fp16", ema_decay=0.9)
    ft.save(directory, state)
    return state


def test_mapped_tensors_are_the_files_pages_and_change_no_file(tmp_path: Path) -> None:
    """The same bits as a copy; written to, they leave the file; removed, they live on."""
    state = _written(tmp_path)
    path = tmp_path / "step-000000000002"
    copied = checkpoint.load_tensors(tmp_path, "*")
    mapped = checkpoint.load_tensors(tmp_path, "*", mapped=True)
    assert mapped.keys() == copied.keys()
    for name, tensor in mapped.items():
        assert tensor.dtype == copied[name].dtype
        assert tensor.shape == copied[name].shape
        assert ft.trees.digest(tensor) == ft.trees.digest(copied[name]), name
    some = checkpoint.load_tensors(tmp_path, "params/*", mapped=True)
    assert set(some) == {f"params/{name}" for name in state.params}
    before = {each.name: each.read_bytes() for each in path.iterdir()}
    for tensor in some.values():
        tensor.zero_()
    assert {each.name: each.read_bytes() for each in path.iterdir()} == before
    assert ft.fingerprint(ft.load(tmp_path, like=state)) == ft.fingerprint(state)
    shutil.rmtree(path)
    assert all(ft.trees.digest(mapped[name]) == ft.trees.digest(copied[name]) for name in copied)


@pytest.mark.parametrize("at", [0, 9, 200, -1])
def test_a_file_that_was_altered_is_not_mapped(at: int, tmp_path: Path) -> None:
    _written(tmp_path)
    path = tmp_path / "step-000000000002" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(ft.CheckpointError, match=r"model\.safetensors: its sha256 does not match"):
        checkpoint.load_tensors(tmp_path, "params/*", mapped=True)
    path.write_bytes(data[:-1])
    with pytest.raises(ft.CheckpointError, match="and the manifest says"):
        checkpoint.load_tensors(tmp_path, "params/*", mapped=True)


@pytest.mark.parametrize("metrics", [{"eval_loss": 2.0}, {"eval_loss": float("nan")}, {}])
def test_a_state_saved_again_keeps_its_metrics_and_says_so_of_others(
    metrics: dict[str, float], tmp_path: Path
) -> None:
    _, _, state = _trained(steps=0)
    path = ft.save(tmp_path, state, metrics=metrics)
    manifest = (path / "manifest.json").read_bytes()
    assert ft.save(tmp_path, state, metrics=metrics) == path  # the same: no warning
    assert ft.save(tmp_path, state) == path
    with pytest.warns(SaveWarning, match=r"its metrics stay \{.*\}, not \{'eval_loss': 1.0\}"):
        assert ft.save(tmp_path, state, metrics={"eval_loss": 1.0}) == path
    assert (path / "manifest.json").read_bytes() == manifest


def test_the_same_state_beside_other_texts_is_not_called_another(tmp_path: Path) -> None:
    _, _, state = _trained(steps=0)
    ft.save(tmp_path, state, beside={"one.txt": "1", "two.txt": "2"})
    message = r"exists and holds this state beside other texts \(one.txt, three.txt, two.txt\)"
    with pytest.raises(ft.CheckpointError, match=message):
        ft.save(tmp_path, state, beside={"one.txt": "one", "three.txt": "3"})


class Odd(nn.Module):
    """A parameter of one element and a buffer of another, cut out of larger tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(zoo.VOCABULARY, 8)
        self.head = nn.Linear(8, zoo.VOCABULARY)
        self.gain = nn.Parameter(torch.ones(1, 5)[:, 3])
        self.register_buffer("last", torch.zeros(1))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(input_ids)
        self.last = hidden.detach()[:1, -1, 0]
        logits: torch.Tensor = self.head(hidden) * self.gain
        return logits


def test_an_element_that_was_cut_out_of_another_tensor_is_saved(tmp_path: Path) -> None:
    architecture, params, buffers = ft.split(Odd())
    step = ft.pretrain_step(architecture, ft.optim.adamw())
    first = step.init(params, buffers)
    state, _ = step(first, zoo.batch())
    assert state.params["gain"].stride() != (1,)  # contiguous all the same
    ft.save(tmp_path, state)
    assert ft.fingerprint(ft.load(tmp_path, like=first)) == ft.fingerprint(state)


class Thin(nn.Module):
    """A model of low rank."""

    def __init__(self, length: int = 2000) -> None:
        super().__init__()
        self.down = nn.Embedding(zoo.VOCABULARY, 1)
        self.wide = nn.Linear(1, length, bias=False)
        self.up = nn.Linear(length, zoo.VOCABULARY, bias=False)
        self.up.weight.requires_grad_(False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.up(self.wide(self.down(input_ids)))
        return logits


class Preconditioned(torch.optim.SGD):
    """Keeps a matrix of the longer side, as Shampoo does."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for param in self.param_groups[0]["params"]:
            side = max(param.shape)
            self.state[param].setdefault("matrix", torch.zeros(side, side))


def test_slots_much_larger_than_the_params_are_loaded_into_a_fresh_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("functrain.checkpoint.format.MOST_HEADER", 1 << 11)
    architecture, params, buffers = ft.split(Thin())
    step = ft.pretrain_step(architecture, ft.optim.from_torch(Preconditioned))
    first = step.init(params, buffers)
    state, _ = step(first, zoo.batch())
    ft.save(tmp_path, state)
    assert ft.fingerprint(ft.load(tmp_path, like=first)) == ft.fingerprint(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cursor": ft.Cursor(loader={"i": 4})}, "cursor/loader is a dict, expected str or None"),  # type: ignore[arg-type]
        ({"cursor": None}, "cursor is a NoneType, expected Cursor"),
        ({"scheduler": None}, "scheduler is a NoneType, expected SchedulerState"),
        ({"base": 3}, "base is a int, expected str or None"),
        ({"key": [1]}, "key: a state cannot hold a list"),
    ],
)
def test_what_no_load_would_take_is_not_saved(change: Any, message: str, tmp_path: Path) -> None:
    _, _, state = _trained()
    with pytest.raises(ft.StateError, match=message):
        ft.save(tmp_path, attrs.evolve(state, **change))
    assert ft.latest(tmp_path) is None
