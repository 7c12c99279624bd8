"""What the plots share: one look, readable by colour-blind readers and in print, and files that are whole."""

from collections.abc import Iterable, Sequence
from typing import Any

from ..files import whole_file


__all__ = ["check_matplotlib", "finish_axes", "line_colors", "new_figure", "save_figure"]

# Okabe and Ito's palette, without its yellow, which is too light for lines on white
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def check_matplotlib() -> None:
    """Refuse to start hours of work if plots cannot be made."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'The plots need matplotlib, which is not installed. Install it with `pip install "trl_promptkd[analysis]"`.'
        ) from error


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches; without pyplot, whose state and windows belong to the user."""
    check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def line_colors(number: int) -> Sequence[Any]:
    """As many colours, all different: of a colour-blind-safe palette, or from dark to light if it has too few (viridis)."""
    if number <= len(_COLORS):
        return _COLORS[:number]
    import matplotlib

    shades = matplotlib.colormaps["viridis"]
    return [shades(0.92 * index / (number - 1)) for index in range(number)]


def finish_axes(panels: Iterable[Any], xlabel: str) -> None:
    """Of plots over whole numbers: steps, layers, positions."""
    for panel in panels:
        panel.set_xlabel(xlabel)
        panel.grid(alpha=0.3, linewidth=0.5)
        panel.xaxis.get_major_locator().set_params(integer=True)


def save_figure(figure: Any, path: str) -> None:
    """Write a PNG file."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
