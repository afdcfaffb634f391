"""Where architectures show their head, and that by chunks they compute what they compute whole."""

from __future__ import annotations

import gc
import inspect
import re
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import functrain as ft
from functrain import keys
from functrain.objectives import chunks, head, language
from functrain.objectives.head import Head, find_head
from functrain.objectives.language import LanguageModeling
from functrain.objectives.logprobs import TokenScores, _by_pairs, hidden_rows, token_scores
from functrain.objectives.reference import reference_scores
from functrain.objectives.support import check_causal

transformers = pytest.importorskip("transformers")

VOCABULARY = 64
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
    "is_decoder": True,
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "embedding_size", "lru_width"], 16),
    **dict.fromkeys(["moe_intermediate_size", "word_embed_proj_dim"], 16),
    **dict.fromkeys(["intermediate_size", "n_inner", "ffn_dim"], 24),
    **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim"], 24),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers"], 2),
    **dict.fromkeys(["encoder_layers", "decoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads", "mamba_n_heads"], 4),
    **dict.fromkeys(["num_local_experts", "num_experts", "n_routed_experts"], 4),
    **dict.fromkeys(["head_dim", "rotary_dim", "state_size"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_experts_per_tok"], 2),
    **dict.fromkeys(["n_group", "topk_group", "n_shared_experts"], 1),
    **dict.fromkeys(["max_position_embeddings", "n_positions"], 64),
    **dict.fromkeys(["mamba_d_head", "mamba_d_state", "q_lora_rank", "kv_lora_rank"], 8),
    **dict.fromkeys(["attention_window_size", "hidden_size_per_layer_input"], 8),
}
"""Fields of configs, each given to every config that has it."""
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "dots1": {"first_k_dense_replace": 1},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_groups": 1},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0, 0.0],
        "laurel_rank": 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.3},
    "mamba2": {"head_dim": 8, "expand": 2, "n_groups": 1, "state_size": 8},
    "minicpm3": LATENT,
    "rwkv": {"rescale_every": 0},  # it would write into its weights in eval mode
    "xmod": {"default_language": "en_XX"},
    "youtu": LATENT,
}
PLAIN = [
    "afmoe",
    "apertus",
    "arcee",
    "bart",
    "bert",
    "bigbird_pegasus",
    "biogpt",
    "bitnet",
    "blenderbot",
    "bloom",
    "codegen",
    "ctrl",
    "deepseek_v2",
    "deepseek_v3",
    "diffllama",
    "doge",
    "dots1",
    "electra",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "falcon",
    "falcon_mamba",
    "flex_olmo",
    "gemma",
    "gemma3_text",
    "gemma4_text",
    "glm",
    "glm4",
    "glm4_moe",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gpt_oss",
    "gptj",
    "helium",
    "hunyuan_v1_dense",
    "jamba",
    "jetmoe",
    "lfm2",
    "llama",
    "llama4_text",
    "mamba",
    "mamba2",
    "marian",
    "mbart",
    "minicpm3",
    "minimax",
    "ministral",
    "mistral",
    "mixtral",
    "modernbert-decoder",
    "mpt",
    "nemotron",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "openai-gpt",
    "opt",
    "persimmon",
    "phi",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "rembert",
    "roberta",
    "rwkv",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
    "trocr",
    "vaultgemma",
    "whisper",
    "xglm",
    "xlm-roberta",
    "xmod",
    "youtu",
]
"""Model types whose logits are what their projection returns."""
FINISHED = {
    "cohere": "model",  # a scale
    "cohere2": "model",
    "falcon_h1": "model",  # a scale that is the trunk's
    "gemma2": "model",  # a soft cap
    "gemma3n_text": "model",
    "granite": "model",  # a scale
    "granitemoe": "model",
    "nanochat": "model",  # a soft cap
    "recurrent_gemma": "model",
    "vaultgemma": "model",
    "xlstm": "backbone",  # a soft cap
}
"""Those that do more with them, and the name of the trunk before."""
HEADLESS = {
    "dory": "a forward of its own",  # a Linear with a learned scale by token
    "prophetnet": "decoder of the trunk is called",
}
"""Those without a head that could be used, and the reason."""
FOUND = pytest.mark.parametrize("name", sorted({*PLAIN, *FINISHED}))
SOME = pytest.mark.parametrize("name", ["decoder", "llama", "gpt2", "gemma2", "falcon_h1", "bert"])


def _config(name: str) -> Any:
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    kind = transformers.CONFIG_MAPPING[name]
    known = set(inspect.signature(kind).parameters)
    known.update(*(vars(each).get("__annotations__", {}) for each in kind.__mro__))
    return kind(**{**{k: v for k, v in SMALL.items() if k in known}, **SPECIAL.get(name, {})})


