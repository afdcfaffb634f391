"""Activation checkpointing by module, chosen by name (Chen et al., 1604.06174).

Within `checkpointed` the activations inside the chosen modules are not kept for the backward pass,
which recomputes them: less memory, up to a third more compute, and the same bits, since dropout and
whatever draws from Python's `random` or NumPy draws the same numbers the second time. A module that
writes to its buffers would compute something else the second time, and is refused.

Selectively, only what lies between matrix products and attention is recomputed
(`functrain.selective`).
"""

from __future__ import annotations

import functools
import re
import types
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from functrain import keys
from functrain.errors import ArchitectureError, ConfigError, did_you_mean
from functrain.selective import contexts

Recompute = Literal["full", "selective"]
"""What of a module is recomputed: everything, or all but matrix products and attention."""

RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)

_again: ContextVar[bool] = ContextVar("again", default=False)


def recomputing() -> bool:
    """Whether a forward is being recomputed, in the backward pass."""
    return _again.get()


_Table = dict[str, Tensor | None]
# The buffer tables of each recomputed module: to find them at every call would take 14 µs.
_tables: weakref.WeakKeyDictionary[nn.Module, list[_Table]] = weakref.WeakKeyDictionary()


def patterns(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """One pattern of names, several, or None, as a tuple; `ConfigError` for anything else."""
    found = (given,) if isinstance(given, str) else () if given is None else given
    if not isinstance(found, Sequence) or not all(isinstance(each, str) for each in found):
        raise ConfigError(
            f"checkpoint: {given!r}, expected a pattern of module names, such as 'model.layers.*', "
            "or several"
        )
    return tuple(found)


def check_recompute(recompute: Recompute, names: Sequence[str]) -> None:
    """Raise `ConfigError` for none of `RECOMPUTES`, and for "selective" without names."""
    if recompute not in RECOMPUTES:
        hint = did_you_mean(str(recompute), RECOMPUTES)
        raise ConfigError(f"recompute: {recompute!r}, unknown; {hint}")
    if recompute == "selective" and not names:
        raise ConfigError(
            "recompute: 'selective', and checkpoint names no modules; name blocks, such as "
            "checkpoint='model.layers.*', or leave recompute out"
        )


def matching(architecture: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that these patterns match, by name; `*` matches within one dotted part.

    An embedding that a pattern matches beside other modules is left out.

    Raises `ConfigError` for a pattern that matches nothing or embeddings only, and for modules that
    are inside one another, are not called, or would not compute the same the second time.
    """
    modules = dict(architecture.named_modules())
    del modules[""]
    found: dict[str, nn.Module] = {}
    for pattern in names:
        some = {name: each for name, each in modules.items() if _matches(name, pattern)}
        if not some:
            known = {re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in modules}
            raise ConfigError(
                f"checkpoint: no module's name matches {pattern!r}; {did_you_mean(pattern, known)}"
            )
        found |= _without_embeddings(some)
    if found:
        _check_own(architecture)
    for name, module in found.items():
        _check(name, module, architecture)
        inside = next((other for other in found if other.startswith(f"{name}.")), None)
        if inside is not None:
            raise ConfigError(
                f"checkpoint: {inside} is inside of {name}, which is recomputed whole; choose one "
                "of them"
            )
    return found


def _matches(name: str, pattern: str) -> bool:
    parts, expected = name.split("."), pattern.split(".")
    return len(parts) == len(expected) and all(map(fnmatchcase, parts, expected))


def _without_embeddings(some: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    # A large embedding with a forward of its own would not add its gradient to the sum directly
    # (functrain.accumulators), and the bits would differ.
    others = {name: each for name, each in some.items() if not isinstance(each, nn.Embedding)}
    if not others:
        raise ConfigError(
            f"checkpoint: {min(some)} is an embedding, which keeps nothing but its ids, so that "
            "nothing would be gained; name blocks: 'model.layers.*'"
        )
    return others


def _check_own(architecture: nn.Module) -> None:
    for name, module in architecture.named_modules():
        own = getattr(module, "gradient_checkpointing", False)
        if own or getattr(getattr(module, "config", None), "checkpointing", False) is True:
            raise ConfigError(
                f"checkpoint: {name or type(module).__name__} has its own turned on; turn that off "
                "(gradient_checkpointing_disable(), DecoderConfig(checkpointing=False)), or leave "
                "checkpoint out"
            )


def _check(name: str, module: nn.Module, architecture: nn.Module) -> None:
    if type(module).forward is nn.Module.forward:
        raise ConfigError(
            f"checkpoint: {name} is a container, which is never called; write {name + '.*'!r}"
        )
    if "forward" in vars(module):
        raise ConfigError(
            f"checkpoint: {name} has a forward of its own in the place of its class's; take that "
            "away, or name other modules"
        )
    if any("running_mean" in each._buffers for each in module.modules()):
        raise ConfigError(
            f"checkpoint: {name} keeps running statistics (BatchNorm), which a second forward "
            "would move again; name other modules"
        )
    shown: Any = getattr(architecture, "get_output_embeddings", None)
    if callable(shown) and module is shown():
        raise ConfigError(
            f"checkpoint: {name} is the head, whose logits are made a few rows at a time where "
            "they are many; name blocks: 'model.layers.*'"
        )


@contextmanager
def checkpointed(
    modules: Mapping[str, nn.Module], recompute: Recompute = "full"
) -> Generator[None]:
    """A context in which the activations of `modules`, found by `matching`, are recomputed.

    Enter it inside `functrain.bound`, and take the gradient inside.

    The backward pass raises `ArchitectureError` if a module's buffers have been written to since
    its forward. Other changes by a forward go unnoticed: non-tensor attributes, and writes that
    leave the version as it is, such as those of `F.batch_norm` and of `tensor.data`.
    """
    recomputed = _selectively if recompute == "selective" else _fully
    before = {name: vars(module).get("forward") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            own = before[name]
            _tables[module] = [each._buffers for each in module.modules() if each._buffers]
            # A module's own setattr would look for parameters first.
            vars(module)["forward"] = (
                types.MethodType(recomputed, module)
                if own is None
                else functools.partial(_checkpointed, module, own, recompute == "selective")
            )
        yield
    finally:
        for name, module in modules.items():
            vars(module).pop("forward", None)
            if before[name] is not None:
                vars(module)["forward"] = before[name]


# Functions, since dynamo does not take bound methods.
def _fully(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = functools.partial(type(module).forward, module)
    return _checkpointed(module, forward, False, *args, **kwargs)


def _selectively(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = functools.partial(type(module).forward, module)
    return _checkpointed(module, forward, True, *args, **kwargs)


def _checkpointed(
    module: nn.Module, forward: Callable[..., Any], selective: bool, *args: Any, **kwargs: Any
) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    count, names = len(args), tuple(kwargs)
    first: list[tuple[keys.Place, list[_Buffer]]] = []

    def called(given: Sequence[Any]) -> Any:
        return forward(*given[:count], **dict(zip(names, given[count:], strict=True)))

    def run(*given: Any) -> Any:
        # Dynamo does not compile a checkpoint that draws or writes; such calls come uncompiled.
        if torch.compiler.is_compiling():
            return called(given)
        if not first:
            first.append((keys.place(), _buffers(module)))
            return called(given)
        begun, buffers = first[0]
        _refuse_written(module, buffers)
        token = _again.set(True)
        try:
            with keys.again(begun):
                return called(given)
        finally:
            _again.reset(token)

    # All arguments are positional: torch (2.13) restores the generators of the devices that it
    # finds among those, so with keywords only, dropout would differ the second time.
    given = (*args, *kwargs.values())
    if selective:
        return checkpoint(run, *given, use_reentrant=False, context_fn=contexts(module))
    return checkpoint(run, *given, use_reentrant=False)


_Buffer = tuple[_Table, str, Tensor | None, int]


def _buffers(module: nn.Module) -> list[_Buffer]:
    """The slot of each buffer, the buffer, and its version."""
    return [
        (table, key, value, 0 if value is None else value._version)
        for table in _tables[module]
        for key, value in table.items()
    ]


def _refuse_written(module: nn.Module, before: Sequence[_Buffer]) -> None:
    for table, key, value, version in before:
        if table.get(key) is value and (value is None or value._version == version):
            continue
        name = next(n for n, each in module.named_modules() if each._buffers is table)
        raise ArchitectureError(
            f"checkpoint: the buffer {f'{name}.{key}' if name else key} of a "
            f"{type(module).__name__} has been written to since its forward, which is run again "
            "for the backward pass and would find another value; name modules that write to no "
            "buffers, or leave checkpoint out"
        )
