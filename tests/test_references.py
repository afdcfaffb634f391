"""The reference online, attached ahead and from a cache: the same bits, and never another's."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
import zoo

import functrain as ft
from functrain.descriptions import description
from functrain.objectives import chunks
from functrain.precision import Precision
from functrain.references import example_keys

PRECISIONS = ["fp32", "bf16", "fp16", "bf16_params"]


def _parts(name: str = "decoder") -> tuple[Any, Any, Any, Any]:
    """An architecture, params, buffers, and other params as reference."""
    architecture, params, buffers = zoo.split(name)
    reference = ft.trees.map_leaves(lambda tensor: tensor * 1.1, params)
    return architecture, params, buffers, reference


def _unpaired(seed: int = 0) -> dict[str, Any]:
    desirable = torch.tensor([True, False, True, False])
    return {
        "completion": zoo.batch(seed),
        "mismatched": zoo.batch(seed + 9),
        "desirable": desirable,
    }


@pytest.mark.parametrize("name", sorted(zoo.MODELS))
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("by_token", [False, True])
def test_online_and_attached_are_the_same_bits(name: str, precision: str, by_token: bool) -> None:
    """Of the loss, of every metric and of the state after a step."""
    architecture, params, buffers, reference = _parts(name)
    online = ft.dpo_step(
        architecture, ft.optim.adamw(1e-2), reference=reference, precision=precision
    )
    ahead = ft.dpo_step(architecture, ft.optim.adamw(1e-2), precision=precision)
    attach = ft.attach_reference(
        architecture, reference, buffers, precision=precision, by_token=by_token
    )
    batch = zoo.pairs()
    state, metrics = online(online.init(params, buffers, seed=3), batch)
    other, measured = ahead(ahead.init(params, buffers, seed=3), attach(batch))
    assert ft.fingerprint(state) == ft.fingerprint(other)
    assert metrics.to_dict() == measured.to_dict()
    assert float(metrics["rewards/margins"]) != 0


@pytest.fixture
def two_threads() -> Iterator[None]:
    """On which products of other rows have other bits."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("layout", ["padded", "shared_prompt"])
