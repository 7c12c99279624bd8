"""One look for all plots of this package and of its pages, on a light and on a dark background."""

import io
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from ..files import whole_file, write_text


__all__ = [
    "DARK",
    "HIGHER",
    "LIGHT",
    "LOWER",
    "Scheme",
    "both_schemes",
    "check_matplotlib",
    "new_figure",
    "plot_style",
    "save_figure",
    "whole_numbers",
    "written_out",
]


class Scheme(NamedTuple):
    """Colours as hexadecimal RGB."""

    paper: str
    ink: str
    """Texts and axes."""
    muted: str
    """Lines to compare with, and what is less important."""
    rule: str
    """Grids."""
    lines: tuple[str, ...]
    """Colours that colour-blind readers can tell apart, the most visible ones first."""


# Okabe and Ito's palette. Its yellow is too light for lines on white, and its black for lines on dark paper
LIGHT = Scheme(
    paper="#ffffff",
    ink="#222222",
    muted="#6b7280",
    rule="#d8dde3",
    lines=("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
)
DARK = Scheme(
    paper="#1e2129",
    ink="#dddddd",
    muted="#9aa5b1",
    rule="#3a414c",
    lines=("#56B4E9", "#FF9D5C", "#2FC79A", "#E5A3CC", "#F0E442", "#7FA8FF", "#FFFFFF"),
)
LOWER, HIGHER = "lower is better", "higher is better"
FONT_SIZE = 11  # points. A figure of 9 inches has texts of 9 points on a page that is 7.4 inches wide
_DOTS_PER_INCH = 110
# Texts stay texts, in the reader's font, and the same figure gives the same file
_SVG: Any = {"svg.fonttype": "none", "svg.hashsalt": "trl_promptkd"}


def both_schemes(rules: Callable[[Scheme], str]) -> str:
    """CSS of an SVG file: the rules for light pages, and those for readers that prefer dark ones."""
    return f"{rules(LIGHT)}\n  @media (prefers-color-scheme: dark) {{ {rules(DARK)} }}"


def check_matplotlib() -> None:
    """Fail before hours of work if plots cannot be made."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "The plots need matplotlib, which is not installed. Install it with "
            '`pip install "trl_promptkd[analysis]"`.'
        ) from error


@contextmanager
def plot_style(scheme: Scheme = LIGHT) -> Iterator[None]:
    """Plots drawn inside, or in a function that this decorates, have the package's look. The user's settings stay."""
    check_matplotlib()
    import matplotlib

    settings: Any = {
        "font.size": FONT_SIZE,
        "axes.titlesize": FONT_SIZE,
        "legend.fontsize": FONT_SIZE,
        "legend.title_fontsize": FONT_SIZE,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": scheme.paper,
        "figure.facecolor": scheme.paper,
        "savefig.facecolor": scheme.paper,
        "grid.color": scheme.rule,
        "grid.linewidth": 0.6,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color"),
            scheme.ink,
        ),
    }
    with matplotlib.rc_context(settings):
        yield


def new_figure(width: float, height: float) -> Any:
    """An empty figure of a size in inches. Made without pyplot, whose state and windows belong to the user."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def whole_numbers(panels: Iterable[Any], xlabel: str) -> None:
    """Set up the axes of plots over whole numbers, such as steps, layers or positions."""
    for panel in panels:
        panel.set_xlabel(xlabel)
        panel.grid()
        panel.xaxis.get_major_locator().set_params(integer=True)


def written_out(*axes: Any) -> None:
    """Of logarithmic axes: 0.5, 1, 2, 5, 10 and so on, without powers of ten."""
    from matplotlib.ticker import LogLocator, NullLocator

    for axis in axes:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:,g}")
        axis.set_minor_locator(NullLocator())


def save_figure(figure: Any, path: Any) -> None:
    """Write a PNG file. If `path` ends in `.svg`, write an SVG file for light and dark pages.

    In the SVG file, the colours of `LIGHT` become those of `DARK` if the reader prefers dark.
    """
    if not str(path).endswith(".svg"):
        with whole_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=_DOTS_PER_INCH)
        return
    import matplotlib

    with io.StringIO() as file, matplotlib.rc_context(_SVG):
        figure.savefig(file, format="svg", dpi=2 * _DOTS_PER_INCH, metadata={"Date": None})
        drawn = file.getvalue()
    write_text(path, _with_both_schemes(drawn))


def _with_both_schemes(svg: str) -> str:
    """Colours of `LIGHT` become variables, which have other values on dark pages."""
    names = {color.lower(): f"--c{index}" for index, color in enumerate(_colors(LIGHT))}
    svg = re.sub(f"(?<=fill: |roke: )({'|'.join(names)})", lambda match: f"var({names[match[0]]})", svg)
    fill = f"fill: var({names['#000000']})"  # matplotlib does not write that of what is black

    def rules(scheme: Scheme) -> str:
        values = [f"{name}: {color}" for name, color in zip(names.values(), _colors(scheme), strict=True)]
        return f":root {{ {'; '.join([fill, *values])} }}"

    return svg.replace("</svg>", f"<style>{both_schemes(rules)}</style>\n</svg>")


def _colors(scheme: Scheme) -> list[str]:
    return [scheme.paper, scheme.ink, scheme.muted, scheme.rule, *scheme.lines]
