"""Stop with one clear line when this Python cannot make the environment."""

import sys

version = sys.version_info[:2]
if not (3, 10) <= version <= (3, 13):
    sys.exit(f"Python 3.10 to 3.13 is needed, this is {version[0]}.{version[1]}. Try: make book PYTHON=python3.12")
try:
    import ensurepip  # noqa: F401  Debian ships Python without it
    import venv  # noqa: F401
except ImportError:
    sys.exit("This Python has no venv. On Debian or Ubuntu: sudo apt-get install python3-venv")
