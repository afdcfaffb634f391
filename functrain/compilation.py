"""The body of an architecture, compiled for the duration of a step.

Within `compiled` its units are called through `torch.compile`; outside of a step the architecture
stays as it is, so evaluation, generation and whatever looks for a head see no compiled module.

Shapes are static: each new shape of the inputs is compiled, and logged (logger `functrain`, level
INFO). With shapes that become dynamic after the second one the bits would depend on which came
first, and a resumed run begins with another. Dropout stays a function of the step's key; it drops
the same elements as uncompiled, unless the compiler lays out tensors in another order.

The first step of a shape takes many seconds. Compiled code is cached in the directory that the
environment variable TORCHINDUCTOR_CACHE_DIR names (by default one below the system's temporary
directory, which a restart may empty); with it a second process warms up in a fraction of the time.
"""

from __future__ import annotations

import logging
import os
import types
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from functrain.errors import ArchitectureError, ConfigError, FunctrainWarning

LIMIT = 16
"""The most shapes that a unit is compiled for: with more, compiling takes longer than it saves."""

BACKEND = "inductor"
# Variants of each shape: with and without gradients, in train and eval mode, and with and without
# the direct sums of `functrain.accumulators`.
_VARIANTS = 8
_SETTINGS: dict[str, Any] = {
    # By default dynamo goes on uncompiled after too many compilations, and only logs it.
    "fail_on_recompile_limit_hit": True,
    "suppress_errors": False,
    "accumulated_recompile_limit": 1 << 20,  # counted over all models of a process
}
_OPTIONS: dict[str, Any] = {
    # Torch's own generators, or dropout would drop other elements than uncompiled.
    "fallback_random": True,
    # A value that several kernels read is stored if it takes more than this many operations. By
    # default every layer recomputes the sines of rotary positions: 5 % of a small model's step.
    "realize_cpu_opcount_threshold": 8,
}
_log = logging.getLogger("functrain")

Shapes = tuple[tuple[int, ...], ...]


@attrs.frozen(eq=False)
class _Unit:
    """A unit: its name, its compiled call, and what it was compiled for.

    `seen`: the shapes of its inputs, whether gradients were enabled, and whether in train mode.
    """

    name: str
    run: Callable[..., Any]
    seen: dict[tuple[Shapes, bool, bool], None] = attrs.field(factory=dict)


@attrs.frozen(eq=False)
class _Call:
    """The call of a unit that replaces its module's own."""

    unit: _Unit
    module: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from torch._dynamo import config
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        unit = self.unit
        shapes = tuple(tuple(each.shape) for each in _tensors((args, kwargs)))
        key = (shapes, torch.is_grad_enabled(), self.module.training)
        first = not unit.seen
        if key not in unit.seen:
            _announce(unit, *key)
        graphs = _graphs()
        # Buffers are compared in the first call of each kind only.
        looked = key not in unit.seen and key[1] and self.module.training
        begun = _buffers(self.module) if looked else {}
        try:
            with config.patch(_SETTINGS):
                returned = unit.run(self.module, *args, **kwargs)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            raise _said(unit, error) from error
        if first and _graphs() == graphs:
            raise ArchitectureError(
                f"compile: nothing of {unit.name} could be compiled: {_reasons()}; leave compile "
                "out for this model"
            )
        if looked:
            _tell_of_written(unit, begun, _buffers(self.module))
        unit.seen[key] = None
        return returned


def _buffers(module: nn.Module) -> dict[str, tuple[int, int]]:
    """The identity and the version of each buffer: assignment changes one, a write the other.

    The statistics of norms are left out, as they are not read after they are written.
    """
    return {
        f"{prefix}.{key}" if prefix else key: (id(buffer), buffer._version)
        for prefix, each in module.named_modules()
        if "running_mean" not in each._buffers
        for key, buffer in each._buffers.items()
        if buffer is not None and not buffer.is_inference()
    }