def test_online_and_attached_are_the_same_bits_by_chunks_too(
    layout: Any, by_token: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both make the logits of whole pairs, as another product could have other bits."""
    monkeypatch.setattr(chunks, "WORTH", 0)
    monkeypatch.setattr(chunks, "BUDGET", 0)
    architecture, params, buffers, reference = _parts()
    online = ft.dpo_step(architecture, ft.optim.adamw(1e-2), reference=reference, layout=layout)
    ahead = ft.dpo_step(architecture, ft.optim.adamw(1e-2), layout=layout)
    attach = ft.attach_reference(architecture, reference, buffers, by_token=by_token, layout=layout)
    batch = zoo.pairs(examples=12, time=9)
    state, metrics = online(online.init(params, buffers, seed=3), batch)
    other, measured = ahead(ahead.init(params, buffers, seed=3), attach(batch))
    assert metrics.to_dict() == measured.to_dict()
    assert ft.fingerprint(state) == ft.fingerprint(other)


def test_kto_takes_attached_log_probs_too() -> None:
    architecture, params, buffers, reference = _parts()
    online = ft.kto_step(architecture, ft.optim.adamw(1e-2), reference=reference)
    ahead = ft.kto_step(architecture, ft.optim.adamw(1e-2))
    attach = ft.attach_reference(architecture, reference, buffers)
    state, _ = online(online.init(params, buffers), _unpaired())
    other, _ = ahead(ahead.init(params, buffers), attach(_unpaired()))
    assert ft.fingerprint(state) == ft.fingerprint(other)
    with pytest.raises(ft.BatchError, match="reference_logps: missing"):
        ahead(ahead.init(params, buffers), _unpaired())


def test_a_cache_gives_the_bits_that_were_computed_and_computes_nothing_twice(
    tmp_path: Path,
) -> None:
    architecture, params, buffers, reference = _parts()
    attach = ft.attach_reference(architecture, reference, buffers)
    step = ft.dpo_step(architecture, ft.optim.adamw(1e-2))
    state = step.init(params, buffers)
    batches = [zoo.pairs(seed) for seed in (0, 5)]
    direct = [ft.fingerprint(step(state, attach(batch))[0]) for batch in batches]
    path = tmp_path / "deep" / "reference.jsonl"
    with ft.ReferenceCache(path, attach) as cache:
        assert [ft.fingerprint(step(state, cache(b))[0]) for b in batches] == direct
        assert cache.computed == len(cache) == 16
    with ft.ReferenceCache(path, attach) as cache:
        assert [ft.fingerprint(step(state, cache(b))[0]) for b in batches] == direct
        assert cache.computed == 0


def test_an_interrupted_cache_goes_on_where_it_was(tmp_path: Path) -> None:
    """Cut at every byte: what is whole is kept, the torn line is computed again."""
    architecture, _, buffers, reference = _parts("tied")
    attach = ft.attach_reference(architecture, reference, buffers)
    batch = zoo.pairs()
    whole = tmp_path / "whole.jsonl"
    with ft.ReferenceCache(whole, attach) as cache:
        expected = cache(batch)["reference_logps"]
    data = whole.read_bytes()
    header = data.index(b"\n") + 1
    for size in range(0, len(data), 7):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(data[:size])
        with ft.ReferenceCache(path, attach) as cache:
            assert len(cache) == max(0, data[:size].count(b"\n") - 1)
            found = cache(batch)["reference_logps"]
            for side in expected:
                assert torch.equal(found[side], expected[side])
        assert path.read_bytes() == data, f"cut at {size}, of which {header} are the header"


def test_a_cache_by_token_is_what_ld_alpha_weighs(tmp_path: Path) -> None:
    """The bits of the online reference, also of rows with other padding; sums are another form."""
    architecture, params, buffers, reference = _parts()
    options = {"ld_alpha": 0.3, "microbatches": 2}
    online = ft.dpo_step(architecture, ft.optim.adamw(1e-2), reference=reference, **options)
    ahead = ft.dpo_step(architecture, ft.optim.adamw(1e-2), **options)
    attach = ft.attach_reference(architecture, reference, buffers, by_token=True)
    batch = zoo.pairs()
    batch["chosen"]["labels"][0, 5:] = -100
    expected = ft.fingerprint(online(online.init(params, buffers), batch)[0])

    def padded(side: Any) -> Any:
        return {key: F.pad(t, (0, 3), value=-100 * (key == "labels")) for key, t in side.items()}

    for computed in (8, 0):
        with ft.ReferenceCache(tmp_path / "c.jsonl", attach) as cache:
            found = cache(batch, microbatches=2)
            assert cache.computed == computed
            wider = cache({side: padded(each) for side, each in batch.items()})["reference_logps"]
            assert cache.computed == computed
        assert ft.fingerprint(ahead(ahead.init(params, buffers), found)[0]) == expected
        for side, logps in found["reference_logps"].items():
            assert torch.equal(wider[side], F.pad(logps, (0, 3)))
    with pytest.raises(ft.DataError, match="precision or form"):
        ft.ReferenceCache(tmp_path / "c.jsonl", attrs.evolve(attach, by_token=False))
    with (tmp_path / "c.jsonl").open("ab") as file:
        file.write(b'{"example":"a","logp":1.0}\n')
    with pytest.raises(ft.DataError, match=r":10: logp is 1.0, expected a list of numbers"):
        ft.ReferenceCache(tmp_path / "c.jsonl", attach)


class Impatient:
    """A lock that fails where two threads wait for each other, instead of waiting on."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        assert self._lock.acquire(timeout=20), "two threads wait for each other"

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_a_reference_is_attached_while_another_thread_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the same architecture, as where batches are prepared ahead: each waits for the other."""
    monkeypatch.setattr(ft.keys, "_lock", Impatient())
    architecture, params, buffers, reference = _parts()
    step = ft.dpo_step(architecture, ft.optim.adamw(1e-2), reference=reference)
    attach = ft.attach_reference(architecture, reference, buffers)
    state, batch = step.init(params, buffers), zoo.pairs()
    done: list[str] = []

    def repeated(name: str, work: Any) -> None:
        for _ in range(30):
            work()
        done.append(name)

    works = {"step": lambda: step(state, batch), "attach": lambda: attach(batch)}
    threads = [threading.Thread(target=repeated, args=each, daemon=True) for each in works.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert sorted(done) == ["attach", "step"]


@pytest.mark.parametrize("what", ["reference", "buffers", "precision"])
def test_a_cache_of_something_else_is_refused(what: str, tmp_path: Path) -> None:
    architecture, params, buffers, reference = _parts()
    attach = ft.attach_reference(architecture, reference, buffers)
    with ft.ReferenceCache(tmp_path / "c.jsonl", attach) as cache:
        cache(zoo.pairs())
    other = {
        "reference": {"reference": params},
        "buffers": {"buffers": ft.trees.map_leaves(lambda t: t + 1, buffers)},
        "precision": {"precision": "bf16"},
    }[what]
    changed = {"reference": reference, "buffers": buffers, "precision": "fp32", **other}
    given = changed.pop("reference"), changed.pop("buffers")
    with pytest.raises(ft.DataError, match="of another reference, architecture"):
        ft.ReferenceCache(
            tmp_path / "c.jsonl", ft.attach_reference(architecture, *given, **changed)
        )


def test_a_precision_is_known_by_its_dtypes_and_not_by_its_name_alone(tmp_path: Path) -> None:
    """A policy of the user's own may have any name, and another content tomorrow."""
    architecture, _, buffers, reference = _parts()

    def attach(precision: Any) -> Any:
        return ft.attach_reference(architecture, reference, buffers, precision=precision)

    for name in ("mine", "fp32"):
        own, other = (
            Precision(name=name, autocast=dtype) for dtype in (torch.bfloat16, torch.float16)
        )
        assert attach(own).fingerprint != attach(other).fingerprint
        assert attach(own).fingerprint != attach("fp32").fingerprint
    named = attrs.evolve(Precision(name="fp32"), initial_scale=8.0)
    assert attach(named).fingerprint == attach("fp32").fingerprint
    with ft.ReferenceCache(tmp_path / "c.jsonl", attach(own)) as cache:
        cache(zoo.pairs())
    with pytest.raises(ft.DataError, match="of another reference, architecture, precision"):
        ft.ReferenceCache(tmp_path / "c.jsonl", attach(other))


def test_whether_a_model_keeps_keys_and_values_is_no_part_of_what_it_computes() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 19, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}

    def described(**more: Any) -> str:
        config = transformers.LlamaConfig(num_hidden_layers=1, **sizes, **more)
        return description(transformers.LlamaForCausalLM(config))

    assert described(use_cache=False) == described(use_cache=True)
    assert described(rms_norm_eps=1e-3) != described()