def _model(name: str) -> Any:
    """A fresh model, in float64 where it runs in it."""
    if name == "decoder":
        return _decoder()
    with keys.seeded(3):
        model = transformers.AutoModelForCausalLM.from_config(_config(name)).eval()
        for parameter in model.parameters():  # a new model's logits are as good as 0
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    try:
        with torch.no_grad():
            model.double()(input_ids=_batch()["input_ids"])
    except RuntimeError:  # kernels of experts and masks that know no float64
        model.float()
    return model


def _decoder(**options: Any) -> Any:
    config = ft.models.DecoderConfig(
        vocabulary=VOCABULARY, width=16, layers=2, heads=4, hidden=24, **options
    )
    return ft.models.decoder(config, seed=3).double().eval()


@cache
def _shared(name: str) -> tuple[Any, float]:
    """A model for several tests, each of which leaves it as it was, and its tolerance."""
    model = _model(name)
    return model, _tolerance(model)


def _batch(seed: int = 0) -> dict[str, Tensor]:
    """40 positions predict, and 31 of them have a target: two chunks, the last one short."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (4, 11), generator=generator)
    labels = ids.clone()
    labels[0, :6] = labels[1, 4] = labels[2, 8:] = -100
    return {"input_ids": ids, "labels": labels}


def _padded(model: Any, seed: int = 0) -> dict[str, Tensor]:
    """With a mask and positions, where the model takes them."""
    batch = _batch(seed)
    mask = torch.ones_like(batch["input_ids"])
    mask[2, 8:] = 0
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0) + 2}
    takes = inspect.signature(model.forward).parameters
    return {**batch, **{key: value for key, value in inputs.items() if key in takes}}


@contextmanager
def _chunked() -> Generator[None]:
    """Within it, no more than 16 rows of logits fit into the budget."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "BUDGET", 16 * VOCABULARY * 4)
        yield


@contextmanager
def _rows() -> Generator[list[Any]]:
    """Within it, what a loss finds of hidden states whose logits are made by chunks."""
    found: list[Any] = []

    def spying(*given: Any, **options: Any) -> Any:
        found.append(hidden_rows(*given, **options))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "hidden_rows", spying)
        yield found


def _tolerance(model: Any) -> float:
    """1e-11 where logits are float64. Where the model narrows them, a few of float32's roundings.

    The gradients of two paths that are the same are 1e-7 apart then, and those of experts 1e-6.
    """
    with torch.no_grad():
        outputs = model(input_ids=_batch()["input_ids"])
    logits = outputs if isinstance(outputs, Tensor) else outputs.logits
    return 1e-11 if logits.dtype == torch.float64 else 1e-5


@contextmanager
def _left_alone(model: nn.Module) -> Generator[None]:
    """Within it nothing is left behind: the same modules, with the same hooks and modes."""
    before = _seen(model)
    yield
    assert _seen(model) == before


def _seen(model: nn.Module) -> list[tuple[object, ...]]:
    return [
        (name, id(module), module.training, *module._forward_hooks, *module._forward_pre_hooks)
        for name, module in model.named_modules()
    ]


def _assert_near(ours: Tensor, theirs: Tensor, tolerance: float, what: str) -> None:
    apart = float((ours.double() - theirs.double()).norm())
    limit = tolerance * max(1.0, float(theirs.double().norm()))
    assert apart <= limit, f"{what}: {apart:.3g} apart"


Measured = tuple[Tensor, dict[str, float], dict[str, Tensor]]


