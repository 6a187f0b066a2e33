"""Write `notebooks/` and `notebooks/student/` from the chapters: plain Markdown that Colab and Jupyter can show.

    python tools/write_notebooks.py           write them
    python tools/write_notebooks.py --check   fail if one is not what would be written

The book must be built before: its `labels.json` holds the numbers of equations, figures and exercises. The result
depends only on the chapters' text, so two runs give the same bytes. The student edition leaves the solutions out.

A chapter may use only the part of MyST that is handled here; anything else is an error with file and line.
"""

import argparse
import hashlib
import json
import posixpath
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import jupytext
import nbformat
from chapters import BRANCH, REPOSITORY, ROOT, SITE, executable_chapters
from pybtex.database import parse_file

NOTEBOOKS = ROOT / "notebooks"
LABELS = ROOT / "_build" / "html" / "labels.json"
BIBLIOGRAPHY = ROOT / "book" / "references.bib"

ADMONITIONS = {"note", "tip", "warning", "caution", "important", "hint", "danger", "attention", "seealso", "admonition"}
KINDS = {
    kind: f"{kind.capitalize()} " for kind in ("table", "section", "exercise", "algorithm", "definition", "theorem")
}
KINDS |= {"figure": "Fig. "}

SETUP = f"""\
try:
    import umeta_core
except ModuleNotFoundError:
    %pip install -q --no-deps "umeta_core @ git+{REPOSITORY}"
    import umeta_core

print("umeta_core", umeta_core.__version__)"""
# In the book, myst_nb's glue carries a number into the prose. A notebook prints the number under the same name.
GLUE_IMPORT = "from myst_nb import glue"
GLUE = """


def glue(name, variable, display=True):
    \"\"\"Show a number that the text quotes.\"\"\"
    print(f"{name} = {variable}")"""

FENCE = re.compile(r"^\s*(?P<fence>`{3,}|:{3,}|~{3,})(?P<rest>.*)$")
DIRECTIVE = re.compile(r"^\{(?P<name>[\w:+-]+)\}\s*(?P<argument>.*)$")
OPTION = re.compile(r"^:([\w-]+):\s*(.*)$")
TARGET = re.compile(r"^\([\w:.-]+\)=\s*$")
MATH_LABEL = re.compile(r"\$\$\s*\((?P<label>[\w:.-]+)\)\s*$")
# A role, or what must be left as it is: a code span or a formula.
ROLE_OR_VERBATIM = re.compile(
    r"\{(?P<role>[\w:-]+)\}`(?P<content>[^`]+)`|(?P<ticks>`+).+?(?P=ticks)|(?<!\\)\$[^$]+(?<!\\)\$", re.S
)
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<url>[^)\s]+)\)")
TEXT_AND_TARGET = re.compile(r"^(.*?)\s*<([^>]+)>$", re.S)


class ChapterError(Exception):
    """Something in a chapter that a plain notebook cannot show; `line` is where."""

    line: int | None = None

    def at(self, line: int) -> "ChapterError":
        self.line = self.line or line
        return self


@dataclass
class Book:
    """What a chapter may refer to: numbered things and publications."""

    labels: dict
    publications: dict

    def reference(self, label: str, text: str | None = None) -> str:
        """A Markdown link into the site, with the number or title that the site shows."""
        if label not in self.labels:
            raise ChapterError(f"nothing is called {label}")
        entry = self.labels[label]
        if text is None and entry.get("kind") == "equation":
            text = f"({entry['number']})"
        if text is None:
            text = KINDS.get(entry.get("kind"), "") + entry["number"] if "number" in entry else entry["text"]
        return f"[{text}]({SITE}/{entry['url']})"

    def number(self, label: str | None) -> str:
        return self.labels.get(label, {}).get("number", "")

    def citation(self, keys: str, in_text: bool) -> str:
        """`Snell et al. (2017)` in the text, `(Snell et al., 2017)` in parentheses, linked to the reference list."""
        cited = []
        for key in (key.strip() for key in keys.split(",")):
            if key not in self.publications:
                raise ChapterError(f"{key} is not in {BIBLIOGRAPHY.name}")
            entry = self.publications[key]
            names = [" ".join(person.last_names) for person in entry.persons["author"]]
            who = names[0] if len(names) == 1 else " and ".join(names) if len(names) == 2 else f"{names[0]} et al."
            year = entry.fields["year"]
            text = f"{who} ({year})" if in_text else f"{who}, {year}"
            cited.append(f"[{text}]({SITE}/book/references.html)")
        return ", ".join(cited) if in_text else f"({'; '.join(cited)})"


