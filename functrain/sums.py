"""Sums of gradients over micro-batches, which can announce each gradient once it is final."""

from __future__ import annotations

import functools
from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from functrain import memory
from functrain.errors import ArchitectureError
from functrain.reductions import Beside, Tree, added
from functrain.trees import Tensors, alike, has_hooks


class GradientSum:
    """Gradients summed over micro-batches.

    Autograd adds into the leaves' own `.grad`, as in an ordinary loop; if the leaves have a
    narrower dtype than the params, the sum is kept in the params' dtype. Sums made directly by
    `functrain.accumulators` are added at the end. With `tree`, each micro-batch's gradients are a
    leaf of a `Tree`.
    """

    def __init__(
        self, leaves: Mapping[str, Tensor], params: Mapping[str, Tensor], *, tree: bool = False
    ) -> None:
        self._tree = Tree(added) if tree else None
        self._leaves, self._params = leaves, params
        self.dtypes = {name: param.dtype for name, param in params.items()}
        self._narrow = frozenset(n for n, leaf in leaves.items() if leaf.dtype != self.dtypes[n])
        self._wide: dict[str, Tensor] = {}
        self._reached: set[str] = set()
        self._received = False
        # Leaves that have no gradient yet; into an existing one autograd adds in place.
        self._new = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        self._names = {id(leaf): name for name, leaf in self._new.items()}
        self._direct: dict[str, Tensor] = {}
        self._added = 1
        self._ending = False
        self._told: set[str] = set()

    def begin(self) -> None:
        """Start the next micro-batch; if it pairs with a leaf of the tree, autograd adds into that.

        This gives the same sum of two, without extra memory and an extra pass.
        """
        branch = None if self._tree is None else self._tree.pop()
        self._added = 1 if branch is None else 2
        for name, grad in (branch or {}).items():
            leaf = self._leaves[name]
            if self._received or name in self._narrow:
                self._wide[name] = grad
            else:
                leaf.grad = grad

    def trains(self, leaf: Tensor) -> bool:
        """Whether a tensor is a trainable leaf."""
        return id(leaf) in self._names

    def sum_of(self, leaf: Tensor) -> Tensor | None:
        """The sum into which gradients of a trainable leaf may be added directly.

        None for other tensors, and if a hook must see the gradients; a forward may have put one on
        its weight.
        """
        name = self._names.get(id(leaf))
        # In the last pass there are the hooks of `telling` too.
        if has_hooks(leaf) if not self._ending else leaf._backward_hooks:
            return None
        if name is not None and name not in self._direct:
            self._direct[name] = memory.zeros(leaf.shape, self.dtypes[name], leaf.device)
        return None if name is None else self._direct[name]

    def receive(self, name: str, rows: Tensor, reached: bool) -> None:
        """Add this worker's rows of a micro-batch's gradient, already summed over the workers."""
        self._received = True
        if reached:
            self._reached.add(name)
        self._wide[name] = self._wide[name].add_(rows) if name in self._wide else rows

    def reached(self, grads: Mapping[str, Tensor]) -> frozenset[str]:
        """The names that have had a gradient on this worker."""
        return frozenset(self._reached if self._received else {*grads, *self._told})

    @contextmanager
    def telling(self, beside: Beside) -> Generator[None]:
        """A context in which the last backward pass tells `beside` of each final gradient."""
        self._ending = True
        handles = []
        for name, leaf in self._leaves.items():
            # Direct sums may still grow.
            if leaf.requires_grad and name not in self._direct:
                ended = functools.partial(self._ended, beside, name, leaf.grad is not None)
                handle = leaf.register_post_accumulate_grad_hook(ended)  # type: ignore[no-untyped-call]
                handles.append(handle)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _ended(self, beside: Beside, name: str, begun: bool, leaf: Tensor) -> None:
        """Tell of a final gradient; `begun`: whether autograd added it into an existing sum."""
        if name in self._direct:  # since this pass; `grads` adds the two sums
            return
        assert leaf.grad is not None  # it has just been accumulated
        grad = leaf.grad
        if not self._taken(name, leaf, grad):
            grad = self._wide.pop(name)
        whole = self._folded(name, grad)
        own = begun or whole is not leaf.grad
        leaf.grad = None
        self._told.add(name)
        beside.ready(name, whole, own=own)

    def _folded(self, name: str, grad: Tensor | None) -> Tensor:
        """A gradient of the last leaf, added to the branches of the tree that wait for it.

        Each worker has a power of two of leaves, so the last one completes every branch in turn.
        """
        for branch in reversed(self._tree.waiting() if self._tree is not None else ()):
            if name in branch:
                before = branch.pop(name)
                grad = before if grad is None else before.add_(grad)
        assert grad is not None
        return grad

    def add(self) -> None:
        """Take the gradients that a micro-batch's backward pass has left.

        Gradients that share memory are separated, since they will be written to: for
        `a[None] + b[None]` autograd gives both leaves the same tensor (torch 2.13), into which the
        second backward pass of an ordinary loop adds for both.
        """
        taken = {name: grad for name, leaf in self._new.items() if (grad := leaf.grad) is not None}
        # Checked for all at once, since a model has hundreds.
        if self._narrow or not all(grad.layout is torch.strided for grad in taken.values()):
            taken = {n: g for n, g in taken.items() if self._taken(n, self._leaves[n], g)}
        places = [grad.untyped_storage().data_ptr() for grad in taken.values()]
        if len(set(places)) < len(places):
            seen: set[int] = set()
            for (name, grad), address in zip(taken.items(), places, strict=True):
                if address in seen:
                    self._leaves[name].grad = grad.clone()
                elif address:  # empty tensors have none
                    seen.add(address)
        if self._tree is None:
            for name in taken:
                del self._new[name]
            if taken and self._has_large():
                memory.trim()  # new gradients lie among the activations that they were made of
        elif not self._ending:
            self._tree.push(dict(self._summed()), self._added)
            self._wide.clear()
            for leaf in self._leaves.values():
                leaf.grad = None

    def _has_large(self) -> bool:
        """Whether sums on the CPU that are made directly are worth trimming the heap."""
        on_cpu = (each.nbytes for each in self._direct.values() if each.device.type == "cpu")
        return sum(on_cpu) >= memory.LARGE

    def _taken(self, name: str, leaf: Tensor, grad: Tensor) -> bool:
        """Whether a leaf keeps its gradient; a narrower one is added to the wide sum instead."""
        if grad.layout is not torch.strided:
            raise ArchitectureError(
                f"{name}: its gradient is sparse, which neither clipping nor the optimizers "
                "take; build its nn.Embedding with sparse=False"
            )
        if name not in self._narrow:
            return True
        wide = grad.to(self.dtypes[name])
        self._wide[name] = self._wide[name].add_(wide) if name in self._wide else wide
        leaf.grad = None
        return False

    def grads(self) -> Tensors:
        """The sums over all micro-batches, except those that were announced already.

        They are marked as `alike` the params: autograd ensures that, even after hooks.
        """
        return alike(self._total(), self._params)

    def _total(self) -> Tensors:
        if self._tree is None:
            return self._summed()
        if not self._ending:
            return Tensors(self._tree.total() or {})
        last = self._summed()
        names = {*last, *(name for branch in self._tree.waiting() for name in branch)}
        return Tensors({name: self._folded(name, last.get(name)) for name in names})

    def _summed(self) -> Tensors:
        own = {name: grad for name, leaf in self._leaves.items() if (grad := leaf.grad) is not None}
        own |= self._wide
        for name, grad in self._direct.items():
            own[name] = grad.add_(own[name]) if name in own else grad
        return Tensors(own)
