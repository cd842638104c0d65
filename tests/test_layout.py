"""Rules for every file: import contracts, docstrings, and the generated example."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from producers.registry import producer_settings
from relay.config.ini_text import example
from relay.config.loading import SECTIONS
from relay.protocols import door_settings

ROOT = Path(__file__).parents[1]
PRODUCERS = sorted((ROOT / "producers").rglob("*.py"))
MODULES = sorted((ROOT / "relay").rglob("*.py")) + PRODUCERS


def test_config_example_is_what_the_code_prints() -> None:
    printed = example({**SECTIONS, **door_settings(), **producer_settings()})
    kept = (ROOT / "config.example.ini").read_text()
    assert kept == printed, "run: scripts/run genconfig > config.example.ini"


def test_the_import_contracts_hold_and_are_exhaustive() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    assert any(each.get("exhaustive") for each in contracts["contracts"])
    assert "lint-imports" in (ROOT / "scripts" / "check").read_text()
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_module_has_a_docstring(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), "a module's docstring states its job"


def test_only_the_stream_package_imports_redis() -> None:
    importing = set()
    for path in MODULES:
        tree = ast.parse(path.read_text())
        # An import for a type annotation alone is not a dependency.
        types_only = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if id(node) not in types_only and {"redis", "hiredis"} & _imported(node):
                importing.add("/".join(path.relative_to(ROOT).parts[:2]))
    assert importing == {"relay/stream"}


def _imported(node: ast.AST) -> set[str]:
    match node:
        case ast.Import():
            return {alias.name.partition(".")[0] for alias in node.names}
        case ast.ImportFrom():
            return {(node.module or "").partition(".")[0]}
        case _:
            return set()


def test_the_lock_names_no_index_and_hashes_every_package() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    assert "index" not in text.replace("index-", "")
    packages = [line for line in text.splitlines() if "==" in line and not line.startswith("#")]
    assert packages
    assert all(line.endswith("\\") for line in packages)