@dataclass
class Writer:
    """Turns the MyST of one chapter into plain Markdown."""

    book: Book
    folder: str = "book"  # of the chapter, from the root: relative links start there
    student: bool = False
    in_solution: bool = field(default=False, init=False)

    # -- inline text -------------------------------------------------------------------------------------------------

    def inline(self, text: str) -> str:
        """Roles and relative links; code spans and formulas stay as they are."""
        parts, position = [], 0
        for match in ROLE_OR_VERBATIM.finditer(text):
            parts.append(self.links(text[position : match.start()]))
            parts.append(self.role(match["role"], match["content"]) if match["role"] else match[0])
            position = match.end()
        return "".join(parts) + self.links(text[position:])

    def role(self, name: str, content: str) -> str:
        titled = TEXT_AND_TARGET.match(content)
        text, target = titled.groups() if titled else (None, content)
        if name in ("cite", "cite:p", "cite:t"):
            return self.book.citation(content, in_text=name == "cite:t")
        if name in ("ref", "prf:ref"):
            entry = self.book.labels.get(target, {})
            title = entry.get("text") if entry.get("kind") == "section" else None
            return self.book.reference(target, text or title)
        if name == "numref":
            return self.book.reference(target, text and text.replace("%s", self.book.number(target)))
        if name == "eq":
            return self.book.reference(content)
        if name == "doc":
            path = posixpath.normpath(posixpath.join(self.folder, target))
            return f"[{text or title_of(ROOT / f'{path}.md')}]({SITE}/{path}.html)"
        if name == "math":
            return f"${content}$"
        if name == "glue:text":
            return f"`{content.split(':')[0]}`"  # printed by the cell that computes it
        raise ChapterError(f"the role {{{name}}} is not handled by tools/write_notebooks.py")

    def links(self, text: str) -> str:
        def absolute(match):
            url, _, anchor = match["url"].partition("#")
            if "://" in url or url.startswith("mailto:"):
                return match[0]
            if not url:
                return self.book.reference(anchor, match["text"] or None)
            path = posixpath.normpath(posixpath.join(self.folder, url))
            if match["image"]:
                address = f"{SITE}/_images/{posixpath.basename(path)}"
            elif path.startswith("book/") and path.endswith(".md"):
                address = f"{SITE}/{path.removesuffix('.md')}.html" + (f"#{anchor}" if anchor else "")
            else:
                address = f"{REPOSITORY}/blob/{BRANCH}/{path}"
            return f"{match['image']}[{match['text']}]({address})"

        return LINK.sub(absolute, text)

    # -- blocks ------------------------------------------------------------------------------------------------------

    def lines(self, lines: list[str], first: int) -> list[str]:
        """Plain Markdown for `lines`, the first of which is line `first` of the chapter."""
        out, i = [], 0
        while i < len(lines):
            try:
                end = block_end(lines, i)
                out += self.block(lines[i:end], first + i)
            except ChapterError as error:
                raise error.at(first + i) from None
            i = end
        return out

    def block(self, lines: list[str], first: int) -> list[str]:
        """One fence, formula, paragraph or comment."""
        if opening := FENCE.match(lines[0]):
            directive = DIRECTIVE.match(opening["rest"])
            return self.directive(directive, lines[1:-1], first + 1) if directive else lines
        if lines[0].startswith("$$"):
            label = MATH_LABEL.search(lines[-1])
            if not label:
                return lines
            last = lines[-1][: label.start()]
            return [*lines[:-1], *([last] if last else []), self.tag(label["label"]), "$$"]
        if lines[0].startswith(r"\begin{"):
            return lines
        if lines[0].startswith("%") or TARGET.match(lines[0]):
            return []
        return self.inline("\n".join(lines)).split("\n")

    def tag(self, label: str) -> str:
        if label not in self.book.labels:
            raise ChapterError(f"nothing is called {label}")
        return rf"\tag{{{self.book.number(label)}}}"

    def directive(self, match: re.Match, body: list[str], first: int) -> list[str]:
        name, argument = match["name"], self.inline(match["argument"].strip())
        options, body, first = split_options(body, first)
        label = options.get("label") or options.get("name")
        number = self.book.number(label)

        if name == "math":
            return ["$$", *body, *([self.tag(label)] if label else []), "$$"]
        if name in ("code-block", "code"):
            return [f"```{argument}", *body, "```"]
        if name in ("solution-start", "solution-end", "solution"):
            return self.solution(name, body, first)
        if name in ("bibliography", "contents", "tableofcontents", "exercise-end", "nb-exec-table"):
            return []

        inner = self.lines(body, first)
        if name in ADMONITIONS:
            return quote(argument or name.capitalize(), inner)
        if name == "margin":
            return quote(argument or "Margin note", inner)
        if name.startswith("prf:"):
            title = " ".join(filter(None, [name[4:].capitalize(), number, f"({argument})" if argument else ""]))
            return quote(title, inner)
        if name in ("exercise", "exercise-start"):
            return [f"#### Exercise {number}{': ' + argument if argument else ''}", "", *inner]
        if name == "table":
            return [f"**Table {number}.** {argument}", "", *inner]
        if name in ("figure", "image"):
            picture = f"![{options.get('alt', '')}]({SITE}/_images/{posixpath.basename(match['argument'].strip())})"
            return [picture, "", *([f"*Fig. {number}. {' '.join(inner).strip()}*", ""] if name == "figure" else [])]
        if name == "dropdown":
            return [f"<details><summary>{argument}</summary>", "", *inner, "", "</details>", ""]
        if name == "tab-set":
            return inner
        if name == "tab-item":
            return [f"**{argument}**", "", *inner]
        raise ChapterError(f"the directive {{{name}}} is not handled by tools/write_notebooks.py")

    def solution(self, name: str, body: list[str], first: int) -> list[str]:
        if name == "solution-start":
            self.in_solution = True
        elif name == "solution-end":
            self.in_solution = False
        if self.student or name == "solution-end":
            return []
        return ["#### Solution", "", *(self.lines(body, first) if name == "solution" else [])]

    # -- cells -------------------------------------------------------------------------------------------------------

    def markdown(self, source: str, first: int) -> str:
        """One Markdown cell. In the student edition the text between solution-start and solution-end is left out."""
        lines = source.split("\n")
        if not self.student:
            return tidy(self.lines(lines, first))
        kept, start = [], 0
        for i, line in enumerate(lines):
            if "{solution-start}" in line:
                kept += self.lines(lines[start:i], first + start)
                self.in_solution = True
            elif "{solution-end}" in line:
                start = block_end(lines, i)
                self.in_solution = False
        if not self.in_solution:
            kept += self.lines(lines[start:], first + start)
        return tidy(kept)

    def cells(self, text: str) -> list:
        """The cells of a chapter, given its whole text."""
        out, position = [], 0
        for cell in jupytext.reads(text, fmt="md:myst").cells:
            position = max(position, text.find(cell.source, position))
            first = text.count("\n", 0, position) + 1
            if cell.cell_type == "code":
                if not (self.student and self.in_solution):
                    out += self.code(cell, first)
                continue
            if plain := self.markdown(cell.source, first):
                out.append(nbformat.v4.new_markdown_cell(plain))
            if self.student and "{solution-start}" in cell.source:
                out.append(nbformat.v4.new_code_cell("# Write your code here."))
        return out

    def code(self, cell, first: int) -> list:
        """The code, and below it the caption of the figure that it draws."""
        tags = cell.metadata.get("tags", [])
        source = "\n".join(line for line in cell.source.split("\n") if line != GLUE_IMPORT)
        out = [nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)} if tags else {})]
        if figure := cell.metadata.get("mystnb", {}).get("figure"):
            try:
                caption = self.inline(" ".join(figure["caption"].split()))
            except ChapterError as error:
                raise error.at(first) from None
            out.append(nbformat.v4.new_markdown_cell(f"*Fig. {self.book.number(figure.get('name'))}. {caption}*"))
        return out


