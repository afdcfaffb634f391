"""Any `torch.optim.Optimizer` class as a pure pair."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from functrain import keys
from functrain.checks import check_tensors, is_number
from functrain.errors import ConfigError, FunctrainError, StateError
from functrain.optimizers.base import (
    Group,
    OptimizerState,
    advanced,
    as_groups,
    check_update,
    checked,
    first_defaults,
    grouped,
    held_back,
    laid_out,
    owned,
    rate_of,
    zero_count,
)
from functrain.optimizers.composite import Form, form, has_parts, is_composite, parts, put_together
from functrain.trees import Tensors, in_order, tensors, versions


def sgd(
    lr: float = 1e-3,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    groups: Iterable[Group] = (),
    **options: Any,
) -> Adapter:
    """SGD with momentum, as `torch.optim.SGD`."""
    return from_torch(
        torch.optim.SGD,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        groups=groups,
        **options,
    )


def adafactor(lr: float = 1e-2, *, groups: Iterable[Group] = (), **options: Any) -> Adapter:
    """Adafactor (Shazeer & Stern, 1804.04235), as `torch.optim.Adafactor`."""
    return from_torch(torch.optim.Adafactor, lr=lr, groups=groups, **options)


def adamw_8bit(lr: float = 1e-3, *, groups: Iterable[Group] = (), **options: Any) -> Adapter:
    """AdamW with block-wise 8-bit moments (Dettmers et al., 2110.02861), from bitsandbytes.

    The moments take a quarter of the memory, on the CPU and on CUDA; tensors of fewer than 4,096
    values keep theirs in float32. Raises `ConfigError` where bitsandbytes is not installed.
    """
    try:
        found = importlib.import_module("bitsandbytes.optim")
    except ModuleNotFoundError as error:
        raise ConfigError(
            "adamw_8bit: bitsandbytes is missing; pip install 'functrain[optimizers]'"
        ) from error
    return from_torch(found.AdamW8bit, lr=lr, groups=groups, **options)


def from_torch(
    cls: Callable[..., torch.optim.Optimizer],
    *,
    lr: float = 1e-3,
    groups: Iterable[Group] = (),
    **options: Any,
) -> Adapter:
    """Any `torch.optim.Optimizer` class as a pure pair: `from_torch(torch.optim.RAdam, eps=1e-6)`.

    The class must keep its state per parameter, in tensors and numbers, as the interface says. One
    that writes into its parameter groups, counts in an attribute of its own (a number or a tensor)
    or needs a closure is refused with `ConfigError`; what it writes is found by an update of zeros
    before the first donated one. Lists and dicts among its attributes are taken for caches, which
    begin anew in each update.
    """
    return Adapter(cls=cls, lr=lr, options=options, groups=groups)


@attrs.frozen(kw_only=True)
class Adapter:
    """Any torch optimizer class as a pure pair; see `from_torch`.

    The class creates its per-parameter state at its first update, so `slots` is empty before. A
    Python number in that state is kept as a 0-d tensor under `slot.number`, which tells it from a
    tensor that is 0-d itself; a None as an empty tensor under `slot.none`. A tensor of the class's
    that wraps others (8-bit moments) is kept as its parts; see `functrain.optimizers.composite`.
    """

    cls: Callable[..., torch.optim.Optimizer]
    lr: float
    options: Mapping[str, Any]
    groups: tuple[Group, ...] = attrs.field(default=(), converter=as_groups)
    # The forms of the class's own tensors; a function of this record and of a parameter's kind.
    _forms: dict[Any, Mapping[str, Form | None]] = attrs.field(
        factory=dict, init=False, eq=False, repr=False
    )
    # The kinds of params for which the state is known to hold only what can be carried.
    _tried: set[Any] = attrs.field(factory=set, init=False, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        _refuse_made(self.cls)
        every: list[Mapping[str, Any]] = [{}, *(g.options for g in self.groups)]
        for options in every:
            merged = {**self.options, **{k: v for k, v in options.items() if k != "lr_scale"}}
            if "lr" in merged:
                raise ConfigError(f"{self.kind}: a group's share of the learning rate is lr_scale")
            _refuse_graphs(self.kind, merged)
            _refuse_closure(self.kind, checked(self.cls, lr=self.lr, **merged))

    @property
    def kind(self) -> str:
        """The name of the class."""
        return getattr(self.cls, "__name__", type(self.cls).__name__)

    @property
    def is_torchs(self) -> bool:
        """Whether the class is one of torch's own, about which more is known."""
        return getattr(self.cls, "__module__", "").startswith("torch.optim.")

    def init(self, params: Mapping[str, Tensor]) -> OptimizerState:
        """No slots yet: the class makes them at the first update.

        Raises `ConfigError` for params that the class does not take (Muon takes matrices only).
        """
        check_tensors("params", params)
        if params:
            try:
                self._optimizer({name: p.detach() for name, p in params.items()}, self.lr)
            except (AssertionError, TypeError, ValueError, RuntimeError) as error:
                raise ConfigError(f"{self.kind}: {error}") from error
        return OptimizerState(kind=self.kind, count=zero_count(params), slots={})

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
        """One `step()` of the class on copies, or in place when donated.

        On an accelerator this waits for the learning rate and for `applied`.
        """
        check_update(self.kind, grads, state, params)
        self._refuse_dense(grads)
        if held_back(applied, waits=True):
            return tensors(params), state
        if donate:
            self._try(grads, state, params)
        new_params, slots = owned(params, state.slots, grads, donate)
        leaves = {name: new_params[name].detach() for name in new_params if name in grads}
        count = advanced(state.count, applied)
        if not leaves:
            return new_params, attrs.evolve(state, count=count, slots=slots)
        optimizer = self._optimizer(leaves, learning_rate)
        spared = frozenset(leaves) if donate else self._spared(optimizer, leaves)
        for name, leaf in leaves.items():
            grad = laid_out(grads[name], leaf) if self._fused else grads[name]
            leaf.grad = grad if name in spared else grad.clone()
            self._fill(optimizer, name, leaf, slots)
        new_slots = self._stepped(optimizer, leaves, slots)
        new_params = Tensors({**new_params, **{n: leaf.detach() for n, leaf in leaves.items()}})
        return new_params, attrs.evolve(state, count=count, slots=new_slots)

    def check(
        self, grads: Mapping[str, Tensor], state: OptimizerState, params: Mapping[str, Tensor]
    ) -> None:
        """Raise what `update` would with `donate=True`, and write nothing."""
        check_update(self.kind, grads, state, params)
        self._refuse_dense(grads)
        self._try(grads, state, params)

    def _refuse_dense(self, grads: Mapping[str, Tensor]) -> None:
        if self.cls is not torch.optim.SparseAdam:
            return
        for name, grad in grads.items():
            if grad.layout is torch.strided:
                raise StateError(
                    f"grads/{name}: dense, as all of a step's are, and SparseAdam takes sparse "
                    "ones alone; take functrain.optim.adam"
                )

    def _try(
        self, grads: Mapping[str, Tensor], state: OptimizerState, params: Mapping[str, Tensor]
    ) -> None:
        """Run a trial that refuses a class whose state cannot be carried, or another class's state.

        The trial is an update by zeros, with the state that is there, of the smallest parameter of
        each kind, once per kind; after a real update it would be too late.
        """
        slots = list(state.slots.items())
        smallest: dict[Any, str] = {}
        for options, names in grouped(self.groups, params, grads):
            for name in names:
                param = params[name]
                own = id(options) if options else None
                has = tuple(slot for slot, items in slots if name in items)
                kind = (own, param.ndim, param.dtype, param.device, grads[name].layout, has)
                if kind in self._tried:
                    continue
                other = smallest.setdefault(kind, name)
                if param.numel() < params[other].numel():
                    smallest[kind] = name
        if not smallest:
            return
        leaves = {name: torch.zeros_like(params[name]) for name in smallest.values()}
        for name, leaf in leaves.items():
            dense = grads[name].layout is torch.strided
            leaf.grad = torch.zeros_like(leaf if dense else grads[name])
        try:
            with keys.kept(next(iter(leaves.values())).device):  # its draws are undone
                optimizer = self._optimizer(leaves, self.lr)
                for name, leaf in leaves.items():
                    copied = {s: {name: t[name].clone()} for s, t in slots if name in t}
                    self._fill(optimizer, name, leaf, copied)
                self._stepped(optimizer, leaves, {})
        except FunctrainError:
            raise
        except Exception:  # a class that does not take zeros says nothing of its state
            pass
        self._tried.update(smallest)

    def _fill(
        self,
        optimizer: torch.optim.Optimizer,
        name: str,
        leaf: Tensor,
        slots: Mapping[str, Mapping[str, Tensor]],
    ) -> None:
        """Give the class what the slots hold for a parameter."""
        own = dict(_entry(slot, t[name]) for slot, t in slots.items() if name in t)
        if has_parts(own):
            own = self._put_together(name, own, leaf)
        if own:
            optimizer.state[leaf] = own

    def _stepped(
        self,
        optimizer: torch.optim.Optimizer,
        leaves: Mapping[str, Tensor],
        slots: Mapping[str, Tensors],
    ) -> dict[str, Tensors]:
        """The slots after a step of the class; `ConfigError` for state that cannot be carried."""
        own, groups = _seen(vars(optimizer)), [_seen(g) for g in optimizer.param_groups]
        found = {slot for entries in optimizer.state.values() for slot in entries}
        try:
            with first_defaults():
                optimizer.step()
        except KeyError as error:
            if not found or (error.args and error.args[0] in found):
                raise
            raise StateError(
                f"optimizer: {self.kind} looks for {error} in its state, which has "
                f"{', '.join(sorted(found))}; it was made with other options: give those, or begin "
                "anew with init(params)"
            ) from error
        _refuse_own_state(self.kind, own, vars(optimizer))
        _refuse_group_state(self.kind, groups, optimizer.param_groups)
        _refuse_common_state(self.kind, optimizer, leaves)
        return _slots({n: _plain(optimizer.state[p], p) for n, p in leaves.items()}, slots)

    def _put_together(self, name: str, own: Mapping[str, Any], leaf: Tensor) -> dict[str, Any]:
        """A parameter's state, reassembled into the class's own tensors."""
        kind = (name, leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
        if kind not in self._forms:
            # An update of zeros, after which the class shows what it keeps.
            like = torch.zeros_like(leaf)
            like.grad = torch.zeros_like(leaf)
            optimizer = self._optimizer({name: like}, self.lr)
            with keys.kept(leaf.device), first_defaults():
                optimizer.step()
            self._forms[kind] = {slot: form(v) for slot, v in optimizer.state[like].items()}
        try:
            return put_together(own, self._forms[kind])
        except (KeyError, TypeError, AssertionError, RuntimeError) as error:
            raise StateError(
                f"optimizer: {self.kind} has no place for {sorted(own)} of {name} ({error!r}); the "
                "state was made by another version of the class, or with other options: begin "
                "anew with init(params)"
            ) from error

    def _spared(
        self, optimizer: torch.optim.Optimizer, leaves: Mapping[str, Tensor]
    ) -> frozenset[str]:
        """The params whose gradients the class is known not to write into.

        With torch's own classes that is all of them, except for SGD's.
        """
        if not self.is_torchs:
            return frozenset()
        if self.cls is not torch.optim.SGD:
            return frozenset(leaves)
        groups = [g for g in optimizer.param_groups if _adds_into_gradients(g)]
        written = {id(leaf) for g in groups for leaf in g["params"]}
        return frozenset(name for name, leaf in leaves.items() if id(leaf) not in written)

    @property
    def _fused(self) -> bool:
        return any(o.get("fused") for o in (self.options, *(g.options for g in self.groups)))

    def _optimizer(
        self, leaves: Mapping[str, Tensor], learning_rate: Tensor | float
    ) -> torch.optim.Optimizer:
        # Made with the optimizer's own rate, then set as schedulers set it: many classes refuse a
        # rate of 0, with which a warmup begins.
        groups = list(grouped(self.groups, leaves, leaves))
        of = [
            {
                "params": [leaves[n] for n in names],
                **{k: v for k, v in options.items() if k != "lr_scale"},
            }
            for options, names in groups
        ]
        with first_defaults():
            optimizer = self.cls(of, lr=self.lr, **self.options)
        for param_group, (options, _) in zip(optimizer.param_groups, groups, strict=True):
            rate = float(rate_of(learning_rate, options))
            if isinstance(param_group["lr"], Tensor):  # the class's own choice, and it insists
                param_group["lr"].fill_(rate)
            else:
                param_group["lr"] = rate
        return optimizer


def _adds_into_gradients(group: Mapping[str, Any]) -> bool:
    """Whether SGD adds Nesterov's momentum to all gradients of a group at once, in place.

    On accelerators `foreach=None` does so too; with a decay or `maximize` it is done on copies.
    """
    if not group["nesterov"] or group["fused"] or group["foreach"] is False:
        return False
    if group["weight_decay"] or group["maximize"]:
        return False
    return bool(group["foreach"]) or any(p.device.type != "cpu" for p in group["params"])


_NUMBER, _NONE = ".number", ".none"


def _plain(state: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
    """A parameter's state in plain tensors and numbers.

    A tensor with the parameter's strides keeps them, since a fused kernel goes by them; any other
    is laid out as a checkpoint reads it: `torch.linalg.qr`, which SOAP calls, gives a matrix by its
    columns.
    """
    found: dict[str, Any] = {}
    for slot, value in state.items():
        if is_composite(value, param):
            found.update(parts(slot, value))
        elif not isinstance(value, Tensor) or value.layout is not torch.strided:
            found[slot] = value
        else:
            found[slot] = value if value.stride() == param.stride() else in_order(value)
    return found


def _entry(slot: str, value: Tensor) -> tuple[str, Tensor | float | None]:
    """An entry of the class's state, from a slot."""
    if slot.endswith(_NUMBER):
        return slot.removesuffix(_NUMBER), value.item()
    if slot.endswith(_NONE):
        return slot.removesuffix(_NONE), None
    return slot, value


def _slots(
    states: Mapping[str, Mapping[str, Any]], before: Mapping[str, Tensors]
) -> dict[str, Tensors]:
    # Nothing of these parameters is kept from before: what the class has removed would be back in
    # the next update, and so would a number that has become a tensor.
    slots = {s: {n: t for n, t in own.items() if n not in states} for s, own in before.items()}
    for name, state in states.items():
        for entry, value in state.items():
            slot, kept = _slot(entry, value, name)
            slots.setdefault(slot, {})[name] = kept
    return {slot: Tensors(items) for slot, items in sorted(slots.items()) if items}


def _slot(entry: str, value: Any, name: str) -> tuple[str, Tensor]:
    """A slot, from an entry of the class's state."""
    if isinstance(value, Tensor):
        return entry, value.detach()
    if value is None:
        return entry + _NONE, torch.empty(0, device="cpu")
    if isinstance(value, int | float):
        return entry + _NUMBER, _as_tensor(value)
    raise ConfigError(
        f"optimizer state {entry!r} of {name} is a {type(value).__name__}; only tensors and "
        "numbers can be carried and saved"
    )


def _as_tensor(value: float | bool) -> Tensor:
    if isinstance(value, bool):
        return torch.tensor(value, dtype=torch.bool, device="cpu")
    dtype = torch.int64 if isinstance(value, int) else torch.float64
    return torch.tensor(value, dtype=dtype, device="cpu")


def _refuse_made(cls: object) -> None:
    if isinstance(cls, torch.optim.Optimizer):
        name = type(cls).__name__
        raise ConfigError(
            f"from_torch: an optimizer of {name} that is made; give the class, "
            f"from_torch(torch.optim.{name}, …)"
        )


def _refuse_graphs(kind: str, options: Mapping[str, Any]) -> None:
    for option in ("differentiable", "capturable"):
        if options.get(option):
            raise ConfigError(
                f"{kind}: {option}=True is for updates inside a recorded graph, and these are made "
                "outside of one; leave it out"
            )


def _refuse_closure(kind: str, optimizer: torch.optim.Optimizer) -> None:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ConfigError(
            f"{kind}: its step evaluates the loss again through a closure, and a pure update has "
            "gradients only; take a class whose step() needs no closure"
        )


_Seen = Mapping[str, tuple[Any, int]]


def _seen(entries: Mapping[str, Any]) -> _Seen:
    """The entries, each with its version: of a tensor, a number that changes with each write."""
    held = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
    found = dict(zip(held, versions(held), strict=True))
    return {key: (value, found.get(key, 0)) for key, value in entries.items()}


def _refuse_own_state(kind: str, before: _Seen, after: Mapping[str, Any]) -> None:
    now = _seen(after)
    for key in (*now, *before):
        old, new = before.get(key, (None, 0)), now.get(key, (None, 0))
        if isinstance(old[0], Tensor) or isinstance(new[0], Tensor):
            changed = old[0] is not new[0] or old[1] != new[1]
        else:
            changed = (is_number(old[0]) or is_number(new[0])) and old != new
        if changed:
            raise ConfigError(
                f"{kind} counts in its attribute {key!r}, which would begin anew in each update; a "
                "pure update can carry only per-parameter state"
            )


def _refuse_group_state(kind: str, before: list[_Seen], after: list[dict[str, Any]]) -> None:
    for old, group in zip(before, after, strict=True):
        for key, (value, version) in _seen(group).items():
            same = key in old and old[key][0] is value and old[key][1] == version
            if key != "params" and not same:
                raise ConfigError(
                    f"{kind} keeps {key!r} in its parameter groups; a pure update can carry only "
                    "per-parameter state"
                )


def _refuse_common_state(
    kind: str, optimizer: torch.optim.Optimizer, leaves: Mapping[str, Tensor]
) -> None:
    known = {id(leaf) for leaf in leaves.values()}
    for key in optimizer.state:
        if id(key) not in known:
            raise ConfigError(
                f"{kind} keeps {key!r} in a state that no parameter owns; a pure update can carry "
                "only per-parameter state"
            )
