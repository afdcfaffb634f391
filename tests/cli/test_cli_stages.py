"""Three stages after one another on files, and what `generate` and `inspect` say of them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import attrs
import numpy as np
import pytest

from functrain import checkpoint, compilation
from functrain.cli import evaluate as measuring
from functrain.cli import main, toml
from functrain.cli.config import DPO, SFT
from functrain.cli.directory import is_tokens
from functrain.cli.origins import origin

COMMON = [
    *("--train.steps", "6", "--train.batch-size", "4", "--train.save-every", "2"),
    *("--train.threads", "1", "--train.device", "cpu", "--evaluation.every", "3"),
    *("--data.time", "32"),
]
CHATS = [{"prompt": f"{i} plus one?", "completion": f" {i + 1}"} for i in range(12)]
TALKS = [
    {
        "messages": [
            {"role": "user", "content": f"{i}?"},
            {"role": "assistant", "content": f"{i + 1}"},
        ]
    }
    for i in range(12)
]
PAIRS = [
    {"prompt": f"{i} plus one?", "chosen": f" {i + 1}", "rejected": f" {i + 2}"} for i in range(12)
]


def _jsonl(path: Path, records: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three stages, each from the one before."""
    path = tmp_path_factory.mktemp("stages")
    (path / "text.txt").write_text("one two three four " * 40)
    sft = _jsonl(path / "sft.jsonl", CHATS)  # type: ignore[arg-type]
    pairs = _jsonl(path / "pairs.jsonl", PAIRS)  # type: ignore[arg-type]
    shape = ["--model.width", "16", "--model.layers", "1", "--model.heads", "2"]
    data = ["--data.train", str(path / "text.txt"), "--data.held-out", str(path / "text.txt")]
    assert main(["pretrain", "--directory", str(path / "a"), *shape, *data, *COMMON]) == 0
    data = ["--data.train", sft, "--data.held-out", sft]
    start = ["--model.from", str(path / "a")]
    assert main(["sft", "--directory", str(path / "b"), *start, *data, *COMMON]) == 0
    data = ["--data.train", pairs, "--data.held-out", pairs]
    start = ["--model.from", str(path / "b")]
    assert main(["dpo", "--directory", str(path / "c"), *start, *data, *COMMON]) == 0
    return path


def test_a_stage_starts_from_the_checkpoint_that_it_names(runs: Path) -> None:
    sft, dpo = toml.read(runs / "b/config.toml", SFT), toml.read(runs / "c/config.toml", DPO)
    assert sft.model.from_ == str(runs / "a/checkpoints/step-000000000006")
    assert dpo.model.from_ == str(runs / "b/checkpoints/step-000000000006")
    assert sft.model.shape == dpo.model.shape is not None
    records = [json.loads(line) for line in (runs / "c/metrics.jsonl").read_text().splitlines()]
    assert records[0]["eval_rewards/margins"] == 0  # the reference is where it starts
    assert records[-1]["eval_rewards/margins"] > 0


