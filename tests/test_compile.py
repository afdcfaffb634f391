"""Compiled steps: what they are uncompiled, to rounding; once for each shape; nothing left behind.

Most are compiled by a backend of torch's that generates no code, which takes a tenth of the time.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

import functrain as ft
from functrain import accumulators, compilation, keys, models
from functrain.errors import FunctrainWarning
from functrain.loop import conditions
from functrain.objectives import chunks

# Of torch's own, when its code generator is imported.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
GENERATES = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def _without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")


@pytest.fixture
def announced(caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    """The shapes that were compiled, as the log names them."""
    with caplog.at_level(logging.INFO, "functrain"):
        yield lambda: [
            record.getMessage()
            for record in caplog.records
            if record.name == "functrain" and record.msg.startswith("compile: ")
        ]


def _llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=zoo.VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        attention_dropout=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with keys.seeded(3):
        built: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return built


class Body(nn.Module):
    """The least that has a table, dropout and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(zoo.VOCABULARY, 16)
        self.dropout = nn.Dropout(0.1)
        self.mix = nn.Linear(16, 16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden: Tensor = self.dropout(self.embedding(input_ids))
        if attention_mask is not None:
            hidden = hidden * attention_mask.unsqueeze(-1)
        return F.silu(self.mix(hidden.cumsum(1)))


class Small(nn.Module):
    """For what is the same whatever is compiled: a decoder takes three times as long."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Body()
        self.lm_head = nn.Linear(16, zoo.VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits: Tensor = self.lm_head(self.model(input_ids, attention_mask))
        return logits

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head


def _small() -> nn.Module:
    with keys.seeded(7):
        return Small()


MODELS: dict[str, Any] = {
    "small": _small,
    "decoder": lambda: zoo.decoder(dropout=0.1, layers=1),
    "checkpointed": lambda: zoo.decoder(dropout=0.1, layers=1, checkpointing=True),
    "llama": _llama,
    "tied": lambda: zoo.model("tied"),  # shows no head
}


def _begun(
    name: str = "decoder",
    stage: str = "pretrain",
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[Any, Any]:
    architecture, params, buffers = ft.split(MODELS[name]().to(dtype))
    optimizer = ft.optim.adamw(1e-2)
    options = {"compile": True, "schedule": ft.schedules.linear(1e-2, total=9), **options}
    if stage == "pretrain":
        step = ft.pretrain_step(architecture, optimizer, **options)
    else:
        options = {"loss": stage, "dropout": True, **options}
        step = ft.dpo_step(architecture, optimizer, reference=ft.trees.clone(params), **options)
    return step, step.init(params, buffers, seed=5)


def _trained(step: Any, state: Any, steps: int = 3, **options: Any) -> tuple[Any, list[float]]:
    make = zoo.batch if step.objective.name == "pretrain" else zoo.pairs
    losses = []
    for seed in range(steps):
        state, metrics = step(state, make(seed, **options))
        losses.append(float(metrics["loss"]))
    return state, losses


def _graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    ("name", "stage", "count"),
    [
        ("decoder", "pretrain", 1),
        ("checkpointed", "pretrain", 1),
        ("llama", "pretrain", 1),
        ("tied", "pretrain", 1),
        ("small", "sigmoid", 2),  # of the reference too
        ("small", "bco_pair", 3),  # and of the first of two passes
        pytest.param("decoder", "sigmoid", 2, marks=pytest.mark.long),
        pytest.param("decoder", "bco_pair", 3, marks=pytest.mark.long),
    ],
)
def test_compiled_steps_end_where_uncompiled_ones_do(
    name: str, stage: str, count: int, announced: Any
) -> None:
    """With dropout: it drops the same. Two micro-batches, and another learning rate each step."""
    before = _graphs()
    ours, losses = _trained(*_begun(name, stage, microbatches=2))
    assert len(announced()) == count
    assert _graphs() == before + count  # each of them once, in three steps
    theirs, expected = _trained(*_begun(name, stage, microbatches=2, compile=False))
    assert losses == pytest.approx(expected, rel=1e-10)
    for parameter, value in ours.params.items():
        torch.testing.assert_close(value, theirs.params[parameter], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "bf16_params"])
def test_no_loss_scale_is_compiled_anew(precision: str) -> None:
    step, state = _begun("small", dtype=torch.float32, precision=precision)
    state, _ = step(state, zoo.batch())
    before = _graphs()
    if state.scaler is not None:
        scaler = ft.precision.init_loss_scale(2.0**9)
        state = attrs.evolve(state, scaler=scaler)
    state, losses = _trained(step, state)
    assert _graphs() == before
    plain = _begun("small", dtype=torch.float32, precision=precision, compile=False)
    _, expected = _trained(*plain)
    assert losses == pytest.approx(expected, rel=0.2)


def test_pure_and_donated_steps_have_the_same_bits() -> None:
    step, state = _begun("small", dtype=torch.float32)
    pure, _ = _trained(step, state)
    step, state = _begun("small", dtype=torch.float32, donate=True)
    donated, _ = _trained(step, state)
    assert ft.fingerprint(pure) == ft.fingerprint(donated)


def test_each_shape_is_compiled_once_and_named(announced: Any) -> None:
    step, state = _begun("small")
    for time in (8, 6, 8, 6):
        state, _ = step(state, zoo.batch(time=time))
    assert announced() == [
        f"compile: model for [4, {time}], with gradients, in train mode" for time in (8, 6)
    ]
    masked = {**zoo.batch(), "attention_mask": torch.ones(4, 8, dtype=torch.int64)}
    step(state, masked)
    assert len(announced()) == 3


def test_the_bits_of_a_shape_do_not_depend_on_the_one_before() -> None:
    """Shapes that became dynamic after the second would have other code."""
    found = set()
    for first in ([], [6]):
        step, state = _begun(dtype=torch.float32)  # of the small one the bits would be the same
        for time in first:
            step(state, zoo.batch(time=time))
        found.add(ft.fingerprint(step(state, zoo.batch())[0]))
    assert len(found) == 1


def test_too_many_shapes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "LIMIT", 2)
    step, state = _begun("small")
    for time in (6, 7):
        step(state, zoo.batch(time=time))
    with pytest.raises(ft.ConfigError, match=r"\[4, 6\]; \[4, 7\], and now comes \[4, 8\]; .*pack"):
        step(state, zoo.batch(time=8))
    step(state, zoo.batch(time=6))  # those that it has go on
    assert not any(m._compiled_call_impl for m in step.architecture.modules())


class Counting(zoo.Tied):
    """Does another thing at each call, so that no compiled code fits twice."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, **inputs: Any) -> Any:  # type: ignore[override]
        self.calls += 1
        outputs = super().forward(**inputs)
        return {"logits": outputs["logits"] * self.calls}


def test_a_model_that_is_compiled_at_each_call_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "LIMIT", 1)
    monkeypatch.setattr(compilation, "_VARIANTS", 3)
    architecture, params, buffers = ft.split(Counting())
    step = ft.pretrain_step(architecture, ft.optim.adamw(), compile=True)
    state = step.init(params, buffers)
    for _ in range(compilation._VARIANTS):
        step(state, zoo.batch())
    with pytest.raises(ft.ConfigError, match="again and again, for reasons beside the shapes"):
        step(state, zoo.batch())