def _measured(model: nn.Module, batch: dict[str, Tensor], mode: str) -> Measured:
    """Loss, metrics and the gradients of all parameters that the loss reaches."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total, metrics = LanguageModeling(head=mode)(model, batch)  # type: ignore[arg-type]
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    grads = {name: grad for name, grad in zip(named, found, strict=True) if grad is not None}
    return total.detach(), metrics.to_dict(), grads


def _assert_same(model: nn.Module, batch: dict[str, Tensor], tolerance: float) -> None:
    """Loss, metrics and gradients by chunks are those of whole logits."""
    with keys.seeded(5):
        whole = _measured(model, batch, "full")
    with _chunked(), _rows() as rows, keys.seeded(5):
        ours = _measured(model, batch, "auto")
    assert [each is not None for each in rows] == [True]
    _assert_near(ours[0], whole[0], tolerance, "loss")
    assert ours[1] == pytest.approx(whole[1], rel=10 * tolerance)
    assert ours[2].keys() == whole[2].keys()
    norm = float(torch.stack([grad.double().norm() for grad in whole[2].values()]).norm())
    for name, grad in whole[2].items():
        apart = float((ours[2][name].double() - grad.double()).norm())
        assert apart <= tolerance * norm, f"{name}: {apart:.3g} apart, at a norm of {norm:.3g}"


def _assert_same_scores(ours: TokenScores, whole: TokenScores, tolerance: float) -> None:
    assert torch.equal(ours.mask, whole.mask)
    assert torch.equal(ours.correct & ours.mask, whole.correct & whole.mask)
    for name in ("logps", "entropy", "level", "collision"):
        _assert_near(getattr(ours, name), getattr(whole, name), tolerance, name)


@FOUND
def test_the_head_is_found(name: str) -> None:
    """By the module of the projection, the names of its values, and the trunk where one is due."""
    model, tolerance = _shared(name)
    head._found.of(model).clear()
    with _left_alone(model):
        found = find_head(model)
    assert isinstance(found, Head), found
    named = dict(model.named_parameters())
    assert found.projection is model.get_output_embeddings()
    assert named[found.weight] is found.projection.weight
    assert (None if found.bias is None else named[found.bias]) is found.projection.bias
    narrowed = tolerance > 1e-9 and next(model.parameters()).dtype == torch.float64
    # To narrow float64 is to change them.
    assert found.trunk == FINISHED.get(name, model.base_model_prefix if narrowed else None)


@pytest.mark.parametrize("name", sorted(HEADLESS))
def test_some_have_no_head_and_say_why(name: str) -> None:
    """Whole logits are taken then, whatever their size."""
    model = _model(name)
    with _left_alone(model), _chunked():
        found = find_head(model)
        assert isinstance(found, str)
        assert HEADLESS[name] in found
        assert hidden_rows(model, _batch()) is None


def test_the_way_of_the_logits_is_described_without_the_architecture_having_its_weights() -> None:
    architecture, params, buffers = ft.split(_decoder(tied=False))
    with _left_alone(architecture):
        said = head.described(architecture, params, buffers)
    assert said == "logits by chunks of lm_head.weight"
    name = sorted(HEADLESS)[0]
    architecture, params, buffers = ft.split(_model(name))
    assert head.described(architecture, params, buffers).startswith("whole logits: ")


@pytest.mark.parametrize("tied", [False, True])
def test_the_built_in_decoder_shows_its_head(tied: bool) -> None:
    model = _decoder(tied=tied)
    found = find_head(model)
    assert isinstance(found, Head)
    weight = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert (found.weight, found.bias, found.trunk) == (weight, None, None)
    _assert_same(model, _batch(), 1e-11)
    _assert_same(model, _padded(model), 1e-11)


@FOUND
def test_by_chunks_the_loss_is_the_same(name: str) -> None:
    """With its metrics and the gradients of all parameters; also with a mask and positions."""
    model, tolerance = _shared(name)
    with _left_alone(model):
        _assert_same(model, _batch(), tolerance)
        _assert_same(model, _padded(model), tolerance)


@FOUND
def test_by_chunks_the_scores_are_the_same(name: str) -> None:
    """Those of the params that are bound, and those of others: what a reference is."""
    model, tolerance = _shared(name)
    batch = _padded(model)
    other = {name: p.detach() * 1.1 for name, p in model.named_parameters()}
    with torch.no_grad(), _left_alone(model):
        whole = token_scores(model, batch, head="full")
        reference = reference_scores(model, other, batch, head="full")
        with _chunked():
            ours = token_scores(model, batch)
            referred = reference_scores(model, other, batch)
    _assert_same_scores(ours, whole, tolerance)
    _assert_same_scores(referred, reference, tolerance)
    assert float((reference.logps - whole.logps).norm()) > 1e-3


@FOUND
def test_under_checkpointing_it_is_the_same(name: str) -> None:
    """In train mode, with the same dropout, the trunk computed again in the backward pass."""
    model, tolerance = _shared(name)
    if not model.supports_gradient_checkpointing:
        pytest.skip(f"{name} has no checkpointing")
    with _checkpointing(model), _left_alone(model):
        _assert_same(model, _batch(), tolerance)


@contextmanager
def _checkpointing(model: Any) -> Generator[None]:
    """Within it, in train mode with checkpointing, and its head not found yet."""
    new, old = "activation_checkpointing", "gradient_checkpointing"
    kind = new if hasattr(model, f"{new}_enable") else old
    getattr(model, f"{kind}_enable")({"use_reentrant": False})
    head._found.of(model).clear()
    model.train()
    try:
        yield
    finally:
        model.eval()
        getattr(model, f"{kind}_disable")()
        head._found.of(model).clear()


def test_where_every_position_has_a_target_none_is_left_out() -> None:
    model = _decoder()
    batch = {**_batch(), "labels": _batch()["input_ids"]}
    _assert_same(model, batch, 1e-11)
    with _chunked():
        rows = hidden_rows(model, batch)
    assert rows is not None
    assert rows.places is None
    assert len(rows.hidden) == 40


def test_rows_without_a_target_are_left_out() -> None:
    with _chunked():
        rows = hidden_rows(_decoder(), _batch())
    assert rows is not None
    assert rows.hidden.shape == (31, 16)
    assert (rows.targets != -100).all()


def test_logits_within_the_budget_are_taken_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is one of the batch's shape: 40 rows of logits in a room for 40, and for 39."""
    model = _decoder()
    row = VOCABULARY * 4
    for budget, whole in ((40 * row, True), (40 * row - 1, False)):
        monkeypatch.setattr(chunks, "BUDGET", budget)
        assert (hidden_rows(model, _batch()) is None) is whole
    monkeypatch.setattr(chunks, "BUDGET", 0)
    assert hidden_rows(model, _batch(), head="full") is None


