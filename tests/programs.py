"""What the workers of the tests do; each function takes options that JSON can hold."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import io
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import attrs
import torch
import torch.utils.checkpoint
import zoo
from torch import nn

import functrain as ft
from functrain import accumulators, keys
from functrain.architecture import emptied, held_values
from functrain.checkpoint.filesystem import FileSystem
from functrain.cli.clock import Clock
from functrain.data import Prefetched
from functrain.deferred import recording
from functrain.distributed import exchange
from functrain.loop import conditions
from functrain.objectives import LanguageModeling, chunks
from functrain.precision import POLICIES, Precision
from functrain.trees import is_sharded, rows_here

EXAMPLES, TIME = 16, 6
SAMPLED = 3  # tokens of a sample that a run asks for
OVERFLOWING = Precision(
    name="fp16", autocast=torch.float16, loss_scale=True, initial_scale=2.0**20, growth_interval=2
)


def uneven(seed: int, examples: int = EXAMPLES) -> dict[str, Any]:
    """A batch that has few or many targets, and in a quarter of its examples none at all.

    That is the first quarter where the seed is odd: the whole part of the first of four workers,
    which then adds nothing to a sum, so that other orders would give its bits too. Where the seed
    is even, it is every fourth example.
    """
    made = zoo.batch(seed, examples, TIME)
    labels = made["labels"].clone()
    labels[slice(examples // 4) if seed % 2 else slice(None, None, 4)] = -100
    labels[-1, 2:] = -100
    return {**made, "labels": labels}


def completions(seed: int, examples: int = EXAMPLES) -> dict[str, Any]:
    """Pairs."""
    return zoo.pairs(seed, examples, TIME)


def unpaired(seed: int, examples: int = EXAMPLES) -> dict[str, Any]:
    """Completions that are desirable or not."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "completion": zoo.batch(seed, examples, TIME),
        "mismatched": zoo.batch(seed + 100, examples, TIME),
        "desirable": torch.rand(examples, generator=generator) < 0.5,
    }


def batches(stage: str, seed: int, examples: int = EXAMPLES) -> dict[str, Any]:
    """The logical batch of a stage."""
    return {"kto": unpaired, "dpo": completions}.get(stage, uneven)(seed, examples)


def part(batch: Any, rank: int, size: int, microbatches: int = 0) -> Any:
    """The rows of one worker; of a sharded tree of `microbatches`, those of each `size`-th."""
    if isinstance(batch, dict):
        return {key: part(value, rank, size, microbatches) for key, value in batch.items()}
    if microbatches:
        return torch.cat(batch.chunk(microbatches)[rank::size])
    own = len(batch) // size
    return batch[rank * own : (rank + 1) * own]


def own_part(step: Any, batch: Any, world: Any) -> Any:
    """What a step of this worker's is given of a batch."""
    strided = step.microbatches if step.sharded and step.reduction == "canonical" else 0
    return part(batch, world.rank, world.size, strided)


class Partial(zoo.Tied):
    """A parameter that only what begins with an even token reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.rare = nn.Parameter(torch.ones(1))

    def forward(self, **inputs: Any) -> Any:  # type: ignore[override]
        out = super().forward(**inputs)
        even = bool((inputs["input_ids"][:, 0] % 2 == 0).all())
        return {"logits": out["logits"] * self.rare} if even else out


class Never(zoo.Tied):
    """A parameter that no batch reaches, and that must stay as it is, without any decay."""

    def __init__(self) -> None:
        super().__init__()
        self.rare = nn.Parameter(torch.ones(4, 3))


class Twins(zoo.Tied):
    """Two parameters that autograd hands views of one gradient, an activation's."""

    apart = False

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.full((TIME, 16), 0.1))
        self.two = nn.Parameter(torch.full((TIME, 16), 0.2))

    def forward(self, **inputs: Any) -> Any:  # type: ignore[override]
        hidden = self.embedding(inputs["input_ids"])
        if self.apart:  # gradients that are nobody else's
            hidden = hidden + self.one * 1.0 + self.two * 1.0
        else:
            hidden = hidden + (self.one[None] + self.two[None])
        return {"logits": self.head(self.norm(hidden))}


