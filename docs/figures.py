"""Draws figures of losses.md, analysis.md, primed_distill.md and teacher_cache.md, and the sketches of cheat_sheet.md:

python -m docs.figures
"""

import math
import re
from functools import partial
from pathlib import Path

import torch
from pandas import DataFrame

from trl_promptkd.analysis.plot_style import (
    HIGHER,
    LIGHT,
    LOWER,
    both_schemes,
    new_figure,
    plot_style,
    save_figure,
    whole_numbers,
)
from trl_promptkd.analysis.plots import plot_classes
from trl_promptkd.divergences import forward_kl, generalized_jsd, reverse_kl


DOCS = Path(__file__).parent
IMAGES = DOCS / "images"
TOKENS = torch.arange(40.0)
DIVERGENCES = {
    "forward KL (0.0)": forward_kl,
    "JSD (0.5)": partial(generalized_jsd, beta=0.5),
    "reverse KL (1.0)": reverse_kl,
    "JSD (0.9)": partial(generalized_jsd, beta=0.9),
}


STYLES = dict(zip(DIVERGENCES, ("-", (0, (4, 2)), "-", (0, (4, 2))), strict=True))


def bell(center, width):
    """Log-probabilities over 40 tokens, `(..., 40)`, of a discrete bell curve."""
    return (-0.5 * ((TOKENS - center) / width) ** 2).log_softmax(dim=-1)


# What curves look like that mean trouble. Nothing is measured here: of each curve its name and a shape over 0 to 1
SKETCHES = {
    "trouble_follows.svg": (
        "The prompt follows the student",
        {
            "kl/student_plain": lambda x: 0.78 - 0.12 * x,
            "kl/prompt_gain": lambda x: 0.08 + 0.46 * x,
            "eval_forward_kl": lambda x: 0.86 - 0.1 * x + 0.2 * x**2,
        },
    ),
    "trouble_collapse.svg": (
        "The student collapses",
        {
            "eval_reverse_kl": lambda x: 0.15 + 0.5 * math.exp(-3 * x),
            "eval_forward_kl": lambda x: 0.8 - 0.4 * x + 0.5 * x**2,
        },
    ),
    "trouble_cut.svg": (
        "Samples never stop",
        {
            "rollout/mean_length": lambda x: 0.9 - 0.45 * math.exp(-6 * x),
            "rollout/terminated_share": lambda x: 0.06 + 0.34 * math.exp(-6 * x),
        },
    ),
}