@SOME
@pytest.mark.parametrize("name_of_call", ["loss", "scores"])
def test_the_model_is_called_once(name: str, name_of_call: str) -> None:
    """And its trunk; after it only what it does with logits, which has no trunk."""
    model = _model(name)
    found = find_head(model)
    assert isinstance(found, Head)
    check_causal(model)
    trunk = model.model if name == "decoder" else model.base_model
    calls = {"model": 0, "trunk": 0}

    def count(which: str) -> Callable[..., None]:
        def add(*_: object) -> None:
            calls[which] += 1

        return add

    model.register_forward_pre_hook(count("model"))
    trunk.register_forward_pre_hook(count("trunk"))
    with _chunked():
        if name_of_call == "loss":
            LanguageModeling()(model, _batch())[0].backward()
        else:
            token_scores(model, _batch()).logps.sum().backward()
    assert calls["trunk"] == 1
    if found.trunk is None:
        assert calls["model"] == 1


class _StopError(Exception):
    pass


def _stop(*_: object) -> None:
    raise _StopError


@SOME
@pytest.mark.parametrize("training", [False, True])
def test_an_exception_in_the_forward_leaves_nothing_behind(name: str, training: bool) -> None:
    """Neither in the search, nor in a call."""
    model = _model(name).train(training)
    last = next(m for m in reversed(list(model.modules())) if isinstance(m, nn.ModuleList))[-1]
    handle = last.register_forward_pre_hook(_stop)
    with _left_alone(model):
        assert isinstance(find_head(model), str)
    handle.remove()
    head._found.of(model).clear()
    assert isinstance(find_head(model), Head)
    handle = last.register_forward_pre_hook(_stop)
    with _left_alone(model), _chunked(), pytest.raises(_StopError):
        LanguageModeling()(model, _batch())
    handle.remove()
    _assert_same(model.eval(), _batch(), 1e-11)