class NoTwins(Twins):
    """The same, of which each has its own."""

    apart = True


class Blocks(zoo.Tied):
    """Blocks in a list, after one another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.PReLU()) for _ in range(4))

    def forward(self, **inputs: Any) -> Any:  # type: ignore[override]
        hidden = self.embedding(inputs["input_ids"])
        for layer in self.chosen():
            hidden = hidden + layer(hidden)
        return {"logits": self.head(self.norm(hidden))}

    def chosen(self) -> Any:
        return self.layers


class Shared(Blocks):
    """One module in all blocks."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer[1] = self.layers[0][1]


class Own(Blocks):
    """Blocks with a forward of their own in the class's place, that recomputes a part."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.forward = functools.partial(self._through, layer)

    @staticmethod
    def _through(layer: Any, hidden: Any) -> Any:
        inner = torch.utils.checkpoint.checkpoint(layer[0], hidden, use_reentrant=False)
        return layer[1](inner) * 0.5


class Random(Blocks):
    """Calls one of its blocks, chosen at random."""

    def chosen(self) -> Any:
        return [self.layers[int(torch.rand([]) * 4)] for _ in range(2)]


class Permuted(Blocks):
    """Calls its blocks in an order of its own on worker 1."""

    def chosen(self) -> Any:
        order = (1, 0, 2, 3) if os.environ.get("RANK") == "1" else range(4)
        return [self.layers[number] for number in order]


class Outside(Blocks):
    """Calls a part of a block before the blocks, by itself."""

    def forward(self, **inputs: Any) -> Any:  # type: ignore[override]
        first = self.layers[1][0]  # type: ignore[index]
        hidden = self.embedding(inputs["input_ids"])
        hidden = hidden + first(hidden)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return {"logits": self.head(self.norm(hidden))}


class Reading(Blocks):
    """Reads parameters of a block outside of its forward: their form, or what is `read` of them."""

    def __init__(self, read: str) -> None:
        super().__init__()
        self.read = read
        block: Any = self.layers[1]
        block.gate = nn.Parameter(torch.ones(1))
        block.pick = nn.Parameter(torch.arange(16).flip(0), requires_grad=False)
        block.mask = nn.Parameter(torch.ones(16, dtype=torch.bool), requires_grad=False)

    def forward(self, **inputs: Any) -> Any:  # type: ignore[override]
        block: Any = self.layers[1]
        linear = block[0].weight
        hidden = self.embedding(inputs["input_ids"]).to(linear.dtype).to(linear).type_as(linear)
        assert linear.shape == (16, 16) == linear.size()
        assert len(linear) == 16 == linear.new_zeros(linear.numel()).view_as(linear).size(0)
        assert next(block.parameters()).device == hidden.device
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        if self.read == "gate":
            hidden = hidden * block.gate
        elif self.read == "pick":
            hidden = hidden + hidden[..., block.pick]
        elif self.read == "mask":
            hidden = hidden * torch.where(block.mask, 2, 1)
        return {"logits": self.head(self.norm(hidden))}


class Experts(zoo.Tied):
    """A mixture of four experts, which returns what its router says; two for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_experts_per_tok=2)
        self.router = nn.Linear(16, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, output_router_logits: bool = False, **inputs: Any) -> Any:  # type: ignore[override]
        hidden = self.embedding(inputs["input_ids"])
        routed = self.router(hidden)
        top = routed.softmax(-1).topk(2)
        parts = torch.zeros_like(routed).scatter(-1, top.indices, top.values)
        for part, expert in zip(parts.unbind(-1), self.experts, strict=True):
            hidden = hidden + part.unsqueeze(-1) * expert(hidden)
        found = SimpleNamespace(logits=self.head(self.norm(hidden)))
        if output_router_logits:
            found.router_logits = (routed.flatten(0, 1),)
        return found