def _tell_of_written(
    unit: _Unit, begun: Mapping[str, tuple[int, int]], after: Mapping[str, tuple[int, int]]
) -> None:
    """Warn of buffers written in place: torch would compute gradients with their old values."""
    names = [
        n
        for n, (same, version) in begun.items()
        if after.get(n, (same, version))[1] > version and after[n][0] == same
    ]
    if names:
        warnings.warn(
            f"compile: {unit.name} writes into its buffers in place ({', '.join(names)}); where it "
            "uses them after that, torch.compile's gradients are wrong. Assign them anew (self.n = "
            "self.n + 1 for self.n += 1), or leave compile out",
            FunctrainWarning,
            stacklevel=2,
        )


# One entry per unit, as long as its module lives, so values must not refer to the module.
_units: weakref.WeakKeyDictionary[nn.Module, _Unit] = weakref.WeakKeyDictionary()


@contextmanager
def compiled(architecture: nn.Module, projection: nn.Module | None) -> Generator[None]:
    """A context in which the units of an architecture are compiled when they are called.

    Enter it inside `functrain.bound`. `projection`: the head's, which stays uncompiled, so that
    logits can be computed a few rows at a time; with None the architecture is one unit.

    Raises `ConfigError` if no C++ compiler is found and, when a unit is called, for more than
    `LIMIT` shapes; `ArchitectureError`, with torch's reason, for what cannot be compiled.
    """
    found = units(architecture, projection)
    try:
        for name, module in found.items():
            unit = _units.get(module)
            if unit is None:
                _check_compiler(module)
                unit = _units[module] = _Unit(name, _compile())
            # A module's own setattr would look for parameters first.
            vars(module)["_compiled_call_impl"] = _Call(unit, module)
        yield
    finally:
        for module in found.values():
            vars(module).pop("_compiled_call_impl", None)


@contextmanager
def paused(architecture: nn.Module) -> Generator[None]:
    """A context in which the units of `compiled` run uncompiled."""
    own = [vars(module) for module in architecture.modules()]
    calls = [(each, each.get("_compiled_call_impl")) for each in own]
    calls = [(each, call) for each, call in calls if isinstance(call, _Call)]
    try:
        for each, _ in calls:
            del each["_compiled_call_impl"]
        yield
    finally:
        for each, call in calls:
            each["_compiled_call_impl"] = call


@contextmanager
def cache_directory(path: str | None) -> Generator[None]:
    """A context in which compiled code is cached at `path`; None leaves the directory as it was.

    Raises `ConfigError` for a path with a space, or where no directory can be made.
    """
    whole = None if path is None else str(Path(path).absolute())
    if whole is not None:
        _check_cache(whole)
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    try:
        if whole is not None:
            os.environ[name] = whole
        yield
    finally:
        if whole is not None:
            os.environ.pop(name, None)
            if before is not None:
                os.environ[name] = before


def _check_cache(path: str) -> None:
    if any(each.isspace() for each in path):
        raise ConfigError(
            f"compile_cache: {path!r} has a space, at which torch cuts it in the command line of "
            "the compiler; give a path without"
        )
    try:  # torch makes it in the first step
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"compile_cache: {path} cannot be made ({error.strerror}); expected a directory, or a "
            "path where one can be made"
        ) from error


def units(architecture: nn.Module, projection: nn.Module | None) -> dict[str, nn.Module]:
    """The units to compile, by name: the largest modules with parameters and without `projection`.

    Containers that are never called (`nn.ModuleList`, `nn.ModuleDict`) are searched. A single
    module of torch's own, such as an embedding or a norm, is left out, since it would gain nothing.

    Raises `ArchitectureError` if nothing is left.
    """
    if projection is None:
        return {type(architecture).__name__: architecture}
    found = dict(_beside(architecture, projection, ""))
    if not found:
        raise ArchitectureError(
            f"compile: {type(architecture).__name__} has no modules beside its head that could be "
            "compiled; leave compile out for this model"
        )
    return found


def _beside(
    module: nn.Module, projection: nn.Module, prefix: str
) -> Iterator[tuple[str, nn.Module]]:
    for key, child in module.named_children():
        name = f"{prefix}{key}"
        if child is projection or _alone(child):
            continue
        inside = any(each is projection for each in child.modules())
        if inside or type(child).forward is nn.Module.forward:
            yield from _beside(child, projection, f"{name}.")
        elif next(child.parameters(), None) is not None:
            yield name, child


