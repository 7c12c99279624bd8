"""A run on one page: its log, samples and settings, and what looks wrong. The HTML needs no other file."""

import glob
import html
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import pandas
from jinja2 import Environment, StrictUndefined

from ..files import read_text
from ..metrics.run_signs import Sign, run_signs
from .plot_style import DARK, LIGHT


__all__ = ["Run", "read_run", "report_page"]

_KL = "nats per token"
# Title, unit, and the logged names with their labels. A chart without any of its names is left out.
_CHARTS: list[tuple[str, str, dict[str, str]]] = [
    (
        "Distance to the teacher, in training",
        _KL,
        {
            "kl/student_plain": "KL(student ‖ plain teacher)",
            "kl/student_prompted": "KL(student ‖ prompted teacher)",
            "kl/student_teacher": "KL(student ‖ teacher)",
            "kd": "divergence trained on",
        },
    ),
    (
        "Distance to the teacher, in evaluation",
        _KL,
        {
            "forward_kl": "KL(teacher ‖ student), on answers",
            "reverse_kl": "KL(student ‖ teacher), on samples",
            "kl/student_teacher": "KL(student ‖ teacher)",
        },
    ),
    ("Cross-entropy of the answers, in evaluation", _KL, {"ce": "cross-entropy"}),
    (
        "Gain and distance of the prompted teacher",
        _KL,
        {"kl/prompt_gain": "prompt gain", "kl/prompted_plain": "KL(prompted ‖ plain teacher)"},
    ),
    ("Drift of the soft prompt", "share of its start's norm", {"prompt/drift": "drift"}),
    ("Entropies", _KL, {"entropy/student": "student", "entropy/teacher": "teacher"}),
    ("Length of samples", "tokens", {"rollout/mean_length": "mean"}),
    ("Cut samples", "share", {"cut": "cut at max_new_tokens"}),
    ("Loss", "", {"loss": "loss", "ce": "cross-entropy"}),
    ("What the priming text adds", _KL, {"priming/gain_nats": "gain in log-probability"}),
    (
        "Task metrics, in evaluation",
        "percent",
        {"rougeL": "ROUGE-L", "exact_match": "exact match", "gsm8k_paper": "GSM8K", "gsm8k_strict": "GSM8K, strict"},
    ),
    (
        "Agreement",
        "share of tokens",
        {"teacher/top1_agreement": "with the teacher", "mean_token_accuracy": "with the answer"},
    ),
]
_LINES = 4  # of one chart: as many as have colours of their own
_IN_EVALUATION = ", in evaluation"
_VERDICTS = {"wrong": "Look at this", "fine": "Fine", "unknown": "Cannot tell"}
_MAX_POINTS = 400
_MAX_LETTERS = 1500
_NUM_SAMPLES = 4
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 190, 46, 10, 8, 24
_FILES = ("adapter_config.json", "teacher_prompt/adapter_config.json")
_OF_STATE = ("max_steps", "num_train_epochs", "train_batch_size", "logging_steps", "eval_steps", "save_steps")


class Run(NamedTuple):
    """What is saved of a run."""

    name: str
    state: dict[str, Any]
    """The content of `trainer_state.json`."""
    samples: list[pandas.DataFrame]
    """The tables of samples, the oldest first. Each has `step`, `prompt` and `completion`."""
    settings: dict[str, dict[str, Any]]
    """Settings by the file that they are from."""


def read_run(folder: str) -> Run:
    """Read a run's state, samples and settings. No file that could run code is opened.

    Args:
        folder: The run's `output_dir`, whose newest checkpoint is read, or one of its checkpoints.

    Raises:
        FileNotFoundError: if there is no `trainer_state.json`.
        ValueError: if a file cannot be read. The message names it.
    """
    folder = os.path.abspath(folder)
    checkpoints = sorted(glob.glob(os.path.join(glob.escape(folder), "checkpoint-*")), key=_step_of)
    found = [path for path in (folder, *checkpoints) if os.path.isfile(os.path.join(path, "trainer_state.json"))]
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no run: there is no `trainer_state.json` in it or in a checkpoint. Pass the run's "
            "`output_dir` or a checkpoint. A run without checkpoints has one after `trainer.save_state()`."
        )
    states = {path: _read_json(os.path.join(path, "trainer_state.json"), "a run's state") for path in found}
    for path, state in states.items():
        if not isinstance(state.get("log_history"), list) or not isinstance(state.get("global_step"), int):
            raise ValueError(
                f"{path}/trainer_state.json is not the state of a run: it has no log. Pass another folder."
            )
    newest = max(found, key=lambda path: states[path]["global_step"])
    root = os.path.dirname(folder) if _step_of(folder) >= 0 else folder
    samples = [
        _read_samples(path) for path in sorted(glob.glob(os.path.join(glob.escape(root), "completions/*.parquet")))
    ]
    # Others are of an earlier run in the same folder
    logged = {entry.get("step") for entry in states[newest]["log_history"] if isinstance(entry, dict)}
    samples = [table for table in samples if table["step"].iloc[0] in logged]
    name = os.path.relpath(folder, os.path.dirname(root))
    return Run(
        name,
        states[newest],
        sorted(samples, key=lambda table: table["step"].iloc[0]),
        _settings(root, newest, states[newest]),
    )