def model(options: Any) -> nn.Module:
    """The model of a test."""
    kinds: dict[Any, Any] = {"twins": Twins, "no twins": NoTwins, "experts": Experts}
    kinds |= {"never": Never, True: Partial, "shared": Shared, "own": Own, "random": Random}
    kinds |= {"permuted": Permuted, "outside": Outside}
    if options.get("read"):
        return Reading(options["read"])
    partial = options.get("partial")
    return kinds[partial]() if partial else zoo.decoder(**decoder(options))


def decoder(options: Any) -> dict[str, Any]:
    """The shape of the model; `odd` shapes leave some workers with fewer rows or none."""
    odd = {"width": 18, "heads": 3, "kv_heads": 1, "hidden": 29}
    layers = options.get("layers", 2)
    return {"dropout": 0.1, "layers": layers, **(odd if options.get("odd") else {})}


@attrs.frozen(eq=False)
class Sums:
    """A record of attrs."""

    total: Any
    count: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Plain:
    """A record of the standard library."""

    total: Any
    count: Any


class Named(NamedTuple):
    """A tuple with names."""

    total: Any
    count: Any


OBSERVATIONS: dict[str, Any] = {
    "tuple": lambda total, count: (total, count),
    "dict": lambda total, count: {"total": total, "list": [count]},
    "named tuple": Named,
    "deep": lambda total, count: Sums(total=(), count={"all": (None, [Plain(total, count)])}),
}
"""A sum, 0-d, and a count, [1], in records of many kinds."""


def numbers_in(record: Any) -> list[torch.Tensor]:
    """The tensors of one of `OBSERVATIONS`, in order."""
    if isinstance(record, torch.Tensor):
        return [record]
    if isinstance(record, Sums | Plain):
        record = [record.total, record.count]
    values = record.values() if isinstance(record, dict) else record or ()
    return [tensor for each in values for tensor in numbers_in(each)]


@attrs.frozen(kw_only=True)
class Weighing(LanguageModeling):
    """Weighs the loss by the mean token of the whole batch, which a micro-batch tells as `kind`."""

    kind: str
    batch_coupled: bool = attrs.field(default=True, init=False)

    def observe(self, _model: Any, batch: Any) -> Any:
        ids = batch["input_ids"]
        return OBSERVATIONS[self.kind](ids.double().sum(), torch.tensor([ids.numel()]))

    def couple(self, observed: Any) -> Any:
        totals, counts = zip(*map(numbers_in, observed), strict=True)
        mean = torch.stack(totals).sum() / torch.cat(counts).sum()
        return [mean for _ in observed]

    def __call__(self, model: Any, batch: Any, coupling: Any = None) -> Any:
        assert coupling is not None
        total, measured = super().__call__(model, batch)
        return total * coupling.to(total.dtype), measured


def made(options: Any, world: Any) -> tuple[Any, Any]:
    """A step and its first state, of the options of a test."""
    if options.get("chunks"):
        chunks.BUDGET, accumulators.TABLE = 64, 64
    if options.get("tables"):
        accumulators.TABLE = 0
    exchange.BUCKET = options.get("bucket", exchange.BUCKET)
    exchange.ALONE = options.get("alone", exchange.ALONE)
    with keys.seeded(3 + options.get("seed", 0)):
        if options.get("apart"):
            architecture, params, buffers = ft.distributed.split(lambda: model(options), world)
        else:
            architecture, params, buffers = ft.split(model(options))
    given = {
        "microbatches": 8,
        "max_grad_norm": 0.05,
        "reduction": "canonical",
        "ema_decay": 0.9,
        "schedule": 3e-3,
        **options.get("step", {}),
    }
    if options.get("overflow"):
        given["precision"] = OVERFLOWING
    if options.get("lora") is not None:
        params = ft.trees.clone(params)
        if options.get("base") == "sharded":
            params = ft.distributed.shard(params, world)
        lora = ft.lora.LoRA(**options["lora"])
        architecture, params = ft.lora.attach(architecture, params, lora, seed=4)
    stage = options.get("stage", "pretrain")
    if stage in ("dpo", "kto"):
        reference = params
        if options.get("lora") is not None:
            reference = ft.lora.reference(architecture, params)
        if options.get("reference") == "sharded" and given.get("sharded"):
            reference = ft.distributed.shard(reference, world)
        given = {"reference": reference, "dropout": True, **given}
    make = getattr(ft, f"{stage}_step")
    step = make(architecture, ft.optim.adamw(weight_decay=0.1), world=world, **given)
    if options.get("observes") is not None:
        step = attrs.evolve(step, objective=Weighing(kind=options["observes"]))
    own = params if options.get("apart") else ft.trees.clone(params)
    return step, step.init(own, buffers, seed=5)


