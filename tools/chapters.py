"""The list of chapters and the addresses of the project, read from the book's own configuration."""

from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())
REPOSITORY = CONFIG["repository"]["url"].rstrip("/")
BRANCH = CONFIG["repository"]["branch"]
SITE = CONFIG["html"]["baseurl"].rstrip("/")


def chapters() -> list[Path]:
    """All pages of `_toc.yml`, in reading order."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    files = [toc["root"]] + [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    return [ROOT / f"{name}.md" for name in files]


def executable_chapters() -> list[Path]:
    """The pages with code: those with a kernel in their header."""
    return [path for path in chapters() if "\nkernelspec:" in path.read_text().split("\n---", 1)[0]]
