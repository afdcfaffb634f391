"""Configs: TOML there and back, and complaints that name the key and the remedy. No torch here."""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from typing import Any, get_args

import attrs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from functrain.cli import checks, known, main, toml
from functrain.cli import config as c
from functrain.errors import ConfigError
from functrain.tracking import services

TEXTS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20
)
COUNTS = st.integers(1, 2**31 - 1)
POSITIVE = st.floats(0, 1e300, exclude_min=True, allow_subnormal=True)
FRACTIONS = st.floats(0, 1, exclude_max=True)


def _optional(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


MODELS = st.builds(
    c.Model,
    width=st.sampled_from([16, 64]),
    heads=st.sampled_from([1, 2, 4]),
    kv_heads=st.sampled_from([None, 1]),
    hidden=_optional(COUNTS),
    theta=POSITIVE,
    tied=st.booleans(),
    dropout=FRACTIONS,
)
DATA: dict[str, Any] = {
    "train": TEXTS,
    "held_out": _optional(TEXTS),
    "time": st.integers(2, 999),
    "limit": _optional(st.integers(1, 2**40)),
    "sha256": _optional(st.just("0" * 64)),
}
OPTIMIZERS = st.one_of(
    st.builds(
        c.Optimizer,
        name=st.sampled_from(["adamw", "adam"]),
        weight_decay=_optional(FRACTIONS),
        betas=_optional(st.tuples(FRACTIONS, FRACTIONS)),
        eps=_optional(POSITIVE),
    ),
    st.builds(c.Optimizer, name=st.just("sgd"), momentum=_optional(FRACTIONS)),
)
SCHEDULES = st.one_of(
    st.builds(c.Schedule, peak=POSITIVE, warmup=_optional(st.integers(0, 9)), total=st.just(9)),
    st.builds(
        c.Schedule,
        name=st.just("multistep"),
        milestones=st.lists(COUNTS, min_size=1).map(lambda found: tuple(sorted(found))),
        gamma=_optional(POSITIVE),
    ),
)
TRAINS = st.builds(
    c.Train,
    steps=COUNTS,
    max_grad_norm=POSITIVE | st.just(math.inf),
    precision=st.sampled_from(known.PRECISIONS),
    ema_decay=_optional(FRACTIONS),
    threads=_optional(st.integers(1, 4096)),
    device=_optional(st.sampled_from(known.DEVICES)),
)
COMMON: dict[str, Any] = {
    "directory": TEXTS,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "train": TRAINS,
}
STARTS = st.builds(
    c.Start, from_=TEXTS, sha256=_optional(st.just("0" * 64)), shape=_optional(MODELS)
)
PREFERENCES = st.builds(c.Preference, loss=st.sampled_from(known.LOSSES), beta=POSITIVE)
CONFIGS = st.one_of(
    st.builds(c.Pretrain, model=MODELS, data=st.builds(c.Text, **DATA), **COMMON),
    st.builds(c.SFT, model=STARTS, data=st.builds(c.Data, **DATA), **COMMON),
    st.builds(
        c.DPO, model=STARTS, preference=PREFERENCES, data=st.builds(c.Data, **DATA), **COMMON
    ),
)


@example(c.Pretrain(directory='\x7f\x01"\\\n\u2028é'))
@given(CONFIGS)
def test_a_config_written_as_toml_reads_back_as_the_same_config(config: c.Config) -> None:
    text = toml.dumps(config)
    assert toml.structured(tomllib.loads(text), type(config), "here") == config


@given(CONFIGS)
def test_a_flattened_config_has_every_field_that_is_given(config: c.Config) -> None:
    found = toml.flat(config)
    assert found["train.steps"] == config.train.steps
    assert found["data.train"] == config.data.train
    assert found["schedule.peak"] == config.schedule.peak


def test_a_file_is_read_and_written_by_its_stage(tmp_path: Path) -> None:
    for config in (c.Pretrain(), c.SFT(), c.DPO()):
        path = tmp_path / f"{config.stage}.toml"
        path.write_text(toml.dumps(config))
        assert toml.read_any(path) == config


BAD = [
    ("[schedule]\npek = 1e-3", "run.toml: schedule.pek: unknown key; did you mean 'peak'"),
    ("[schedle]\npeak = 1e-3", "run.toml: schedle: unknown key; did you mean 'schedule'"),
    ('[model]\nfrm = "x"', "model.frm: unknown key; did you mean 'from'"),
    ('[train]\nsteps = "many"', "train.steps: expected an integer, got 'many'"),
    ("[train]\nsteps = 2.5", "train.steps: expected an integer, got 2.5"),
    ("[train]\nsteps = true", "train.steps: expected an integer, got True"),
    ("[train]\nsteps = 0", "train.steps: 0, expected an integer of at least 1"),
    ("[train]\nmicrobatches = 3", "train.microbatches: 3 does not divide train.batch_size 16"),
    ('[train]\nprecision = "fp17"', "train.precision: 'fp17' is unknown; did you mean 'fp16'"),
    ('[optimizer]\nname = "adamv"', "optimizer.name: 'adamv' is unknown; did you mean 'adam'"),
    ('[optimizer]\nname = "sgd"\neps = 1e-8', "optimizer.eps: sgd has none; it has weight_decay"),
    ("[optimizer]\nbetas = 3", "optimizer.betas: expected a list of 2 numbers"),
    ("[optimizer]\nbetas = [0.9]", r"optimizer.betas: expected a list of 2 numbers, got \[0.9\]"),
    ("[schedule]\nmilestones = 3", "schedule.milestones: expected a list of numbers"),
    ("[tracking]\nservices = 3", "tracking.services: expected a list of texts"),
    ('[tracking]\nservices = "wandb"', "services: expected a list of texts, got 'wandb'"),
    ("[tracking.services]\nwandb = true", "services: expected a list of texts, got a section"),
    ('[optimizer]\nbetas = ["x", 1]', "optimizer.betas: expected a number, got 'x'"),
    ("[optimizer]\nbetas = [0.9, 1]", r"optimizer.betas: 1.0, expected numbers in \[0, 1\)"),
    ('[schedule]\nname = "cosin"', "schedule.name: 'cosin' is unknown; did you mean 'cosine'"),
    ('[schedule]\nname = "linear"\ngamma = 0.1', "schedule.gamma: linear has none; it has warmup"),
    ('[schedule]\nname = "step"', "schedule.every: must be given for step"),
    ('[schedule]\nname = "multistep"\nmilestones = []', "schedule.milestones: must be given for"),
    (
        "[data]\ntime = 99999999999",
        "data.time: 99999999999, expected an integer of at most 2147",
    ),
    (f"[train]\nsteps = {2**63}", "train.steps: .* expected an integer of at most 9223"),
    ("[train]\nthreads = 4097", "train.threads: 4097, expected an integer of at most 4096"),
    (f"x = {'9' * 5000}", "run.toml: not TOML: Exceeds the limit"),
    (f"x = {'[' * 9999}{']' * 9999}", "run.toml: not TOML: maximum recursion depth"),
    ('directory = "a\\u0000b"', "directory: 'a.x00b': embedded null byte; expected a path"),
    (f'directory = "{"a" * 300}"', "directory: 'a{50}'…: File name too long; expected a path"),
    ("[schedule]\npeak = nan", "schedule.peak: nan, expected a positive finite number"),
    (f"[schedule]\npeak = 1{'0' * 400}", "schedule.peak: expected a number of at most 1.8e308"),
    ("[schedule]\nwarmup = 5\ntotal = 4", "schedule.warmup: 5 is more than schedule.total 4"),
    ("[data]\nmin_prompt = 0", "data.min_prompt: 0, expected an integer of at least 1"),
    (
        '[lora]\nrank = 2\n[train]\nprecision = "bf16_params"',
        "train.precision: 'bf16_params' casts",
    ),
    ("[data]\nmin_prompt = 2", "min_prompt: 2 is for data.truncation='prompt_first' alone, and"),
    (
        '[data]\ntime = 8\nmin_prompt = 8\ntruncation = "prompt_first"',
        "min_prompt: 8 of the 8 tokens of data.time leave none for a completion",
    ),
    ('[preference]\nloss = "sigmoid+ 2*sigmoid"', "preference.loss: 'sigmoid' is there twice"),
    ('[preference]\nloss = "APO"', "'APO' is unknown; did you mean 'apo_down' or 'apo_zero'"),
    ('[preference]\nloss = "TR-DPO"', "'TR-DPO' is unknown; it is any loss with a reference, with"),
    ('[preference]\nloss = "sigmoyd"', "preference.loss: 'sigmoyd' is unknown; did you mean"),
    ("[preference]\nbeta = 0", "preference.beta: 0.0, expected a positive finite number"),
    ('[preference]\nloss = "ipo"\nlabel_smoothing = 0.1', "label_smoothing: the ipo loss has none"),
    ("schedule = 3", "run.toml: schedule: expected a section with name, peak"),
    ('stage = "sft"', "stage: 'sft', expected 'dpo'; use `functrain sft`"),
    ('[data]\ntrain = ""', "data.train: empty; expected a path"),
    ('[tracking]\nname = ""', "tracking.name: empty; expected a name"),
    ('[train]\ncheckpoint = ""', "train.checkpoint: empty; expected a name"),
    (
        '[train]\nrecompute = "half"',
        "train.recompute: 'half' is unknown; known: 'full', 'selective'",
    ),
    ('[train]\nrecompute = "selective"', "'selective', and train.checkpoint names no modules"),
    ("peak == 3", "run.toml: not TOML: "),
    ('stage = "sftt"', "stage: 'sftt', expected 'dpo'; did you mean 'sft'"),
    ("seed = 1", r"run.toml: seed: unknown key; it is of \[train\]"),
    ("dropout = 0.1", r"run.toml: dropout: unknown key; it is of \[lora\]"),
    ("[model]\nseed = 1", r"run.toml: model.seed: unknown key; it is of \[train\]"),
    ("[train]\npeak = 1", r"train.peak: unknown key; it is of \[schedule\]"),
    ("[optimizer]\nwarmpu = 1", r"unknown key; did you mean 'warmup' of \[schedule\]\?"),
    ("stepz = 1", r"stepz: unknown key; did you mean 'steps' of \[train\]\?"),
    ('[train]\ndirectory = "x"', "train.directory: unknown key; it is of no section, and belongs"),
    ("[train.schedule]\npeak = 1", r"unknown key; it is a section by itself, \[schedule\]"),
    ("\ufeff[train]\nsteps = 0", "train.steps: 0, expected an integer of at least 1"),
    ("[train]\nkeep_pages = true\nreturn_pages = true", "what a file has --train.no-return-pages"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_complaints_name_the_file_the_key_and_what_was_expected(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        toml.read(path, c.DPO)


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "run.toml"
    path.write_text(
        'directory = "~/run"\n[model]\nfrom = "~/a"\n[data]\ntrain = "~/b"\nheld_out = "~/c"\n'
        '[train]\ncompile = true\ncompile_cache = "~/d"\n[preference]\ncache = "~/e"\n'
    )
    found = toml.flat(toml.read(path, c.DPO))
    keys = ("directory", "model.from", "data.train", "data.held_out", "train.compile_cache")
    paths = [found[key] for key in (*keys, "preference.cache")]
    assert paths == [str(tmp_path / name) for name in ("run", "a", "b", "c", "d", "e")]
    assert c.Pretrain(data=c.Text(train="x.txt", cache="~/f")).data.cache == str(tmp_path / "f")


def test_a_path_that_no_config_can_hold_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    named = "\udcff"  # as Python has a byte of a name that is not UTF-8
    for option, key in (("--directory", "directory"), ("--data.held-out", "data.held_out")):
        assert main(["pretrain", option, f"{named}.txt"]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"{key}: '\\udcff.txt' is not UTF-8, as a config is" in said


def test_a_run_without_a_stage_is_told_so(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[model]\nwidth = 64\n")
    with pytest.raises(ConfigError, match="stage: missing; expected one of pretrain, sft, dpo"):
        toml.read_any(path)


def test_all_complaints_come_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[schedule]\npek = 1\n[train]\nsteps = 1.5\nbatch_size = 0")
    with pytest.raises(ConfigError) as caught:
        toml.read(path, c.Pretrain)
    lines = str(caught.value).splitlines()
    # Of a record that could not be made, the wrong types come before the wrong values.
    assert len(lines) == 2
    assert all(line.startswith(str(path)) for line in lines)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.toml: cannot be read \(No such file"):
        toml.read(tmp_path / "no.toml", c.Pretrain)


def test_a_directory_in_the_place_of_a_config_is_told_with_the_config_in_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a directory; expected a file"):
        toml.read(tmp_path, c.Pretrain)
    (tmp_path / "config.toml").touch()
    with pytest.raises(ConfigError, match=f"a directory; give {tmp_path}/config.toml"):
        toml.read(tmp_path, c.Pretrain)


@pytest.mark.parametrize(
    ("text", "mix"),
    [
        ("1e+1*sft + sigmoid", {"sft": 10.0, "sigmoid": 1.0}),
        ("1.E+0*sigmoid+2e-1*sft", {"sigmoid": 1.0, "sft": 0.2}),
        ("sigmoid+sft", {"sigmoid": 1.0, "sft": 1.0}),
    ],
)
def test_a_mix_is_read_with_any_form_of_number(text: str, mix: dict[str, float]) -> None:
    assert checks.mixed(text) == mix


@pytest.mark.parametrize("stage", sorted(c.STAGES))
def test_a_written_config_is_the_default_with_a_word_on_every_key(
    stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deep" / f"{stage}.toml"
    assert main(["init", stage, str(path)]) == 0
    assert f"functrain {stage} {path}" in capsys.readouterr().out
    assert toml.read_any(path) == c.STAGES[stage]()
    lines = path.read_text().splitlines()
    keys = [n for n, line in enumerate(lines) if re.match(r"(# )?[a-z_]+ =", line)]
    bare = [lines[n] for n in keys if not lines[n - 1].startswith("# ")]
    assert [line for line in bare if not line.startswith("stage =")] == []
    known = {key.rpartition(".")[2] for key in toml.flat(c.STAGES[stage]())}
    shown = {re.sub(r"(# )?([a-z_]+) =.*", r"\2", lines[n]) for n in keys}
    hidden = {"sha256", "held_out_sha256", "shape", "templated", "total_filled"}
    assert known - shown <= hidden
    assert main(["init", stage, str(path)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_the_known_names_are_those_of_the_library() -> None:
    """The config has lists of its own, because checking it must not import torch."""
    import functrain as ft
    from functrain.data.grouping import MULTIPLE
    from functrain.data.token_files import SUFFIXES
    from functrain.data.truncation import MODES
    from functrain.objectives.layouts import LayoutName
    from functrain.objectives.losses import DIVERGENCES, LOSSES
    from functrain.objectives.options import CALLED
    from functrain.precision import POLICIES
    from functrain.schedules import SCHEDULES as MADE

    assert set(known.PRECISIONS) == set(POLICIES)
    assert set(known.LOSSES) == set(LOSSES)
    assert known.DIVERGENCES == DIVERGENCES
    assert get_args(LayoutName) == known.LAYOUTS
    assert set(known.SMOOTHED) == {name for name, each in LOSSES.items() if each.smoothing}
    assert set(known.LIKELIHOODS) == {name for name, each in LOSSES.items() if each.value is None}
    assert set(known.BARE) == {name for name, each in LOSSES.items() if not each.reference}
    assert {name: said for name, said in CALLED.items() if name != known.KTO} == known.CALLED
    assert set(known.TRUNCATIONS) == set(MODES)
    assert known.TOKEN_FILES == SUFFIXES
    assert known.MULTIPLE == MULTIPLE
    assert set(known.SCHEDULES) == set(MADE)
    assert all(callable(getattr(ft.optim, name)) for name in known.OPTIMIZERS)
    assert set(known.TRACKERS) == set(services.SERVICES)
    for name, options in known.SCHEDULES.items():
        fields = {field.name: field for field in attrs.fields(MADE[name])}
        assert set(options) <= set(fields), name
        needed = {n for n, f in fields.items() if f.default is attrs.NOTHING} - {"peak", "total"}
        assert needed == set(known.REQUIRED.get(name, ())), name