def _alone(module: nn.Module) -> bool:
    return not module._modules and type(module).__module__.startswith("torch.nn.")


def check_uncompiled(architecture: nn.Module) -> None:
    """Raise `ConfigError` for an architecture that is compiled already."""
    for name, module in architecture.named_modules():
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            raise ConfigError(
                f"compile: {name or type(module).__name__} is compiled already; split the module "
                "as it was before torch.compile, or leave compile out"
            )


def refuse_tracing(what: str) -> None:
    """Raise `ConfigError` inside `torch.compile`, which would fail with an assertion of its own.

    With `fullgraph=True` torch makes an error of its own of it, which has this one's text.
    """
    # False where what has been compiled is run, and nothing else is compiled.
    if torch.compiler.is_dynamo_compiling() or get_eval_frame_callback() not in (None, False):
        raise ConfigError(
            f"{what}: called inside torch.compile, which cannot trace it; call it outside: a step "
            "(or gradient) made with compile=True compiles the model's body itself"
        )


def _check_compiler(module: nn.Module) -> None:
    device = next((p.device.type for p in module.parameters()), "cpu")
    if BACKEND != "inductor" or device != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise ConfigError(
            f"compile: on the CPU it needs a C++ compiler ({error}); install one (apt install "
            "g++), name it in the environment's CXX, or leave compile out"
        ) from error


def _compile() -> Callable[..., Any]:
    """A compiled call with a code object of its own, by which dynamo caches and counts."""
    own = types.FunctionType(_run.__code__.replace(), _run.__globals__)
    options: dict[str, Any] = {
        "dynamic": False,
        "backend": BACKEND,
        "options": _OPTIONS if BACKEND == "inductor" else None,
        "recompile_limit": LIMIT * _VARIANTS,
        "isolate_recompiles": True,
    }
    compiled: Callable[..., Any] = torch.compile(own, **options)
    return compiled


def _run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]


def _announce(unit: _Unit, shapes: Shapes, graded: bool, training: bool) -> None:
    """Log a new shape; raise `ConfigError` if there are too many."""
    before = dict.fromkeys(each for each, *_ in unit.seen)
    if shapes not in before and len(before) >= LIMIT:
        raise ConfigError(
            f"compile: {unit.name} was compiled for {LIMIT} shapes, "
            f"{'; '.join(map(_shown, before))}, and now comes {_shown(shapes)}; have fewer: pack "
            "documents into rows of one length, pad to one length or to a multiple of 64, say, "
            "and let microbatches divide the batch; or leave compile out"
        )
    kind = "with gradients" if graded else "without gradients"
    mode = "train" if training else "eval"
    _log.info("compile: %s for %s, %s, in %s mode", unit.name, _shown(shapes), kind, mode)


def _shown(shapes: Shapes) -> str:
    return " and ".join(dict.fromkeys(str(list(shape)) for shape in shapes)) or "no tensors"


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, Sequence) and not isinstance(values, str | bytes):
        for value in values:
            yield from _tensors(value)


def _graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _reasons() -> str:
    from torch._dynamo.utils import counters

    found = list(counters["graph_break"])
    return found[-1].strip()[:500] if found else "torch gives no reason"


def _said(unit: _Unit, error: Exception) -> ArchitectureError | ConfigError:
    """Torch's error as one that tells the user what to do."""
    from torch._dynamo.exc import FailOnRecompileLimitHit

    if isinstance(error, FailOnRecompileLimitHit):
        return ConfigError(
            f"compile: {unit.name} is compiled again and again, for reasons beside the shapes of "
            "its inputs (TORCH_LOGS=recompiles names them); leave compile out for this model"
        )
    reason = str(error).strip()
    if len(reason) > 2000:  # a failed C++ compiler: a long command, then its message
        reason = f"{reason[:500]} … {reason[-1500:]}"
    return ArchitectureError(
        f"compile: {unit.name} cannot be compiled; leave compile out for this model: {reason}"
    )
