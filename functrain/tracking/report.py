"""report.html: one file that shows a run, on a phone or a screen, in light or dark."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import attrs

from functrain.checks import PathLike, as_path
from functrain.errors import ConfigError
from functrain.tracking.charts import COLOURS, Chart, Curve, curve, drawn
from functrain.writing import write

# Each chart's title, and for each curve its name, its metric, and whether it is drawn as dots.
CHARTS: tuple[tuple[str, tuple[tuple[str, str, bool], ...]], ...] = (
    ("Loss, nats", (("train", "loss", False), ("held out", "eval_loss", True))),
    (
        "Perplexity",
        (("train", "perplexity", False), ("held out", "eval_perplexity", True)),
    ),
    (
        "Reward margin, nats",
        (("train", "rewards/margins", False), ("held out", "eval_rewards/margins", True)),
    ),
    (
        "Reward accuracy",
        (("train", "rewards/accuracies", False), ("held out", "eval_rewards/accuracies", True)),
    ),
    (
        "Rewards, nats",
        (("chosen", "rewards/chosen", False), ("rejected", "rewards/rejected", False)),
    ),
    (
        "Token accuracy",
        (("train", "mean_token_accuracy", False), ("held out", "eval_mean_token_accuracy", True)),
    ),
    ("Gradient norm", (("before clipping", "grad_norm", False),)),
    ("Learning rate", (("of the update", "learning_rate", False),)),
    ("Throughput, target tokens per second", (("train", "tokens_per_second", False),)),
    (
        "Padding, part of the tokens",
        (("train", "padding", False), ("held out", "eval_padding", True)),
    ),
    ("Waiting for data, seconds a step", (("train", "data_seconds", False),)),
    ("Model FLOPs utilisation", (("train", "mfu", False),)),
    ("Peak memory of the process, GiB", (("train", "peak_memory_gib", False),)),
    ("Loss scale", (("of the step", "loss_scale", False),)),
    ("Skipped steps", (("skipped", "skipped", False),)),
)
LOGARITHMIC = ("perplexity", "grad_norm", "loss_scale")
FROM_ZERO = (
    "tokens_per_second",
    "learning_rate",
    "rewards/accuracies",
    "mean_token_accuracy",
    "padding",
    "data_seconds",
    "mfu",
    "peak_memory_gib",
)
# Not shown while constant.
QUIET = ("loss_scale", "skipped")
# Not shown while 0, to the digits that are displayed.
NOTHING = ("padding", "eval_padding", "data_seconds")


class Sample(Protocol):
    """A prompt, and how each of several models continues it."""

    @property
    def prompt(self) -> str:
        """The prompt."""
        ...

    @property
    def answers(self) -> Sequence[tuple[str, str]]:
        """For each model, its name and its text."""
        ...


@attrs.frozen(kw_only=True)
class CheckpointRow:
    """A kept checkpoint: its size in bytes, the sha256 of each file, its held-out loss."""

    step: int
    size: int
    sha256: Mapping[str, str]
    loss: float | None = None


@attrs.frozen(kw_only=True)
class StageRecord:
    """A stage and the records of its metrics.jsonl; `config` is shown as it is.

    `notes`: what was read of its data, one line each. `environment`: values by name.
    """

    name: str
    metrics: Sequence[Mapping[str, Any]]
    config: str = ""
    notes: Sequence[str] = ()
    environment: Mapping[str, str] = attrs.field(factory=dict)
    checkpoints: Sequence[CheckpointRow] = ()


def charts(metrics: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """The charts for which these records have something to show."""
    found = []
    for title, curves in CHARTS:
        made = [curve(name, metrics, key, dots=dots) for name, key, dots in curves]
        shown = tuple(c for c, (_, key, _) in zip(made, curves, strict=True) if _says(c, key))
        if shown:
            key = curves[0][1]
            found.append(Chart(title, shown, key in LOGARITHMIC, key in FROM_ZERO))
    return found


def overlaid(stages: Sequence[StageRecord]) -> list[Chart]:
    """One chart per metric over several runs, with a curve for each run that has it."""
    found = []
    for title, curves in CHARTS:
        for name, key, dots in curves:
            made = [curve(stage.name, stage.metrics, key, dots=dots) for stage in stages]
            shown = tuple(each for each in made if _says(each, key))
            if shown:
                whole = title if len(curves) == 1 else f"{title}: {name}"
                found.append(Chart(whole, shown, key in LOGARITHMIC, key in FROM_ZERO))
    return found


def _drawn(made: Sequence[Chart]) -> list[dict[str, Any]]:
    return [
        {"title": chart.title, "names": [each.name for each in chart.curves], "svg": svg}
        for chart in made
        if (svg := drawn(chart))
    ]


def _says(each: Curve, key: str) -> bool:
    if key in QUIET:
        return len({value for _, value in each.points}) > 1
    if key in NOTHING:
        return any(value >= 1e-3 for _, value in each.points)
    return bool(each.points)


def render_report(
    *,
    title: str,
    stages: Sequence[StageRecord],
    table: Sequence[Sequence[str]] = (),
    samples: Sequence[Sample] = (),
    fingerprint: str = "",
    commands: Sequence[str] = (),
    together: bool = False,
) -> str:
    """The report as HTML: no script, nothing fetched, every text escaped.

    `table`: rows of stage, measure, before, after. `commands`: what to type next. `together`: the
    stages are runs to be compared, so charts of all of them come first. Raises `ConfigError` if
    jinja2 is not installed.
    """
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise ConfigError("report: jinja2 is missing; pip install 'functrain[cli]'") from error
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(_TEMPLATE)
    return template.render(
        title=title,
        stages=[
            {
                "name": stage.name,
                "steps": int(stage.metrics[-1]["step"]) if stage.metrics else 0,
                "config": stage.config,
                "charts": _drawn(charts(stage.metrics)),
                "notes": tuple(stage.notes),
                "environment": tuple(stage.environment.items()),
                "checkpoints": [_row(each) for each in stage.checkpoints],
            }
            for stage in stages
        ],
        together=_drawn(overlaid(stages)) if together else [],
        colours=COLOURS,
        table=[tuple(row) for row in table],
        samples=samples,
        fingerprint=fingerprint,
        commands=tuple(commands),
    )


def _row(kept: CheckpointRow) -> dict[str, str]:
    """A row of the table; equal hash prefixes, of the params or of all files, mean equal bits."""
    params = kept.sha256.get("model.safetensors", "")
    whole = hashlib.sha256("".join(kept.sha256[name] for name in sorted(kept.sha256)).encode())
    return {
        "step": f"{kept.step:,}",
        "size": f"{kept.size / 2**20:,.1f}",
        "loss": "" if kept.loss is None else f"{kept.loss:.4f}",
        "params": params[:16],
        "whole": whole.hexdigest()[:16],
    }


def write_report(path: PathLike, **contents: Any) -> None:
    """Write `render_report` to a file, whole or not at all; raises `OSError` if it cannot."""
    write(as_path("path", path), render_report(**contents).encode())


_TEMPLATE = """{% macro figures(charts, always=false) %}
{% for chart in charts %}
<figure class="card"><div class="head"><h3>{{ chart.title }}</h3>
{% if always or chart.names | length > 1 %}<span class="key">
{% for name in chart.names %}<i class="c{{ loop.index0 % colours }}"></i>{{ name }}{% endfor %}
</span>{% endif %}
</div>{{ chart.svg | safe }}</figure>
{% else %}
<p>No metrics were logged.</p>
{% endfor %}
{% endmacro %}<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ground: #fbfaf7; --card: #ffffff; --ink: #22211e;
  --soft: #6d6a62; --line: #e4e1d8; --c0: #2f6db5; --c1: #d1651f; --c2: #2e8b57;
  --c3: #9b4fb0; --c4: #b8901a; --c5: #c23b5a; }