class Body(nn.Module):
    """Hidden states of each token alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.mix = nn.Linear(8, 8)
        self.power = nn.Parameter(torch.tensor(0.7))
        self.share = 0.5
        self.register_buffer("factor", torch.tensor(0.7))

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"last_hidden_state": self.mix(self.embedding(input_ids)).tanh()}


class Finished(nn.Module):
    """A model that makes something of its logits."""

    base_model_prefix = "body"

    def __init__(
        self, finish: Callable[[Any, Tensor], Tensor] = lambda _, rows: rows * 0.5
    ) -> None:
        super().__init__()
        with keys.seeded(3):
            self.body = Body()
            self.lm_head = nn.Linear(8, VOCABULARY)
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("factor", torch.tensor(0.7))
        self.finish = finish
        self.double()

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {
            "logits": self.finish(self, self.lm_head(self.body(input_ids)["last_hidden_state"]))
        }

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


USABLE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a buffer": lambda model, rows: rows * model.factor,
    "a number of the trunk": lambda model, rows: rows * model.body.share,
    "a buffer of the trunk": lambda model, rows: rows * model.body.factor,
    "in place": lambda _, rows: rows.mul_(0.7),
    "narrowing": lambda _, rows: rows.float(),
    "by word": lambda _, rows: rows * torch.linspace(0.5, 1.5, VOCABULARY, dtype=rows.dtype),
    "impossible words": lambda _, rows: torch.cat(
        [rows[..., :3], torch.full_like(rows[..., 3:5], -torch.inf), rows[..., 5:]], -1
    ),
}
UNUSABLE: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "a parameter": (lambda model, rows: rows / model.temperature, "depends on parameters"),
    "a mean over time": (lambda _, rows: rows - rows.mean(1, keepdim=True), "on other rows"),
    "fewer words": (lambda _, rows: rows[..., :-1], "of another shape"),
    "a parameter of the trunk": (
        lambda model, rows: rows * model.body.power,
        "depends on parameters",
    ),
    "its place": (
        lambda _, rows: rows * torch.linspace(0.5, 1.5, rows.shape[1]).unsqueeze(1),
        "on its place",
    ),
    "a call of the trunk": (lambda model, rows: model.body.mix(rows[..., :8]), "is called"),
}


@pytest.mark.parametrize("what", sorted(USABLE))
def test_what_a_model_makes_of_its_logits_is_made_of_every_chunk(what: str) -> None:
    model = Finished(USABLE[what])
    batch = _batch()
    batch["labels"][(batch["labels"] == 3) | (batch["labels"] == 4)] = 9
    with _left_alone(model):
        found = find_head(model)
        assert isinstance(found, Head), found
        assert found.trunk == "body"
        _assert_same(model, batch, 1e-5 if what == "narrowing" else 1e-11)
        with torch.no_grad():
            whole = token_scores(model, batch, head="full")
            with _chunked():
                ours = token_scores(model, batch)
    _assert_near(ours.logps, whole.logps, 1e-5 if what == "narrowing" else 1e-11, "logps")
    _assert_near(ours.entropy, whole.entropy, 1e-5 if what == "narrowing" else 1e-11, "entropy")


@pytest.mark.parametrize("what", sorted(UNUSABLE))
@pytest.mark.parametrize("grads", [False, True])
def test_what_cannot_be_made_of_a_chunk_hides_the_head(what: str, grads: bool) -> None:
    """A parameter of it would get no gradient. So it is in an evaluation, which asks first."""
    finish, reason = UNUSABLE[what]
    model = Finished(finish).requires_grad_(grads)
    with _left_alone(model):
        found = find_head(model)
    assert isinstance(found, str)
    assert reason in found
    with _chunked():
        assert hidden_rows(model, _batch()) is None


@pytest.mark.parametrize("every", [False, True])
def test_what_is_made_of_a_row_for_its_tokens_hides_the_head(every: bool) -> None:
    """By the first token of a sequence, or by each: of neither the chunks of rows know anything."""
    prior = torch.linspace(-1, 1, VOCABULARY, dtype=torch.float64)

    class Conditioned(Finished):
        def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
            asked = input_ids if every else input_ids[:, :1]
            logits = super().forward(input_ids)["logits"]
            return {"logits": logits + prior[asked].unsqueeze(-1) ** 2}

    found = find_head(Conditioned())
    assert isinstance(found, str)
    assert "or on the tokens" in found


def test_without_a_trunk_by_name_there_is_no_calling_what_follows() -> None:
    class Nameless(Finished):
        base_model_prefix = "elsewhere"

    assert find_head(Nameless()) == (
        "it changes the logits after the projection, and names no trunk"
    )


def _cooler(model: Any, rows: Tensor) -> Tensor:
    """A temperature while it trains."""
    return rows / 4 if model.training else rows


def _dropped(model: Any, rows: Tensor) -> Tensor:
    return F.dropout(rows, 0.5, model.training)


def _centred(model: Any, rows: Tensor) -> Tensor:
    return rows - rows.mean(1, keepdim=True) if model.training else rows


def _told_in_training(model: Any, rows: Tensor) -> Tensor:
    assert rows.shape[1] or not model.training, "no rows"
    return rows


TRAINING: dict[str, tuple[Callable[[Any, Tensor], Tensor], str, str]] = {
    "dropout": (_dropped, "training mode depends .* or is drawn", "training mode, and names no t"),
    "a mean over time": (_centred, "training mode depends on param", "training mode, and names no"),
    "an assertion": (_told_in_training, r"training mode \(AssertionError: no rows", "no rows"),
}


@pytest.mark.parametrize("nameless", [False, True])
@pytest.mark.parametrize("what", sorted(TRAINING))
def test_what_it_makes_of_logits_in_training_mode_alone_hides_the_head(
    what: str, nameless: bool
) -> None:
    """As chunks of rows know nothing of it; the loss is that of whole logits in either mode."""
    finish, *reasons = TRAINING[what]
    model = Finished(finish)
    model.base_model_prefix = "elsewhere" if nameless else "body"
    with _left_alone(model):
        found = find_head(model)
    assert isinstance(found, str)
    assert re.search(reasons[nameless], found), found
    with _chunked():
        assert hidden_rows(model.train(), _batch()) is None


def test_what_is_made_of_each_row_in_training_mode_is_made_of_every_chunk() -> None:
    model = Finished(_cooler)
    with _left_alone(model):
        found = find_head(model)
    assert isinstance(found, Head), found
    assert found.trunk == "body"
    for training in (True, False):
        _assert_same(model.train(training), _batch(), 1e-11)


@pytest.mark.parametrize("name", ["decoder", "gpt2"])
def test_dropout_before_the_head_does_not_hide_it(name: str) -> None:
    if name == "decoder":
        model = _decoder(dropout=0.5)
    else:
        config = {**SMALL, "n_positions": 16}
        known = ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions", "use_cache")
        config = {key: value for key, value in config.items() if key in known}
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.GPT2Config(**config, embd_pdrop=0.5, resid_pdrop=0.5, attn_pdrop=0.5)
        ).double()
    found = find_head(model.train())
    assert isinstance(found, Head), found
    assert found.trunk is None
    _assert_same(model, _batch(), 1e-11)


def test_a_model_that_reads_its_logits_is_given_them() -> None:
    """One that cannot do without a row shows no head, whatever the mode."""
    for read in (lambda rows: rows.max(), lambda rows: rows[:, 0]):

        def finish(_: Any, rows: Tensor, read: Any = read) -> Tensor:
            read(rows)
            return rows

        found = find_head(Finished(finish))
        assert isinstance(found, str)
        assert "its forward cannot be called for it" in found


def test_an_exception_in_what_follows_leaves_nothing_behind() -> None:
    stopped: list[bool] = []

    def finish(_: Any, rows: Tensor) -> Tensor:
        if stopped and rows.shape[1] > 3:
            raise _StopError
        return rows * 0.5

    model = Finished(finish)
    assert isinstance(find_head(model), Head)
    stopped.append(True)
    with _left_alone(model), _chunked(), pytest.raises(_StopError):
        LanguageModeling()(model, _batch())


class _Own(nn.Linear):
    """A projection that scales what it returns."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) * 2.0


