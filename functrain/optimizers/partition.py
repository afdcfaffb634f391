"""Several optimizers at once, each for its own parameters, such as Muon with AdamW."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from functrain.architecture import check_module
from functrain.checks import check_tensors
from functrain.errors import ConfigError
from functrain.lora.layers import Adapted
from functrain.optimizers.adam import Adam, adamw
from functrain.optimizers.adapter import Adapter, from_torch
from functrain.optimizers.base import (
    Checking,
    Optimizer,
    OptimizerState,
    Predicate,
    advanced,
    check_predicate,
    check_update,
    held_back,
    zero_count,
)
from functrain.trees import Tensors, tensors


def muon(
    lr: float = 1e-3,
    *,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    adjust_lr_fn: str = "match_rms_adamw",
    hidden: Predicate | None = None,
    others: Optimizer | None = None,
    **options: Any,
) -> Partition:
    """Muon (Jordan et al. 2024) for hidden matrices, as `torch.optim.Muon`; AdamW for the rest.

    `hidden` selects Muon's parameters: `hidden_matrices(architecture)`, or by default
    `is_hidden_matrix`, which goes by names; where no name gives away an embedding or a head, `init`
    raises `ConfigError`. `others` trains the rest. One learning rate serves both, because
    `match_rms_adamw` (2502.16982) gives Muon's updates AdamW's size.

    torch computes Muon's products in bfloat16. On a CPU without instructions for it (AVX2 alone)
    they take some 20 times as long as in float32, and were 70 % of a small model's step.
    """
    matrices = from_torch(
        torch.optim.Muon,
        lr=lr,
        weight_decay=weight_decay,
        momentum=momentum,
        adjust_lr_fn=adjust_lr_fn,
        **options,
    )
    rest = adamw(lr, weight_decay=weight_decay) if others is None else others
    if isinstance(hidden, nn.Module):
        raise ConfigError("muon: hidden is a module, expected hidden=optim.hidden_matrices(module)")
    made = partition([("muon", hidden or is_hidden_matrix, matrices), ("others", is_any, rest)])
    return _ByName(parts=made.parts) if hidden is None else made


_EMBEDDING = re.compile(
    r"(^|[._])(emb|embd|embed\w*|wte|wpe|relative_attention_bias)([._]|$)|^shared\."
)
_HEAD = re.compile(r"(^|[._])(unemb\w*|lm_head|head|logits)([._]|$)")
# Common names of an output projection, which in a numbered block are names of hidden matrices.
_OUTPUT = re.compile(
    r"(^|[._])output([._]|$)|(^|\.)(decoder|fc_out|proj_out|generator(\.proj)?)(\.weight)?$"
)
_NUMBERED = re.compile(r"(^|\.)\d+\.")


def is_hidden_matrix(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is a matrix, and by its name neither an embedding nor the head."""
    return tensor.ndim == 2 and _EMBEDDING.search(name) is None and not _is_head(name)


def _is_head(name: str) -> bool:
    if _HEAD.search(name):
        return True
    return _OUTPUT.search(name) is not None and _NUMBERED.search(name) is None


def hidden_matrices(architecture: nn.Module) -> Predicate:
    """A predicate for the matrices of an architecture's linear layers, not embeddings or head.

    Linear layers are `nn.Linear`, others with `in_features` and `out_features`, transformers'
    `Conv1D`, and the projections of `nn.MultiheadAttention`. The head is a weight tied to an
    embedding, or a layer with one output for each entry of an embedding. Where that number is also
    a width of other layers, the head is told by its name; where no name tells it, every layer with
    that many outputs is taken for one, since AdamW trains a hidden matrix well and Muon a head
    badly. The adapters of a hidden matrix (`functrain.lora`) are hidden too: `architecture` is the
    adapted one then.

    The predicate raises `ConfigError` for a name that the architecture does not have.
    """
    check_module(architecture)
    embeddings = [m for m in architecture.modules() if _entries(m) is not None]
    sizes = {_entries(m) for m in embeddings}
    embedded = {id(p) for m in embeddings for p in m.parameters(recurse=False)}
    shapes = {id(w): shape for m in architecture.modules() for w, shape in _linear_weights(m)}
    widths = {inputs for inputs, _ in shapes.values()}
    layers = {
        name: shapes[id(p)]
        for name, p in architecture.named_parameters()
        if id(p) in shapes and id(p) not in embedded
    }
    heads = {name for name, (_, outputs) in layers.items() if outputs in sizes}
    certain = {name for name in heads if layers[name][1] not in widths}
    if certain or shapes.keys() & embedded:
        heads = certain
    else:
        heads = {name for name in heads if _is_head(name)} or heads
    matrices = frozenset(layers.keys() - heads)
    stems = {name.removesuffix("weight") for name in matrices}
    hidden = matrices | {f"{stem}{adapter}" for stem in stems for adapter in ("lora_A", "lora_B")}
    known = frozenset(name for name, _ in architecture.named_parameters(remove_duplicate=False))
    kind = type(architecture).__name__

    def is_hidden(name: str, _tensor: Tensor) -> bool:
        if name not in known:
            raise ConfigError(
                f"hidden_matrices: {name} is no parameter of the {kind} that it was given; give it "
                "the architecture of the step, after functrain.lora.attach where that is used"
            )
        return name in hidden

    return is_hidden


