"""The book keeps its promises: equations name their code and the site is sound."""

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import check_site  # noqa: E402
from chapters import chapters  # noqa: E402

LABEL = re.compile(r"\((eq-[\w-]+)\)")
COMPUTES = re.compile(r"^%\s*computes:\s*([\w.]+)\s*$")
BUILT = (ROOT / "_build" / "html" / "index.html").exists()
needs_site = pytest.mark.skipif(not BUILT, reason="the book is not built: run `make book`")


def labeled_equations(text: str) -> dict[str, str | None]:
    """label -> the function named by the `% computes:` line that follows the equation, or None."""
    found, lines = {}, text.split("\n")
    in_directive = False
    for i, line in enumerate(lines):
        in_directive |= bool(re.match(r"^\s*[`:]{3,}\{math\}", line))
        end = re.search(r"\$\$\s*\((eq-[\w-]+)\)\s*$", line)
        option = in_directive and re.match(r"^\s*:label:\s*(eq-[\w-]+)", line)
        if not (end or option):
            continue
        last = i
        if option:
            last = next(j for j in range(i, len(lines)) if re.fullmatch(r"\s*[`:]{3,}\s*", lines[j]))
            in_directive = False
        after = next((text for text in lines[last + 1 :] if text.strip()), "")
        marker = COMPUTES.match(after)
        found[(end or option)[1]] = marker[1] if marker else None
    return found


def resolve(dotted: str):
    """The object that `package.module.name` or `package.module.Class.name` means."""
    parts = dotted.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(dotted)


def equations_of_book() -> dict[str, str | None]:
    equations = {}
    for chapter in chapters():
        for label, function in labeled_equations(chapter.read_text()).items():
            assert label not in equations, f"{chapter.name}: {label} is used twice"
            equations[label] = function
    return equations


def labels_in_docstrings() -> dict[str, str]:
    """label -> where an `umeta_core` docstring names it."""
    found = {}
    for path in (ROOT / "umeta_core").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                for label in LABEL.findall(ast.get_docstring(node) or ""):
                    found[label] = f"{path.relative_to(ROOT)}: {getattr(node, 'name', 'module')}"
    return found


def test_finds_equations_in_all_spellings():
    text = "$$\na\n$$ (eq-one)\n\n% computes: m.f\n$$ b $$ (eq-two)\ntext\n"
    text += "```{math}\n:label: eq-three\nc\n```\n% computes: m.C.g"
    assert labeled_equations(text) == {"eq-one": "m.f", "eq-two": None, "eq-three": "m.C.g"}


def test_every_equation_names_its_function_and_the_reverse():
    faults = []
    for label, dotted in equations_of_book().items():
        if dotted is None:
            faults.append(f"{label}: no `% computes: umeta_core....` line follows the equation")
            continue
        try:
            docstring = resolve(dotted).__doc__ or ""
        except (ModuleNotFoundError, AttributeError):
            faults.append(f"{label}: there is no {dotted}")
            continue
        if f"({label})" not in docstring:
            faults.append(f"{label}: the docstring of {dotted} does not name ({label})")
    assert not faults, "\n".join(faults)


def test_every_equation_named_in_the_package_is_in_the_book():
    equations = equations_of_book()
    dangling = {label: place for label, place in labels_in_docstrings().items() if label not in equations}
    assert not dangling


def test_every_equation_is_compared_with_its_function():
    """`tests/test_equations*.py` hold one test per label, called `test_eq_...`."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "tests").glob("test_equations*.py")]
    tests = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    missing = [label for label in equations_of_book() if f"test_{label.replace('-', '_')}" not in tests]
    assert not missing, "no test compares these with the package"


@needs_site
@pytest.mark.parametrize("check", ["broken_links", "images_without_text", "outside_requests"])
def test_site(check):
    assert check_site.pages()
    assert not {page.name: faults for page in check_site.pages() if (faults := getattr(check_site, check)(page))}


@needs_site
def test_site_in_a_browser():
    if not check_site.chromium():
        pytest.skip("no Chromium here: formulas, requests and accessibility were not checked")
    assert not check_site.browser_faults()


def test_the_checks_find_faults(tmp_path):
    """A page with every fault: the checks above can fail."""
    page = tmp_path / "page.html"
    page.write_text(
        '<p id="here"><a href="#here">ok</a><a href="#gone">x</a><a href="gone.html">x</a>'
        '<img src="page.html"><img src="page.html" alt="_images/a.png"><script src="https://cdn.example/a.js"></script>'
    )
    assert check_site.broken_links(page) == ["#gone", "gone.html"]
    assert len(check_site.images_without_text(page)) == 2
    assert check_site.outside_requests(page) == ["https://cdn.example/a.js"]


@pytest.mark.skipif(not check_site.chromium(), reason="no Chromium here")
def test_the_browser_checks_find_faults(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        '<html><body><div style="width: 3000px">wide</div><span class="math">x</span>'
        '<div class="math" id="eq-a" style="width: 500px">'
        '<mjx-container><mjx-math style="display: block; width: 490px"></mjx-math></mjx-container>'
        '<span class="eqno" style="position: absolute; left: 450px">(1)</span></div>'
        '<img src="http://cdn.example/a.png" alt="a"></body></html>'
    )
    faults = "\n".join(check_site.open_page(page, "light", 800, axe=None))
    assert "wider than the screen" in faults and "not drawn" in faults and "asks for http://cdn.example" in faults
    assert "formula is wider" not in faults  # it scrolls on a phone
    assert "formula is wider than the page: eq-a" in "\n".join(check_site.open_page(page, "light", 1200, axe=None))


@pytest.mark.parametrize("html", [
    '<iframe src="https://far.example/a"></iframe>', '<video src="//far.example/a"></video>',
    '<audio src="https://far.example/a"></audio>', '<source src="https://far.example/a">',
    '<link rel="stylesheet" href="https://far.example/a.css">', '<link rel="preconnect" href="https://far.example">',
    '<link rel="stylesheet" href="own.css">',
])  # fmt: skip
def test_whatever_a_browser_fetches_from_outside_is_found(tmp_path, html):
    (tmp_path / "own.css").write_text('@import "https://far.example/b.css"; a { background: url(own.png) }')
    page = tmp_path / "page.html"
    page.write_text(f'{html}<img src="own.png" alt="a"><a href="https://far.example">a</a>')
    (address,) = check_site.outside_requests(page)
    assert "//far.example" in address