def steps(options: Any) -> dict[str, Any]:
    """Steps on parts of batches; the state's fingerprint and the metrics of each step."""
    with ft.distributed.world(timeout=60) as world:
        step, state = made(options, world)
        seen = []
        for number in range(options.get("steps", 2)):
            batch = batches(options.get("stage", "pretrain"), number, options.get("examples", 16))
            state, metrics = step(state, own_part(step, batch, world))
            seen.append({name: value.hex() for name, value in metrics.to_dict().items()})
        norm = float(ft.trees.global_norm(state.params))
        return {"fingerprint": ft.fingerprint(state), "metrics": seen, "norm": norm}


def operations(options: Any) -> list[list[str]]:
    """What is said where the operations of a step in shards are to be counted."""
    with ft.distributed.world(timeout=60) as world:
        step, state = made({**options, "step": {"sharded": True}}, world)
        batch = own_part(step, batches("pretrain", 0), world)
        return _refusal(lambda: ft.flops_of(step, state, batch))


def adapted(options: Any) -> dict[str, Any]:
    """After some steps of adapters: digests of the merged model, and bytes of the base here."""
    with ft.distributed.world(timeout=60) as world:
        step, state = made(options, world)
        for number in range(2):
            state, _ = step(state, own_part(step, batches("pretrain", number), world))
        _, merged = ft.lora.merged(step.architecture, state.params)
        held = held_values(step.architecture)
        return {
            "merged": {name: ft.trees.digest(tensor) for name, tensor in merged.items()},
            "sharded": is_sharded(merged),
            "bytes": sum(rows_here(t).untyped_storage().nbytes() for t in held.values()),
            "whole": sum(t.nbytes for t in held.values()),
        }


def exporting(options: Any) -> dict[str, Any]:
    """An export and adapters of a state in shards: what is refused, and the way that is named."""
    with ft.distributed.world(timeout=60) as world:
        step, state = made(options, world)
        state, _ = step(state, own_part(step, batches("pretrain", 0), world))
        architecture, folder = step.architecture, options["folder"]
        refused = []
        if world.size > 1:
            refused += _refusal(lambda: ft.export(state, architecture, f"{folder}/never"))
        if options.get("lora") is not None:
            if world.size > 1:
                given = architecture, state.params
                refused += _refusal(lambda: ft.lora.save_adapter(f"{folder}/never", *given))
            adapters = ft.distributed.gathered(state.params)
            if world.speaks:
                ft.lora.save_adapter(f"{folder}/adapters", architecture, adapters)
        whole = ft.distributed.gathered(state)
        if options.get("base") == "sharded":
            architecture, params = ft.lora.merged(architecture, state.params)
            whole = ft.distributed.gathered(attrs.evolve(state, params=params))
        if world.speaks:
            ft.export(whole, architecture, f"{folder}/model")
        return {"refused": refused}


def _refusal(function: Any) -> list[list[str]]:
    try:
        function()
    except ft.errors.FunctrainError as error:
        return [[type(error).__name__, str(error)]]
    return []