def title_of(chapter: Path) -> str:
    """The chapter's first heading."""
    return next(line[2:].strip() for line in chapter.read_text().splitlines() if line.startswith("# "))


def block_end(lines: list[str], start: int) -> int:
    """Index after the last line of the block that begins at `start`."""
    line = lines[start]
    if opening := FENCE.match(line):
        fence = opening["fence"]
        for i in range(start + 1, len(lines)):
            text = lines[i].strip()
            if len(text) >= len(fence) and set(text) == {fence[0]}:
                return i + 1
        raise ChapterError(f"{line.strip()} is not closed")
    if line.startswith("$$"):
        if "$$" in line[2:]:
            return start + 1
        return next((i + 1 for i in range(start + 1, len(lines)) if "$$" in lines[i]), len(lines))
    if line.startswith(r"\begin{"):
        return next((i + 1 for i in range(start, len(lines)) if lines[i].startswith(r"\end{")), len(lines))
    if starts_block(line):
        return start + 1
    return next((i for i in range(start + 1, len(lines)) if starts_block(lines[i])), len(lines))


def starts_block(line: str) -> bool:
    special = line.startswith(("%", "$$", r"\begin{"))
    return special or not line.strip() or bool(FENCE.match(line) or TARGET.match(line))


def split_options(body: list[str], first: int) -> tuple[dict, list[str], int]:
    """`:key: value` lines at the top of a directive, the rest, and the number of the rest's first line."""
    options, used = {}, 0
    while used < len(body) and (match := OPTION.match(body[used].strip())):
        options[match[1]] = match[2]
        used += 1
    return options, body[used:], first + used