def is_any(_name: str, _tensor: Tensor) -> bool:
    """Every parameter."""
    return True


def _entries(module: nn.Module) -> int | None:
    number = getattr(module, "num_embeddings", None)
    return number if isinstance(number, int) else None


def _linear_weights(module: nn.Module) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """The matrices of a linear layer, each with its numbers of inputs and outputs."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.MultiheadAttention):
        for own in module.parameters(recurse=False):
            if own.ndim == 2:
                yield own, (own.shape[1], own.shape[0])
    elif isinstance(module, Adapted):
        yield module.weight, (module.lora_A.shape[1], module.lora_B.shape[0])
    elif not isinstance(weight, Tensor) or weight.ndim != 2:
        return
    elif type(module).__name__ == "Conv1D":
        yield weight, (weight.shape[0], weight.shape[1])
    elif hasattr(module, "in_features") and hasattr(module, "out_features"):
        yield weight, (weight.shape[1], weight.shape[0])


@attrs.frozen(kw_only=True)
class Partition:
    """Several optimizers, each for its own parameters; see `partition`."""

    parts: tuple[tuple[str, Predicate, Optimizer], ...]

    @property
    def lr(self) -> float:
        """The first part's learning rate."""
        return self.parts[0][2].lr

    @property
    def kind(self) -> str:
        """The parts by label, `muon=Muon,others=adamw`."""
        return ",".join(f"{label}={optimizer.kind}" for label, _, optimizer in self.parts)

    def init(self, params: Mapping[str, Tensor]) -> OptimizerState:
        """Every part's slots, under `part.slot`."""
        slots: dict[str, Tensors] = {}
        for label, optimizer, members in self._members(params):
            state = optimizer.init(members)
            slots |= {f"{label}.{slot}": t for slot, t in state.slots.items()}
        return OptimizerState(kind=self.kind, count=zero_count(params), slots=slots)

    def update(
        self,
        grads: Mapping[str, Tensor],
        state: OptimizerState,
        params: Mapping[str, Tensor],
        learning_rate: Tensor | float,
        *,
        applied: Tensor | None = None,
        donate: bool = False,
    ) -> tuple[Tensors, OptimizerState]:
        """Every part's update on its own parameters."""
        check_update(self.kind, grads, state, params)
        if held_back(applied):
            return tensors(params), state
        given = list(self._given(grads, state, params))
        if donate:
            _check(given)
        new_params = dict(params)
        slots: dict[str, Tensors] = {}
        for label, optimizer, own_grads, own, members in given:
            updated, part = optimizer.update(
                own_grads, own, members, learning_rate, applied=applied, donate=donate
            )
            new_params |= dict(updated)
            slots |= {f"{label}.{slot}": t for slot, t in part.slots.items()}
        count = advanced(state.count, applied)
        return Tensors(new_params), attrs.evolve(state, count=count, slots=slots)

    def check(
        self, grads: Mapping[str, Tensor], state: OptimizerState, params: Mapping[str, Tensor]
    ) -> None:
        """Raise what a part's `update` would with `donate=True`, and write nothing."""
        check_update(self.kind, grads, state, params)
        _check(self._given(grads, state, params))

    def _given(
        self, grads: Mapping[str, Tensor], state: OptimizerState, params: Mapping[str, Tensor]
    ) -> Iterator[_Given]:
        for label, optimizer, members in self._members(params):
            own = {
                slot.removeprefix(f"{label}."): t
                for slot, t in state.slots.items()
                if slot.startswith(f"{label}.")
            }
            yield (
                label,
                optimizer,
                {n: g for n, g in grads.items() if n in members},
                OptimizerState(kind=optimizer.kind, count=state.count, slots=own),
                members,
            )

    def _members(self, params: Mapping[str, Tensor]) -> list[tuple[str, Optimizer, Tensors]]:
        """The parts that have parameters, each with its own."""
        check_tensors("params", params)
        members: dict[str, dict[str, Tensor]] = {label: {} for label, _, _ in self.parts}
        for name, tensor in params.items():
            label = next((lab for lab, where, _ in self.parts if where(name, tensor)), None)
            if label is None:
                raise ConfigError(f"{name}: no part of the partition takes it; end with `is_any`")
            members[label][name] = tensor
        return [
            (label, optimizer, Tensors(members[label]))
            for label, _, optimizer in self.parts
            if members[label]
        ]