def test_a_cache_of_other_data_of_the_same_reference_gives_no_wrong_log_prob(
    tmp_path: Path,
) -> None:
    """Another truncation, prompt mask, template or side of the padding makes other examples.

    One file takes them all, and each finds its own log-prob there.
    """
    architecture, _, buffers, reference = _parts()
    attach = ft.attach_reference(architecture, reference, buffers)
    # The sides have no token in common, so that no truncation makes them equal.
    tokens = torch.arange(20).reshape(2, 2, 5) % zoo.VOCABULARY

    def side(content: Any, end: int, prompt: int, begin: tuple[int, ...], left: bool) -> Any:
        start = torch.tensor([begin], dtype=torch.int64).expand(len(content), -1)
        ids = torch.cat([start, content[:, :end]], 1)
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < prompt, -100)
        pad = (2, 0) if left else (0, 2)
        columns = {"input_ids": (ids, 0), "labels": (labels, -100)}
        columns["attention_mask"] = (torch.ones_like(ids), 0)
        return {key: F.pad(t, pad, value=value) for key, (t, value) in columns.items()}

    forms = list(itertools.product((3, 4, 5), (1, 2), ((), (3,), (3, 5)), (False, True)))
    for form in forms:
        batch = {name: side(tokens[i], *form) for i, name in enumerate(("chosen", "rejected"))}
        # Opened anew each time, so that what it knows is read back from the disk.
        with ft.ReferenceCache(tmp_path / "c.jsonl", attach) as cache:
            found = cache(batch)["reference_logps"]
        for name, expected in attach(batch)["reference_logps"].items():
            torch.testing.assert_close(found[name], expected.double())
    assert len(cache) == 4 * len(forms)


