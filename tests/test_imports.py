import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("mingru", "gossip", "training", "runtime", "preparation")
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))

# Who may import whom, of the project's own: scripts -> training -> gossip, mingru -> runtime.
ALLOWED = {
    "runtime": {"runtime"},
    "mingru": {"mingru", "runtime"},
    "gossip": {"gossip", "runtime"},
    "training": {"training", "gossip", "mingru", "runtime"},
    "preparation": {"preparation", "runtime"},
}


def imported(source: str) -> set[str]:
    """Full names of all modules and of what is taken from them, wherever in a source; relative ones with their dots."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def own_imports(source: str) -> set[str]:
    """The project's packages and scripts among the imports."""
    return {name.split(".")[0] for name in imported(source)} & {*PACKAGES, *SCRIPTS}


def sources(package: str):
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package):
    assert len(sources(package)) > 1
    for path in sources(package):
        strangers = own_imports(path.read_text()) - ALLOWED[package]
        assert not strangers, f"{path.relative_to(ROOT)} imports {sorted(strangers)}"


def test_imports_no_script_is_imported():
    assert {"train", "generate", "prepare_data", "export", "watch"} <= set(SCRIPTS)
    for path in sorted(ROOT.glob("*.py")) + [path for package in PACKAGES for path in sources(package)]:
        assert not own_imports(path.read_text()) & set(SCRIPTS), path.relative_to(ROOT)


def test_imports_are_absolute():
    for package in PACKAGES:
        for path in sources(package):
            relative = {name for name in imported(path.read_text()) if name.startswith(".")}
            assert not relative, f"{path.relative_to(ROOT)} imports {sorted(relative)}"


def test_imports_of_a_source_are_all_found():
    source = "import gossip.merge as m, os\ndef f():\n    from training import loop\n    from train import main\n"
    assert own_imports(source) == {"gossip", "training", "train"}


def test_imports_the_launcher_and_the_coordinator_need_no_torch():
    """They start before, and beside, processes that need the seconds and the memory that torch takes."""
    for start in ("runtime/launch.py", "gossip/filesystem_coordinator.py"):
        seen, waiting = set(), [start]
        while waiting:
            path = waiting.pop()
            seen.add(path)
            names = imported((ROOT / path).read_text())
            assert not {name for name in names if name.split(".")[0] == "torch"}, path
            found = {f"{name.replace('.', '/')}.py" for name in names if name.split(".")[0] in PACKAGES}
            waiting += [name for name in found if (ROOT / name).is_file() and name not in seen]


TRAIN_AND_WRITE = """
import runpy, sys
root, compilers = sys.argv.pop(1), {"torch._dynamo", "sympy", "triton"}
sys.path.insert(0, root)
def run(script, *arguments):
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(f"{root}/{script}", run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
    print(script, sorted(compilers & set(sys.modules)), file=sys.stderr)
small = "--cpu --dim 16 --depth 1 --batch_size 2 --chunk_size 32 --val_every 0 --train_steps 3 --data text"
run("train.py", *small.split(), "--output", "run")
run("generate.py", "--model", "run", "--cpu", "--prompt", "a", "--max_length", "3")
"""


def test_training_and_writing_on_a_cpu_import_no_compiler(tmp_path):
    """Torch's takes longer to import than torch itself, and ranks are started again."""
    (tmp_path / "text").write_bytes(bytes(range(256)) * 200)
    command = [sys.executable, "-c", TRAIN_AND_WRITE, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    told = [line for line in done.stderr.splitlines() if line.startswith(("train.py [", "generate.py ["))]
    assert told == ["train.py []", "generate.py []"], done.stderr
