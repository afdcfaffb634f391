"""Where an architecture shows its head: the last projection, from hidden states to logits.

Where it does, the logits of a whole batch, [batch, time, vocabulary], need never exist: the hidden
states are taken at the projection's door, and logits are made of a few rows at a time
(`functrain.objectives.chunks`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from functrain.errors import ArchitectureError
from functrain.objectives.batches import MODEL_INPUTS, Batch

Call = Callable[..., Any]
"""A model's forward, with the keywords of `MODEL_INPUTS`."""


@attrs.frozen(eq=False)
class Head:
    """The projection of an architecture, by its module and the names of its parameters.

    `trunk`: the name of the submodule whose output the projection takes, where the model does more
    with the logits after it (a soft cap, a scale); None where it hands them out as they are.
    """

    projection: nn.Linear
    weight: str
    bias: str | None
    trunk: str | None

    def hidden(self, call: Call, batch: Batch) -> Tensor:
        """The hidden states [batch, time, width] that the projection would have taken.

        The model is called as ever, but the projection is handed no rows, so it makes none.
        """
        taken: list[Tensor] = []
        with _entered(self.projection, taken):
            call(**{key: batch[key] for key in MODEL_INPUTS if key in batch})
        expected = tuple(batch["input_ids"].shape)
        if len(taken) != 1 or tuple(taken[0].shape[:-1]) != expected:
            shapes = [list(each.shape) for each in taken]
            raise ArchitectureError(
                f"head: the projection was handed {shapes}, expected one [batch, time, width] = "
                f"[{expected[0]}, {expected[1]}, …]; take logits as they are: head='full'"
            )
        return taken[0]

    def finish(self, model: nn.Module) -> Callable[[Tensor], Tensor] | None:
        """What the model makes of the projection's rows [n, vocabulary]; None: nothing."""
        return None if self.trunk is None else lambda rows: _finished(self, model, rows)


# One search for each architecture; the reason is kept where it has no head.
_found: weakref.WeakKeyDictionary[nn.Module, Head | str] = weakref.WeakKeyDictionary()


def find_head(architecture: nn.Module) -> Head | str:
    """The head that an architecture shows, or why it shows none.

    Shown by `get_output_embeddings()`, an `nn.Linear`, as the causal models of transformers and the
    built-in decoder have it. The model is called once on a single token, in eval mode, to see that
    its logits are what the projection returns; where it changes them, it must have a trunk
    (`base_model_prefix`) that can be left out, so that the rest of its forward can be called alone.
    """
    found = _found.get(architecture)
    if found is None:
        found = _found[architecture] = _search(architecture)
    return found


def _search(architecture: nn.Module) -> Head | str:
    shown = getattr(architecture, "get_output_embeddings", None)
    projection = shown() if callable(shown) else None
    if not isinstance(projection, nn.Linear) or projection.weight is None:
        return "it has no get_output_embeddings() that returns an nn.Linear"
    names = {id(tensor): name for name, tensor in architecture.named_parameters()}
    weight = names.get(id(projection.weight))
    if weight is None:
        return "its projection's weight is none of its parameters"
    bias = None if projection.bias is None else names[id(projection.bias)]
    plain = Head(projection, weight, bias, None)
    try:
        if _hands_out(architecture, plain):
            return plain
        trunk = getattr(architecture, "base_model_prefix", "")
        if not isinstance(trunk, str) or not isinstance(
            architecture._modules.get(trunk), nn.Module
        ):
            return "it changes the logits after the projection, and names no trunk"
        head = attrs.evolve(plain, trunk=trunk)
        rows = projection.weight.new_zeros(3, projection.out_features)
        with _calm(architecture):
            finished = _finished(head, architecture, rows)
    except Exception as error:  # whatever a foreign forward raises, it is no head that can be used
        return f"its forward cannot be called for it ({type(error).__name__}: {str(error)[:200]})"
    return head if finished.shape == rows.shape else "its logits are of another shape"


def _hands_out(architecture: nn.Module, head: Head) -> bool:
    """Whether the model's logits are the very tensor that its projection returns."""
    ids = torch.zeros(1, 1, dtype=torch.int64, device=head.projection.weight.device)
    returned: list[Any] = []

    def leave(_module: nn.Module, _inputs: object, output: Any) -> None:
        returned.append(output)

    handle = head.projection.register_forward_hook(leave)
    try:
        with _calm(architecture):
            outputs = architecture(input_ids=ids)
    finally:
        handle.remove()
    return len(returned) == 1 and _logits(outputs) is returned[0]


@contextmanager
def _calm(architecture: nn.Module) -> Iterator[None]:
    """Eval mode, and no history."""
    modes = [(module, module.training) for module in architecture.modules()]
    try:
        architecture.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _entered(projection: nn.Linear, taken: list[Tensor]) -> Iterator[None]:
    def enter(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        taken.append(inputs[0])
        return (inputs[0][..., :0, :],)

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
        return self.get(name)


class _Trunk(nn.Module):
    """In the trunk's place: hidden states of no rows."""

    def __init__(self, width: int, like: Tensor) -> None:
        super().__init__()
        self._hidden = like.new_empty(1, 0, width)

    def forward(self, *_args: Any, **_inputs: Any) -> _Outputs:
        return _Outputs(last_hidden_state=self._hidden)


def _finished(head: Head, model: nn.Module, rows: Tensor) -> Tensor:
    """The rest of the model's forward, from the projection's output on."""
    assert head.trunk is not None
    trunk = model._modules[head.trunk]

    def leave(_module: nn.Module, _inputs: object, _output: object) -> Tensor:
        return rows.unsqueeze(0)

    handle = head.projection.register_forward_hook(leave)
    model._modules[head.trunk] = _Trunk(head.projection.in_features, head.projection.weight)
    try:
        outputs = model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=rows.device))
    finally:
        model._modules[head.trunk] = trunk
        handle.remove()
    finished: Tensor = _logits(outputs).squeeze(0)
    return finished


def _logits(outputs: Any) -> Any:
    """The logits among what a model returns; None where there are none."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        return outputs.get("logits")
    return getattr(outputs, "logits", None)
