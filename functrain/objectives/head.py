"""Find the head of an architecture: the last projection, from hidden states to logits.

With it, the logits of a whole batch, [batch, time, vocabulary], need never exist: the hidden states
are taken where they enter the projection, and logits are made a few rows at a time
(`functrain.objectives.chunks`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from functrain import compilation, keys
from functrain.architecture import Mode, Slots, bound, bound_buffers, slots
from functrain.errors import ArchitectureError
from functrain.objectives.batches import MODEL_INPUTS, Batch
from functrain.objectives.chunks import computed_in
from functrain.objectives.verdicts import Verdicts

Call = Callable[..., Any]
"""A model's forward, with the keywords of `MODEL_INPUTS`."""


@attrs.frozen(eq=False)
class Head:
    """The projection of an architecture, by its module and the names of its parameters.

    `trunk`: the name of the submodule whose output the projection takes, where the model changes
    the logits afterwards (a soft cap, a scale); None where it returns them as they are.
    """

    projection: nn.Linear
    weight: str
    bias: str | None
    trunk: str | None

    def hidden(self, call: Call, batch: Batch) -> Tensor:
        """The hidden states [batch, time, width] that the projection would have taken.

        The model is called as usual, but the projection is handed no rows, so it makes no logits.
        The dtype is the one it would have been computed in: a model may turn autocast off for its
        head.

        Raises `ArchitectureError` where the projection was not called once with such states, or
        where a model without a trunk changed what it returned: because of an attribute that was set
        since the search, for a mask, or for longer sequences.
        """
        taken: list[Tensor] = []
        made: list[_Made] = []
        with _entered(self.projection, taken), _left(self.projection, made):
            outputs = call(**{key: batch[key] for key in MODEL_INPUTS if key in batch})
        expected = tuple(batch["input_ids"].shape)
        if len(taken) != 1 or tuple(taken[0].shape[:-1]) != expected:
            shapes = [list(each.shape) for each in taken]
            raise ArchitectureError(
                f"head: the projection was handed {shapes}, expected one [batch, time, width] = "
                f"[{expected[0]}, {expected[1]}, …]; take logits as they are: head='full'"
            )
        if self.trunk is None and not made[0].is_in(outputs):
            raise ArchitectureError(
                "head: the model makes something of its logits after the projection, expected that "
                "it hands them out as they are, as it did when the head was searched for; by "
                "chunks that would be left out, so take logits as they are: head='full'"
            )
        return taken[0]

    def finish(self, model: nn.Module) -> Callable[[Tensor], Tensor] | None:
        """What the model makes of the projection's rows [n, vocabulary]; None: nothing."""
        return None if self.trunk is None else lambda rows: _finished(self, model, rows)


# One search per architecture with weights: its head, or the reason why it has none.
_found: Verdicts[Head | str] = Verdicts()
_KEY = "head"


def find_head(architecture: nn.Module) -> Head | str:
    """The head that an architecture shows, or why it shows none.

    It is the `nn.Linear` that `get_output_embeddings()` returns, as the causal models of
    transformers and the built-in decoder have it. The model is called on a few tokens, in eval and
    in training mode, to see that its logits are what the projection returns and that nothing else,
    its buffers included, depends on them. A model that changes the logits must have a trunk
    (`base_model_prefix`) that can be left out, so that the rest of its forward can be called alone;
    that rest must treat every row alike and have no parameters. Hooks of the user's own on the
    logits hide the head, and so does compilation, which sees no hooks of ours.

    What cannot be told on the meta device is asked again in a step, where the weights are there.
    """
    projection = shown(architecture)
    if projection is None:
        return "it has no get_output_embeddings() that returns an nn.Linear"
    hindrance = _hindrance(architecture, projection)
    if hindrance is not None:
        return hindrance
    found = _found.of(architecture).get(_KEY)
    if found is None or (isinstance(found, Head) and found.projection is not projection):
        found = _search(architecture, projection)
        if isinstance(found, Head) or has_weights(architecture):
            _found.of(architecture)[_KEY] = found
    return found


