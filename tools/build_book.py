"""Execute the chapters and build the site: `make book`.

Jupyter Book runs chapters one after the other, and its cache does not notice a change of the package or of the
results. So the cache is filled here, by two processes, and thrown away when anything changed that a chapter uses.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from chapters import ROOT, executable_chapters

BUILD = ROOT / "_build"
USED = BUILD / "used.txt"  # fingerprint of what a chapter's outputs depend on besides its own text
SHOWN = BUILD / "shown.txt"  # fingerprint of the text, once the site is built
PROCESSES = 2
TIMEOUT = 900  # seconds per cell


def fingerprint(*sources: str) -> str:
    """A hash of files and of everything in folders."""
    digest = hashlib.sha256(sys.version.encode())
    for source in (ROOT / name for name in sources):
        for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def quiet_environment() -> None:
    """Settings for every kernel: no progress bars, one thread per process on two cores, MyST tables."""
    os.environ["UMETA_BOOK"] = "1"
    os.environ.pop("UMETA_RESULTS", None)  # the book is about the records in results/
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // PROCESSES))
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"


def read(path: Path):
    from myst_nb.core.read import myst_nb_reader_plugin

    return myst_nb_reader_plugin(str(path))


def execute(path: Path):
    """Run one chapter on a fresh kernel; returns the notebook with outputs and the seconds it took."""
    from nbclient import NotebookClient

    notebook, start = read(path), time.perf_counter()
    # Timing would be stored in the cells' metadata, which is part of the cache's key.
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    )
    client.execute()
    return notebook, time.perf_counter() - start


def fill_cache(chapters: list[Path]) -> int:
    """Run the chapters whose code is not in the cache. Returns how many; exits with a traceback if one fails."""
    from jupyter_cache import get_cache
    from jupyter_cache.base import CacheBundleIn

    cache, outdated = get_cache(BUILD / ".jupyter_cache"), []
    for path in chapters:
        try:
            cache.match_cache_notebook(read(path))
        except KeyError:
            outdated.append(path)
    failed = False
    with ProcessPoolExecutor(PROCESSES) as pool:
        running = {pool.submit(execute, path): path for path in outdated}
        for future in as_completed(running):
            name = running[future].relative_to(ROOT)
            if error := future.exception():
                message = re.sub(r"\x1b\[[\d;]*m", "", str(error))  # a log shows no colors
                print(f"failed    {name}\n{message}", file=sys.stderr)
                failed = True
                continue
            notebook, seconds = future.result()
            bundle = CacheBundleIn(notebook, str(running[future]), data={"execution_seconds": seconds})
            cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
            print(f"executed  {name} in {seconds:.0f} s", flush=True)
    if failed:
        sys.exit("A chapter failed: the site was not built.")
    return len(outdated)


def build_site() -> None:
    """The HTML, with every warning an error."""
    jupyter_book = str(Path(sys.executable).with_name("jupyter-book"))
    command = [jupyter_book, "build", str(ROOT), "-q", "-W", "-n", "--keep-going"]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        shutil.rmtree(BUILD / ".doctrees", ignore_errors=True)  # else the next build would not repeat the warnings
        sys.exit(built.stderr)


def main() -> None:
    start, ran, page = time.perf_counter(), 0, BUILD / "html" / "index.html"
    used = fingerprint("requirements.txt", "umeta_core", "results")
    shown = fingerprint("_config.yml", "_toc.yml", "book", "tools")
    if not USED.exists() or USED.read_text() != used:
        shutil.rmtree(BUILD, ignore_errors=True)  # pages too: Sphinx does not see that their outputs changed
        BUILD.mkdir()
        USED.write_text(used)
    if not page.exists() or not SHOWN.exists() or SHOWN.read_text() != shown:
        SHOWN.unlink(missing_ok=True)
        quiet_environment()
        ran = fill_cache(executable_chapters())
        build_site()
        SHOWN.write_text(shown)
    print(f"The book: {page.as_uri()}\n{ran} chapters executed, {time.perf_counter() - start:.1f} s in all")


if __name__ == "__main__":
    main()