def sketch(title, lines):
    """Curves with their names, as SVG for light and dark pages."""
    width, height, bottom = 300, 250, 150
    styles = {".paper": ("fill", "paper"), "text": ("fill", "ink"), ".axis": ("stroke", "muted")}

    def css(scheme):
        rules = [f"{part} {{ {what}: {getattr(scheme, color)} }}" for part, (what, color) in styles.items()]
        rules += [f".s{index} {{ stroke: {scheme.lines[index]} }}" for index in range(len(lines))]
        return " ".join(rules)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"><title>{title}</title>',
        "<style>",
        "  text { font: 13px sans-serif } path { fill: none; stroke-width: 2.5; stroke-linecap: round }",
        "  .title { font-weight: bold } .axis { stroke-width: 1 }",
        "  .s1 { stroke-dasharray: 8 5 } .s2 { stroke-dasharray: 2 5 }",
        f"  {both_schemes(css)}",
        "</style>",
        f'<rect class="paper" width="{width}" height="{height}" rx="6"/>',
        f'<text class="title" x="14" y="22">{title}</text>',
        f'<path class="axis" d="M14 34V{bottom}H286"/>',
        f'<text x="286" y="{bottom + 17}" text-anchor="end">steps</text>',
    ]
    for index, (name, shape) in enumerate(lines.items()):
        points = [f"{14 + 272 * i / 24:.1f},{bottom - 112 * shape(i / 24):.1f}" for i in range(25)]
        y = bottom + 40 + 21 * index
        parts.append(f'<path class="s{index}" d="M{" ".join(points)}"/>')
        parts.append(f'<path class="s{index}" d="M14 {y - 4}H48"/><text x="58" y="{y}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


@plot_style()
def draw(teacher, best, betas, jsd, ends):
    """On the left the closest students, on the right the generalized JSD over beta, and both KLs."""
    colors = LIGHT.lines
    figure = new_figure(9, 3.8)
    left, right = figure.subplots(1, 2)
    left.bar(TOKENS, teacher.exp(), width=1, color=LIGHT.ink, alpha=0.25, label="teacher")
    for (label, student), color in zip(best.items(), colors, strict=False):
        left.plot(TOKENS, student.exp(), color=color, linewidth=2, label=label, linestyle=STYLES[label])
    left.set(title="The best single bell curve under each", xlabel="token", ylabel="probability", ylim=(0, 0.21))
    left.legend(loc="upper right")
    right.plot(betas, jsd, color=colors[1], linewidth=2, label="generalized JSD")
    for beta, name, color in ((0, "forward KL (0.0)", colors[0]), (1, "reverse KL (1.0)", colors[2])):
        right.plot(beta, ends[beta], "o", color=color, label=name, clip_on=False, zorder=3)
        right.plot(beta, 0, "o", color=colors[1], markerfacecolor=LIGHT.paper, clip_on=False, zorder=3)
    right.set(title="Two distributions of three tokens", xlabel="beta", ylabel="nats", xlim=(0, 1))
    right.set_ylim(bottom=0)
    right.legend(loc="center")
    save_figure(figure, IMAGES / "plots" / "divergences.svg")


# Rows of the table in primed_distill.md that are drawn
MEASURES = {
    "eval_ce": ("Cross-entropy", f"nats per token ({LOWER})"),
    "eval_kl/student_teacher": ("KL(student || primed teacher)", f"nats per token ({LOWER})"),
    "eval_teacher/top1_agreement": ("Same likeliest token", f"share of tokens ({HIGHER})"),
}


@plot_style()
def draw_primed():
    """The run of primed_distill.md on held-out questions, from that page's table."""
    page = (DOCS / "primed_distill.md").read_text(encoding="utf-8")
    figure = new_figure(9, 3)
    panels = figure.subplots(1, len(MEASURES))
    for panel, (name, (title, ylabel)), color in zip(panels, MEASURES.items(), LIGHT.lines, strict=False):
        cells = re.search(rf"^\| `{name}`[^|]*\|(.+)\|$", page, re.MULTILINE)[1]
        panel.plot([float(cell) for cell in cells.split("|")], "o-", color=color, linewidth=2)
        panel.set(title=title, ylabel=ylabel)
        panel.set_ylim(bottom=0)
    whole_numbers(panels, "epoch")
    save_figure(figure, IMAGES / "plots" / "primed_gsm8k.svg")


def draw_cache():
    """What a cache stores, from the table of teacher_cache.md."""
    from benchmarks.teacher_cache import draw

    page = (DOCS / "teacher_cache.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- table: teacher-cache kept -->(.*?)<!-- end -->", page, re.DOTALL)[1]
    rows = re.findall(r"^\| (.+?) \| (\d+) \| ([\d.]+) \|$", table, re.MULTILINE)
    kept = {name.strip("*`"): {"bytes_per_token": int(size), "kl_mean": float(kl)} for name, size, kl in rows}
    draw({"kept": kept}, IMAGES / "plots" / "teacher_cache.svg")


# What `trl-promptkd analyze prompt` measured for analysis.md: tokens, and both KLs in nats per token
CLASSES = {
    "first token": (24, 0.0878, 0.968),
    "word start": (448, 0.0871, 0.997),
    "word continuation": (140, 0.117, 1.69),
    "number": (38, 0.0487, 0.924),
    "punctuation": (90, 0.0747, 0.996),
    "whitespace": (11, 0.136, 1.14),
    "end of text": (13, 0.0834, 1.11),
    "other": (2, 0.286, 2.07),
    "all tokens": (766, 0.0904, 1.13),
}


def main():
    draw_primed()
    draw_cache()
    classes = DataFrame.from_dict(CLASSES, "index", columns=["tokens", "prompted_plain", "prompted_student"])
    plot_classes(classes, IMAGES / "plots" / "prompt_classes.svg")
    for name, (title, lines) in SKETCHES.items():
        (IMAGES / name).write_text(sketch(title, lines), encoding="utf-8")
    teacher = torch.logaddexp(bell(11, 2.5) + torch.tensor(0.65).log(), bell(28, 3.5) + torch.tensor(0.35).log())
    centers, widths = torch.meshgrid(torch.linspace(5, 35, 241), torch.linspace(1, 14, 105), indexing="ij")
    students = bell(centers.reshape(-1, 1), widths.reshape(-1, 1))
    best = {}
    for name, divergence in DIVERGENCES.items():
        values = divergence(students, teacher.expand_as(students))
        best[name] = students[values.argmin()]
        print(
            f"{name}: center {centers.flatten()[values.argmin()]:.2f}, width {widths.flatten()[values.argmin()]:.2f}"
        )

    p, q = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.1, 0.3, 0.6]).log()
    betas = torch.linspace(0.001, 0.999, 999)
    jsd = [generalized_jsd(q, p, float(beta)) for beta in betas]
    draw(teacher, best, betas, jsd, [forward_kl(q, p), reverse_kl(q, p)])
    print("forward, reverse:", float(forward_kl(q, p)), float(reverse_kl(q, p)))
    print({beta: round(float(generalized_jsd(q, p, beta)), 4) for beta in (0.01, 0.1, 0.5, 0.9, 0.99)})


if __name__ == "__main__":
    main()