class _Twice(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return tensor * 2.0


def _of_its_own(model: Any) -> None:
    model.lm_head = _Own(8, VOCABULARY).double()


def _patched(model: Any) -> None:
    """As offloading does it."""
    plain = model.lm_head.forward
    model.lm_head.forward = lambda hidden: plain(hidden) * 2.0


def _parametrized(name: str) -> Callable[[Any], None]:
    return lambda model: parametrize.register_parametrization(model.lm_head, name, _Twice())


def _wrapped(model: Any) -> None:
    """As low-rank adapters do it."""
    model.lm_head = nn.Sequential(model.lm_head)


def _foreign(model: Any) -> None:
    other = nn.Linear(8, VOCABULARY).double()
    model.get_output_embeddings = lambda: other


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "a forward of its own": (_of_its_own, "forward of its own"),
    "a patched forward": (_patched, "forward of its own"),
    "a parametrized weight": (_parametrized("weight"), "weight is none of its parameters"),
    "a parametrized bias": (_parametrized("bias"), "bias is none of its parameters"),
    "a wrapped projection": (_wrapped, "returns an nn.Linear"),
    "a projection elsewhere": (_foreign, "none of its modules"),
    "compiled": (
        lambda model: model.compile(backend="eager"),
        "compiled",
    ),
    "a forward hook": (
        lambda model: model.lm_head.register_forward_hook(lambda _m, _i, out: out * 2.0),
        "hooks",
    ),
    "a backward hook": (
        lambda model: model.lm_head.register_full_backward_hook(lambda *_: None),
        "hooks",
    ),
    "a hook on the model": (
        lambda model: model.register_forward_hook(
            lambda _m, _i, out: {"logits": out["logits"] * 2.0}
        ),
        "hooks",
    ),
}


@pytest.mark.parametrize("what", sorted(CHANGES))
@pytest.mark.parametrize("found_before", [False, True])
def test_a_head_that_does_more_than_project_is_none(what: str, found_before: bool) -> None:
    """Whether it was so at first or became so later: the loss is that of whole logits."""
    model = Finished(lambda _, rows: rows)
    if found_before:
        assert isinstance(find_head(model), Head)
    change, reason = CHANGES[what]
    change(model)
    found = find_head(model)
    assert isinstance(found, str)
    assert reason in found
    with _chunked():
        assert hidden_rows(model, _batch()) is None


