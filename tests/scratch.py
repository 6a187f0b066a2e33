"""Run the from-scratch code of a chapter, to compare it with the library."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def scratch_namespace(chapter: str) -> dict:
    """Names defined by the cells tagged `scratch` in a chapter such as "book/03_protonets.md", run in order."""
    import jupytext

    namespace = {"__name__": chapter}
    for number, cell in enumerate(jupytext.read(ROOT / chapter).cells):
        if cell.cell_type == "code" and "scratch" in cell.metadata.get("tags", []):
            exec(compile(cell.source, f"{chapter}, cell {number}", "exec"), namespace)
    return namespace