class InPlace(zoo.Tied):
    """Counts its calls in a buffer, and uses the count."""

    in_place = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, **inputs: Any) -> Any:  # type: ignore[override]
        if self.in_place:
            self.count += 1
        else:
            self.count = self.count + 1
        return {"logits": super().forward(**inputs)["logits"] * self.count}


class Anew(InPlace):
    in_place = False


class Statistics(zoo.Tied):
    """With a norm that keeps statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.over_rows = nn.BatchNorm1d(zoo.VOCABULARY)

    def forward(self, **inputs: Any) -> Any:  # type: ignore[override]
        logits = super().forward(**inputs)["logits"]
        return {"logits": self.over_rows(logits.flatten(0, 1)).view_as(logits)}


@pytest.mark.parametrize(("cls", "told"), [(InPlace, 1), (Anew, 0), (Statistics, 0)])
def test_buffers_that_a_unit_writes_in_place_are_told_once(cls: Any, told: int) -> None:
    """Torch takes the gradient with what was in them before."""
    architecture, params, buffers = ft.split(cls())
    step = ft.pretrain_step(architecture, ft.optim.adamw(), compile=True)
    state = step.init(params, buffers)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            state, _ = step(state, zoo.batch())
    ours = [str(each.message) for each in found if each.category is FunctrainWarning]
    assert len(ours) == told
    assert all("in place (count)" in each and "self.n = self.n + 1" in each for each in ours)


class Closed(zoo.Tied):
    """A model that dynamo is told to leave alone."""

    @torch._dynamo.disable
    def forward(self, **inputs: Any) -> Any:  # type: ignore[override]
        return super().forward(**inputs)


def test_a_model_that_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture, params, buffers = ft.split(Closed())
    step = ft.pretrain_step(architecture, ft.optim.adamw(), compile=True)
    with pytest.raises(ft.ArchitectureError, match=r"nothing of Closed could be compiled: .+"):
        step(step.init(params, buffers), zoo.batch())

    def failing(_graph: Any, _inputs: Any) -> Any:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(compilation, "BACKEND", failing)
    step, state = _begun("small")
    with pytest.raises(ft.ArchitectureError, match=r"model cannot be compiled; [^!]*on purpose"):
        step(state, zoo.batch())
    assert not any(m._compiled_call_impl for m in step.architecture.modules())


def test_a_machine_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(compilation, "BACKEND", "inductor")
    step, state = _begun()
    told = pytest.raises(ft.ConfigError, match=r"needs a C\+\+ compiler .*no-such-compiler.*CXX")
    with config.patch({"cpp.cxx": ("no-such-compiler",)}), told:
        step(state, zoo.batch())


@pytest.mark.parametrize("given", [torch.compile, lambda m: m.compile() or m])
def test_a_model_that_is_compiled_already_is_refused(given: Any) -> None:
    architecture, *_ = ft.split(given(zoo.decoder()))
    with pytest.raises(ft.ConfigError, match="is compiled already; split the module as it was"):
        ft.pretrain_step(architecture, ft.optim.adamw(), compile=True)
    with pytest.raises(ft.ConfigError, match="compile: 'yes', expected True or False"):
        ft.pretrain_step(zoo.split("tied")[0], ft.optim.adamw(), compile="yes")  # type: ignore[arg-type]


def test_within_torch_compile_a_step_is_refused() -> None:
    """torch 2.13 ends in an assertion of its own; afterwards the step is as it was."""
    step, state = _begun(compile=False)
    params, buffers, batch = state.params, state.buffers, zoo.batch()
    expected, _ = step(state, batch)
    for called in (
        lambda: torch.compile(step, backend="eager")(state, batch),
        lambda: torch.compile(lambda: step(state, batch), backend="eager")(),
        lambda: torch.compile(step.value_and_grad, backend="eager")(params, buffers, batch),
        lambda: torch.compile(step.gradient, backend="eager")(params, buffers, batch),
        lambda: torch.compile(ft.evaluate, backend="eager")(step, state, [batch]),
    ):
        with pytest.raises(ft.ConfigError, match=r"called inside torch\.compile.*compile=True"):
            called()
    assert ft.fingerprint(step(state, batch)[0]) == ft.fingerprint(expected)


def test_outside_of_a_step_nothing_is_compiled(announced: Any) -> None:
    """Evaluation and generation are an uncompiled step's, to the bit, and so is the next search."""
    step, state = _begun()
    plain, _ = _begun(compile=False)
    after, _ = step(state, zoo.batch())
    compiled = announced()
    assert ft.evaluate(step, after, [zoo.batch(time=5)]).to_dict() == pytest.approx(
        ft.evaluate(plain, after, [zoo.batch(time=5)]).to_dict(), rel=0, abs=0
    )
    prompt = [1, 2, 3]
    said = [
        models.generate(each.architecture, after.params, after.buffers, prompt, max_new_tokens=4)
        for each in (step, plain)
    ]
    assert said[0] == said[1]
    assert announced() == compiled
    assert not any("_compiled_call_impl" in vars(m) for m in step.architecture.modules())