_Given = tuple[str, Optimizer, Mapping[str, Tensor], OptimizerState, Tensors]


def _check(given: Iterable[_Given]) -> None:
    """Check every part before any is written, as a later one would refuse too late."""
    for _, optimizer, grads, state, params in given:
        if isinstance(optimizer, Checking):
            optimizer.check(grads, state, params)


@attrs.frozen(kw_only=True)
class _ByName(Partition):
    """Muon's partition by names; it refuses names that tell it nothing."""

    def init(self, params: Mapping[str, Tensor]) -> OptimizerState:
        check_tensors("params", params)
        matrices = [name for name, p in params.items() if p.ndim == 2]
        if len(matrices) > 1 and all(is_hidden_matrix(name, params[name]) for name in matrices):
            raise ConfigError(
                f"muon: none of the {len(matrices)} matrices is known by its name for an embedding "
                f"or a head ({', '.join(matrices[:3])}, …); pass "
                "hidden=optim.hidden_matrices(architecture), or hidden=optim.is_hidden_matrix "
                "where all of them are hidden"
            )
        return super().init(params)


def partition(parts: Iterable[tuple[str, Predicate, Optimizer]]) -> Partition:
    """Several optimizers by predicate: `[("muon", is_hidden_matrix, m), ("rest", is_any, a)]`."""
    if not isinstance(parts, Iterable):
        raise ConfigError(f"partition: {parts!r}, expected {_PART} for each part")
    parts = tuple(parts)
    for number, part in enumerate(parts):
        _check_part(f"partition[{number}]", part)
    labels = [label for label, _, _ in parts]
    cut = any(mark in label for label in labels for mark in "./")
    if not parts or len(set(labels)) < len(labels) or cut:
        raise ConfigError(
            f"partition: labels must be distinct and without dots or slashes, got {labels}"
        )
    return Partition(parts=parts)


_MEMBERS = ("init", "update", "lr", "kind")
_PART = "(label, predicate, optimizer)"


def _check_part(where: str, part: Any) -> None:
    fields = list(part) if isinstance(part, Iterable) else []
    if len(fields) != 3 or not isinstance(fields[0], str):
        raise ConfigError(f"{where}: {part!r}, expected {_PART}")
    _, predicate, optimizer = fields
    check_predicate(where, predicate)
    if isinstance(optimizer, type) or not all(hasattr(optimizer, n) for n in _MEMBERS):
        raise ConfigError(f"{where}: {optimizer!r}, expected an optimizer such as optim.adamw()")


_ELEMENTWISE = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.SGD,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.ASGD,
    torch.optim.Rprop,
)


def is_elementwise(optimizer: Optimizer) -> bool:
    """Whether an update is known to treat each element of a parameter on its own.

    It can then be computed for some rows alone. Muon and Adafactor do not; about a class that is
    not torch's own nothing is known.
    """
    if isinstance(optimizer, Partition):
        return all(is_elementwise(part) for _, _, part in optimizer.parts)
    if isinstance(optimizer, Adapter):
        return optimizer.cls in _ELEMENTWISE
    return isinstance(optimizer, Adam)


def may_write(optimizer: Optimizer) -> bool:
    """Whether a donated update may write into gradients: of torch's own classes SGD alone."""
    if isinstance(optimizer, Partition):
        return any(may_write(part) for _, _, part in optimizer.parts)
    if isinstance(optimizer, Adapter):
        return not optimizer.is_torchs or optimizer.cls is torch.optim.SGD
    return not isinstance(optimizer, Adam)


def may_draw(optimizer: Optimizer) -> bool:
    """Whether an update may draw random numbers, as any but torch's own may."""
    return not is_torchs(optimizer)


def is_torchs(optimizer: Optimizer) -> bool:
    """Whether all of an update is torch's own, about which more is known.

    It draws nothing, and its state shares no memory with the params or within itself.
    """
    if isinstance(optimizer, Partition):
        return all(is_torchs(part) for _, _, part in optimizer.parts)
    if isinstance(optimizer, Adapter):
        return optimizer.is_torchs
    return isinstance(optimizer, Adam)
