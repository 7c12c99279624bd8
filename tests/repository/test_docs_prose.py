"""How pages are written: each Python block can be copied by itself, and sentences are short.

A block that needs what is above it says so in its first line, `# continues the block above`.
"""

import re
import subprocess
import sys

import pytest
from doc_pages import blocks_of
from markdown_it import MarkdownIt
from paths import ROOT


pytest.importorskip("ruff", reason="the extra `dev` is not installed")

CONTINUES = "# continues the block above"
CODE_LINE = 88  # characters
SENTENCE = 20  # words, on average
SEMICOLONS = 3  # per 1,000 words
BANNED = (
    r"\b(?:leave|leaves|leaving|left) (?:\S+ ){0,6}?away\b",
    r"\bnats an? \w+",
    r"\bbehind (?:the|a|an|its|their) (?:\w+ )?(?:soft prompt|prompt|text|line|message)\b",
    r"\b(?:as asked|was wanted)\b",
)
TEST_NAME = r"\btest_\w+\.py\b"
NAMES_TESTS = "docs/reliability.md"
GENERATED = "docs/errors.md"  # its sentences are the package's messages
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def undefined_names(page, folder):
    """What ruff finds in each Python block by itself, or with all above it if it says that it continues them."""
    above = ""
    for block in blocks_of(page):
        if block.language == "python":
            above = f"{above}\n{block.text}"
            alone = above if block.text.startswith(CONTINUES + "\n") else block.text
            (folder / f"block_at_line_{block.line}.py").write_text(alone, encoding="utf-8")
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--quiet", "--select", "F821"]
    found = subprocess.run([*ruff, "--output-format", "concise", "."], cwd=folder, capture_output=True, text=True)
    assert not found.stderr, found.stderr
    return found.stdout.splitlines()


def paragraphs(page):
    """A page's text without code, tables, HTML, headings and addresses: paragraphs and items of lists. Code and
    formulas between words are a word."""
    tokens, left_out = MarkdownIt("commonmark").enable("table").parse(page), 0
    for token in tokens:
        if token.type in ("table_open", "table_close", "heading_open", "heading_close"):
            left_out += token.nesting
        elif token.type == "inline" and not left_out:
            parts = [
                "Code" if child.type == "code_inline" else child.content or " "
                for child in token.children
                if child.type not in ("html_inline", "image")
            ]
            text = re.sub(r"\$[^$]+\$", "Formula", re.sub(r"\$\$[^$]+\$\$", "", "".join(parts)))
            yield re.sub(r'^=== "\w+"$', "", text)


def sentences(page):
    """Lists of words. A colon, too, ends a sentence if a paragraph ends with it."""
    for text in paragraphs(page):
        for sentence in re.split(r"(?<=[.!?])[)\"”]*\s+(?=[(\"“]*[A-Z0-9])", text):
            if words := [word for word in sentence.split() if re.search(r"\w", word)]:
                yield words


def without_caption(page):
    """Pictures without a line in emphasis below that says what to see. Charts beside each other have one for all."""
    page = re.sub(r'<div class="charts" markdown>.*?</div>\n\n(?=\*\w)', "", page, flags=re.DOTALL)
    return re.findall(r"^!\[.*\]\((.+)\)$(?!\n\*[\w`])", page, re.MULTILINE)


def problems_of(page, folder, name="docs/page.md"):
    found = undefined_names(page, folder)
    for block in (block for block in blocks_of(page) if block.language):  # without one it is what a program prints
        lines = enumerate(block.text.splitlines(), start=block.line + 1)
        found += [f"line {number}: {len(line)} characters of code" for number, line in lines if len(line) > CODE_LINE]
    banned = BANNED if name == NAMES_TESTS else (*BANNED, TEST_NAME)
    text = " ".join(page.split())
    found += sorted({f"phrase: {match[0]}" for phrase in banned for match in re.finditer(phrase, text, re.I)})
    found += [f"no caption: {picture}" for picture in without_caption(page)]
    lengths = [len(words) for words in sentences(page)]
    if lengths and name != GENERATED:
        semicolons = 1000 * sum(text.count(";") for text in paragraphs(page)) / sum(lengths)
        if semicolons >= SEMICOLONS:
            found.append(f"{semicolons:.1f} semicolons per 1,000 words")
        if (mean := sum(lengths) / len(lengths)) >= SENTENCE:
            found.append(f"{mean:.1f} words a sentence")
    return found


@pytest.mark.parametrize("name", PAGES)
def test_page_is_in_order(name, tmp_path):
    problems = problems_of((ROOT / name).read_text(encoding="utf-8"), tmp_path, name)
    assert not problems, "\n".join([name, *problems])


GOOD = """# A heading; with semicolons; and so on

One `x; y`, a [link](https://a.b/c;d;e) and $a; b$.
Second: <span title="a;b">words</span> behind `it`, in 0.5 s

| a; b | c; d; e |
| --- | --- |
| `f` | g; h |

```python
import math

print(math.pi)
```

```bash
echo; echo; echo
```

```python
# continues the block above
print(math.e)
```

- Last one! 2 more?

![A picture](a.svg)
*What it shows.*

<div class="charts" markdown>

![One](b.svg)

![Another](c.svg)

</div>

*What both show.*
"""


def test_words_and_sentences_are_counted_without_code_tables_html_and_addresses():
    assert [" ".join(words) for words in sentences(GOOD)] == [
        "One Code, a link and Formula.",
        "Second: words behind Code, in 0.5 s",
        "Last one!",
        "2 more?",
        "What it shows.",
        "What both show.",
    ]


def test_a_page_in_order_has_no_problem(tmp_path):
    assert problems_of(GOOD, tmp_path) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("# continues the block above\n", "", "Undefined name `math`"),
        ("import math\n", "", "Undefined name `math`"),
        ("print(math.e)", ">>> math.e", "invalid-syntax"),
        ("print(math.e)", f"print({'1' * 82})", "line 22: 89 characters of code"),
        ("Last one!", "Leave the words away!", "phrase: Leave the words away"),
        ("Last one!", "It is in nats a\ntoken!", "phrase: nats a token"),
        ("Last one!", "Behind it, behind its soft prompt!", "phrase: behind its soft prompt"),
        ("Last one!", "As `test_docs.py` says!", "phrase: test_docs.py"),
        ("*What it shows.*", "What it shows.", "no caption: a.svg"),
        ("*What both show.*", "**What** both show.", "no caption: "),
        ("Last one!", "Last; one!", "43.5 semicolons per 1,000 words"),
        ("Last one!", "word " * 98 + "word!", "20.0 words a sentence"),
    ],
)
def test_what_is_not_in_order_is_a_problem(old, new, problem, tmp_path):
    assert old in GOOD
    found = problems_of(GOOD.replace(old, new), tmp_path)
    assert found
    assert all(problem in text for text in found)