def test_by_chunks_and_in_layouts(monkeypatch: pytest.MonkeyPatch, announced: Any) -> None:
    """The head stays outside; the few tokens that a layout is tried on are not compiled."""
    monkeypatch.setattr(chunks, "BUDGET", 0)
    _, losses = _trained(*_begun(stage="sigmoid", layout="shared_prompt"), steps=1)
    assert len(announced()) == 2
    _, expected = _trained(*_begun(stage="sigmoid", layout="shared_prompt", compile=False), steps=1)
    assert losses == pytest.approx(expected, rel=1e-10)


class Nested(nn.Module):
    """Blocks in a dict that is never called, beside a projection that is deep inside."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))
        blocks = nn.ModuleList([block, nn.TransformerEncoderLayer(4, 1)])
        self.body = nn.ModuleDict({"wte": nn.Embedding(9, 4), "blocks": blocks})
        self.top = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 9))
        self.free = nn.Identity()


def test_the_units_are_the_largest_modules_without_the_head() -> None:
    decoder = zoo.decoder()
    assert list(compilation.units(decoder, decoder.lm_head)) == ["model"]
    assert compilation.units(decoder, None) == {"Decoder": decoder}
    nested = Nested()
    found = compilation.units(nested, nested.top[1])
    assert list(found) == ["body.blocks.0", "body.blocks.1", "top.0"]
    bare = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    with pytest.raises(ft.ArchitectureError, match="no modules beside its head"):
        compilation.units(bare, bare[1])


def test_an_architecture_is_not_kept_by_what_was_compiled_of_it() -> None:
    import gc
    import weakref

    step, state = _begun("tied")
    step(state, zoo.batch())
    architecture = weakref.ref(step.architecture)
    del step, state
    gc.collect()
    assert architecture() is None


def test_a_checkpoint_says_that_its_run_was_compiled(tmp_path: Path) -> None:
    step, state = _begun(dtype=torch.float32)
    ft.save(tmp_path, state, conditions=conditions(step, 4))
    plain, _ = _begun(dtype=torch.float32, compile=False)
    newest = ft.latest(tmp_path)
    assert newest is not None
    ft.load(newest, like=state, conditions=conditions(step, 4), strict=True)
    with pytest.raises(ft.CheckpointError, match="compile True then, False now"):
        ft.load(newest, like=state, conditions=conditions(plain, 4), strict=True)


def test_the_directory_of_the_cache_is_set_and_put_back(tmp_path: Path) -> None:
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with compilation.cache_directory(str(tmp_path)):
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)
    for spaced in ("a b", " "):
        with (
            pytest.raises(ft.ConfigError, match="has a space"),
            compilation.cache_directory(spaced),
        ):
            pass
    (tmp_path / "file").touch()
    for path in ("file", "file/in"):
        with (
            pytest.raises(ft.ConfigError, match=r"cannot be made .*; expected a directory"),
            compilation.cache_directory(str(tmp_path / path)),
        ):
            pass
    with compilation.cache_directory(None):
        assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == before
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == before


@GENERATES
@pytest.mark.parametrize("name", ["decoder", pytest.param("small", marks=pytest.mark.long)])
def test_generated_code(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With dropout, in float32, and an embedding that is large enough for a sum of its own.

    The C++ compiler takes five seconds for each kernel, of which a decoder has many.
    """
    monkeypatch.setattr(compilation, "BACKEND", "inductor")
    monkeypatch.setattr(accumulators, "TABLE", 0)
    with compilation.cache_directory(str(tmp_path)):
        ours, losses = _trained(*_begun(name, dtype=torch.float32))
    theirs, expected = _trained(*_begun(name, dtype=torch.float32, compile=False))
    assert losses == pytest.approx(expected, rel=1e-5)
    for parameter, value in ours.params.items():
        torch.testing.assert_close(value, theirs.params[parameter], rtol=1e-3, atol=1e-4)