def tidy(lines: list[str]) -> str:
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def quote(title: str, lines: list[str]) -> list[str]:
    return [f"> **{title}**", ">", *(f"> {line}".rstrip() for line in tidy(lines).split("\n")), ""]


def with_ids(cells: list) -> list:
    """Cell ids from the content, so that an edit changes only the ids of the cells it touches."""
    seen = {}
    for cell in cells:
        digest = hashlib.sha1(cell.source.encode()).hexdigest()[:12]
        seen[digest] = seen.get(digest, 0) + 1
        cell["id"] = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
    return cells


def convert(chapter: Path, book: Book, student: bool = False) -> str:
    """The notebook of one chapter as text."""
    target = f"notebooks/{'student/' if student else ''}{chapter.stem}.ipynb"
    colab = REPOSITORY.replace("https://github.com", "https://colab.research.google.com/github")
    badge = (
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab}/blob/{BRANCH}/{target})"
    )
    page = f"[Read this chapter in the book]({SITE}/book/{chapter.stem}.html)"
    text = chapter.read_text()
    setup = SETUP + (GLUE if GLUE_IMPORT in text else "")
    head = [
        nbformat.v4.new_markdown_cell(f"{badge}\n\n{page}"),
        nbformat.v4.new_code_cell(setup, metadata={"tags": ["setup"]}),
    ]
    try:
        cells = Writer(book, student=student).cells(text)
    except ChapterError as error:
        raise ChapterError(f"{chapter.relative_to(ROOT)}:{error.line}: {error}") from None
    notebook = nbformat.v4.new_notebook(cells=with_ids(head + cells))
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "colab": {"name": f"{chapter.stem}.ipynb", "toc_visible": True},
    }
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def notebooks() -> dict[Path, str]:
    """Every file that this script writes, with its content."""
    if not LABELS.exists():
        raise ChapterError("the book is not built yet: run `make book`")
    book = Book(json.loads(LABELS.read_text()), parse_file(str(BIBLIOGRAPHY)).entries)
    written = {}
    for chapter in executable_chapters():
        written[NOTEBOOKS / f"{chapter.stem}.ipynb"] = convert(chapter, book)
        written[NOTEBOOKS / "student" / f"{chapter.stem}.ipynb"] = convert(chapter, book, student=True)
    return written


def stale(expected: dict[Path, str]) -> list[str]:
    """Names of files in `notebooks/` that are missing, different, or belong to no chapter."""
    there = {*NOTEBOOKS.glob("*.ipynb"), *NOTEBOOKS.glob("student/*.ipynb")}
    wrong = there - expected.keys()
    wrong |= {path for path, text in expected.items() if not path.exists() or path.read_text() != text}
    return sorted(str(path.relative_to(ROOT)) for path in wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare, and fail if a notebook is stale")
    arguments = parser.parse_args()
    try:
        expected = notebooks()
    except ChapterError as error:
        sys.exit(str(error))
    wrong = stale(expected)
    if arguments.check:
        sys.exit(f"Stale, run `make notebooks`: {', '.join(wrong)}" if wrong else 0)
    for name in wrong:
        path = ROOT / name
        if path not in expected:
            path.unlink()
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(expected[path])
    print(f"{len(expected)} notebooks, {len(wrong)} changed")


if __name__ == "__main__":
    main()
