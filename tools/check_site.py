"""Check the built site: `python tools/check_site.py [folder]`.

Every internal link and anchor exists; every image says what it shows; no page asks another host for anything; and,
where Chromium is there, each page is opened in light and dark: formulas are drawn, nothing is requested from outside,
the page does not scroll sideways on a phone, and axe (when npm can fetch it) finds no accessibility fault.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup
from chapters import ROOT

SITE = ROOT / "_build" / "html"
AXE = "axe-core@4.14.1"
# Elements that make a browser fetch something while it shows the page; an <a> does not.
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}
FETCHED_LINKS = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload", "manifest"}


def pages(site: Path = SITE) -> list[Path]:
    """The pages of the book."""
    return sorted(site.glob("book/*.html"))


@cache
def soup(page: Path) -> BeautifulSoup:
    return BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")


@cache
def anchors(page: Path) -> set[str]:
    return {tag[name] for tag in soup(page).find_all(True) for name in ("id", "name") if tag.has_attr(name)}


def broken_links(page: Path) -> list[str]:
    """Links and sources that lead to no file, or to no place within one."""
    broken = []
    for tag in soup(page).find_all(True):
        address = tag.get("href") or tag.get("src")
        if not address or urlsplit(address).scheme or address.startswith("//"):
            continue
        path, anchor = unquote(urlsplit(address).path), unquote(urlsplit(address).fragment)
        target = (page.parent / path).resolve() if path else page
        missing = anchor and target.suffix == ".html" and target.exists() and anchor not in anchors(target)
        if not target.exists() or missing:
            broken.append(address)
    return broken


def images_without_text(page: Path) -> list[str]:
    """Images whose alternative text is missing or is only a path. Decoration is marked by an empty text and a role."""
    wrong = []
    for image in soup(page).find_all("img"):
        text = image.get("alt", "").strip()
        decoration = image.get("role") == "presentation" or image.get("aria-hidden") == "true"
        if not decoration and (not text or re.search(r"[\\/]|\.(png|svg|jpe?g|gif)$", text)):
            wrong.append(f"{image.get('src')} (alt: {text!r})")
    return wrong


def outside_requests(page: Path) -> list[str]:
    """Addresses on other hosts that the page itself or one of its style sheets asks for."""
    asked = [tag.get(attribute, "") for name, attribute in FETCHED.items() for tag in soup(page).find_all(name)]
    for link in soup(page).find_all("link"):
        if FETCHED_LINKS & set(link.get("rel", [])):
            asked.append(link.get("href", ""))
            sheet = page.parent / unquote(urlsplit(link.get("href", "")).path)
            if sheet.suffix == ".css" and sheet.exists():
                asked += re.findall(r"(?:url\(|@import)\s*['\"]?((?:https?:)?//[^'\")\s]+)", sheet.read_text())
    return [address for address in asked if re.match(r"(https?:)?//", address)]


# -- with a browser ----------------------------------------------------------------------------------------------------


def chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def fetch_axe() -> Path | None:
    """The accessibility checker as one script, fetched once by npm; None when that is impossible."""
    folder = Path(sys.prefix) / "axe"  # beside the other tools, not in _build, which is often emptied
    script = folder / "node_modules" / "axe-core" / "axe.min.js"
    if not script.exists() and shutil.which("npm"):
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--no-save", "--ignore-scripts", "--prefix", str(folder), AXE]
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(command, capture_output=True, timeout=120)
    return script if script.exists() else None


# Runs in the page when it has loaded and leaves its findings in the page, where --dump-dom shows them.
PROBE = """
// Whether a formula goes on under its own number or beyond its box; on a phone it scrolls.
function covered(box) {
  const edge = (box.querySelector(".eqno") ?? box).getBoundingClientRect();
  const limit = box.querySelector(".eqno") ? edge.left : edge.right;
  return [...box.querySelectorAll("mjx-math")].some(e => e.getBoundingClientRect().right > limit + 1);
}
window.addEventListener("load", async () => {
  document.documentElement.dataset.theme = "THEME";
  await (window.MathJax?.startup?.promise ?? Promise.resolve());
  const found = {
    undrawn: document.querySelectorAll("span.math, div.math").length
      - [...document.querySelectorAll("span.math, div.math")].filter(e => e.querySelector("mjx-container")).length,
    faulty: [...document.querySelectorAll("mjx-merror")].map(e => e.textContent),
    cut: innerWidth < 1000 ? [] : [...document.querySelectorAll("div.math")].filter(covered)
      .map(e => e.id || "in " + e.closest("section")?.id),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    outside: performance.getEntriesByType("resource").map(e => e.name).filter(name => /^https?:/.test(name)),
    axe: [],
  };
  if (window.axe) {
    const result = await axe.run(document, {resultTypes: ["violations"]});
    found.axe = result.violations.map(v => v.id + ": " + v.nodes.map(n => n.target.join(" ")).slice(0, 3).join(", "));
  }
  const report = document.createElement("pre");
  report.id = "probe";
  report.textContent = JSON.stringify(found);
  document.body.append(report);
});
"""


def open_page(page: Path, theme: str, width: int, axe: Path | None) -> list[str]:
    """Faults of one page as a browser shows it. A copy with the probe lies beside the page while it is looked at."""
    scripts = f"<script>{axe.read_text()}</script>" if axe else ""
    scripts += f"<script>{PROBE.replace('THEME', theme)}</script>"
    copy = page.with_name(f".{page.stem}-{theme}-{width}.html")
    copy.write_text(page.read_text().replace("</body>", f"{scripts}</body>"))
    name = f"{page.name} ({theme}, {width} px)"
    try:
        for _ in range(3):  # the browser's virtual clock now and then runs out before the page's scripts end
            report = re.search(r'<pre id="probe"[^>]*>(.*?)</pre>', dumped(copy, width), re.S)
            if report:
                return [f"{name}: {fault}" for fault in faults(report[1])]
    finally:
        copy.unlink()
    return [f"{name}: the page's scripts did not run to the end"]


def dumped(page: Path, width: int) -> str:
    """The document after its scripts have run, in a browser that reaches no host."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            *(chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
            *("--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND"),
            *(f"--user-data-dir={profile}", f"--window-size={width},900", "--virtual-time-budget=30000", "--dump-dom"),
            page.as_uri(),
        ]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
        except subprocess.TimeoutExpired:
            return ""


