"""The notebooks are what the chapters say, and the writer handles the book's Markdown."""

import json
import re
import sys
from pathlib import Path

import jupytext
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import write_notebooks as wn  # noqa: E402
from chapters import SITE, executable_chapters  # noqa: E402
from pybtex.database import parse_string  # noqa: E402

BIBLIOGRAPHY = """
@article{one, author = {Snell, Jake and Swersky, Kevin and Zemel, Richard}, year = {2017}}
@article{two, author = {Hsu, Kyle and Finn, Chelsea}, year = {2019}}
"""
LABELS = {
    "eq-a": {"kind": "equation", "number": "2.1", "url": "book/c.html#equation-eq-a"},
    "fig-a": {"kind": "figure", "number": "2.3", "url": "book/c.html#fig-a"},
    "sec-a": {"kind": "section", "number": "2.4", "text": "A section", "url": "book/c.html#sec-a"},
    "ex-a": {"kind": "exercise", "number": "2.2", "url": "book/c.html#ex-a"},
}
HEADER = "---\nkernelspec:\n  display_name: Python 3\n  language: python\n  name: python3\n---\n\n"


@pytest.fixture
def book():
    return wn.Book(LABELS, parse_string(BIBLIOGRAPHY, "bibtex").entries)


def plain(text, book):
    return wn.Writer(book).markdown(text, 1)


def cells(text, book, student=False):
    return wn.Writer(book, student=student).cells(HEADER + text)


@pytest.mark.skipif(not wn.LABELS.exists(), reason="the book is not built: run `make book`")
def test_notebooks_are_current():
    assert wn.stale(wn.notebooks()) == [], "run `make notebooks` and commit the result"


@pytest.mark.skipif(not wn.LABELS.exists(), reason="the book is not built: run `make book`")
def test_two_runs_write_the_same_bytes():
    assert wn.notebooks() == wn.notebooks()


@pytest.mark.parametrize("chapter", executable_chapters(), ids=lambda path: path.stem)
def test_a_notebook_has_the_code_that_the_build_executes(chapter):
    """So that `make test` need not execute it again."""
    executed = [cell.source for cell in jupytext.read(chapter).cells if cell.cell_type == "code"]
    notebook = json.loads((ROOT / "notebooks" / f"{chapter.stem}.ipynb").read_text())
    first, *cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert first.startswith(wn.SETUP) and ("def glue" in first) == any("myst_nb" in source for source in executed)
    assert cells == [source.replace(wn.GLUE_IMPORT + "\n", "") for source in executed]


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("**/[0-9]*.ipynb")), ids=lambda path: path.name)
def test_notebook_is_plain_and_empty(path):
    notebook = json.loads(path.read_text())
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook["cells"])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            text = re.sub(r"(`+).+?\1", "", "".join(cell["source"]))
            assert not re.search(r"\{[\w:-]+\}`|^\s*[:`]{3,}\{|^\([\w-]+\)=|^%", text, re.M), text


def test_roles_and_links_become_plain_links(book):
    assert plain("{cite:t}`one` and {cite:p}`one,two`.", book) == (
        f"[Snell et al. (2017)]({SITE}/book/references.html) and "
        f"([Snell et al., 2017]({SITE}/book/references.html); [Hsu and Finn, 2019]({SITE}/book/references.html))."
    )
    assert plain("{eq}`eq-a`, {numref}`fig-a`", book) == (
        f"[(2.1)]({SITE}/book/c.html#equation-eq-a), [Fig. 2.3]({SITE}/book/c.html#fig-a)"
    )
    assert plain("{ref}`sec-a` {numref}`sec-a`", book) == (
        f"[A section]({SITE}/book/c.html#sec-a) [Section 2.4]({SITE}/book/c.html#sec-a)"
    )
    assert plain("[x](03_b.md#y) and [r](../results/a.json)", book) == (
        f"[x]({SITE}/book/03_b.html#y) and [r]({wn.REPOSITORY}/blob/{wn.BRANCH}/results/a.json)"
    )