def test_hooks_of_the_users_own_stay_and_act() -> None:
    """One that changes hidden states at the projection's door acts on every row."""
    model = Finished(lambda _, rows: rows)
    seen: list[tuple[int, ...]] = []

    def double(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(tuple(inputs[0].shape))
        return (inputs[0] * 2.0,)

    plain = _measured(model, _batch(), "full")[0]
    model.lm_head.register_forward_pre_hook(double)
    with _left_alone(model):
        assert isinstance(find_head(model), Head)
        _assert_same(model, _batch(), 1e-11)
    assert float(_measured(model, _batch(), "full")[0]) != float(plain)
    assert seen[-1] == (4, 11, 8)


@pytest.mark.parametrize("found_before", [False, True])
def test_a_hook_that_is_taken_away_shows_the_head_again(found_before: bool) -> None:
    model = Finished(lambda _, rows: rows)
    if found_before:
        assert isinstance(find_head(model), Head)
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    assert isinstance(find_head(model), str)
    handle.remove()
    assert isinstance(find_head(model), Head)


def test_a_projection_that_was_replaced_is_found_anew() -> None:
    model = Finished()
    find_head(model)
    model.lm_head = nn.Linear(8, VOCABULARY, bias=False).double()
    found = find_head(model)
    assert isinstance(found, Head)
    assert found.projection is model.lm_head
    assert found.bias is None
    _assert_same(model, _batch(), 1e-11)


def test_the_search_moves_neither_buffers_nor_generators_nor_modes() -> None:
    """A model that counts its calls and draws in them: the first step is as every other."""
    modes: list[bool] = []

    class Drawing(Finished):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
            modes.append(self.training)
            self.calls += 1
            self.calls = self.calls + torch.rand(())
            return super().forward(input_ids)

    model = Drawing().train()
    model.body.eval()
    before, state = model.calls, torch.get_rng_state()
    with _left_alone(model):
        assert isinstance(find_head(model), Head)
    # Whole logits in either mode, twice what follows the projection in each, and no logits.
    assert modes == [False, True] + [False] * 2 + [True] * 2 + [False, True]
    assert model.calls is before
    assert float(before) == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_an_architecture_is_not_kept_alive() -> None:
    model = Finished()
    assert isinstance(find_head(model), Head)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("name", ["decoder", "llama", "mixtral", "gemma2"])
def test_without_weights_the_search_is_not_the_last(name: str) -> None:
    """What the meta device does not tell is found where weights are bound, as in a step."""
    architecture, params, buffers = ft.split(_model(name))
    unbound = find_head(architecture)
    assert isinstance(unbound, Head) or "cannot be called" in unbound
    with ft.bound(architecture, params, buffers, "eval") as model:
        found = find_head(model)
        assert isinstance(found, Head), found
        tolerance = 1e-11 if next(iter(params.values())).dtype == torch.float64 else 1e-5
        with torch.no_grad(), _chunked():
            ours = token_scores(model, _batch())
        with torch.no_grad():
            whole = token_scores(model, _batch(), head="full")
    _assert_same_scores(ours, whole, tolerance)
    assert find_head(architecture) is found


def test_the_precision_of_the_first_call_does_not_matter() -> None:
    """A model that widens its logits changes nothing: also where it is first seen in bf16."""

    class Nameless(Finished):
        base_model_prefix = ""

    for dtype in (torch.bfloat16, torch.float32):
        found = find_head(Nameless(lambda _, rows: rows.float()).to(dtype))
        assert isinstance(found, Head), found
        assert found.trunk is None


def test_a_head_that_is_kept_out_of_autocast_is_so_by_chunks() -> None:
    """Logits in float32, as the model wants them, where the step's precision is bf16."""

    class Precise(Finished):
        def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
            hidden = self.body(input_ids)["last_hidden_state"]
            with torch.autocast("cpu", enabled=False):
                return {"logits": self.lm_head(hidden.float())}

    architecture, params, buffers = ft.split(Precise().float())
    found = []
    for mode in ("auto", "full"):
        objective = LanguageModeling(head=mode)  # type: ignore[arg-type]
        gradient = ft.value_and_grad(objective, architecture, precision="bf16")
        with _chunked():
            found.append(gradient(params, buffers, _batch()))
    ours, whole = found
    assert float(ours.metrics["loss"]) == pytest.approx(float(whole.metrics["loss"]), rel=1e-6)
    for name, grad in whole.grads.items():
        _assert_near(ours.grads[name], grad, 1e-6, name)


def test_a_projection_that_is_not_reached_is_named() -> None:
    """One that a few tokens go through, as the search has seen it, but a batch does not."""

    class Elsewhere(Finished):
        def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
            if input_ids.shape[1] < 4:
                return super().forward(input_ids)
            hidden = self.body(input_ids)["last_hidden_state"]
            return {"logits": F.linear(hidden, self.lm_head.weight, self.lm_head.bias)}

    model = Elsewhere(lambda _, rows: rows)
    with _left_alone(model), _chunked(), pytest.raises(ft.ArchitectureError, match="head='full'"):
        LanguageModeling()(model, _batch())
    LanguageModeling(head="full")(model, _batch())


LATER: dict[str, Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]] = {
    "by an attribute": lambda model, rows, _ids, _mask: rows / model.heat,
    "in place": lambda model, rows, _ids, _mask: rows if model.heat == 1 else rows.div_(3),
    "where it is long": lambda _, rows, ids, _mask: rows if ids.shape[1] < 8 else rows / 2,
    "where it has a mask": lambda _, rows, _ids, mask: rows if mask is None else rows / 3,
}


