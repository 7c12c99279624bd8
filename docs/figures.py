"""Draws the figure of losses.md, for light and for dark pages: python docs/figures.py"""

from functools import partial
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

from trl_promptkd.divergences import forward_kl, generalized_jsd, reverse_kl


IMAGES = Path(__file__).parent / "images"
TOKENS = torch.arange(40.0)
# Text and lines, background, and a palette that colour-blind readers can tell apart on it (Okabe and Ito)
SCHEMES = {
    "divergences.png": ("#222222", "#ffffff", ("#0072B2", "#009E73", "#D55E00", "#AA5588")),
    "divergences_dark.png": ("#dddddd", "#1e2129", ("#56B4E9", "#2fc79a", "#ff9d5c", "#e5a3cc")),
}
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


def main():
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
    for name, (ink, paper, colors) in SCHEMES.items():
        look = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink)
        with matplotlib.rc_context({**look, "font.size": 11}):
            figure = Figure(figsize=(9, 3.6), layout="constrained", facecolor=paper)
            left, right = figure.subplots(1, 2)
            left.bar(TOKENS, teacher.exp(), width=1, color=ink, alpha=0.25, label="teacher")
            for (label, student), color in zip(best.items(), colors, strict=True):
                left.plot(TOKENS, student.exp(), color=color, linewidth=2, label=label, linestyle=STYLES[label])
            left.set(title="The best single bell curve under each", xlabel="token", ylabel="probability")
            left.set_ylim(top=0.19)
            left.legend(fontsize=9, labelcolor=ink, frameon=False, loc="upper right")
            right.plot(betas, jsd, color=colors[1], linewidth=2, label="generalized JSD")
            right.plot(0, forward_kl(q, p), "o", color=colors[0], label="forward KL (0.0)", clip_on=False, zorder=3)
            right.plot(1, reverse_kl(q, p), "o", color=colors[2], label="reverse KL (1.0)", clip_on=False, zorder=3)
            for end in (0, 1):
                right.plot(end, 0, "o", color=colors[1], markerfacecolor=paper, clip_on=False, zorder=3)
            right.set(title="Two distributions of three tokens", xlabel="beta", ylabel="nats", xlim=(0, 1))
            right.set_ylim(bottom=0)
            right.legend(fontsize=9, labelcolor=ink, frameon=False, loc="center")
            for axes in (left, right):
                axes.set_facecolor(paper)
                axes.spines[["top", "right"]].set_visible(False)
            figure.savefig(IMAGES / name, dpi=130)
    print("forward, reverse:", float(forward_kl(q, p)), float(reverse_kl(q, p)))
    print({beta: round(float(generalized_jsd(q, p, beta)), 4) for beta in (0.01, 0.1, 0.5, 0.9, 0.99)})


if __name__ == "__main__":
    main()
