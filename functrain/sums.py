"""Gradients as they are summed over micro-batches, and told of when they are what they will be."""

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

    Autograd adds into the leaves' own `.grad`, as in an ordinary loop; where the leaves are of a
    narrower dtype than the params, the sum is kept in the params' dtype. What is summed where it is
    made (`functrain.accumulators`) is added at the end. As a `tree` each micro-batch's gradients
    are a leaf of it.
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
        # Those without a gradient in memory of their own, where autograd adds the following ones.
        self._new = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        self._names = {id(leaf): name for name, leaf in self._new.items()}
        self._direct: dict[str, Tensor] = {}
        self._added = 1
        self._ending = False
        self._told: set[str] = set()

    def begin(self) -> None:
        """The next micro-batch: where it is added to one leaf of the tree, autograd adds it there.

        The same sum of two, without memory and a pass of its own.
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
        """Whether a tensor is a leaf that trains."""
        return id(leaf) in self._names

    def sum_of(self, leaf: Tensor) -> Tensor | None:
        """Where gradients of a leaf that trains may be summed as they are made.

        None where a hook is to see them, which a forward may have put on its weight.
        """
        name = self._names.get(id(leaf))
        # At the end there are some of `telling`'s.
        if has_hooks(leaf) if not self._ending else leaf._backward_hooks:
            return None
        if name is not None and name not in self._direct:
            self._direct[name] = memory.zeros(leaf.shape, self.dtypes[name], leaf.device)
        return None if name is None else self._direct[name]

    def receive(self, name: str, rows: Tensor, reached: bool) -> None:
        """Take the rows of a gradient of one micro-batch, summed over the workers already."""
        self._received = True
        if reached:
            self._reached.add(name)
        self._wide[name] = self._wide[name].add_(rows) if name in self._wide else rows

    def reached(self, grads: Mapping[str, Tensor]) -> frozenset[str]:
        """What of the sums has had a gradient here."""
        return frozenset(self._reached if self._received else {*grads, *self._told})

    @contextmanager
    def telling(self, beside: Beside) -> Generator[None]:
        """Within it, the last backward pass tells which sums here have come to their end."""
        self._ending = True
        handles = []
        for name, leaf in self._leaves.items():
            # What is summed where it is made may still grow.
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
        """`begun`: whether there was a sum before, to whose memory autograd has added."""
        if name in self._direct:  # since this pass: `grads` adds the two
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
        """A gradient of the last leaves with the branches of the tree that wait for it.

        Each worker has a power of two of leaves, so that the last one meets every branch in turn.
        """
        for branch in reversed(self._tree.waiting() if self._tree is not None else ()):
            if name in branch:
                before = branch.pop(name)
                grad = before if grad is None else before.add_(grad)
        assert grad is not None
        return grad

    def add(self) -> None:
        """Take what the backward pass of a micro-batch has left.

        Gradients that share their memory get their own, since they will be written to: of
        `a[None] + b[None]` autograd hands both leaves the same (torch 2.13), in which an ordinary
        loop's second backward pass adds for both.
        """
        taken = {name: grad for name, leaf in self._new.items() if (grad := leaf.grad) is not None}
        # Asked of all at once: a model has hundreds.
        if self._narrow or not all(grad.layout is torch.strided for grad in taken.values()):
            taken = {n: g for n, g in taken.items() if self._taken(n, self._leaves[n], g)}
        places = [grad.untyped_storage().data_ptr() for grad in taken.values()]
        if len(set(places)) < len(places):
            seen: set[int] = set()
            for (name, grad), address in zip(taken.items(), places, strict=True):
                if address in seen:
                    self._leaves[name].grad = grad.clone()
                elif address:  # empty ones have none
                    seen.add(address)
        if self._tree is None:
            for name in taken:
                del self._new[name]
        elif not self._ending:
            self._tree.push(dict(self._summed()), self._added)
            self._wide.clear()
            for leaf in self._leaves.values():
                leaf.grad = None

    def _taken(self, name: str, leaf: Tensor, grad: Tensor) -> bool:
        """Whether a leaf keeps its gradient; one that is narrower than its sum is widened."""
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
        """The sum over all micro-batches, but for what was told to be there.

        They are known to be like the params: autograd sees to that, after hooks too.
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