def misused(options: Any) -> None:
    """A base in shards where it cannot be: `how` it is used."""
    with ft.distributed.world(timeout=60) as world:
        architecture, params, buffers = ft.split(model(options))
        shards = ft.distributed.shard(ft.trees.clone(params), world)
        if options["how"] == "mixed":
            shards = ft.trees.Tensors({**shards, "model.norm.weight": params["model.norm.weight"]})
        architecture, adapters = ft.lora.attach(architecture, shards, ft.lora.LoRA(rank=2))
        if options["how"] == "replicated":
            ft.sft_step(architecture, ft.optim.adamw(), microbatches=2, world=world)
        ft.models.generate(architecture, adapters, buffers, [1, 2], max_new_tokens=2)


def parts(options: Any) -> str:
    """One step on a batch of this worker's own making: `options` say what for each rank."""
    with ft.distributed.world(timeout=options.get("timeout", 60)) as world:
        own = options.get("ranks", {}).get(str(world.rank), {})
        step, state = made({**options, **own}, world)
        batch = part(batches("pretrain", 0), world.rank, world.size)
        if own.get("label") is not None:
            batch["labels"][0, 1] = own["label"]
        if own.get("hidden"):
            batch["labels"][:] = -100
        if own.get("shift"):
            state = ft.state.map_tensors(state, lambda _, t: t + own["shift"])
        if own.get("dies"):
            os._exit(7)
        if own.get("hangs"):
            while not Path(options["ended"]).exists():
                time.sleep(0.02)
        try:
            for _ in range(options.get("steps", 1)):
                state, _ = step(state, batch)
        finally:
            if options.get("ended"):
                Path(options["ended"]).touch()
        return ft.fingerprint(state)


def worlds(options: Any) -> list[str]:
    """Steps in one world after another; what each came to. `raises`: where one worker does.

    The store of their addresses lives on, as torchrun's does, and worker 0 would be slow to leave.
    """
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    first = os.environ["RANK"] == "0"
    store = torch.distributed.TCPStore(*address, is_master=first, wait_for_workers=False)
    destroy = torch.distributed.destroy_process_group

    def slow() -> None:
        time.sleep(0.3)
        destroy()

    if first:
        torch.distributed.destroy_process_group = slow
    found = []
    for number in range(3):
        try:
            with ft.distributed.world(timeout=20) as world:
                sharded = bool(options.get("sharded")) and number % 2 == 1
                step, state = made({"step": {"sharded": sharded}}, world)
                if options.get("raises") == [world.rank, number]:
                    raise ValueError("here alone")
                state, _ = step(state, own_part(step, batches("pretrain", 0), world))
                found.append(ft.fingerprint(state))
        except (ValueError, ft.errors.WorkerError) as error:
            found.append(type(error).__name__)
    store.add("left", 1)
    while first and int(store.add("left", 0)) < 2:
        time.sleep(0.01)
    return found


def nested(options: Any) -> list[bool]:
    """Whether there still is a process group within an outer world, and after it.

    `foreign`: it was there before.
    """
    if options.get("foreign"):
        torch.distributed.init_process_group("gloo")
    found = []
    with ft.distributed.world(timeout=20) as world:
        with contextlib.suppress(ValueError), ft.distributed.world(timeout=20) as inner:
            inner.total(1)
            if options.get("raises"):
                raise ValueError
        assert world.total(1) == 2
        found.append(torch.distributed.is_initialized())
        if options.get("raises") == "both":
            return [*found, *_raising(world)]
    return [*found, torch.distributed.is_initialized()]


def _raising(world: Any) -> list[bool]:
    with contextlib.suppress(ValueError), world:
        raise ValueError
    return [torch.distributed.is_initialized()]


def closed(_options: Any) -> None:
    """A step after its world."""
    with ft.distributed.world(timeout=20) as world:
        step, state = made({}, world)
    step(state, own_part(step, batches("pretrain", 0), world))