def _step_of(path: str) -> int:
    """The step of a checkpoint's folder, -1 for any other folder."""
    found = re.fullmatch(r"checkpoint-(\d+)", os.path.basename(path))
    return int(found[1]) if found else -1


def _read_json(path: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(read_text(path, what))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}). It is damaged: pass another checkpoint.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a dict. It is damaged: pass another checkpoint.")
    return value


def _read_samples(path: str) -> pandas.DataFrame:
    try:
        table = pandas.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise ValueError(f"{path} cannot be read ({error}). Delete it: the report leaves its step out.") from error
    if len(table) == 0 or not {"step", "prompt", "completion"} <= set(table):
        raise ValueError(f"{path} holds no samples of a run (its columns are {list(table)}). Move it elsewhere.")
    return table


def _settings(root: str, checkpoint: str, state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings from the model card, the configurations of adapters, and the state."""
    found: dict[str, dict[str, Any]] = {}
    for folder in dict.fromkeys((root, checkpoint)):
        card = os.path.join(folder, "README.md")
        if os.path.isfile(card) and "README.md" not in found:
            table = read_text(card, "the model card").partition("## Settings")[2].partition("\n## ")[0]
            found["README.md"] = dict(re.findall(r"^\| `(.+?)` \| `(.*)` \|$", table, flags=re.MULTILINE))
        for name in _FILES:
            path = os.path.join(folder, name)
            if os.path.isfile(path) and name not in found:
                found[name] = _read_json(path, "settings")
    found["trainer_state.json"] = {name: state.get(name) for name in _OF_STATE}
    given = {
        name: {key: value for key, value in values.items() if value not in (None, "")}
        for name, values in found.items()
    }
    return {name: values for name, values in given.items() if values}


def report_page(run: Run) -> tuple[str, list[Sign]]:
    """The page, and the signs of what looks wrong.

    All text of the run is escaped. The page fetches nothing and runs no script.
    """
    history = [entry for entry in run.state["log_history"] if isinstance(entry, dict)]
    signs = run_signs(history, run.samples)
    series = _series(history)
    page = (
        Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        .from_string(resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
        .render(
            name=run.name,
            light=LIGHT,
            dark=DARK,
            facts=_facts(run, series),
            signs=[sign._replace(text=_marked(sign.text)) for sign in signs],
            verdicts=_VERDICTS,
            charts=_charts(series),
            moments=_moments(run.samples),
            settings=run.settings,
            logged=[
                {"name": name, "first": _number(points[0][1]), "last": _number(points[-1][1])}
                for name, points in sorted(series.items())
            ],
        )
    )
    return page, signs


Points = list[tuple[float, float]]


def _series(history: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """Steps and finite values of each logged name."""
    found: dict[str, Points] = {}
    for entry in history:
        step = entry.get("step")
        if not isinstance(step, int | float):
            continue
        for name, value in entry.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and name not in ("step", "epoch") and math.isfinite(value):
                found.setdefault(name, []).append((step, value))
    if "rollout/terminated_share" in found:
        found["cut"] = [(step, 1 - share) for step, share in found["rollout/terminated_share"]]
    return found


def _facts(run: Run, series: Mapping[str, Points]) -> list[str]:
    state = run.state
    methods = {"kl/prompt_gain": "PromptKD", "kd": "response priming"}
    facts = [method for name, method in methods.items() if name in series][:1]
    facts.append(f"step {state['global_step']} of {state.get('max_steps', '?')}")
    if isinstance(state.get("epoch"), int | float):
        facts.append(f"epoch {state['epoch']:.3g}")
    if state.get("best_metric") is not None and state.get("best_global_step") is not None:
        facts.append(f"best checkpoint: step {state['best_global_step']} ({_number(state['best_metric'])})")
    return facts


def _charts(series: Mapping[str, Points]) -> list[dict[str, Any]]:
    charts = []
    for title, unit, names in _CHARTS:
        lines = []
        for name, label in names.items():
            if title.endswith(_IN_EVALUATION):  # of each evaluation set
                wanted = [known for known in series if re.fullmatch(rf"eval_(.+_)?{re.escape(name)}", known)]
            else:
                wanted = [
                    known for known in series if known == name or known.startswith(f"{name}/")
                ]  # of each teacher
            for known in wanted:
                evaluated = known.removeprefix("eval_").replace(name, "", 1).strip("_/")
                lines.append((f"{label} ({evaluated})" if evaluated and len(wanted) > 1 else label, series[known]))
        for start in range(0, len(lines), _LINES):
            part = lines[start : start + _LINES]
            svg = _svg(title, [points for _, points in part])
            shown = [{"label": label, "last": _number(points[-1][1])} for label, points in part]
            charts.append({"title": f"{title} (more)" if start else title, "unit": unit, "lines": shown, "svg": svg})
    return charts


def _svg(title: str, lines: Sequence[Points]) -> str:
    """A chart with the fonts and colours of the page. It contains no data of the run except numbers."""
    steps, values = ([point[axis] for points in lines for point in points] for axis in (0, 1))
    x_low, x_high = min(steps), max(steps)
    ticks = _ticks(min(*values, 0.0), max(values))
    low, high = min(ticks[0], *values), max(ticks[-1], *values)

    def place(step: float, value: float) -> tuple[float, float]:
        x = (step - x_low) / (x_high - x_low or 1)
        y = (value - low) / (high - low or 1)
        return (
            round(_LEFT + x * (_WIDTH - _LEFT - _RIGHT), 1),
            round(_HEIGHT - _BOTTOM - y * (_HEIGHT - _TOP - _BOTTOM), 1),
        )

    parts = []
    for tick in ticks:
        y = place(x_low, tick)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:.4g}</text>')
    bottom = _HEIGHT - 6
    parts.append(f'<text x="{_LEFT}" y="{bottom}">step {x_low:g}</text>')
    if x_high > x_low:
        parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{bottom}" text-anchor="end">{x_high:g}</text>')
    for index, points in enumerate(lines):
        stride = -(-len(points) // _MAX_POINTS)
        shown = points[::stride] if points[-1] in points[::stride] else [*points[::stride], points[-1]]
        places = [place(*point) for point in shown]
        path = " ".join(f"{x},{y}" for x, y in places)
        if len(places) == 1:
            parts.append(f'<circle class="line s{index}" cx="{places[0][0]}" cy="{places[0][1]}" r="3"/>')
        else:
            parts.append(f'<polyline class="line s{index}" points="{path}"/>')
    head = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">'
    return "\n".join([head, *parts, "</svg>"])


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers around the values."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= span / 4)
    return [step * count for count in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _moments(samples: Sequence[pandas.DataFrame]) -> list[dict[str, Any]]:
    """The first samples of the first, the middle and the last table."""
    chosen = sorted({0, len(samples) // 2, len(samples) - 1}) if samples else []
    return [
        {
            "step": samples[index]["step"].iloc[0],
            "rows": [
                {"prompt": _cut(row["prompt"]), "completion": _cut(row["completion"]), "about": _about(row)}
                for row in samples[index].head(_NUM_SAMPLES).to_dict("records")
            ],
        }
        for index in chosen
    ]


def _about(row: Mapping[str, Any]) -> list[str]:
    """What a table says about a sample, for any columns."""
    about = []
    for name, value in row.items():
        if name == "ended":
            about.append("ended" if value else "cut")
        elif name not in ("step", "prompt", "completion"):
            about.append(f"{name} {_number(value) if isinstance(value, float) else _cut(value)}")
    return about


def _marked(text: str) -> str:
    """Escaped, with `names` as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(text.replace("||", "‖")))


def _cut(value: Any) -> str:
    text = str(value)
    return (
        text if len(text) <= _MAX_LETTERS else f"{text[:_MAX_LETTERS]} ... ({len(text) - _MAX_LETTERS} letters more)"
    )


def _number(value: float) -> str:
    return f"{value:.4g}"
