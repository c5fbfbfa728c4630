"""What docs/security.md promises of all of the code, read from the sources: nothing here can run a stranger's code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("mingru", "gossip", "training", "runtime", "preparation", "bench")
SOURCES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])
# Modules that run code, or make objects of any kind, from bytes that they are given.
LOADERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
# torch.load raises pickle.UnpicklingError for what weights_only refuses: the name of that error is all that is used.
# A pickle is among what the fuzzer feeds the decoders, and the predecessor's way, which a bench times, reads its own.
ALLOWED = {
    ("training/checkpoint.py", "pickle.UnpicklingError"),
    ("bench/fuzz_inputs.py", "pickle.dumps"),
    ("bench/speed/exchange.py", "torch.load without weights_only=True"),
}


def breaches(source: str) -> list[str]:
    """Every use in `source` of what could run a stranger's bytes, as "module.name" or the builtin's name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LOADERS:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Import):
            found += [
                f"{alias.name} as {alias.asname}" for alias in node.names if alias.asname and alias.name in LOADERS
            ]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in LOADERS:
            found.append(f"{node.value.id}.{node.attr}")
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in BUILTINS:
                found.append(node.func.id)
            if ast.unparse(node.func) in ("torch.load", "numpy.load", "np.load"):
                safe = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if safe.get("weights_only") != "True":
                    found.append(f"{ast.unparse(node.func)} without weights_only=True")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_runs_no_strangers_code(path):
    name = str(path.relative_to(ROOT))
    assert [use for use in breaches(path.read_text()) if (name, use) not in ALLOWED] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.loads(b'')",
        "from pickle import loads",
        "import marshal as m",
        "eval('1')",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
    ],
)
def test_a_breach_would_be_seen(source):
    assert breaches(source)