def parting(options: Any) -> None:
    """Steps in which worker 1 does something else from some point on: `how`."""
    with ft.distributed.world(timeout=20) as world:
        other = world.rank == 1
        how = options["how"]
        step, state = made({"step": {"sharded": how in ("saves alone", "evaluates alone")}}, world)
        seen = []
        for number in range(3):
            if how == "leaves" and other and number == 2:
                break
            seen.append(state)
            if how == "goes on from another state" and other and number == 2:
                state = seen[1]
            if how == "has another key" and other and number == 2:
                state = attrs.evolve(state, key=7)
            if how == "has another step" and other and number == 2:
                step = attrs.evolve(step, max_grad_norm=0.01)
            if how == "saves alone" and other and number == 2:
                ft.save(options["directory"], state, world=world)
            if how == "evaluates alone" and other and number == 2:
                ft.evaluate(step, state, [zoo.batch()])
            state, _ = step(state, own_part(step, batches("pretrain", number), world))


def scaled(options: Any) -> None:
    """A step with a function that holds another number on worker 1."""
    with ft.distributed.world(timeout=20) as world:
        factor = options["factors"][world.rank]

        def transform(grads: Any, _params: Any) -> Any:
            return {name: grad * factor for name, grad in grads.items()}

        step, state = made({"step": {"transform": transform}}, world)
        step(state, own_part(step, batches("pretrain", 0), world))


def observing(options: Any) -> list[float]:
    """What all workers have observed, of which this one tells its `own` by its rank: `how`."""
    with ft.distributed.world(timeout=20) as world:
        number = torch.tensor(float(world.rank))
        own: dict[str, Any] = {
            "nothing": {"mean": 3.0},
            "an array": (number, number.numpy()),
            "a matrix": number.expand(1, 1),
            "other keys": {f"number {world.rank}": number},
            "other dtypes": number.to(torch.float64 if world.rank else torch.float32),
            "other numbers": (number, world.rank),
            "more of them": (number,) * (1 + world.rank),
            "other lengths": number.expand(world.rank),
        }
        (one, two) = world.observations([own[options["how"]]])
        return [*one.tolist(), *two.tolist()]


def fractions(_options: Any) -> None:
    """A part of a batch whose weight is no integer."""
    with ft.distributed.world(timeout=20) as world:
        world.part(lambda: (1, torch.tensor(0.5)), tree=False)


def slow(options: Any) -> str:
    """What worker 0 makes in more time than others would wait; and what they all make in less."""
    with ft.distributed.world(timeout=options["timeout"]) as world:

        def make() -> str:
            time.sleep(options["sleeps"])
            if options.get("raises"):
                raise ft.errors.CheckpointError("no")
            return "made"

        return world.from_first(make, "a test")


def warned(options: Any) -> None:
    """What is no error of functrain's, on one worker alone."""
    with ft.distributed.world(timeout=20) as world:

        def make() -> str:
            if world.rank == options["rank"]:
                raise UserWarning("one alone")
            return ""

        if options["how"] == "for all":
            world.for_all(make)
        elif options["how"] == "from first":
            world.from_first(make, "a test")
        else:
            world.part(lambda: (1, torch.tensor(len(make()))), tree=False)


def restarting(_options: Any) -> None:
    """A world of torchrun --max-restarts."""
    os.environ["TORCHELASTIC_MAX_RESTARTS"] = "3"
    ft.distributed.world(timeout=10).close()


class Moving(zoo.Tied):
    """Counts its calls in a buffer."""

    def forward(self, **inputs: Any) -> Any:  # type: ignore[override]
        self.scale += 1
        return super().forward(**inputs)


def moving(options: Any) -> None:
    """A step of a model whose forward writes to a buffer."""
    with ft.distributed.world(timeout=60) as world:
        module: nn.Module = zoo.model("normed") if options.get("normed") else Moving()
        architecture, params, buffers = ft.split(module)
        step = ft.pretrain_step(architecture, ft.optim.adamw(1e-3), microbatches=2, world=world)
        step(step.init(params, buffers), part(zoo.batch(), world.rank, world.size))


