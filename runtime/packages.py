"""Scripts import this before anything else: where a package of requirements.txt is missing, one line says so."""

import importlib.util
import sys

NEEDED = ("torch", "numpy", "schedulefree", "blake3", "tqdm", "rich")  # wherever a script begins

missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if missing:
    print(
        f"error: expected the packages of requirements.txt, got a Python without {missing[0]}, {sys.executable}: "
        "source .venv/bin/activate, or pip install -r requirements.txt",
        file=sys.stderr,
    )
    sys.exit(2)