PROGRAM = """
import sys, pathlib
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
import test_compile, zoo
import functrain as ft
from functrain import accumulators
accumulators.TABLE = 0
from torch._dynamo.utils import counters
step, state = test_compile._begun(dtype=torch.float32, microbatches=2)
directory = pathlib.Path({directory!r})
newest = ft.latest(directory)
if newest is not None:
    state = ft.load(newest, like=state, strict=True)
while state.step < {steps}:
    state, _ = step(state, zoo.batch(state.step))
    if state.step == 2:
        ft.save(directory, state)
print(ft.fingerprint(state), counters["inductor"]["fxgraph_cache_hit"])
print(counters["inductor"]["fxgraph_cache_miss"])
"""


@pytest.mark.long
@GENERATES
def test_a_resumed_run_in_a_new_process_is_warm_and_has_the_same_bits(tmp_path: Path) -> None:
    """Stopped and resumed in another process, with a warm cache, and with a cold one."""

    def run(directory: str, steps: int, cache: str) -> tuple[str, int]:
        code = PROGRAM.format(
            tests=str(Path(__file__).parent), directory=str(tmp_path / directory), steps=steps
        )
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / cache)}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        fingerprint, hits = done.stdout.split()[:2]
        return fingerprint, int(hits)

    whole, hits = run("whole", 4, "cold")
    assert hits == 0
    run("cut", 2, "cold")
    resumed, hits = run("cut", 4, "cold")
    assert (resumed, hits > 0) == (whole, True)
    shutil.rmtree(tmp_path / "cut")
    run("cut", 2, "another")
    assert run("cut", 4, "third") == (whole, 0)
