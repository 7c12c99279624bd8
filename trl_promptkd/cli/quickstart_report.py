"""The results of the quickstart: the final table, the verdict, some answers, and the plot."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..analysis.plot_style import HIGHER, LIGHT, LOWER, new_figure, plot_style, save_figure, whole_numbers
from ..intervals import ByRow, difference, mean


__all__ = ["METRICS", "STAGES", "page", "plot", "show", "verdict"]

CUT, WARM, GKD, PROMPTKD = STAGES = ("cut student", "warm start", "GKD", "PromptKD")
REVERSE_KL, FORWARD_KL, ROUGE_L = METRICS = (
    "KL(student || teacher), student's samples",
    "KL(teacher || student), teacher's samples",
    "ROUGE-L to the teacher's answers, percent",
)
UNITS = "KL in nats per token (lower is better); ROUGE-L of greedy answers (higher is better)."


def verdict(measured: dict[str, dict[str, ByRow]]) -> str:
    """Compare PromptKD with its control, metric by metric. An interval that contains 0 is no clear difference."""
    found: dict[str, list[str]] = {"better": [], "worse": [], "no clear difference": []}
    for metric in METRICS:
        _, low, high = difference(measured[PROMPTKD][metric], measured[GKD][metric])
        rises = "better" if metric == ROUGE_L else "worse"
        falls = "worse" if metric == ROUGE_L else "better"
        found[rises if low > 0 else falls if high < 0 else "no clear difference"].append(metric.split(",")[0])
    said = ". ".join(f"{word.capitalize()} in {', '.join(names)}" for word, names in found.items() if names)
    return (
        f"PromptKD against plain GKD, from the same start with as many steps. {said}. This is one seed on "
        f"{len(measured[GKD][ROUGE_L])} prompts; it says nothing of other models."
    )


def cells(measured: dict[str, dict[str, ByRow]]) -> list[list[str]]:
    """The final table, header first."""
    rows = [["on held-out prompts", *STAGES, "PromptKD - GKD (95 %)"]]
    for metric in METRICS:
        digits = 1 if metric == ROUGE_L else 3
        gain = [f"{value:+.{digits}f}" for value in difference(measured[PROMPTKD][metric], measured[GKD][metric])]
        values = [f"{mean(measured[stage][metric]):.{digits}f}" for stage in STAGES]
        rows.append([metric, *values, f"{gain[0]} ({gain[1]} to {gain[2]})"])
    return rows


def answers_of(samples: dict[str, list[str]], questions: list[str]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The first questions, with the answers of the teacher and the students."""
    names = ("teacher", WARM, GKD, PROMPTKD)
    return [(questions[i], [(name, samples[name][i].strip()) for name in names]) for i in range(len(questions))]


def page(measured, samples, questions: list[str]) -> str:
    """The report as Markdown."""
    head, *rows = cells(measured)
    lines = ["| " + " | ".join(row).replace("||", "\\|\\|") + " |" for row in (head, ["---"] * len(head), *rows)]
    lines += ["", UNITS, "", verdict(measured).replace("||", "\\|\\|"), ""]
    lines.append(f"The first {len(questions)} questions:\n")
    for question, said in answers_of(samples, questions):
        lines += [f"- **{question}**", *(f"  - {name}: {text}" for name, text in said)]
    return "\n".join([*lines, "", "![The run](run.png)", ""])


def show(measured, samples, questions: list[str]) -> None:
    """Print the report."""
    head, *rows = cells(measured)
    table = Table(caption=UNITS, title="What came out")
    for column, name in enumerate(head):
        table.add_column(name, justify="right" if column else "left", style="bold" if name == PROMPTKD else "")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    console.print(table)
    console.print(verdict(measured), style="bold")
    told = Table(title=f"The first {len(questions)} questions", show_header=False, show_lines=False)
    for question, said in answers_of(samples, questions):
        told.add_row("", question, style="bold")
        for name, text in said:
            told.add_row(name, text)
        told.add_section()
    console.print(told)


@plot_style()
def plot(measured, histories: dict[str, list[dict]], path: Path) -> None:
    """Plot training, the effect of the soft prompt, and the held-out prompts at all four stages."""
    colours = dict(zip(STAGES, (LIGHT.rule, LIGHT.muted, *LIGHT.lines[:2]), strict=True))
    figure = new_figure(9, 8)
    panels = figure.subplots(2, 2).flat

    def line(axes, stage: str, key: str, label: str, style: str = "-") -> None:
        logs = [entry for entry in histories[stage] if key in entry]
        steps, values = [entry["step"] for entry in logs], [entry[key] for entry in logs]
        axes.plot(steps, values, style, color=colours[stage], label=label)
        axes.set(ylabel="nats per token")

    line(panels[0], GKD, "kl/student_teacher", "GKD")
    line(panels[0], PROMPTKD, "kl/student_plain", "PromptKD")
    line(panels[0], PROMPTKD, "kl/student_prompted", "PromptKD, its loss", ":")
    panels[0].set(title="KL(student || teacher) in training")
    panels[0].set_ylim(0, None)
    line(panels[1], PROMPTKD, "kl/prompt_gain", "gain: plain minus prompted")
    line(panels[1], PROMPTKD, "kl/prompted_plain", "drift: KL(prompted || plain)", "--")
    panels[1].axhline(0, color=LIGHT.muted, linewidth=0.8)
    panels[1].set(title="What the soft prompt changes")
    whole_numbers(panels[:2], "step")
    for axes in panels[:2]:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
    groups = ((panels[2], METRICS[:2], f"nats per token, {LOWER}"), (panels[3], [ROUGE_L], f"percent, {HIGHER}"))
    for axes, metrics, label in groups:
        for offset, stage in enumerate(STAGES):
            values = [mean(measured[stage][metric]) for metric in metrics]
            bars = axes.bar(
                [x + 0.2 * offset for x in range(len(metrics))], values, 0.18, color=colours[stage], label=stage
            )
            axes.bar_label(bars, fmt="%.1f" if ROUGE_L in metrics else "%.2f")
        axes.set_xticks([x + 0.3 for x in range(len(metrics))], [metric.replace(", ", ",\n") for metric in metrics])
        axes.set(ylabel=label, title="Held-out prompts")
        axes.margins(y=0.1)
    panels[2].legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=2)
    figure.draw_without_rendering()  # the layout depends on the ticks, and the ticks on the layout
    save_figure(figure, path)
