"""Adam and AdamW, straight over torch's functional kernel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.optim.adam import adam as adam_kernel

from functrain.checks import check_fraction, check_not_negative, check_tensors
from functrain.errors import ConfigError, StateError
from functrain.optimizers.base import (
    Group,
    OptimizerState,
    advanced,
    as_groups,
    check_rate,
    check_update,
    grouped,
    held_back,
    laid_out,
    owned,
    rate_of,
    zero_count,
)
from functrain.trees import Tensors, are_like, by_dtype, tensors

_List = list[Tensor]
_Lists = tuple[_List, _List, _List, _List, _List, _List]


def adamw(
    lr: float = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
    maximize: bool = False,
    fused: bool = True,
    groups: Iterable[Group] = (),
) -> Adam:
    """AdamW (Loshchilov & Hutter, 1711.05101), bit-equal to `torch.optim.AdamW(fused=fused)`."""
    return Adam(
        decoupled=True,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
        maximize=maximize,
        fused=fused,
        groups=groups,
    )


def adam(
    lr: float = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    fused: bool = True,
    groups: Iterable[Group] = (),
) -> Adam:
    """Adam (Kingma & Ba, 1412.6980), bit-equal to `torch.optim.Adam(fused=fused)`."""
    return Adam(
        decoupled=False,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
        maximize=maximize,
        fused=fused,
        groups=groups,
    )


@attrs.frozen(kw_only=True)
class Adam:
    """Adam and AdamW over torch's functional kernel; see `adamw` and `adam`."""

    decoupled: bool
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    amsgrad: bool = False
    maximize: bool = False
    fused: bool = True
    groups: tuple[Group, ...] = attrs.field(default=(), converter=as_groups)

    def __attrs_post_init__(self) -> None:
        # Not by an optimizer of torch's: making the first takes a second, to import the compiler.
        check_rate(self.kind, self.lr)
        for options in (self._options(), *(self._options(each.options) for each in self.groups)):
            for name in ("eps", "weight_decay"):
                check_not_negative(f"{self.kind} {name}", options[name])
            betas = options["betas"]
            if not isinstance(betas, Sequence) or len(betas) != 2:
                raise ConfigError(f"{self.kind} betas: {betas!r}, expected two numbers in [0, 1)")
            for beta in betas:
                check_fraction(f"{self.kind} betas", beta)

    @property
    def kind(self) -> str:
        """`adamw` or `adam`, and whether it keeps AMSGrad's maximum."""
        return ("adamw" if self.decoupled else "adam") + ("(amsgrad)" if self.amsgrad else "")

    def init(self, params: Mapping[str, Tensor]) -> OptimizerState:
        """Zero moments for every parameter, on its device and in its dtype.

        Raises `ConfigError` for complex params where the kernel is the fused one.
        """
        check_tensors("params", params)
        for name, param in params.items():
            if self.fused and param.is_complex():
                raise ConfigError(
                    f"{self.kind}: params/{name} is {param.dtype}, which torch's fused kernel does "
                    "not take; give fused=False"
                )
        slots = {
            slot: Tensors({name: torch.zeros_like(p) for name, p in params.items()})
            for slot in self._moments
        }
        slots["step"] = Tensors({name: self._step_count(p) for name, p in params.items()})
        return OptimizerState(kind=self.kind, count=zero_count(params), slots=slots)

    @property
    def _moments(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if self.amsgrad else ()))

    def _step_count(self, param: Tensor) -> Tensor:
        device = param.device if self.fused else torch.device("cpu")
        return torch.zeros((), dtype=torch.float32, device=device)

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
        """One update by torch's kernel; see `Optimizer.update`.

        With `fused=False` this waits on an accelerator for `applied`.
        """
        self._check_given(grads, state, params)
        if held_back(applied, waits=not self.fused):
            return tensors(params), state
        params, slots = owned(params, state.slots, grads, donate)
        self._check_slots(slots, grads, params)
        for options, names in grouped(self.groups, params, grads):
            self._kernel(options, names, grads, params, slots, learning_rate, applied)
        count = advanced(state.count, applied)
        return params, OptimizerState(kind=state.kind, count=count, slots=slots)

    def check(
        self, grads: Mapping[str, Tensor], state: OptimizerState, params: Mapping[str, Tensor]
    ) -> None:
        """Raise what `update` would with `donate=True`, and write nothing."""
        self._check_given(grads, state, params)
        self._check_slots(state.slots, grads, params)

    def _check_given(
        self, grads: Mapping[str, Tensor], state: OptimizerState, params: Mapping[str, Tensor]
    ) -> None:
        check_update(self.kind, grads, state, params)
        if not are_like(grads, params):
            _refuse_sparse(grads)

    def _check_slots(
        self,
        slots: Mapping[str, Tensors],
        grads: Mapping[str, Tensor],
        params: Mapping[str, Tensor],
    ) -> None:
        names = (*self._moments, "step")
        for slot in names:
            missing = grads.keys() - slots[slot].keys() if slot in slots else set(grads)
            if missing:
                raise StateError(f"state/{slot}: no {min(missing)}; {_FRESH}")
        # Lists are compared, not tensors one by one: a model has hundreds.
        own = [params[name] for name in grads]
        shapes, strides = [p.shape for p in own], [p.stride() for p in own]
        dtypes = [p.dtype for p in own]
        for slot in self._moments:
            values = [slots[slot][name] for name in grads]
            same = [value.shape for value in values] == shapes
            same = same and [value.dtype for value in values] == dtypes
            if not same or (self.fused and [value.stride() for value in values] != strides):
                for name, value, param in zip(grads, values, own, strict=True):
                    self._check_moment(slot, name, value, param)
        for name in grads:
            count = slots["step"][name]
            if count.ndim:
                self._check_moment("step", name, count, count.new_zeros(()))

    def _check_moment(self, slot: str, name: str, value: Tensor, like: Tensor) -> None:
        where = f"state/{slot}/{name}"
        if value.shape != like.shape:
            raise StateError(
                f"{where}: shape {list(value.shape)}, expected {list(like.shape)}; {_FRESH}"
            )
        if value.dtype != like.dtype:
            raise StateError(
                f"{where}: {value.dtype}, expected {like.dtype} as the parameter is; {_FRESH}"
            )
        if self.fused and value.stride() != like.stride():
            raise StateError(
                f"{where}: strides {value.stride()}, expected the parameter's {like.stride()} for "
                f"the fused kernel; give params[{name!r}].contiguous() to init and update, or take "
                "fused=False"
            )

    def _kernel(
        self,
        options: Mapping[str, Any],
        names: Sequence[str],
        grads: Mapping[str, Tensor],
        params: Tensors,
        slots: Mapping[str, Tensors],
        learning_rate: Tensor | float,
        applied: Tensor | None,
    ) -> None:
        settings = self._options(options)
        beta1, beta2 = settings["betas"]
        shared = {
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": settings["weight_decay"],
            "eps": settings["eps"],
            "lr": rate_of(learning_rate, options),
            "amsgrad": self.amsgrad,
            "maximize": self.maximize,
        }
        with torch.no_grad():
            if not self.fused:
                lists = self._lists(names, grads, params, slots)
                adam_kernel(*lists, fused=False, decoupled_weight_decay=self.decoupled, **shared)
                return
            for several in by_dtype({name: params[name].dtype for name in names}):
                lists = self._lists(several, grads, params, slots)
                self._fused_kernel(lists, _found_inf(applied), shared)

    def _lists(
        self,
        names: Sequence[str],
        grads: Mapping[str, Tensor],
        params: Tensors,
        slots: Mapping[str, Tensors],
    ) -> _Lists:
        """What torch's kernels take, in their order."""
        own = [params[n] for n in names]
        given = [grads[n] for n in names]
        if self.fused and [grad.stride() for grad in given] != [param.stride() for param in own]:
            given = [laid_out(grad, param) for grad, param in zip(given, own, strict=True)]
        maxima = [slots["max_exp_avg_sq"][n] for n in names] if self.amsgrad else []
        first, second = ([slots[slot][n] for n in names] for slot in self._moments[:2])
        return own, given, first, second, maxima, [slots["step"][n] for n in names]

    def _fused_kernel(
        self, lists: _Lists, found_inf: Tensor | None, options: dict[str, Any]
    ) -> None:
        """Call torch's fused kernel as `torch.optim` does, with counts of the same values.

        `torch.optim` adds a Python number to each count, and a tensor is made of it each time: on
        the CPU that takes longer than the kernel does for a small parameter.
        """
        counts = lists[-1]
        if counts[0].device.type == "cpu":
            one = torch.ones((), device="cpu")
            torch._foreach_add_(counts, one, alpha=1)  # without alpha, as a number
        else:
            torch._foreach_add_(counts, 1)
        kernel = torch._fused_adamw_ if self.decoupled else torch._fused_adam_
        kernel(*lists, found_inf=found_inf, **options)
        if found_inf is not None:
            torch._foreach_sub_(counts, [found_inf] * len(counts))

    def _options(self, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
        own = {"betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}
        given = {k: v for k, v in (overrides or {}).items() if k != "lr_scale"}
        unknown = given.keys() - own.keys()
        if unknown:
            raise ConfigError(
                f"group option {min(unknown)!r}: an Adam group may set betas, eps, weight_decay "
                "and lr_scale"
            )
        return {"lr": self.lr, **own, **given}


def _refuse_sparse(grads: Mapping[str, Tensor]) -> None:
    for name, grad in grads.items():
        if grad.layout is not torch.strided:
            raise StateError(
                f"grads/{name}: sparse, expected a dense gradient; give .to_dense() of it, or "
                "take from_torch(torch.optim.SparseAdam)"
            )


_FRESH = "the state was made for other params; begin anew with init(params)"


def _found_inf(applied: Tensor | None) -> Tensor | None:
    """The flag that tells a fused kernel to hold back; None on the CPU, where `update` decided."""
    if applied is None or applied.device.type == "cpu":
        return None
    return (~applied).float()