def described(
    architecture: nn.Module, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> str:
    """How an architecture's logits are made: by chunks of which head, or whole and why.

    The params are bound for it, and the model is called on a few tokens; nothing is changed.
    """
    values = dict(architecture.named_buffers()) | dict(buffers)
    with bound(architecture, params, values, "eval"):
        found = find_head(architecture)
    if isinstance(found, str):
        return f"whole logits: {found}"
    rest = "" if found.trunk is None else f", then what the model makes of them after {found.trunk}"
    return f"logits by chunks of {found.weight}{rest}"


def has_weights(architecture: nn.Module) -> bool:
    """Whether every parameter has values: unbound, an architecture may hold only some of them."""
    return all(parameter.device.type != "meta" for parameter in architecture.parameters())


def shown(architecture: nn.Module) -> nn.Linear | None:
    """The projection that an architecture says is its head, whether or not it can be used."""
    shown = getattr(architecture, "get_output_embeddings", None)
    projection = shown() if callable(shown) else None
    return projection if isinstance(projection, nn.Linear) else None


def _hindrance(architecture: nn.Module, projection: nn.Linear) -> str | None:
    """Why a head cannot be used at present; None where it can."""
    if type(projection).forward is not nn.Linear.forward or "forward" in vars(projection):
        return "its projection has a forward of its own"
    if projection._parameters.get("weight") is None:
        return "its projection's weight is none of its parameters"
    if projection.bias is not None and projection._parameters.get("bias") is None:
        return "its projection's bias is none of its parameters"
    modules = (architecture, projection)
    if "_orig_mod" in architecture._modules or any(m._compiled_call_impl for m in modules):
        return "it is compiled, and compiled code sees no hooks"
    backward = (*projection._backward_hooks, *projection._backward_pre_hooks)
    if architecture._forward_hooks or projection._forward_hooks or backward:
        return "it has hooks that are to see the logits"
    return None


def _search(architecture: nn.Module, projection: nn.Linear) -> Head | str:
    names = {id(tensor): name for name, tensor in architecture.named_parameters()}
    if any(id(value) not in names for value in projection.parameters()):
        return "its projection is none of its modules"
    bias = None if projection.bias is None else names[id(projection.bias)]
    head = Head(projection, names[id(projection.weight)], bias, None)
    mode: Mode = "eval"
    whole: dict[Mode, Mapping[str, Tensor]] = {}
    try:
        for mode in _MODES:
            handed_out, whole[mode] = _called(architecture, projection, mode)
            if not handed_out and head.trunk is None:
                trunk = _trunk(architecture)
                if trunk is None:
                    changing = f"it changes the logits after the projection{_MODES[mode]}"
                    return f"{changing}, and names no trunk"
                head = attrs.evolve(head, trunk=trunk)
        for mode in _MODES if head.trunk is not None else ():
            fault = _fault(architecture, head, mode)
            if fault is not None:
                return fault
        for mode in _MODES:
            without = _do_without(architecture, head, mode)
            of_logits = [n for n, each in whole[mode].items() if not _alike(each, without.get(n))]
            if of_logits:
                return f"it makes its buffer {of_logits[0]} of its logits{_MODES[mode]}"
        return head
    except Exception as error:  # whatever a foreign forward raises, its head cannot be used
        raised = f"{type(error).__name__}: {str(error)[:200]}"
        return f"its forward cannot be called for it{_MODES[mode]} ({raised})"


def _trunk(architecture: nn.Module) -> str | None:
    """The name of the submodule before the projection, where the architecture says it."""
    name = getattr(architecture, "base_model_prefix", "")
    named = isinstance(name, str) and isinstance(architecture._modules.get(name), nn.Module)
    return name if named else None


# Dropout and temperatures may exist in training alone.
_MODES: Mapping[Mode, str] = {"eval": "", "train": " in training mode"}


def _fault(architecture: nn.Module, head: Head, mode: Mode) -> str | None:
    """What is wrong with the rest of a forward in this mode, or None.

    Its parameters are NaN, and so is one of the rows: the others, which are all the same, must not
    see it. Nor may they see the model's inputs, which the rest is not given.
    """
    nothing = {
        name: torch.full((), torch.nan, dtype=p.dtype, device=p.device).expand(p.shape)
        for name, p in architecture.named_parameters()
        if p.is_floating_point()
    }
    weight = head.projection.weight
    row = torch.linspace(-1, 1, len(weight), dtype=weight.dtype, device=weight.device)
    rows = row.repeat(3, 1)
    rows[0] = torch.nan
    ids = torch.arange(3, 0, -1, device=weight.device).unsqueeze(0) % len(weight)
    with calm(architecture, nothing, mode=mode):
        finished = _finished(head, architecture, rows)
        among = _finished(head, architecture, rows, ids)
    if finished.shape != rows.shape:
        return "its logits are of another shape"
    made = f"what it makes of a row of logits{_MODES[mode]}"
    if bool(finished[1:].isnan().any()):
        return f"{made} depends on parameters, or on other rows"
    if not all(row.equal(finished[1]) for row in (finished[2], *among[1:])):
        drawn = ", or is drawn" if mode == "train" else ""
        return f"{made} depends on its place, or on the tokens{drawn}"
    return None


def _tokens(projection: nn.Linear) -> Tensor:
    """Ids that every model knows; several, as the first token may be treated differently."""
    return torch.zeros(2, 3, dtype=torch.int64, device=projection.weight.device)


def _do_without(architecture: nn.Module, head: Head, mode: Mode) -> Mapping[str, Tensor]:
    """Call the model for its hidden states; raises what its forward raises for logits of no rows.

    Returns the buffers that it leaves, as `_called` does.
    """
    with calm(architecture, {}, mode=mode) as places:
        begun = bound_buffers(places)
        head.hidden(architecture, {"input_ids": _tokens(head.projection)})
        return _comparable(bound_buffers(places), begun)


def _called(
    architecture: nn.Module, projection: nn.Linear, mode: Mode
) -> tuple[bool, Mapping[str, Tensor]]:
    """Whether the model's logits are the very tensor that its projection returns in this mode.

    And the buffers that the call leaves.
    """
    made: list[_Made] = []
    with calm(architecture, {}, mode=mode) as places:
        begun = bound_buffers(places)
        with _left(projection, made):
            outputs = architecture(input_ids=_tokens(projection))
        left = _comparable(bound_buffers(places), begun)
    return len(made) == 1 and made[0].is_in(outputs), left


def _comparable(left: Mapping[str, Tensor], begun: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The buffers that a call left, but for those on the meta device, which have no values.

    Raises `ArchitectureError` where one of these was written to, as its new value is unknown.
    """
    for name, each in left.items():
        if each.is_meta and (each is not begun[name] or _version(each)):
            raise ArchitectureError(f"{name} is written to, and has no values on the meta device")
    return {name: each for name, each in left.items() if not each.is_meta}


def _alike(one: Tensor, other: Tensor | None) -> bool:
    """Whether two buffers have the same bits."""
    if other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    first, second = (each.contiguous().flatten().view(torch.uint8) for each in (one, other))
    return first.equal(second)


@attrs.frozen(eq=False)
class _Made:
    """What the projection returned, and its version at that time, where it has one."""

    output: Tensor
    version: int | None

    def is_in(self, outputs: Any) -> bool:
        """Whether it is what the model returns, and has not been written to in place."""
        return _logits(outputs) is self.output and self.version == _version(self.output)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


@contextmanager
def _left(projection: nn.Linear, made: list[_Made]) -> Generator[None]:
    """Record what the projection returns within this context.

    Half precision is widened first, so that a model which widens its logits changes nothing.
    """

    def leave(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        output = output.float() if output.dtype.itemsize < 4 else output
        made.append(_Made(output, _version(output)))
        return output

    handle = projection.register_forward_hook(leave)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def calm(
    architecture: nn.Module,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor] = MappingProxyType({}),
    *,
    mode: Mode = "eval",
) -> Generator[Slots]:
    """Bind an architecture in this mode, with neither history nor compilation, and restore it.

    Buffers, random generators and attributes that the forward sets are as before at the end. Yields
    the slots that are bound.

    `params`, `buffers`: what is bound in place of the architecture's own.
    """
    params = {**dict(architecture.named_parameters()), **params}
    given = {**dict(architecture.named_buffers()), **buffers}
    with torch.inference_mode(False):  # tensors made in it cannot be written to outside
        buffers = {name: buffer.clone() for name, buffer in given.items()}
    device = next(iter(params.values())).device
    places = slots(architecture, held=True)
    with (
        torch.inference_mode(False),  # in which no tensor has a version
        torch.no_grad(),
        _attributes_put_back(architecture),
        bound(architecture, params, buffers, mode, places=places),
        keys.seeded(0, device),
        compilation.paused(architecture),
    ):
        yield places


@contextmanager
def _attributes_put_back(architecture: nn.Module) -> Generator[None]:
    before = [(vars(module), dict(vars(module))) for module in architecture.modules()]
    try:
        yield
    finally:
        for own, attributes in before:
            for key in own.keys() - attributes.keys():
                del own[key]
            own.update(attributes)


@contextmanager
def _entered(projection: nn.Linear, taken: list[Tensor]) -> Generator[None]:
    def enter(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0].to(computed_in(inputs[0]))
        taken.append(hidden)
        return (hidden[..., :0, :],)

    handle = projection.register_forward_pre_hook(enter)
    try:
        yield
    finally:
        handle.remove()


class _Outputs(dict[str, Any]):
    """What a trunk returns, as far as a causal model reads it."""

    def __getitem__(self, key: Any) -> Any:
        return self.get("last_hidden_state") if key == 0 else self.get(key)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)


class _Trunk(nn.Module):
    """The trunk's stand-in: it returns hidden states of no rows, and has none of its methods."""

    def __init__(self, trunk: nn.Module | None, hidden: Tensor) -> None:
        super().__init__()
        self.__dict__["_trunk"] = trunk  # not a submodule
        self._hidden = hidden

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_trunk"], name)
        if callable(value):
            raise AttributeError(f"{name} of the trunk is called")
        return value

    def forward(self, *_args: Any, **_inputs: Any) -> _Outputs:
        return _Outputs(last_hidden_state=self._hidden)


def _finished(head: Head, model: nn.Module, rows: Tensor, ids: Tensor | None = None) -> Tensor:
    """The rest of the model's forward, from the projection's output on; `ids`: by default one 0."""
    assert head.trunk is not None
    trunk = model._modules[head.trunk]

    def leave(_module: nn.Module, _inputs: object, _output: object) -> Tensor:
        return rows.unsqueeze(0)

    handle = head.projection.register_forward_hook(leave)
    hidden = head.projection.weight.new_empty(1, 0, head.projection.in_features)
    model._modules[head.trunk] = _Trunk(trunk, hidden)
    if ids is None:
        ids = torch.zeros(1, 1, dtype=torch.int64, device=rows.device)
    try:
        outputs = model(input_ids=ids)
    finally:
        model._modules[head.trunk] = trunk
        handle.remove()
    finished: Tensor = _logits(outputs).squeeze(0)
    return finished


def _logits(outputs: Any) -> Any:
    """The logits in a model's output; None where there are none."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        return outputs.get("logits")
    return getattr(outputs, "logits", None)