@pytest.mark.parametrize("name", ["b", "c"])
def test_a_finished_stage_is_resumed_from_its_first_command(
    runs: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`model.from` is a run there, and a checkpoint of it in the resolved config."""
    stage, before = ("sft", "a") if name == "b" else ("dpo", "b")
    data = str(runs / ("sft.jsonl" if stage == "sft" else "pairs.jsonl"))
    given = ["--directory", str(runs / name), "--model.from", str(runs / before)]
    given += ["--data.train", data, "--data.held-out", data, *COMMON, "--resume"]
    assert main([stage, *given]) == 0
    assert "finished, 6 of 6" in capsys.readouterr().out


def test_a_checkpoint_is_known_by_its_bare_name_and_from_inside(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of its run, and of no other checkpoint of it."""
    name = "step-000000000004"
    inside = runs / "b" / "checkpoints"
    options = ["1 plus one?", "--max-new-tokens", "4"]
    assert main(["generate", str(inside / name), *options]) == 0
    said = capsys.readouterr().out
    for place, path in ((inside, name), (inside / name, "."), (runs / "b", f"checkpoints/{name}")):
        monkeypatch.chdir(place)
        assert main(["generate", path, *options]) == 0
        assert capsys.readouterr().out == said
        assert main(["inspect", path]) == 0
        found = capsys.readouterr().out
        assert "step        4\n" in found
        assert "  speed" in found  # as its run's metrics say
        assert origin(path).run.config.is_file()
    monkeypatch.chdir(inside)
    assert origin(".").checkpoint.name == "step-000000000006"
    assert str(origin(str(inside.parent)).checkpoint) == str(inside / "step-000000000006")


def test_a_start_that_has_changed_is_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "b"
    shutil.copytree(runs / "b", run)
    config = toml.read(run / "config.toml", SFT)
    model = attrs.evolve(config.model, sha256="0" * 64)
    (run / "config.toml").write_text(toml.dumps(attrs.evolve(config, model=model)))
    resumed = ["sft", str(run / "config.toml"), "--directory", str(run), "--resume"]
    for command in (resumed, ["verify", str(run), "--replay", "4..6"]):
        assert main(command) == 2
        assert "is not what this run started from" in capsys.readouterr().err


def test_a_start_may_lie_in_another_place(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the run that it is of has gone on since; it is known by its hash."""
    shutil.copytree(runs / "a", tmp_path / "a")
    data = ["--data.train", str(runs / "sft.jsonl")]
    run = tmp_path / "run"
    start = ["--model.from", str(tmp_path / "a")]
    assert main(["sft", "--directory", str(run), *start, *data, *COMMON]) == 0
    begun = ["pretrain", str(tmp_path / "a" / "config.toml"), "--directory", str(tmp_path / "a")]
    assert main([*begun, "--resume", "--train.steps", "7"]) == 0
    (tmp_path / "a").rename(tmp_path / "moved")
    again = ["sft", str(run / "config.toml"), "--resume", "--train.steps", "7"]
    capsys.readouterr()
    assert main(again) == 2
    assert "where it was moved, give --model.from with its place now" in capsys.readouterr().err
    assert main([*again, "--model.from", str(runs / "b")]) == 2
    assert "is not what this run started from" in capsys.readouterr().err
    assert main([*again, "--model.from", str(tmp_path / "moved")]) == 0
    assert main([*again[:4], "8"]) == 0


def test_data_that_have_changed_are_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = tmp_path / "b", tmp_path / "other.jsonl"
    shutil.copytree(runs / "b", run)
    config = (run / "config.toml").read_text()
    _jsonl(data, CHATS[1:])  # type: ignore[arg-type]
    (run / "config.toml").write_text(config.replace(str(runs / "sft.jsonl"), str(data)))
    resumed = ["sft", str(run / "config.toml"), "--directory", str(run), "--resume"]
    assert main(resumed) == 2
    assert "other.jsonl is not what this run was begun with" in capsys.readouterr().err
    _jsonl(data, CHATS)  # type: ignore[arg-type]
    assert main(resumed) == 0


def test_the_config_of_a_run_begins_another_with_another_start(runs: Path, tmp_path: Path) -> None:
    other = ["--model.from", str(runs / "b"), "--directory", str(tmp_path / "again")]
    assert main(["sft", str(runs / "b/config.toml"), *other]) == 0
    again = toml.read(tmp_path / "again/config.toml", SFT)
    assert again.model.from_ == str(runs / "b/checkpoints/step-000000000006")


def test_dialogues_can_be_trained_on(runs: Path, tmp_path: Path) -> None:
    data = _jsonl(tmp_path / "talks.jsonl", TALKS)  # type: ignore[arg-type]
    given = ["--model.from", str(runs / "a"), "--data.train", data, "--directory"]
    assert main(["sft", *given, str(tmp_path / "talk"), *COMMON]) == 0


@pytest.mark.parametrize("name", ["adam", "sgd", "adafactor", "muon"])
def test_every_optimizer_resumes_to_the_bit(runs: Path, tmp_path: Path, name: str) -> None:
    data = ["--data.train", str(runs / "text.txt")]
    shape = ["--model.width", "16", "--model.layers", "1", "--model.heads", "2"]
    common = ["pretrain", *data, *shape, "--optimizer.name", name, *COMMON]
    common += ["--optimizer.weight-decay", "0.1", "--schedule.total", "6"]
    assert main([*common, "--directory", str(tmp_path / "once")]) == 0
    first = [*common, "--directory", str(tmp_path / "twice")]
    assert main([*first, "--train.steps", "3"]) == 0
    assert main([*first, "--resume"]) == 0
    newest = [checkpoint.latest(tmp_path / run / "checkpoints") for run in ("once", "twice")]
    texts = [path / "manifest.json" for path in newest if path is not None]
    assert texts[0].read_text() == texts[1].read_text()


def test_token_ids_are_trained_on_without_a_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = np.arange(600, dtype=np.uint16) % 50
    ids.tofile(tmp_path / "ids.bin")
    shape = ["--model.width", "16", "--model.layers", "1", "--model.heads", "2"]
    common = ["pretrain", "--data.train", str(tmp_path / "ids.bin"), *shape, *COMMON]
    run = str(tmp_path / "run")
    assert main([*common, "--directory", run]) == 2
    assert "data.vocabulary: missing" in capsys.readouterr().err
    vocabulary = ["--data.vocabulary", "50"]
    assert main([*common, *vocabulary, "--directory", run]) == 0
    assert not (tmp_path / "run" / "tokenizer.json").exists()
    assert main(["generate", run, "hello"]) == 2
    assert "has no tokenizer beside it" in capsys.readouterr().err


def test_many_files_of_token_ids_are_those_of_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = np.arange(600, dtype=np.uint16) % 50
    (tmp_path / "many").mkdir()
    ids.tofile(tmp_path / "ids.bin")
    for name, part in zip("abc", np.split(ids, [100, 333]), strict=True):
        part.tofile(tmp_path / "many" / f"{name}.bin")
    shape = ["--model.width", "16", "--model.layers", "1", "--model.heads", "2"]
    common = ["pretrain", *shape, *COMMON, "--data.vocabulary", "50", "--data.limit", "500"]
    given = ["ids.bin", "many", "many/*.bin"]
    for run, train in enumerate(given):
        options = ["--data.train", str(tmp_path / train), "--directory", str(tmp_path / str(run))]
        assert main([*common, *options]) == 0
    configs = [toml.read_any(tmp_path / str(run) / "config.toml") for run in range(len(given))]
    assert len({config.data.sha256 for config in configs}) == 1
    texts = [(tmp_path / str(run) / "metrics.jsonl").read_text() for run in range(len(given))]
    losses = [[json.loads(line)["loss"] for line in text.splitlines()] for text in texts]
    assert losses[0] == losses[1] == losses[2]


def test_ids_of_another_width_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read as ids of 2 bytes, those of 4 would be in the vocabulary, and none would be right."""
    path = tmp_path / "ids.bin"
    (np.arange(600, dtype=np.uint32) + 100_000).tofile(path)
    given = ["pretrain", "--data.train", str(path), "--data.vocabulary", "128256", *COMMON]
    assert main([*given, "--directory", str(tmp_path / "run")]) == 2
    assert "read as uint16, every second id is 0 or nearly" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_on_a_directory_of_ids_is_one_where_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That it has no tokenizer its config says, and not what lies there now."""
    monkeypatch.chdir(tmp_path)
    for name in ("ids", "embedded"):  # the latter is no name of a directory
        (tmp_path / name).mkdir()
        (np.arange(600, dtype=np.uint16) % 50).tofile(tmp_path / name / "a.bin")
    shape = ["--model.width", "16", "--model.layers", "1", "--model.heads", "2"]
    common = ["pretrain", *shape, *COMMON, "--data.train", "ids", "--data.vocabulary", "50"]
    assert main([*common, "--directory", "run"]) == 0
    (tmp_path / "ids").rename("elsewhere")
    capsys.readouterr()
    assert main(["evaluate", "run", "elsewhere"]) == 0
    assert main(["generate", "run", "hello"]) == 2
    assert "has no tokenizer beside it" in capsys.readouterr().err
    more = ["pretrain", "run/config.toml", "--resume", "--train.steps", "8"]
    assert main(more) == 2
    assert "give --data.train with its place now" in capsys.readouterr().err
    assert main([*more, "--data.train", "elsewhere"]) == 0
    assert main([*more[:-1], "9", "--data.train", "elsewhere/?.b*"]) == 0
    assert not is_tokens("embedded")


@pytest.mark.parametrize("given", ["k", "k/*", "k/*.bin"])
def test_ids_that_were_moved_are_asked_for(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "k").mkdir()
    (np.arange(600, dtype=np.uint16) % 50).tofile(tmp_path / "k" / "a.bin")
    shape = ["--model.width", "16", "--model.layers", "1", "--model.heads", "2"]
    common = ["pretrain", *shape, *COMMON, "--data.vocabulary", "50", "--data.train", given]
    assert main([*common, "--directory", "run"]) == 0
    (tmp_path / "k").rename("moved")
    capsys.readouterr()
    assert main(["pretrain", "run/config.toml", "--resume", "--train.steps", "8"]) == 2
    assert f"data.train: {given} is not there" in (told := capsys.readouterr().err)
    assert "give --data.train with its place now" in told
    assert main([*common, "--directory", "other"]) == 2
    unknown = f"data.train: {given!r}, expected a file"  # of a name that tells nothing
    told = capsys.readouterr().err
    assert (f"data.train: {given} is not there" if "*" in given else unknown) in told


def test_a_directory_of_text_may_hold_others_whose_names_end_as_those_of_ids(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t" / "v.bin").mkdir(parents=True)
    (tmp_path / "t" / "v.bin" / "a.txt").write_text("one two three " * 40)
    given = ["pretrain", "--data.train", str(tmp_path / "t"), *COMMON, "--model.width", "16"]
    given += ["--model.layers", "1", "--model.heads", "2", "--directory", str(tmp_path / "run")]
    assert main(given) == 0
    (tmp_path / "t" / "x.bin").write_bytes(bytes(8))
    given[-1] = str(tmp_path / "other")
    capsys.readouterr()
    assert main(given) == 2
    assert "x.bin: expected a file that ends in .txt" in capsys.readouterr().err


def test_of_what_is_evaluated_each_is_looked_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = tmp_path / "[a].bin"
    (np.arange(600, dtype=np.uint16) % 50).tofile(ids)
    shape = ["--model.width", "16", "--model.layers", "1", "--model.heads", "2"]
    common = ["pretrain", *shape, *COMMON, "--data.vocabulary", "50", "--data.train", str(ids)]
    run = str(tmp_path / "run")
    assert main([*common, "--directory", run]) == 0
    capsys.readouterr()
    assert main(["evaluate", run, str(ids)]) == 0
    assert str(ids) in capsys.readouterr().out  # which is no markup
    np.zeros(1, dtype=np.uint16).tofile(tmp_path / "one.bin")
    assert main(["evaluate", run, str(tmp_path / "one.bin")]) == 2
    assert "one.bin: tokens: 1 in all" in capsys.readouterr().err
    monkeypatch.setattr(measuring, "measured", lambda *_, **__: pytest.fail("too early"))
    for missing in ("no*.bin", "no*"):
        assert main(["evaluate", run, str(ids), str(tmp_path / missing)]) == 2
        assert f"{missing}: no file matches" in capsys.readouterr().err


def test_an_id_out_of_range_is_named_with_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, most in (("a", 50), ("b", 99)):
        (np.arange(600, dtype=np.uint16) % most).tofile(tmp_path / f"{name}.bin")
    given = ["pretrain", "--data.train", str(tmp_path), "--data.vocabulary", "50", *COMMON]
    assert main([*given, "--directory", str(tmp_path / "run")]) == 2
    assert f"{tmp_path}/b.bin: token 98 is 98, expected in [0, 50)" in capsys.readouterr().err


def test_generate_says_the_same_for_the_same_seed(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*options: str) -> str:
        assert main(["generate", str(runs / "a"), "one two", *options]) == 0
        return capsys.readouterr().out

    sampled = ["--temperature", "1.5", "--max-new-tokens", "30", "--seed"]
    assert said(*sampled, "1") == said(*sampled, "1")
    assert said(*sampled, "1") != said(*sampled, "2")
    greedy = said("--max-new-tokens", "5")
    assert len(greedy.rstrip("\n")) <= 5
    at = runs / "a/checkpoints/step-000000000006"
    assert main(["generate", str(at), "one two", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out == greedy


def test_inspect_shows_what_a_checkpoint_holds(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(runs / "a")]) == 0
    of_run = capsys.readouterr().out
    assert main(["inspect", str(runs / "a/checkpoints/step-000000000006")]) == 0
    assert capsys.readouterr().out == of_run
    assert "step        6" in of_run
    assert "samples     24" in of_run
    assert "optimizer   adamw" in of_run
    assert "head        logits by chunks of model.embed_tokens.weight" in of_run
    assert re.search(r"padding     \d+\.\d% of the tokens of the logged steps", of_run)
    assert re.search(r"waiting     0\.\d{4} s a step for data", of_run)
    assert re.search(r"speed       [\d,]+ target tokens per second", of_run)
    assert "every size and sha256 is as the manifest says" in of_run
    assert main(["inspect", str(runs / "a"), "--tensors"]) == 0
    assert "model.embed_tokens.weight" in capsys.readouterr().out


def test_a_model_is_measured_on_files_of_every_kind(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the figures of the run's own evaluation, whatever the stage that made the model."""
    files = [str(runs / name) for name in ("text.txt", "sft.jsonl", "pairs.jsonl")]
    capsys.readouterr()
    assert main(["evaluate", str(runs / "c"), *files, "--json"]) == 0
    text, completions, pairs = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [each["kind"] for each in (text, completions, pairs)] == ["text", "completions", "pairs"]
    assert completions["examples"] == pairs["examples"] == 12
    assert pairs["loss"] == pytest.approx(completions["loss"], rel=1e-6)  # the same completions
    assert 0 <= pairs["likelier"] <= 1
    assert text["likelier"] is None
    for run, kind in (("a", "text.txt"), ("b", "sft.jsonl")):
        assert main(["evaluate", str(runs / run), str(runs / kind), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        records = [json.loads(x) for x in (runs / run / "metrics.jsonl").read_text().splitlines()]
        assert found["loss"] == pytest.approx(records[-1]["eval_loss"], rel=1e-6)
        assert found["tokens"] == records[-1]["eval_num_tokens"]
    table = ["--batch-size", "5", "--limit", "7"]
    assert main(["evaluate", str(runs / "c"), files[1], *table]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "completions" in x]
    assert line.split()[1:3] == ["completions", "7"]


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_what_is_measured_is_laid_out_as_the_run_has_it(
    stage: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Documents apart where the run packs them, and the end of an example where it keeps that."""
    if stage == "pretrain":
        texts = [{"text": chr(ord("a") + i) * (3 + 2 * i)} for i in range(12)]
        data = _jsonl(tmp_path / "texts.jsonl", texts)  # type: ignore[arg-type]
        options = ["--data.packing", "--model.width", "16", "--model.layers", "1"]
        options += ["--model.heads", "2"]
    else:
        long = [{**each, "completion": " and".join([" 1"] * i)} for i, each in enumerate(CHATS, 1)]
        data = _jsonl(tmp_path / "long.jsonl", long)  # type: ignore[arg-type]
        options = ["--model.from", str(runs / "a"), "--data.truncation", "prompt_first"]
        options += ["--data.min-prompt", "9"]
    run = tmp_path / "run"
    given = ["--directory", str(run), "--data.train", data, "--data.held-out", data, *options]
    assert main([stage, *given, *COMMON]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run), data, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["loss"] == pytest.approx(last["eval_loss"], rel=1e-6)
    assert found["tokens"] == last["eval_num_tokens"]


TEXTS = [{"text": each["prompt"]} for each in CHATS]


@pytest.mark.parametrize(
    ("stage", "kind", "bad", "good"),
    [
        ("pretrain", "text", {"prompt": "a"}, TEXTS),
        ("sft", "completions", {"prompt": "a", "rejected": "b"}, CHATS),
        ("dpo", "pairs", {"prompt": "a"}, PAIRS),
    ],
)
def test_a_run_that_skips_is_measured_on_what_it_was_trained_on(
    stage: str,
    kind: str,
    bad: dict[str, object],
    good: list[dict[str, object]],
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where the first record is one that it has skipped; how many were is said."""
    path, run = _jsonl(tmp_path / "flawed.jsonl", [bad, *good, bad]), str(tmp_path / "run")
    given = ["--model.width", "16", "--model.layers", "1", "--model.heads", "2"]
    given = given if stage == "pretrain" else ["--model.from", str(runs / "b")]
    given += ["--data.train", path, "--data.held-out", path, "--data.on-bad-record", "skip"]
    assert main([stage, "--directory", run, *given, *COMMON]) == 0
    capsys.readouterr()
    assert main(["evaluate", run, path, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["malformed"]) == (kind, 2)
    assert main(["evaluate", run, path]) == 0
    assert f"{kind} (2 malformed)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["no.txt"], "no.txt: is not there"),
        (["{runs}/judged.jsonl"], "judged.jsonl: completions with a label"),
        (["{runs}/bad.jsonl"], "bad.jsonl:2: not JSON"),
        (["{runs}/text.txt", "--time", str(10**12)], "time: 1000000000000; the token ids of one"),
        (["{runs}/text.txt", "--limit", "0"], "limit: 0, expected an integer of at least 1"),
        ([], "no file"),
        (["{runs}/text.txt", "{runs}/ids.npy"], "ids.npy: token ids, and the model reads text"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    runs: Path, given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(runs / "ids.npy", np.arange(300) % 50)
    (runs / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{\n')
    _jsonl(runs / "judged.jsonl", [{**each, "label": True} for each in CHATS])
    assert main(["evaluate", str(runs / "a"), *(x.format(runs=runs) for x in given)]) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["no.txt"], "no.txt: is not there"),
        (["{runs}/*.md"], "*.md: no file matches"),
        (["{runs}/torn.jsonl"], "torn.jsonl:1: not JSON"),
        (["--tasks", "mine", "--include", "{runs}/no"], "/no is no directory"),
        (["--tasks", "mine", "--chat"], "has no chat template"),
        (["--chat"], "chat: it is of --tasks, and there are none"),
        (["--include", "{runs}"], "include: it is of --tasks, and there are none"),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_computed(
    runs: Path,
    given: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def computed(*_: object, **_options: object) -> None:
        raise AssertionError("a file was measured before all names had been looked at")

    monkeypatch.setattr(measuring, "measured", computed)
    (runs / "torn.jsonl").write_text("{")
    more = [each.format(runs=runs) for each in given]
    assert main(["evaluate", str(runs / "a"), str(runs / "text.txt"), *more]) == 2
    assert message in capsys.readouterr().err


def test_a_page_shows_several_runs_in_the_same_charts(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "runs.html"
    assert main(["report", str(runs / "a"), str(runs / "b"), "--to", str(page)]) == 0
    assert "2 runs" in capsys.readouterr().out
    text = page.read_text()
    whole = text[text.index("All runs") : text.index("<h2>a ")]
    loss = whole[whole.index("Loss, nats: train") : whole.index("Loss, nats: held out")]
    assert loss.count("<polyline") == 2
    assert re.search(r'c0"></i>a\s*<i class="c1"></i>b', loss)
    assert main(["report", str(runs / "a"), "--to", str(page)]) == 0
    assert "All runs" not in page.read_text()
    link = tmp_path / "link.html"
    link.symlink_to(page)
    assert main(["report", str(runs / "a"), str(runs / "b"), "--to", str(link)]) == 0
    assert link.is_symlink()
    assert "All runs" in page.read_text()
    assert main(["report", str(runs / "a"), str(runs / "a"), "--to", str(page)]) == 2
    assert "is given twice; name each run once" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(runs / "a")
    for again in (runs / "b" / ".." / "a", tmp_path / "link", runs / "a" / "checkpoints"):
        assert main(["report", str(runs / "a"), str(again), "--to", str(page)]) == 2
        assert f"{runs / 'a'} is given twice" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--to", str(page)]) == 2
    assert "expected a run" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["{xx", '{"step": 2, "loss": "abc"}'])
def test_a_damaged_line_of_metrics_is_named_and_stops_what_needs_it_alone(
    runs: Path, tmp_path: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "a", tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([*lines[:2], line, *lines[3:], ""]))
    run, named = str(tmp_path / "run"), f"{metrics}:3: "
    for command in (
        ["inspect", run],
        ["diff", run, str(runs / "a")],
        ["export", run, str(tmp_path / "exported")],
    ):
        assert main(command) == 0
        assert named in capsys.readouterr().out
    assert main(["report", run, "--to", str(tmp_path / "page.html")]) == 2
    said = capsys.readouterr().err
    assert named in said
    assert "remove that line" in said
    metrics.write_text("\n".join([*lines[:2], *lines[3:], ""]))
    assert main(["report", run, "--to", str(tmp_path / "page.html")]) == 0


def test_a_page_is_a_file(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(runs / "a"), "--to", str(tmp_path)]) == 2
    assert f"to: {tmp_path} is a directory; name a file" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["a", "b", "c"])
def test_a_tokenizer_that_is_gone_is_what_is_missed(
    runs: Path, tmp_path: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / stage, tmp_path / "run")
    (tmp_path / "run" / "tokenizer.json").unlink()
    run = str(tmp_path / "run")
    for command in (["generate", run, "one"], ["evaluate", run, str(runs / "text.txt")]):
        assert main(command) == 2
        assert f"{run}/tokenizer.json is missing" in capsys.readouterr().err


def test_inspect_finds_an_altered_file(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "step-000000000006"
    target.mkdir()
    for path in (runs / "a/checkpoints/step-000000000006").iterdir():
        data = bytearray(path.read_bytes())
        if path.name == "model.safetensors":
            data[-1] ^= 1
        (target / path.name).write_bytes(data)
    assert main(["inspect", str(target)]) == 2
    assert "its sha256 does not match the manifest" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["sft", "pretrain"])
def test_packed_runs_train_resume_to_the_bit_and_say_what_was_padding(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    texts: list[dict[str, object]] = [{"text": "one two " * (n % 9)} for n in range(40)]
    data = _jsonl(tmp_path / "data.jsonl", CHATS if stage == "sft" else texts)  # type: ignore[arg-type]
    start = ["--model.from", str(runs / "a")]
    if stage == "pretrain":
        start = ["--model.width", "16", "--model.layers", "1", "--model.heads", "2"]
    common = [stage, *start, "--data.train", data, "--data.held-out", data, *COMMON]
    common += ["--data.packing", "--data.time", "64", "--schedule.total", "6"]
    assert main([*common, "--directory", str(tmp_path / "once")]) == 0
    said = capsys.readouterr()
    assert "packs of 64 tokens, " in said.err
    first = [*common, "--directory", str(tmp_path / "twice")]
    assert main([*first, "--train.steps", "3"]) == 0
    assert main([*first, "--resume"]) == 0
    newest = [checkpoint.latest(tmp_path / run / "checkpoints") for run in ("once", "twice")]
    manifests = [path / "manifest.json" for path in newest if path is not None]
    assert manifests[0].read_text() == manifests[1].read_text()
    lines = (tmp_path / "once/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    seen = [record["padding"] for record in records if "padding" in record]
    assert len(seen) == 6
    assert all(0 <= each < 0.5 for each in seen)
    assert f"padding      {sum(seen) / 6:.1%} of a step's tokens, on average" in said.out
    resumed = [*first, "--resume", "--data.no-packing"]
    assert main(resumed) == 2
    assert "data.packing: False, and the run has True" in capsys.readouterr().err
    _jsonl(Path(data), (CHATS if stage == "sft" else texts)[1:])  # type: ignore[arg-type]
    assert main([*first, "--resume"]) == 2
    assert "data.jsonl is not what this run was begun with" in capsys.readouterr().err


def test_the_held_out_examples_are_scored_alike_however_training_is_packed(
    runs: Path, tmp_path: Path
) -> None:
    data = ["--data.train", str(runs / "sft.jsonl"), "--data.held-out", str(runs / "sft.jsonl")]
    given = ["sft", "--model.from", str(runs / "a"), *data, *COMMON]
    found = []
    for options in ([], ["--data.packing"], ["--data.group-by-length"]):
        run = tmp_path / str(len(found))
        assert main([*given, *options, "--directory", str(run)]) == 0
        found.append(json.loads((run / "metrics.jsonl").read_text().splitlines()[0]))
    assert found[0] == found[1] == found[2]


PACKED = [
    (["sft", "--data.packing", "--data.group-by-length"], "data.group_by_length: with data.pack"),
    (["pretrain", "--data.truncation", "keep_end"], "data.truncation: running text is not cut"),
    (["pretrain", "--data.min-prompt", "7"], "data.min_prompt: running text is not cut"),
    (["pretrain", "--data.group-by-length"], "data.group_by_length: rows of text are all of one"),
    (["dpo", "--data.packing"], "data.packing: preference data are not packed; use preference.la"),
    (
        ["dpo", "--data.packing", "--preference.loss", "kto"],
        "data.packing: preference data are not packed; use data.group_by_length",
    ),
]


@pytest.mark.parametrize(("given", "message"), PACKED)
def test_packing_that_makes_no_sense_is_refused(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(given) == 2
    assert message in capsys.readouterr().err


def test_files_of_token_ids_are_not_packed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (np.arange(600, dtype=np.uint16) % 50).tofile(tmp_path / "ids.bin")
    given = ["--data.train", str(tmp_path / "ids.bin"), "--data.vocabulary", "50"]
    assert main(["pretrain", *given, "--data.packing"]) == 2
    assert "is one stream of ids, whose rows are full" in capsys.readouterr().err


def test_preference_data_can_be_grouped_by_length(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model.from", str(runs / "b"), "--data.train", str(runs / "pairs.jsonl"), *COMMON]
    given += ["--data.group-by-length", "--directory", str(tmp_path / "run")]
    assert main(["dpo", *given]) == 0
    said = capsys.readouterr()
    assert "12 examples; in batches of 4, " in said.err
    assert " of the tokens are padding" in said.err
    assert "of a step's tokens, on average" in said.out


def test_too_many_widths_to_compile_for_are_refused_before_a_step(
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With what is to be done about it, which then trains; and each shape is said."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    records = [{"prompt": "?", "completion": "x" * (1 + 9 * n)} for n in range(20)]
    train = _jsonl(tmp_path / "long.jsonl", records)  # type: ignore[arg-type]
    given = ["--model.from", str(runs / "a"), "--data.train", train, *COMMON, "--train.compile"]
    given += ["--data.time", "256", "--directory", str(tmp_path / "run")]
    assert main(["sft", *given]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "batches of these data can be of 20 widths (8 to 176 tokens)" in said
    assert "give data.pad_to_multiple_of=16, data.packing, or leave train.compile out" in said
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert main(["sft", *given, "--data.pad-to-multiple-of", "16"]) == 0
    assert "compile: model for [4, " in capsys.readouterr().err
    for stage, options, message in (
        ("dpo", ["--preference.layout", "padding_free"], "rows are of any length, and each is"),
        ("sft", ["--data.packing", "--data.pad-to-multiple-of", "4"], "all rows are of data.time"),
        ("pretrain", ["--data.pad-to-multiple-of", "4"], "rows of text are all of data.time"),
    ):
        assert main([stage, "--train.compile", *options]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_directories_and_patterns_are_data_too(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Records of two files, in the order of names, are those of one file: the same hash."""
    parts = tmp_path / "parts"
    parts.mkdir()
    _jsonl(parts / "a.jsonl", CHATS[:5])  # type: ignore[arg-type]
    _jsonl(parts / "b.jsonl", CHATS[5:])  # type: ignore[arg-type]
    start = ["sft", "--model.from", str(runs / "a"), *COMMON]
    for name, train in (("d", str(parts)), ("e", str(parts / "*.jsonl"))):
        given = ["--directory", str(tmp_path / name), "--data.train", train]
        assert main([*start, *given]) == 0
        found = toml.read(tmp_path / name / "config.toml", SFT)
        assert found.data.sha256 == toml.read(runs / "b/config.toml", SFT).data.sha256
    assert main(["evaluate", str(tmp_path / "d"), str(parts)]) == 0
    (parts / "c.csv").write_text("x")
    capsys.readouterr()
    assert main([*start, "--directory", str(tmp_path / "f"), "--data.train", str(parts)]) == 2
    assert "c.csv: expected a file that ends in .jsonl" in capsys.readouterr().err
