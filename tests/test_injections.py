"""Every fault by name has a test that injects it."""

import ast
from pathlib import Path

import pytest

from bench.injection import Injection

TESTS = Path(__file__).parent


def injected() -> set[str]:
    """Names in all `@pytest.mark.injects(Injection.NAME, ...)` of the tests, parameters' marks included."""
    found = set()
    for path in TESTS.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "injects":
                found |= {argument.attr for argument in node.args}
    return found


@pytest.mark.parametrize("injection", Injection, ids=lambda injection: injection.name)
def test_injection_has_a_test(injection):
    assert injection.name in injected()
