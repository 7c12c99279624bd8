"""The look of all plots."""

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
