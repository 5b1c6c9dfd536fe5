"""Versions and layout: one set of pins, every rule complete."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import yaml

from cap4d_core.versions import STAGE_VERSIONS

ROOT = Path(__file__).parents[2]
PIN = re.compile(r"^([a-z0-9-]+)==(\S+)$")


def pins(lines: list[str]) -> dict[str, str]:
    found = (PIN.match(line.strip()) for line in lines)
    return {match[1]: match[2] for match in found if match}


def requirements(name: str) -> dict[str, str]:
    return pins((ROOT / name).read_text().splitlines())


def direct_dependencies(*, dev: bool = False) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    entries = project["optional-dependencies"]["dev"] if dev else project["dependencies"]
    return {re.split(r"[<>=!~ \[]", entry)[0].lower().replace("_", "-") for entry in entries}


def test_every_dependency_is_pinned() -> None:
    assert direct_dependencies() <= set(requirements("requirements.txt"))
    assert direct_dependencies(dev=True) <= set(requirements("requirements-dev.txt"))


def test_conda_environments_have_the_same_versions() -> None:
    expected = requirements("requirements.txt")
    for path in (ROOT / "envs").glob("*.yaml"):
        if path.name == "pixel3dmm.yaml":
            continue  # nothing of it is imported here
        environment = yaml.safe_load(path.read_text())
        nested = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
        found = pins(nested[0])
        assert found and found.items() <= expected.items(), path
        if path.name == "torch.yaml":
            assert set(found) == direct_dependencies()


def test_installed_versions_are_the_pinned_ones() -> None:
    """What the tests run with is what users get."""
    different = {}
    for name, pinned in requirements("requirements.txt").items():
        try:
            installed = version(name).partition("+")[0]
        except PackageNotFoundError:
            installed = "absent"
        if installed != pinned:
            different[name] = (installed, pinned)
    if "torch" in different:
        pytest.skip("another environment than `make setup` makes")
    assert different == {}


def rules() -> list[tuple[str, str]]:
    """(name, text) of every rule that runs something."""
    found = []
    for path in sorted((ROOT / "rules").glob("*.smk")):
        for text in re.split(r"^rule ", path.read_text(), flags=re.MULTILINE)[1:]:
            found.append((text.partition(":")[0], text))
    return found


@pytest.mark.parametrize(("name", "text"), rules(), ids=lambda value: value.split(":")[0])
def test_rules_are_complete_and_named_like_their_script(name: str, text: str) -> None:
    for directive in (
        "output:", "log:", "benchmark:", "conda:", "threads:", "resources:", "params:", "message:"
    ):  # fmt: skip
        assert f"    {directive}" in text, directive
    assert "mem_mb=" in text and "runtime=" in text and "version=STAGE_VERSIONS" in text
    assert f'"../workflow_scripts/{name}.py"' in text
    assert f"<logs>/{name}" in text and f"<benchmarks>/{name}" in text
    script = (ROOT / "workflow_scripts" / f"{name}.py").read_text()
    assert script.startswith(f'"""Rule {name}: ')
    assert len(script.splitlines()) <= 45, "scripts only adapt; put work into cap4d_core"


def test_every_script_has_a_rule_and_every_stage_version_is_used() -> None:
    names = {name for name, _ in rules()}
    scripts = {path.stem for path in (ROOT / "workflow_scripts").glob("*.py")}
    assert names == scripts
    used = {name for _, text in rules() for name in re.findall(r'STAGE_VERSIONS\["(\w+)"\]', text)}
    assert used == set(STAGE_VERSIONS)