class Later(Finished):
    """A model that makes something of its logits where the search has not seen it."""

    heat = 1

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        rows: Tensor = self.lm_head(self.body(input_ids)["last_hidden_state"])
        plain = self.heat == 1 and self.finish is LATER["by an attribute"]
        return {"logits": rows if plain else self.finish(self, rows, input_ids, attention_mask)}  # type: ignore[call-arg]


@pytest.mark.parametrize("what", sorted(LATER))
@pytest.mark.parametrize("graded", [False, True])
def test_what_a_model_makes_of_its_logits_later_is_refused(what: str, graded: bool) -> None:
    """By chunks it would be left out, silently."""
    model = Later(LATER[what])  # type: ignore[arg-type]
    assert isinstance(find_head(model), Head)
    assert find_head(model).trunk is None  # type: ignore[union-attr]
    model.heat = 3
    batch = {**_batch(), "attention_mask": torch.ones_like(_batch()["input_ids"])}
    with _left_alone(model), _chunked(), torch.set_grad_enabled(graded):
        with pytest.raises(ft.ArchitectureError, match=r"makes something of its logits .*'full'"):
            LanguageModeling()(model, batch)
        LanguageModeling(head="full")(model, batch)


def test_what_is_made_of_logits_of_several_tokens_hides_the_head() -> None:
    """A penalty by place, say, which begins after the first."""

    def penalised(_: Any, rows: Tensor) -> Tensor:
        if rows.shape[1] < 2:
            return rows
        return rows * torch.linspace(1, 2, rows.shape[1], dtype=rows.dtype).unsqueeze(1)

    found = find_head(Finished(penalised))
    assert isinstance(found, str)
    assert "depends on its place" in found


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_widens_its_logits_is_not_refused(dtype: torch.dtype, inference: bool) -> None:
    class Nameless(Finished):
        base_model_prefix = ""

    model = Nameless(lambda _, rows: rows.float()).to(dtype)
    with _chunked(), torch.inference_mode(inference):
        assert hidden_rows(model, _batch()) is not None


def _kept(model: Any, rows: Tensor) -> Tensor:
    """A running mean of the logits."""
    if model.training:
        with torch.no_grad():
            model.factor.lerp_(rows.mean(), 0.1)
    return rows


def _counted(model: Any, rows: Tensor) -> Tensor:
    """How many logits there were, in a buffer anew each time."""
    model.factor = model.factor + rows.numel()
    return rows


@pytest.mark.parametrize(("finish", "mode"), [(_kept, " in training mode"), (_counted, "")])
@pytest.mark.parametrize("changed", [False, True])
def test_buffers_that_are_made_of_logits_hide_the_head(
    finish: Callable[[Any, Tensor], Tensor], mode: str, changed: bool
) -> None:
    """Of no rows they would be NaN, or stay as they are."""
    model = Finished(lambda m, rows: finish(m, rows) * (0.5 if changed else 1))
    with _left_alone(model):
        found = find_head(model)
    assert found == f"it makes its buffer factor of its logits{mode}"
    with _chunked():
        assert hidden_rows(model, _batch()) is None


def test_buffers_that_are_made_of_hidden_states_do_not_hide_the_head() -> None:
    class Normed(Finished):
        def __init__(self) -> None:
            super().__init__(lambda _, rows: rows)
            self.norm = nn.BatchNorm1d(8)
            self.body.mix.register_forward_hook(lambda _, _i, out: self.norm(out.mT).mT)
            self.double()

    model = Normed().train()
    found = find_head(model)
    assert isinstance(found, Head), found
    _assert_same(model, _batch(), 1e-11)


def test_pairs_are_in_one_order_whether_all_places_are_scored_or_some() -> None:
    """On an accelerator all are; a pair is its chosen side, and then the rejected one."""
    labels = torch.zeros(6, 4, dtype=torch.int64)
    every, sizes = _by_pairs(None, labels)
    assert every.tolist() == [0, 1, 2, 9, 10, 11, 3, 4, 5, 12, 13, 14, 6, 7, 8, 15, 16, 17]
    assert sizes == [6, 6, 6]
    same, counted = _by_pairs(torch.arange(18), labels)
    assert same.equal(every)
    assert counted == sizes
    some, fewer = _by_pairs(torch.tensor([1, 2, 4, 9, 13, 14, 17]), labels)
    assert some.tolist() == [1, 2, 9, 4, 13, 14, 17]
    assert fewer == [3, 3, 1]