def faults(report: str) -> list[str]:
    found = json.loads(BeautifulSoup(report, "html.parser").text)
    out = [f"asks for {address}" for address in found["outside"]]
    out += [f"formula error: {text}" for text in found["faulty"]]
    out += [f"axe: {text}" for text in found["axe"]]
    out += [f"a formula is wider than the page: {label}" for label in found["cut"]]
    if found["undrawn"]:
        out.append(f"{found['undrawn']} formulas were not drawn")
    if found["overflow"] > 1:
        out.append(f"the page is {found['overflow']} px wider than the screen")
    return out


def browser_faults(site: Path = SITE) -> list[str]:
    """Open every page on a desktop in light and on a phone in dark."""
    axe = fetch_axe()
    if axe is None:
        print("accessibility pass skipped: axe could not be fetched by npm")
    views = [(page, theme, width) for page in pages(site) for theme, width in (("light", 1200), ("dark", 500))]
    with ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1))) as pool:
        return [fault for faults in pool.map(lambda view: open_page(*view, axe), views) for fault in faults]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", nargs="?", type=Path, default=SITE)
    site = parser.parse_args().site
    wrong = []
    for page in pages(site):
        wrong += [f"{page.name}: broken link {link}" for link in broken_links(page)]
        wrong += [f"{page.name}: no text for image {image}" for image in images_without_text(page)]
        wrong += [f"{page.name}: asks for {address}" for address in outside_requests(page)]
    if chromium():
        wrong += browser_faults(site)
    else:
        print("browser pass skipped: no Chromium here")
    print(f"{len(pages(site))} pages, {len(wrong)} faults", *wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
