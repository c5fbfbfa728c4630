"""Copies of the project that cost nothing: links to its parts, an environment of its own, folders to write to."""

import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.ranks import ROOT

PACKAGES = ("gossip", "mingru", "preparation", "runtime", "training")


def make_project(folder: Path, environment: str = ".venv") -> None:
    """Make `folder` a place to call the project's scripts from.

    The environment holds no packages: it finds those of this process's, and passes for one that is in step.
    """
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".sh", ".txt") or path.name in PACKAGES:
            (folder / path.name).symlink_to(path)
    (folder / "logs").mkdir()
    made = folder / environment
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", made], check=True)
    packages = next((made / "lib").glob("python*/site-packages"))
    (packages / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    everything = "".join(path.read_text() for path in sorted(ROOT.glob("requirements*.txt")))
    (made / "installed_requirements.txt").write_text((ROOT / "requirements.txt").read_text() + everything)