def training(options: Any) -> dict[str, Any]:
    """`train` over a source of padded examples, from the newest checkpoint on if any."""
    with ft.distributed.world(timeout=60) as world:
        step, state = made(options, world)
        source = Ragged(options.get("data", 0) if world.rank else 0)
        if options.get("unreadable", [None])[0] == world.rank:
            source = Unreadable(options["unreadable"][1])
        directory, every = options.get("directory"), options.get("every", 2)
        newest = ft.latest(directory) if directory is not None else None
        if newest is not None:
            under = conditions(step, source.batch_size)
            state = ft.load(newest, like=state, conditions=under, strict=True, world=world)
        records: list[Any] = []
        run = ft.train(
            step,
            state,
            source,
            steps=options.get("steps", 4),
            evaluation=[zoo.batch(n, 3 + n % 2) for n in range(90, 95)],
            evaluate_every=every,
            directory=directory,
            save_every=every if directory is not None else None,
            background=options.get("background", False),
        )
        for state, metrics in run:
            records.append({name: value.hex() for name, value in metrics.to_dict().items()})
            if options.get("dies") == [world.rank, state.step]:
                os._exit(9)
        return {"fingerprint": ft.fingerprint(state), "records": records}


class Broken(FileSystem):
    """One worker's disk, which is full, or stops it for good, at some operation of a save."""

    def __init__(self, operation: str, after: int, action: str) -> None:
        self._left = {operation: after}
        self._action = action

    def __getattribute__(self, name: str) -> Any:
        left = object.__getattribute__(self, "__dict__").get("_left", {})
        if left.get(name) == 0:
            if self._action == "kill":
                os._exit(9)
            raise OSError(errno.ENOSPC, "No space left on device")
        if name in left:
            left[name] -= 1
        return object.__getattribute__(self, name)


def saving(options: Any) -> dict[str, Any]:
    """Two saves of a state in shards, the second with a disk that breaks on one worker.

    `loads`: what is there is loaded before.
    """
    with ft.distributed.world(timeout=20) as world:
        step, state = made({**options, "layers": 1, "step": {"sharded": True}}, world)
        loaded = ""
        if options.get("loads"):
            loaded = ft.fingerprint(ft.load(options["directory"], like=state, world=world))
        first = ft.save(options["directory"], state, world=world)
        batch = part(batches("pretrain", 0), world.rank, world.size, step.microbatches)
        later, _ = step(state, batch)
        rank, operation, after, action = options["breaks"]
        files = Broken(operation, after, action) if world.rank == rank else FileSystem()
        error = ""
        try:
            ft.save(options["directory"], later, world=world, filesystem=files)
        except ft.FunctrainError as failure:
            error = f"{type(failure).__name__}: {failure}"
        back = ft.load(first, like=later, world=world)
        same = ft.fingerprint(back) == ft.fingerprint(state)
        return {"error": error, "same": same, "loaded": loaded}


def loading(options: Any) -> str:
    """Load into a state in shards; the fingerprint."""
    with ft.distributed.world(timeout=20) as world:
        _, state = made({**options, "layers": 1, "step": {"sharded": True}}, world)
        known = {} if options.get("no world") else {"world": world}
        return ft.fingerprint(ft.load(options["directory"], like=state, **known))


def reusing(options: Any) -> list[str]:
    """What a donated step makes of shards that another state holds as well: nothing."""
    with ft.distributed.world(timeout=20) as world:
        options = {**options, "layers": 1, "step": {"sharded": True, "donate": True}}
        step, state = made(options, world)
        batch = part(batches("pretrain", 0), world.rank, world.size, step.microbatches)
        shards = dict(state.params)
        before = ft.fingerprint(state)
        step(step.init(shards, state.buffers, seed=1), batch)
        step(step.adopt(state), batch)
        return [before, ft.fingerprint(state)]


class Ragged:
    """Batches whose length is that of their longest example, as padded data are."""

    batch_size = EXAMPLES

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def __len__(self) -> int:
        return 40

    def at(self, position: int, n: int) -> dict[str, Any]:
        samples = [self._sample(place) for place in range(position, position + n)]
        longest = max(len(each) for each in samples)
        ids = torch.stack([nn.functional.pad(each, (0, longest - len(each))) for each in samples])
        mask = torch.stack([torch.arange(longest) < len(each) for each in samples])
        return {
            "input_ids": ids,
            "labels": ids.masked_fill(~mask, -100),
            "attention_mask": mask.long(),
        }

    def _sample(self, place: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self._seed * 1000 + place % 40)
        length = int(torch.randint(3, 9, (), generator=generator))
        return torch.randint(1, zoo.VOCABULARY, (length,), generator=generator)