@media (prefers-color-scheme: dark) { :root { --ground: #171716; --card: #20201e; --ink: #e9e6dd;
  --soft: #a09b8f; --line: #35342f; --c0: #7db1ee; --c1: #f0a062; --c2: #74c99a;
  --c3: #cf95e0; --c4: #e3c25c; --c5: #f0879f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 28px 18px 60px; background: var(--ground);
  color: var(--ink); font: 15px/1.55 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0 0 18px; } h2 { font-size: 18px; margin: 34px 0 12px; }
h2 small { color: var(--soft); font-weight: normal; font-size: 14px; }
h3 { font-size: 13px; font-weight: 600; margin: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr));
  gap: 14px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 14px; margin: 0; }
.head { display: flex; justify-content: space-between; flex-wrap: wrap; gap: 2px 10px;
  margin-bottom: 4px; }
.key { color: var(--soft); font-size: 12px; } .key i { display: inline-block; width: 10px;
  height: 3px; border-radius: 2px; margin: 0 4px 3px 8px; }
{% for n in range(colours) %}
i.c{{ n }} { background: var(--c{{ n }}); } .curve.c{{ n }} { stroke: var(--c{{ n }}); }
.dot.c{{ n }} { fill: var(--c{{ n }}); }
{% endfor %}
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 10.5px; font-family: inherit; }
@media (max-width: 480px) { svg text { font-size: 12px; } }
.grid { stroke: var(--line); stroke-width: 1; }
.curve { fill: none; stroke-width: 1.5; stroke-linejoin: round; } .dot { stroke: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; } th { color: var(--soft); font-size: 13px; }
.number { text-align: right; white-space: nowrap; }
dl { margin: 8px 0 0; } dt { color: var(--soft); font-size: 13px; }
dd { margin: 0 0 8px; } pre, .said { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0;
  font: 13px/1.5 ui-monospace, monospace; }