FOREIGN = [
    b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "d"}',
    b"one line without an end",
    b"\n",
    b'{"format": 3}\n{"torn": ',
    b'{"format":"functrain reference log-probs","reference":"of another, torn',
]


@pytest.mark.parametrize("content", FOREIGN)
def test_a_file_that_is_no_cache_is_left_as_it_is(content: bytes, tmp_path: Path) -> None:
    architecture, _, buffers, reference = _parts("tied")
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    with pytest.raises(ft.DataError, match="no cache of functrain, and left as it is") as caught:
        ft.ReferenceCache(path, ft.attach_reference(architecture, reference, buffers))
    assert "remove" not in str(caught.value)
    assert path.read_bytes() == content


def test_a_cache_of_another_reference_is_left_as_it_is_torn_or_not(tmp_path: Path) -> None:
    architecture, params, buffers, reference = _parts("tied")
    path = tmp_path / "c.jsonl"
    with ft.ReferenceCache(path, ft.attach_reference(architecture, reference, buffers)) as cache:
        cache(zoo.pairs())
    torn = path.read_bytes()[:-5]
    path.write_bytes(torn)
    with pytest.raises(ft.DataError, match="of another reference, architecture, precision or form"):
        ft.ReferenceCache(path, ft.attach_reference(architecture, params, buffers))
    assert path.read_bytes() == torn


class _Activated(zoo.Tied):
    """`Tied` with a module of its own for the nonlinearity, which has no values."""

    def __init__(self, activation: Any) -> None:
        super().__init__()
        self.activation = activation


def _gpt2(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    config = {"vocab_size": 31, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    return transformers.AutoModelForCausalLM.from_config(
        transformers.GPT2Config(**{**config, **options})
    )


def _llama(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    config = {"vocab_size": 31, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "max_position_embeddings": 16, **options}
    return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**config))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (zoo.decoder, lambda: zoo.decoder(eps=1e-2)),
        (zoo.decoder, lambda: zoo.decoder(theta=99.0)),
        (_gpt2, lambda: _gpt2(n_head=4)),
        (_llama, lambda: _llama(hidden_act="gelu")),
        (lambda: _Activated(torch.nn.SiLU()), lambda: _Activated(torch.nn.GELU())),
        (lambda: _Activated(torch.nn.Softplus(1.0)), lambda: _Activated(torch.nn.Softplus(2.0))),
        (zoo.Tied, zoo.Checkpointed),
    ],
    ids=["eps", "theta", "n_head", "hidden_act", "modules", "repr", "class"],
)
def test_the_same_values_in_another_architecture_are_another_reference(
    one: Any, other: Any, tmp_path: Path
) -> None:
    """Another number of a config changes log-probs, and no value."""
    first, values, buffers = ft.split(one())
    second, _, _ = ft.split(other())
    path = tmp_path / "c.jsonl"
    ft.ReferenceCache(path, ft.attach_reference(first, values, buffers)).close()
    with pytest.raises(ft.DataError, match="of another reference, architecture"):
        ft.ReferenceCache(path, ft.attach_reference(second, values, buffers))
    again, _, _ = ft.split(one())
    ft.ReferenceCache(path, ft.attach_reference(again, values, buffers)).close()