class Unreadable(Ragged):
    """From some sample on, no disk."""

    def __init__(self, below: int) -> None:
        super().__init__()
        self._below = below

    def _sample(self, place: int) -> torch.Tensor:
        if place >= self._below:
            raise OSError("the disk is gone")
        return super()._sample(place)


def model_in_shards(options: Any) -> dict[str, str]:
    """The params and buffers that a worker reads of a model or a checkpoint: digests of the whole.

    `checkpoint`: into an architecture that has no values.
    """
    with ft.distributed.world(timeout=60) as world:
        if options.get("checkpoint"):
            with recording(draws=False):
                module = model(options)
            params, buffers = emptied(module)
            empty = {n: torch.empty_like(b, device="cpu") for n, b in buffers.items()}
            params, buffers = ft.checkpoint.load_model(options["path"], params, empty, world=world)
        else:
            dtype = options.get("dtype", "float32")
            path = options.get("others", {}).get(str(world.rank), options["path"])
            found = ft.models.from_pretrained(path, dtype=dtype, world=world)
            params, buffers = found.params, found.buffers
        assert is_sharded(params) == (world.size > 1)
        return {n: ft.trees.digest(t) for n, t in {**params, **buffers}.items()}


def beside(options: Any) -> tuple[int, int]:
    """How many exchanges of gradients a step has begun in its backward pass, of how many."""
    seen: list[tuple[int, int]] = []
    finish = exchange.Beside.finish

    def watched(self: exchange.Beside, grads: Any) -> Any:
        seen.append((self.sent, len(self.buckets)))
        return finish(self, grads)

    exchange.Beside.finish = watched  # type: ignore[method-assign]
    steps({**options, "steps": 1})
    return seen[0]


def measured(_options: Any) -> dict[str, Any]:
    """This machine as a cluster."""
    with ft.distributed.world(timeout=60) as world:
        found = ft.planning.here(world, POLICIES["fp32"])
        return attrs.asdict(found)


def clocked(options: Any) -> dict[str, Any]:
    """What the clock of a run counts of a step, and the rows of what it calls the model with."""
    rows: set[int] = set()
    with ft.distributed.world(timeout=60) as world:
        step, state = made(options, world)
        step.architecture.register_forward_pre_hook(
            lambda _module, _args, given: rows.add(len(given["input_ids"])), with_kwargs=True
        )
        source = Ragged()
        built: Any = SimpleNamespace(step=step, data=source, source=source, evaluation=[])
        config: Any = SimpleNamespace(train=SimpleNamespace(peak_tflops=1.0, steps=9))
        clock = Clock(config, built, state, Prefetched(source))
        return {"flops": clock._flops, "rows": sorted(rows)}


def command(options: Any) -> dict[str, Any]:
    """The command line in a worker: its exit code, and what it has printed."""
    from functrain import models
    from functrain.cli import main, run, samples

    samples.TOKENS = SAMPLED
    run.GATHERED = options.get("gathered", run.GATHERED)
    generate = models.generate

    waits = [options.get("speaks_in", 0)]

    def slowly(*given: Any, **more: Any) -> list[int]:
        time.sleep(waits.pop() if waits else 0)  # once is enough
        return generate(*given, **more)

    models.generate = slowly
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(options["arguments"])
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def torchrun(options: Any) -> None:
    """torchrun, whose workers are forked from it and run a script; what they say goes to files."""
    from torch.distributed.run import main

    from functrain.cli import samples

    samples.TOKENS = SAMPLED
    for stream, path in ((1, options["out"]), (2, options["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ.update(options["environment"])
    # At the alarm it ends its workers too, by what it does at that signal.
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    main(["--run-path", "--start-method=fork", *options["arguments"]])