def test_code_and_formulas_are_left_alone(book):
    text = "`{cite}` and ``[a](b)`` and $\\mathbb{E}[x](y)$\n\n```python\n% {eq}`nothing`\n(a)=\n```"
    assert plain(text, book) == text


@pytest.mark.parametrize("text", ["$$\nx\n$$ (eq-a)", "```{math}\n:label: eq-a\nx\n```"])
def test_equations_keep_their_number(text, book):
    assert plain(text, book) == "$$\nx\n\\tag{2.1}\n$$"


def test_one_line_equation_and_comment(book):
    assert plain("$$ x $$ (eq-a)\n% computes: umeta_core.f\n\nafter", book) == "$$ x \n\\tag{2.1}\n$$\n\nafter"


def test_nested_fences(book):
    hint, code = "```{hint}\nLook at {eq}`eq-a`.\n```", "```python\nx = 1\n```"
    text = f"````{{exercise}} Title\n:label: ex-a\nDo it.\n\n{hint}\n\n{code}\n````\nafter"
    assert plain(text, book) == (
        "#### Exercise 2.2: Title\n\nDo it.\n\n> **Hint**\n>\n"
        f"> Look at [(2.1)]({SITE}/book/c.html#equation-eq-a).\n\n```python\nx = 1\n```\nafter"
    )


SOLVED = """\
before

```{exercise}
:label: ex-a
Question.
```

```{solution-start} ex-a
:class: dropdown
```
Answer.

```{code-cell} ipython3
answer = 1
```

More answer.

```{solution-end}
```

after

```{code-cell} ipython3
:tags: [scratch]
kept = 1
```
"""


def test_solutions_are_in_the_full_notebook(book):
    sources = [cell.source for cell in cells(SOLVED, book)]
    assert sources[0].endswith("#### Solution\n\nAnswer.") and sources[1] == "answer = 1"
    assert sources[2] == "More answer.\n\nafter" and sources[3] == "kept = 1"


def test_solutions_are_not_in_the_student_notebook(book):
    found = cells(SOLVED, book, student=True)
    assert [cell.source for cell in found] == [
        "before\n\n#### Exercise 2.2\n\nQuestion.",
        "# Write your code here.",
        "after",
        "kept = 1",
    ]
    assert found[-1].metadata["tags"] == ["scratch"]


def test_every_exercise_has_a_cell_to_fill_in(book):
    """Also where the end of a solution and the next exercise are one piece of text."""
    second = SOLVED.replace("after\n", "").replace("before\n", "").replace("ex-a", "ex-b")
    found = [cell.source for cell in cells(SOLVED.replace("after\n", second), book, student=True)]
    assert found.count("# Write your code here.") == 2
    assert found.index("# Write your code here.") == 1 and "Question." in found[2] and found[3] == found[1]


def test_figure_caption_follows_its_cell(book):
    header = "---\nmystnb:\n  figure:\n    name: fig-a\n    caption: See {eq}`eq-a`.\n---"
    code, caption = cells(f"```{{code-cell}} ipython3\n{header}\ndraw()\n```", book)
    assert code.source == "draw()" and caption.source.startswith("*Fig. 2.3. See [(2.1)](")


def test_edit_changes_only_the_ids_it_touches():
    make = wn.nbformat.v4.new_code_cell
    before = wn.with_ids([make("a"), make("b"), make("b")])
    after = wn.with_ids([make("new"), make("a"), make("b"), make("b")])
    assert [cell["id"] for cell in after[1:]] == [cell["id"] for cell in before]
    assert len({cell["id"] for cell in after}) == 4


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("one\n\n{nope}`x`", 3, "{nope}"),
        ("```{nope}\nx\n```", 1, "{nope}"),
        ("````{note}\n\n```{nope}\n```\n````", 3, "{nope}"),
        ("one\n\n{eq}`eq-gone`", 3, "eq-gone"),
        ("{cite:t}`three`", 1, "three"),
        ("```{note}\nopen", 1, "not closed"),
    ],
)
def test_unknown_things_are_errors_with_a_line(text, line, message, book):
    with pytest.raises(wn.ChapterError, match=re.escape(message)) as error:
        cells(text, book)
    assert error.value.line == HEADER.count("\n") + line
