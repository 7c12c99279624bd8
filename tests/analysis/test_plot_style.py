"""The look of all plots."""

import re

import pytest

from trl_promptkd.analysis.plot_style import DARK, LIGHT, new_figure, plot_style, save_figure


matplotlib = pytest.importorskip("matplotlib", reason="the extra `analysis` is not installed")


def luminance(color):
    """Relative luminance, as the Web Content Accessibility Guidelines define it."""
    parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_texts_and_the_first_lines_stand_out_from_the_paper(scheme):
    """3 and 4.5 are what the guidelines want of graphics and of texts."""
    assert min(contrast(color, scheme.paper) for color in scheme.lines[:4]) >= 3
    assert min(contrast(color, scheme.paper) for color in (scheme.ink, scheme.muted)) >= 4.5
    assert len(set(scheme.lines)) == len(scheme.lines)


def test_contrast_is_that_of_black_on_white():
    assert contrast("#000000", "#FFFFFF") == pytest.approx(21)


def test_the_look_is_that_of_the_decorated_function_and_the_users_settings_stay(tmp_path):
    @plot_style(DARK)
    def draw():
        figure = new_figure(2, 1)
        figure.subplots().plot([0, 1])
        save_figure(figure, str(tmp_path / "plot.png"))
        return figure

    before = dict(matplotlib.rcParams)
    figure = draw()
    assert matplotlib.colors.to_hex(figure.get_facecolor()) == DARK.paper
    assert figure.axes[0].xaxis.label.get_color() == DARK.ink
    assert figure.axes[0].xaxis.label.get_fontsize() >= 9
    assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_an_svg_file_is_for_light_and_dark_pages_and_the_same_each_time(tmp_path):
    @plot_style()
    def draw(path):
        figure = new_figure(2, 1)
        figure.subplots().plot([0, 1], color=LIGHT.lines[0], label="a text")
        figure.legend()
        save_figure(figure, path)
        return path.read_text(encoding="utf-8")

    drawn = draw(tmp_path / "plot.svg")
    line, paper = (re.search(rf"(--c\d+): {color}; ", drawn)[1] for color in (LIGHT.lines[0], LIGHT.paper))
    black = re.search(r"(--c\d+): #000000", drawn)[1]
    assert f":root {{ fill: var({black}); " in drawn  # matplotlib leaves it out
    light, dark = drawn.split("@media (prefers-color-scheme: dark)")
    assert f"stroke: var({line})" in light
    assert light.count(LIGHT.lines[0]) == 1  # no line keeps the colour of light pages
    for name, color in ((line, DARK.lines[0]), (paper, DARK.paper)):
        assert f"{name}: {color}" in dark
    assert ">a text</text>" in drawn
    assert draw(tmp_path / "again.svg") == drawn
