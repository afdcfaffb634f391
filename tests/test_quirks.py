"""What modules of torch and transformers do beside computing, and that a binding undoes it."""

from __future__ import annotations

import sys
import threading
import types
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import transformers as tf
import zoo
from models import families
from torch import nn

import functrain as ft
from functrain import quirks
from functrain.errors import ArchitectureError

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


class Writing(nn.Module):
    """A model that rescales its head in eval mode, as one for float16 might."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(zoo.VOCABULARY, 4), nn.Linear(4, zoo.VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if not self.training:
            with torch.no_grad():
                self.head.weight.div_(2)
        logits: torch.Tensor = self.head(self.embedding(input_ids))
        return logits


class Layered(nn.Module):
    """A causal model of torch's own transformer layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(zoo.VOCABULARY, 16)
        self.block = nn.TransformerEncoderLayer(
            16, 4, 32, dropout=0.0, batch_first=True, activation="gelu"
        )
        self.head = nn.Linear(16, zoo.VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1])
        hidden = self.block(self.embedding(input_ids), src_mask=mask, is_causal=True)
        logits: torch.Tensor = self.head(hidden)
        return logits


def layered() -> tuple[nn.Module, Any, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ft.split(Layered())


def test_a_forward_that_writes_into_its_parameters_is_named() -> None:
    architecture, params, buffers = ft.split(Writing())
    step = ft.pretrain_step(architecture, ft.optim.sgd(1e-2))
    state = step.init(params, buffers)
    for _ in range(2):  # the slots are put back also then
        with pytest.raises(ArchitectureError, match=r"head\.weight: the model's forward wrote"):
            ft.evaluate(step, state, [zoo.batch()])
    with pytest.raises(ArchitectureError, match=r"rescale_every"):
        ft.models.generate(architecture, state.params, state.buffers, [1], max_new_tokens=2)


def test_an_error_within_a_binding_is_not_hidden_by_what_was_written() -> None:
    architecture, params, buffers = ft.split(Writing())

    def broken() -> None:
        with torch.no_grad(), ft.bound(architecture, params, buffers, "eval") as model:
            model(torch.zeros(1, 1, dtype=torch.int64))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()


def test_params_made_in_inference_mode_are_bound() -> None:
    """They have no version that would tell what is written."""
    architecture, params, buffers = zoo.split("decoder")
    with torch.inference_mode():
        made = {name: param.clone() for name, param in params.items()}
        with ft.bound(architecture, made, buffers, "eval") as model:
            model(zoo.batch()["input_ids"])


@pytest.mark.parametrize("form", ["read", "skeleton"])
def test_rwkv_leaves_its_weights_alone(form: str, tmp_path: Path) -> None:
    """Of more than six layers, where transformers' divides them in eval mode."""
    config: Any = families.CONFIGS["rwkv"]()
    config.num_hidden_layers, config.rescale_every = 8, 6
    ordinary = tf.AutoModelForCausalLM.from_config(config).float()
    ordinary.save_pretrained(tmp_path)
    if form == "read":
        architecture, params, buffers, _ = ft.models.from_pretrained(tmp_path)
    else:
        architecture = ft.models.skeletons.skeleton(tmp_path, torch.float32)
        architecture, params, buffers = ft.split(architecture)
    step = ft.pretrain_step(architecture, ft.optim.sgd(1e-2))
    state, batch = step.init(params, buffers), zoo.batch()
    begun = ft.fingerprint(state)
    loss = step(state, batch)[1]["loss"]
    ft.evaluate(step, state, [batch])
    ft.models.generate(architecture, state.params, state.buffers, [1, 2], max_new_tokens=2)
    assert ft.fingerprint(state) == begun
    assert step(state, batch)[1]["loss"] == loss


def test_in_eval_mode_torchs_layers_compute_as_in_train_mode() -> None:
    """Bit for bit, so that DPO's margin is 0 where params and reference are the same."""
    architecture, params, buffers = layered()
    ids = zoo.batch()["input_ids"]
    with ft.bound(architecture, params, buffers, "train") as model:
        trained = model(ids).detach()
    with torch.no_grad(), ft.bound(architecture, params, buffers, "eval") as model:
        assert torch.equal(model(ids), trained)
    step = ft.dpo_step(architecture, ft.optim.sgd(1e-2), reference=params)
    _, metrics = step(step.init(params, buffers), zoo.pairs())
    assert float(metrics["rewards/margins"]) == 0


def test_adapters_of_torchs_layers_count_in_eval_mode() -> None:
    architecture, params, buffers = layered()
    adapted, adapters = ft.lora.attach(architecture, params, ft.lora.LoRA(rank=2))
    assert not any("out_proj" in name for name in adapters)
    moved = {n: t + 0.05 * torch.ones_like(t) for n, t in adapters.items()}
    ids = zoo.batch()["input_ids"]
    logits = []
    for parts in ((adapted, moved), ft.lora.merged(adapted, moved)):
        with torch.no_grad(), ft.bound(*parts, buffers, "eval") as model:
            logits.append(model(ids))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


def test_the_switch_of_the_fast_path_is_put_back_when_the_last_binding_ends() -> None:
    enabled = torch.backends.mha.get_fastpath_enabled
    first, second = zoo.split("decoder"), zoo.split("tied")
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with ft.bound(*second):
            inside.set()
            leave.wait(10)

    assert enabled()
    thread = threading.Thread(target=other)
    with ft.bound(*first):
        thread.start()
        assert inside.wait(10)
        assert not enabled()
    assert not enabled()
    leave.set()
    thread.join()
    assert enabled()


def _caching(name: str, caching: bool) -> tuple[Any, Any, Any]:
    config = families.CONFIGS[name]()
    config.use_cache = caching
    return families.stirred(config, attn_implementation="eager")


@pytest.mark.parametrize("name", ["codegen", "gpt2", "gpt_j", "gpt_neo", "llama", "mamba", "opt"])
def test_a_cache_that_a_config_asks_for_changes_no_bit(name: str) -> None:
    """Neither of a gradient, with recomputed blocks or without, nor of an evaluation."""
    found = []
    for caching in (False, True):
        architecture, params, buffers = _caching(name, caching)
        families.without_dropout(architecture)
        blocks = next(n for n, m in architecture.named_modules() if isinstance(m, nn.ModuleList))
        for checkpoint in (None, f"{blocks}.*"):
            step = ft.pretrain_step(architecture, ft.optim.sgd(1e-2), checkpoint=checkpoint)
            state, metrics = step(step.init(params, buffers), zoo.batch())
            measured = ft.evaluate(step, state, [zoo.batch()])
            found.append((ft.fingerprint(state), metrics.to_dict(), measured.to_dict()))
        assert architecture.config.use_cache is caching
    assert all(each == found[0] for each in found)


def test_documents_are_separated_by_a_model_whose_config_asks_for_a_cache() -> None:
    architecture, params, buffers = _caching("llama", True)
    step = ft.pretrain_step(architecture, ft.optim.sgd(1e-2))
    position = torch.tensor([[*range(5), *range(3)]])
    ids = zoo.batch(examples=1, time=8)["input_ids"]
    batch = {
        "input_ids": ids,
        "labels": ids.masked_fill(position == 0, -100),
        "position_ids": position,
    }
    ft.testing.assert_packing_isolated(step, step.init(params, buffers), batch)


def test_a_cache_is_given_to_who_asks_for_it_in_the_call() -> None:
    architecture, params, buffers = _caching("llama", True)
    ids = zoo.batch()["input_ids"]
    with ft.bound(architecture, params, buffers, "eval") as model:
        assert model(ids).past_key_values is None
        assert model(ids, use_cache=True).past_key_values is not None
    with pytest.raises(ZeroDivisionError), ft.bound(architecture, params, buffers):
        raise ZeroDivisionError
    assert architecture.config.use_cache


def test_a_config_that_two_models_share_asks_again_when_the_last_binding_ends() -> None:
    config = families.CONFIGS["llama"]()
    first, second = families.stirred(config), families.stirred(config)
    assert first[0].config is second[0].config
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with ft.bound(*second):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with ft.bound(*first):
        thread.start()
        assert inside.wait(10)
    assert not config.use_cache
    leave.set()
    thread.join()
    assert config.use_cache


class Noticing:
    """As a config of transformers; `then` is called when it is about to ask for a cache again."""

    def __init__(self) -> None:
        self.use_cache, self.then = True, lambda: None

    def to_diff_dict(self) -> dict[str, Any]:
        """Says whose config it is."""
        return {}

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "use_cache" and value and hasattr(self, "then"):
            self.then()
        object.__setattr__(self, name, value)


def test_a_binding_that_begins_as_another_threads_ends_has_no_cache() -> None:
    config, found = Noticing(), []
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with quirks.uncached([config]):
            inside.set()
            leave.wait(10)
            found.append(config.use_cache)

    def begins() -> None:
        config.then = lambda: None
        thread.start()
        assert inside.wait(10)

    thread, config.then = threading.Thread(target=other), begins
    with quirks.uncached([config]):
        pass
    leave.set()
    thread.join()
    assert found == [False]
    assert config.use_cache


def _interrupted(at: int, config: Any) -> bool:
    """Ctrl-C at a line of what keeps the cache off; whether it came to that line."""
    seen = 0

    def trace(frame: types.FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        seen += frame.f_code.co_name == "uncached" and event == "line"
        if seen == at:
            seen += 1
            raise KeyboardInterrupt
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        with quirks.uncached([config]):
            pass
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(previous)
    return False


def test_a_config_asks_again_after_a_binding_that_was_interrupted_or_the_next_one() -> None:
    at, config = 1, Noticing()
    while _interrupted(at, config):
        with quirks.uncached([config]):
            assert not config.use_cache
        assert config.use_cache, at
        at += 1
    assert at > 10


@attrs.frozen
class Frozen:
    """A config of a model of one's own."""

    use_cache: bool = True


def test_a_config_that_is_not_transformers_is_left_alone() -> None:
    """It may mean something else, and cannot always be written to."""
    model = Writing()
    model.head.config = Frozen()  # type: ignore[assignment]
    with ft.bound(*ft.split(model)):
        pass


@pytest.fixture(params=["dynamic", "longrope"])
def dynamic(request: Any) -> tuple[nn.Module, Any, Any]:
    if request.param == "longrope":
        return families.stirred(families.longrope())
    config = tf.LlamaConfig(
        **{**families.GROUPED, "max_position_embeddings": 6}, rope_parameters=DYNAMIC
    )
    return families.stirred(config)


def test_dynamic_rotary_positions_remember_no_longer_batch(dynamic: Any) -> None:
    """Neither within a binding nor from one to the next, nor in the state."""
    architecture, params, buffers = dynamic
    step = ft.pretrain_step(architecture, ft.optim.sgd(1e-2))
    state, batch = step.init(params, buffers), zoo.batch(time=8)
    expected = ft.fingerprint(step(state, batch)[0])
    longer, _ = step(state, zoo.batch(time=20))
    assert ft.fingerprint(step(state, batch)[0]) == expected
    assert all(torch.equal(longer.buffers[name], state.buffers[name]) for name in state.buffers)
    several = [zoo.batch(time=time) for time in (8, 20)]
    forward = ft.evaluate(step, state, several)["eval_loss"]
    assert ft.evaluate(step, state, several[::-1])["eval_loss"] == forward


def test_dynamic_rotary_positions_are_those_of_transformers(dynamic: Any) -> None:
    """Of a model that has seen nothing longer yet."""
    architecture, params, buffers = dynamic
    fresh: Any = type(architecture)(architecture.config).eval()
    fresh.load_state_dict(dict(params))
    ids = zoo.batch(time=20)["input_ids"]
    with torch.no_grad(), ft.bound(architecture, params, buffers, "eval") as model:
        found = model(ids).logits
        assert torch.equal(found, fresh(ids).logits)
        short = model(ids[:, :5]).logits
    with torch.no_grad():
        assert torch.equal(short, fresh(ids[:, :5]).logits)
    assert "forward" not in vars(architecture.get_submodule("model.rotary_emb"))


def test_generation_leaves_the_frequencies_of_longrope_alone() -> None:
    architecture, params, buffers = ft.split(
        tf.AutoModelForCausalLM.from_config(families.longrope()).float()
    )
    before = ft.trees.clone(buffers)
    ft.models.generate(architecture, params, buffers, [1, 2, 3], max_new_tokens=12)
    assert all(torch.equal(buffers[name], before[name]) for name in buffers)
