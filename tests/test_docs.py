"""What the documentation promises to name, it names: every file, every column, every event."""

import re
from pathlib import Path

import pytest

from gossip import event_log
from tests.test_imports import PACKAGES, ROOT, sources
from training import metrics

EVENT = re.compile(r'\b(?:event|note|_record)[(,]\s*"(\w+)"')  # of this rank alone; those of exchanges are below
ENDINGS = {"sent", "merged", "averaged", "tied", "busy", "failed"}


def map_of_files() -> dict[str, str]:
    """The parts of the file map in docs/architecture.md by what they begin with: `training/`; "" for the scripts."""
    house = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
    parts = re.split(r"^(\w+/) ", house, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def is_named(path: Path, part: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(path.name)}(?!\w)", part) is not None


@pytest.mark.parametrize("package", PACKAGES)
def test_architecture_names_every_file_of_a_package(package):
    part = map_of_files()[f"{package}/"]
    files = [path for path in [*sources(package), *ROOT.glob(f"{package}/*.sh")] if path.name != "__init__.py"]
    assert [path.name for path in files if not is_named(path, part)] == []
    named = {name for name in re.findall(r"\b\w+\.(?:py|sh)\b", part) if not (ROOT / name).exists()}
    assert named <= {path.name for path in files}


def test_architecture_names_every_script():
    scripts = [path for ending in ("py", "sh", "R") for path in ROOT.glob(f"*.{ending}")]
    assert len(scripts) > 8 and [path.name for path in scripts if not is_named(path, map_of_files()[""])] == []


def explained(heading: str) -> list[str]:
    """The names in the first cells of the tables under a heading of docs/metrics.md, in their order."""
    _, section = (ROOT / "docs" / "metrics.md").read_text().split(f"\n## {heading}", 1)
    rows = re.findall(r"^\| (`[^|]*) \| *(\S.*) \|$", section.split("\n## ")[0], flags=re.MULTILINE)
    return [name for cell, _ in rows for name in re.findall(r"`(\w+)`", cell)]


def test_metrics_explains_every_column_in_its_order():
    assert explained("metrics/") == list(metrics.COLUMNS)
    assert explained("gossip_logs/")[: len(event_log.COLUMNS)] == list(event_log.COLUMNS)


def test_metrics_explains_every_event():
    code = "".join(path.read_text() for package in ("gossip", "training") for path in sources(package))
    known = ENDINGS | set(EVENT.findall(code))
    assert {"rolled_back", "registry_failed", "accept_failed", "save_failed"} < known
    assert set(explained("gossip_logs/")[len(event_log.COLUMNS) :]) == known


def test_documentation_is_at_most_120_columns_wide_but_for_tables_and_pictures():
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        lines = enumerate(path.read_text().splitlines(), 1)
        wide = [number for number, line in lines if len(line) > 120 and not line.startswith(("|", "!["))]
        assert wide == [], path.name