.samples { display: grid; gap: 14px; } summary { cursor: pointer; color: var(--soft); }
details { margin-top: 14px; } ul.card { padding-left: 30px; overflow-wrap: anywhere; }
.hash { font: 13px/1.5 ui-monospace, monospace; } summary + * { margin-top: 8px; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% if table %}
<div class="card scroll"><table>
<tr><th>stage</th><th>held out</th><th class="number">before</th><th class="number">after</th></tr>
{% for row in table %}
<tr><td>{{ row[0] if loop.first or row[0] != table[loop.index0 - 1][0] else "" }}</td>
<td>{{ row[1] }}</td>
<td class="number">{{ row[2] }}</td><td class="number">{{ row[3] }}</td></tr>
{% endfor %}
</table></div>
{% endif %}
{% if together %}
<h2>All runs</h2>
<div class="charts">{{ figures(together, always=true) }}</div>
{% endif %}
{% for stage in stages %}
<h2>{{ stage.name }} <small>{{ "{:,}".format(stage.steps) }} steps</small></h2>
<div class="charts">{{ figures(stage.charts) }}</div>
{% if stage.notes %}
<details><summary>data</summary><ul class="card">
{% for note in stage.notes %}<li>{{ note }}</li>
{% endfor %}</ul></details>
{% endif %}
{% if stage.checkpoints %}
<details><summary>checkpoints</summary><div class="card scroll"><table>
<tr><th class="number">step</th><th class="number">MiB</th><th class="number">held-out loss</th>
<th>sha256 of the params</th><th>of all files</th></tr>
{% for each in stage.checkpoints %}
<tr><td class="number">{{ each.step }}</td><td class="number">{{ each.size }}</td>
<td class="number">{{ each.loss }}</td><td class="hash">{{ each.params }}</td>
<td class="hash">{{ each.whole }}</td></tr>
{% endfor %}</table></div></details>
{% endif %}
{% if stage.environment %}
<details><summary>environment</summary><div class="card scroll"><table>
{% for name, value in stage.environment %}
<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}</table></div></details>
{% endif %}
{% if stage.config %}
<details><summary>config</summary><pre class="card">{{ stage.config }}</pre></details>
{% endif %}
{% endfor %}
{% if samples %}
<h2>Samples</h2>
<div class="samples">
{% for sample in samples %}
<div class="card"><div class="said"><strong>{{ sample.prompt.strip() }}</strong></div>
<dl>{% for name, answer in sample.answers %}
<dt>{{ name }}</dt><dd class="said">{{ answer.strip() or "(nothing)" }}</dd>
{% endfor %}</dl></div>
{% endfor %}
</div>
{% endif %}
{% if fingerprint or commands %}
<h2>To go on</h2>
<div class="card">
{% if fingerprint %}<dl><dt>fingerprint of the last state</dt>
<dd class="said">{{ fingerprint }}</dd></dl>{% endif %}
{% if commands %}<pre>{% for command in commands %}{{ command }}
{% endfor %}</pre>{% endif %}
</div>
{% endif %}
</body>
</html>
"""
