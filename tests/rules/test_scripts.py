"""Workflow scripts fit the functions that they call, and rules give them what they read."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "workflow_scripts").glob("*.py"))
RULES = "".join(path.read_text() for path in sorted((ROOT / "rules").glob("*.smk")))


def imported_names(tree: ast.AST) -> dict[str, object]:
    """Everything that a script imports from the package, by name."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cap4d_core"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                found[alias.name] = getattr(module, alias.name)
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_calls_fit_the_signatures(script: Path) -> None:
    tree = ast.parse(script.read_text())
    functions = imported_names(tree)
    checked = 0
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        function = functions.get(node.func.id)
        if not inspect.isfunction(function) or any(kw.arg is None for kw in node.keywords):
            continue
        inspect.signature(function).bind(*node.args, **{str(kw.arg): 0 for kw in node.keywords})
        checked += 1
    assert checked >= 2  # the stage's function and `run`


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_files_and_params_are_those_of_the_rule(script: Path) -> None:
    text = script.read_text()
    rule = re.search(rf"^rule {script.stem}:\n(.*?)(?=^rule |\Z)", RULES, re.M | re.S)
    assert rule is not None
    for kind, name in re.findall(r"job\.(input|output)_files?\(\"(\w+)\"\)", text):
        section = re.search(rf"^    {kind}:\n((?:        .*\n)+)", rule[1], re.M)
        assert section is not None and f"        {name}=" in section[1], f"{kind} {name}"
    params = re.search(r"^    params:\n((?:        .*\n)+)", rule[1], re.M)
    assert params is not None
    for name in re.findall(r"job\.params\[\"(\w+)\"\]", text):
        assert f"        {name}=" in params[1], f"params {name}"
    for name in re.findall(r"job\.wildcards\[\"(\w+)\"\]", text):
        assert f"{{{name}}}" in rule[1], f"wildcard {name}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_stages_are_imported_inside_main(script: Path) -> None:
    """A GPU must be leased before torch is imported."""
    top = [node for node in ast.parse(script.read_text()).body if isinstance(node, ast.ImportFrom)]
    assert {node.module for node in top} == {"cap4d_core.job"}