def test_how_a_model_was_made_is_no_part_of_its_cache() -> None:
    def fingerprint(model: Any, values: Any) -> str:
        return ft.attach_reference(model, *values).fingerprint

    model, *values = ft.split(_llama())
    expected = fingerprint(model, values)
    model.config._name_or_path = "/elsewhere"
    model.config.transformers_version = "0"
    model.config.architectures = ["LlamaForCausalLM"]
    model.config._attn_implementation = "eager"
    model.config.dtype = torch.bfloat16
    assert fingerprint(model, values) == expected
    plain, *values = ft.split(zoo.decoder())
    recomputing, *_ = ft.split(zoo.decoder(checkpointing=True))
    assert fingerprint(plain, values) == fingerprint(recomputing, values)


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_log_prob_that_is_not_finite_is_named_and_not_written(
    by_token: bool, microbatches: int, tmp_path: Path
) -> None:
    """And what is written can be read again."""
    architecture, reference, buffers = ft.split(zoo.decoder(tied=False))
    embedding = "model.embed_tokens.weight"
    spoiled = {**reference, embedding: reference[embedding].clone()}
    spoiled[embedding][30] = float("nan")
    ids = torch.arange(32).view(4, 8) % 29
    batch = {
        side: {"input_ids": i, "labels": i}
        for side, i in (("chosen", ids), ("rejected", ids.flip(1)))
    }
    batch["rejected"]["input_ids"][3, 4] = 30
    attach = ft.attach_reference(architecture, spoiled, buffers, by_token=by_token)
    path = tmp_path / "c.jsonl"
    with ft.ReferenceCache(path, attach) as cache:
        message = "rejected: the reference's log-prob of example 3 is nan, expected a finite"
        with pytest.raises(ft.BatchError, match=message):
            cache(batch, microbatches=microbatches)
    assert b"null" not in path.read_bytes()
    ft.ReferenceCache(path, attach).close()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"not json", "expected an example and its logp"),
        (b'{"example":"a","logp":null}', "logp is None"),
        (b'{"example":"a","logp":1}', "logp is 1"),
        (b'{"example":1,"logp":1.0}', "expected an example"),
        (b'{"example":"a","logp":1.0,"more":2}', "expected an example"),
    ],
)
def test_a_damaged_line_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    architecture, _, buffers, reference = _parts("tied")
    attach = ft.attach_reference(architecture, reference, buffers)
    path = tmp_path / "c.jsonl"
    ft.ReferenceCache(path, attach).close()
    with path.open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(ft.DataError, match=message) as caught:
        ft.ReferenceCache(path, attach)
    assert f"{path}:2" in str(caught.value)


def test_a_full_disk_leaves_the_cache_as_it_was(tmp_path: Path) -> None:
    """Wherever in a line it is full; with room again the same cache goes on."""
    architecture, _, buffers, reference = _parts("tied")
    attach = ft.attach_reference(architecture, reference, buffers)
    path = tmp_path / "c.jsonl"
    cache = ft.ReferenceCache(path, attach)
    cache(zoo.pairs(0))
    before, known = path.read_bytes(), len(cache)
    with _room(len(before) + 100):
        for _ in range(2):
            with pytest.raises(ft.DataError, match=r"cannot be written .*File too large"):
                cache(zoo.pairs(1))
    assert (path.read_bytes(), len(cache), cache.computed) == (before, known, known)
    expected = attach(zoo.pairs(1))["reference_logps"]
    found = cache(zoo.pairs(1))["reference_logps"]
    assert all(torch.equal(found[side], expected[side].double()) for side in expected)
    cache.close()
    with ft.ReferenceCache(path, attach) as again:
        assert len(again) == 2 * known
        again(zoo.pairs(1))
        assert again.computed == 0


def test_a_header_that_cannot_be_written_is_a_data_error(tmp_path: Path) -> None:
    architecture, _, buffers, reference = _parts("tied")
    attach = ft.attach_reference(architecture, reference, buffers)
    with _room(10), pytest.raises(ft.DataError, match=r"cannot be written .*File too large"):
        ft.ReferenceCache(tmp_path / "c.jsonl", attach)
    ft.ReferenceCache(tmp_path / "c.jsonl", attach).close()


def test_a_failed_close_lets_another_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    architecture, _, buffers, reference = _parts("tied")
    attach = ft.attach_reference(architecture, reference, buffers)
    cache = ft.ReferenceCache(tmp_path / "c.jsonl", attach)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refused)
        with pytest.raises(ft.DataError, match=r"cannot be written .*Input/output error"):
            cache.close()
    ft.ReferenceCache(tmp_path / "c.jsonl", attach).close()


