"""Draws the two pictures of the methods, for light and dark pages:

python docs/pictures.py
"""

from pathlib import Path

from trl_promptkd.analysis.plot_style import both_schemes


IMAGES = Path(__file__).parent / "images"
WIDTH, HEIGHT = 340, 390  # as wide as a phone shows them, so that texts of 13 px are about 10 points everywhere
LEARNERS = ("prompt", "student")
PROMPTED = 'p<tspan dy="3" font-size="12">P</tspan><tspan dy="-3">&#8203;</tspan>'


def colors(scheme):
    """What stays as it is, what shapes the teacher, the student, and the answer."""
    student, prompt, answer = scheme.lines[:3]
    return {"given": scheme.muted, "prompt": prompt, "student": student, "answer": answer}


def css(scheme):
    rules = [f".paper {{ fill: {scheme.paper} }} text {{ fill: {scheme.ink} }} "]
    rules += [
        f"path {{ stroke: {scheme.muted} }} .rule {{ stroke: {scheme.rule} }} #tip path {{ fill: {scheme.muted} }}"
    ]
    for role, color in colors(scheme).items():
        rules.append(f".{role} {{ fill: {color}; stroke: {color} }}")
        if role in LEARNERS:
            rules.append(f".to-{role} {{ stroke: {color} }} #tip-{role} path {{ fill: {color} }}")
    return "\n  ".join(rules)


def box(x, y, width, role, *lines):
    """A rounded box with one or two lines of text in its middle."""
    start = y + 24.5 - 8 * (len(lines) - 1)
    texts = [
        f'<text x="{x + width / 2:g}" y="{start + 16 * i:g}">{line}</text>' for i, line in enumerate(lines) if line
    ]
    shape = f'<rect class="box {role}" x="{x}" y="{y}" width="{width}" height="40" rx="6"/>'
    return "\n".join([shape, *texts])


def answer(x, y, words=("", "", "", "")):
    """The tokens of an answer."""
    return "\n".join(box(x + 20 * i, y, 17, "answer", word) for i, word in enumerate(words))


def text(x, y, words, kind="start"):
    return f'<text class="{kind}" x="{x}" y="{y}">{words}</text>'


def arrow(path, role=""):
    """In the colour of what learns along it, dashed."""
    return f'<path class="learns to-{role}" d="{path}"/>' if role else f'<path class="goes" d="{path}"/>'


def rule(y):
    return f'<path class="rule" d="M12 {y}H{WIDTH - 12}"/>'


def picture(title, *parts):
    tips = "".join(
        f'<marker id="tip{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        '<path d="M0 0L8 4L0 8z"/></marker>'
        for name in ("", *(f"-{role}" for role in LEARNERS))
    )
    ends = " ".join(f".learns.to-{role} {{ marker-end: url(#tip-{role}) }}" for role in LEARNERS)
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    head = f"""<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>{title}</title>
<style>
  text {{ font: 13px sans-serif; text-anchor: middle }} .title {{ font-weight: bold }}
  .start, .title {{ text-anchor: start }}
  .box {{ fill-opacity: .14; stroke-width: 1.5 }} path {{ fill: none; stroke-width: 1.5 }}
  .goes {{ marker-end: url(#tip) }} .learns {{ stroke-width: 2; stroke-dasharray: 5 3 }}
  marker path {{ stroke: none }} .match {{ stroke-dasharray: 1 4; stroke-linecap: round }}
  {ends}
  {both_schemes(css)}
</style>
<defs>{tips}</defs>
<rect class="paper" width="{WIDTH}" height="{HEIGHT}" rx="6"/>"""
    return "\n".join([head, *parts, "</svg>", ""])


def promptkd():
    prompted = box(14, 0, 62, "prompt", "soft", "prompt") + box(80, 0, 78, "given", "teacher", "(frozen)")
    return picture(
        "One step of PromptKD",
        text(14, 24, "1. The student samples an answer", "title"),
        box(14, 36, 76, "given", "question"),
        arrow("M92 56H126"),
        box(130, 36, 76, "student", "student q"),
        arrow("M208 56H242"),
        answer(247, 36),
        text(285.5, 93, "answer", ""),
        rule(106),
        text(14, 130, "2. The soft prompt is tuned", "title"),
        f'<g transform="translate(0 142)">{prompted}</g>',
        arrow("M242 162H162"),
        text(202, 155, "reads", ""),
        answer(247, 142),
        arrow("M45 207V186", "prompt"),
        text(14, 223, f"to lower KL({PROMPTED} ‖ q) + w KL({PROMPTED} ‖ p)"),
        rule(240),
        text(14, 264, "3. The student learns", "title"),
        f'<g transform="translate(0 276)">{prompted}</g>',
        arrow("M160 296H242", "student"),
        text(202, 286, f"KL(q ‖ {PROMPTED})", ""),
        box(247, 276, 77, "student", "student q"),
        text(14, 338, "at every token of the answer."),
        rule(352),
        text(14, 376, f"p: the plain teacher, {PROMPTED}: with the soft prompt"),
    )


def priming():
    words = ("It", "is", "4", "2")
    return picture(
        "Response priming: the two views of a row",
        text(14, 24, "The teacher sees a priming text", "title"),
        box(14, 36, 72, "prompt", "priming", "text"),
        box(90, 36, 72, "given", "question"),
        answer(166, 36, words),
        arrow("M247 56H258"),
        box(262, 36, 66, "given", "teacher p"),
        *(f'<path class="match" d="M{174.5 + 20 * i} 80V197"/>' for i in range(len(words))),
        text(14, 120, "Matched:"),
        text(14, 138, "the same tokens"),
        text(14, 156, "of the answer"),
        arrow("M276 78V196", "student"),
        text(284, 142, "D(q, p)"),
        box(90, 200, 72, "given", "question"),
        answer(166, 200, words),
        arrow("M247 220H258"),
        box(262, 200, 66, "student", "student q"),
        text(14, 265, "The student does not", "title"),
        rule(284),
        text(14, 310, "At each of these tokens the student learns from"),
        text(14, 330, "D(q, p), its distance to the teacher. It also learns"),
        text(14, 350, "the answer itself, by cross-entropy."),
        text(14, 376, "Priming text and question are not trained on."),
    )


def main():
    for name, draw in PICTURES.items():
        (IMAGES / name).write_text(draw(), encoding="utf-8")


PICTURES = {"promptkd.svg": promptkd, "priming.svg": priming}

if __name__ == "__main__":
    main()