@contextmanager
def _room(size: int) -> Generator[None]:
    """No file of this process may be longer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_cache_has_one_writer_and_a_place(tmp_path: Path) -> None:
    architecture, _, buffers, reference = _parts("tied")
    attach = ft.attach_reference(architecture, reference, buffers)
    with (
        ft.ReferenceCache(tmp_path / "c.jsonl", attach),
        pytest.raises(ft.DataError, match="another process is writing"),
    ):
        ft.ReferenceCache(tmp_path / "c.jsonl", attach)
    with pytest.raises(ft.DataError, match="cannot be written"):
        ft.ReferenceCache(tmp_path, attach)
    assert os.listdir(tmp_path) == ["c.jsonl"]  # noqa: PTH208


def test_the_key_of_an_example_is_its_content_and_not_its_padding() -> None:
    """Whatever comes after the last target does not matter; any token, label or mask does."""
    batch = zoo.full(zoo.batch())
    padded = {key: torch.nn.functional.pad(t, (0, 3), value=0) for key, t in batch.items()}
    padded["labels"][:, -3:] = -100
    assert example_keys(batch) == example_keys(padded)
    for key in batch:
        changed = {**batch, key: batch[key].clone()}
        changed[key][2, 1] = 1 - changed[key][2, 1].clamp(max=1)
        differ = [a != b for a, b in zip(example_keys(batch), example_keys(changed), strict=True)]
        assert differ == [False, False, True, False], key


def test_positions_are_no_mask_in_the_key_of_an_example() -> None:
    """Of two tokens they may be the same numbers; without positions keys are as they ever were."""
    ids = torch.tensor([[3, 5]])
    side = {"input_ids": ids, "labels": ids}
    numbers = torch.tensor([[0, 1]])
    masked, placed = ({**side, key: numbers} for key in ("attention_mask", "position_ids"))
    assert example_keys(masked) != example_keys(placed)
    assert example_keys(side) == ["4fa611c5f9ba6cd72b323b57dcac8746"]
    assert example_keys(masked) == ["83b96a9937541aac8a12ca89550c47d0"]
    assert example_keys({**masked, **placed}) == ["9b3008ec47505e985721e5ecc3dc8170"]


def test_a_reference_is_that_of_the_moment_when_it_was_given() -> None:
    """A donated step writes into the memory of params that a plain mapping has as well."""
    architecture, params, buffers = zoo.split("decoder")
    batch = zoo.pairs()
    attach = ft.attach_reference(architecture, dict(params), dict(buffers))
    expected, fingerprint = attach(batch), attach.fingerprint
    step = ft.dpo_step(architecture, ft.optim.adamw(0.1), donate=True)
    state, _ = step(step.init(params, buffers), expected)
    step(state, expected)
    for side, logps in attach(batch)["reference_logps"].items():
        assert torch.equal(logps, expected["reference_logps"][side])
    assert attach.fingerprint == fingerprint


@pytest.mark.parametrize("given", [None, [1], {"weight": 1}])
def test_what_is_no_mapping_of_tensors_is_no_reference(given: Any) -> None:
    architecture, params, buffers = zoo.split("tied")
    with pytest.raises(ft.ConfigError, match="reference: expected params, a mapping from names"):
        ft.attach_reference(architecture, given, buffers)
    if given is not None:
        with pytest.raises(ft.ConfigError, match="buffers: expected buffers, a mapping from names"):
            ft.attach_reference(architecture, params, given)


def _changed(batch: dict[str, Any], side: str, **changes: Any) -> dict[str, Any]:
    found = {**batch[side], **changes}
    return {**batch, side: {key: value for key, value in found.items() if value is not None}}


_MASK = torch.ones(4, 8, dtype=torch.int64)
APART: dict[str, tuple[Any, str]] = {
    "rows": (
        lambda: {"chosen": zoo.batch(0, 3), "rejected": zoo.batch(1, 1)},
        "chosen has 3 examples and rejected 1; expected as many on both sides",
    ),
    "a mask on chosen": (
        lambda: _changed(zoo.pairs(), "chosen", attention_mask=_MASK),
        "expected the same keys",
    ),
    "a mask on rejected": (
        lambda: _changed(zoo.pairs(), "rejected", attention_mask=_MASK[:, :7]),
        "expected the same keys",
    ),
    "no labels": (lambda: _changed(zoo.pairs(), "rejected", labels=None), "rejected.labels: miss"),
    "a list": (
        lambda: _changed(zoo.pairs(), "chosen", labels=[[1]]),
        "chosen.labels: expected a tensor, got list",
    ),
    "one dimension": (
        lambda: _changed(zoo.pairs(), "chosen", labels=zoo.batch()["labels"][0]),
        r"chosen.labels: shape \[8\] differs",
    ),
    "a tensor": (
        lambda: {**zoo.pairs(), "rejected": zoo.batch()["input_ids"]},
        "rejected: expected a mapping",
    ),
    "rows without a pair": (
        lambda: {**_unpaired(), "mismatched": zoo.batch(1, 3)},
        "completion has 4 examples and mismatched 3",
    ),
}


@pytest.mark.parametrize("what", sorted(APART))
def test_sides_that_do_not_belong_together_are_named(what: str, tmp_path: Path) -> None:
    """Before anything is computed, hashed or written, as a step names them."""
    architecture, params, buffers = zoo.split("tied")
    attach = ft.attach_reference(architecture, params, buffers)
    make, message = APART[what]
    with pytest.raises(ft.BatchError, match=message):
        attach(make())
    path = tmp_path / "c.jsonl"
    with ft.ReferenceCache(path, attach) as cache:
        before = path.read_bytes()
        with pytest.raises(ft.BatchError, match=message):
            cache(make(), microbatches=2)
        assert path.read_bytes() == before


def test_what_else_a_batch_has_is_passed_on() -> None:
    """It is the affair of its objective."""
    architecture, params, buffers, _ = _parts()
    attach = ft.attach_reference(architecture, params, buffers)
    margin = torch.ones(4)
    found = attach({**zoo.pairs(), "margin": margin})
    assert found["margin"] is margin
    expected = attach(zoo.pairs())["reference_logps"]
    assert all(torch.equal(found["reference_logps"][side], expected[side]) for side in expected)


def test_reference_logps_of_before_are_replaced_whatever_they_are() -> None:
    architecture, params, buffers = zoo.split("tied")
    attach = ft.attach_reference(architecture, params, buffers)
    spoiled = {side: torch.full((4,), torch.nan) for side in ("chosen", "rejected")}
    found = attach({**zoo.pairs(), "reference_logps": spoiled})["reference_logps"]
    assert all(bool(logps.isfinite().all()) for logps in found.values())


@pytest.mark.parametrize("microbatches", [0, -1, 1.0, True, "2"])
def test_a_number_of_slices_that_is_none_is_named(microbatches: Any, tmp_path: Path) -> None:
    architecture, params, buffers = zoo.split("tied")
    attach = ft.attach_reference(architecture, params, buffers)
    with (
        ft.ReferenceCache(tmp_path / "c.jsonl", attach) as cache,
        pytest.raises(ft.ConfigError, match=r"microbatches: .* expected an integer of at least 1"),
    ):
        cache(zoo.pairs(), microbatches=microbatches)


def test_a_cache_that_is_closed_says_so_and_may_be_closed_again(tmp_path: Path) -> None:
    architecture, params, buffers = zoo.split("tied")
    attach = ft.attach_reference(architecture, params, buffers)
    with ft.ReferenceCache(tmp_path / "c.jsonl", attach) as cache:
        cache(zoo.pairs())
        cache.close()
    for seed in (0, 5):
        with pytest.raises(ft.DataError, match=r"c\.jsonl: the cache is closed; open it again"):
            cache(zoo.pairs(seed))


@pytest.mark.parametrize("make", [zoo.pairs, _unpaired])
def test_an_index_that_the_model_has_no_place_for_is_named(make: Any) -> None:
    """As a step names it, where an architecture does not show how many positions it knows."""

    class Placed(zoo.Tied):
        def __init__(self) -> None:
            super().__init__()
            self.positions = torch.nn.Embedding(6, 16)

        def forward(self, input_ids: Any, **inputs: Any) -> Any:
            self.positions(torch.arange(input_ids.shape[1]))
            return super().forward(input_ids, **inputs)

    attach = ft.attach_reference(*ft.split(Placed()))
    with pytest.raises(ft.BatchError, match="no place for one of its indices"):
        attach(make())


def test_a_reference_of_another_architecture_is_refused_when_it_is_given() -> None:
    architecture, _, buffers, reference = _parts()
    _, others, _ = zoo.split("tied")
    with pytest.raises(ft.ArchitectureError, match="reference: missing"):
        ft.attach_reference(architecture, others, buffers)
    with pytest.raises(ft.ArchitectureError, match="buffers: missing"):
        ft.attach_reference(architecture, reference)
    attach = ft.attach_reference(architecture, reference, buffers)
    with pytest.raises(ft.BatchError, match="expected chosen and rejected, or completion"):
        attach(zoo.batch())


@pytest.mark.parametrize("name", ["dpo_step", "kto_step", "attach_reference"])
def test_what_cannot_be_a_reference_is_named_when_it_is_given(name: str) -> None:
    """Values on meta, numbers that are codes, and both names of a tied parameter."""
    model = zoo.model("tied")
    both = {n: t for n, t in model.state_dict().items() if n != "scale"}
    architecture, params, buffers = ft.split(model)
    meta = dict(architecture.named_parameters())
    codes = {name: tensor.to(torch.int8) for name, tensor in params.items()}
    make: Any = {
        "dpo_step": lambda given: ft.dpo_step(architecture, ft.optim.adamw(), reference=given),
        "kto_step": lambda given: ft.kto_step(architecture, ft.optim.adamw(), reference=given),
        "attach_reference": lambda given: ft.attach_reference(architecture, given, buffers),
    }[name]
    for given, kind, message in (
        (meta, ft.StateError, r"reference/embedding.weight: on the meta device.*functrain.split"),
        (codes, ft.StateError, r"reference/embedding.weight: dtype torch.int8.*not quantised"),
        (
            both,
            ft.ArchitectureError,
            r"'head.weight', which is tied to 'embedding.weight'; take fu",
        ),
    ):
        with pytest.raises(kind, match=message):
            make(given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_reference_of_another_dtype_is_the_same_online_and_attached(
    dtype: torch.dtype, precision: str
) -> None:
    """In that of the params, and not the whole forward in its own."""
    architecture, params, buffers, reference = _parts()
    reference = ft.trees.map_leaves(lambda tensor: tensor.to(dtype), reference)
    options: Any = {"precision": precision}
    online = ft.dpo_step(architecture, ft.optim.adamw(1e-2), reference=reference, **options)
    ahead = ft.dpo_step(architecture, ft.optim.adamw(1e-2), **options)
    attach = ft.attach_reference(architecture, reference, buffers, **options)
    _, one = online(online.init(params, buffers), zoo.pairs())
    _, other = ahead(ahead.init(params, buffers), attach(zoo.pairs()))
    assert one.to_dict() == other.to_dict()


def test_a_source_with_its_reference_trains_as_with_the_reference_online() -> None:
    architecture, params, buffers, reference = _parts()
    source = zoo.Batches(zoo.pairs)
    online = ft.dpo_step(architecture, ft.optim.adamw(1e-2), reference=reference)
    ahead = ft.dpo_step(architecture, ft.optim.adamw(1e-2))
    attach = ft.attach_reference(architecture, reference, buffers)
    referenced = ft.Referenced(source, attach)
    assert (len(referenced), referenced.batch_size) == (40, 4)
    ends = []
    for step, data in ((online, source), (ahead, referenced)):
        state = step.init(params, buffers)
        for now, _ in ft.train(step, state, data, steps=4):
            state = now
        ends.append(ft.fingerprint(state))
    assert ends[0] == ends[1]
