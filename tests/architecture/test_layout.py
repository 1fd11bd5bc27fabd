"""The house's rules that a reader would otherwise have to check by eye (DESIGN.md)."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "densedino"
MODULES = sorted(p for p in SOURCE.rglob("*.py") if p.name not in ("__init__.py", "__main__.py"))
IDS = [str(p.relative_to(SOURCE)) for p in MODULES]
ROOMS = {
    "adapters",
    "cli",
    "engines",
    "evals",
    "features",
    "geo",
    "heads",
    "images",
    "models",
    "pretrain",
    "recipes",
    "serve",
    "tasks",
    "weights",
}


def test_one_folder_level_and_no_grab_bags() -> None:
    assert all(len(p.relative_to(SOURCE).parts) <= 2 for p in MODULES)
    assert {p.parent.name for p in MODULES} - {"densedino"} <= ROOMS


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_a_module_is_small_and_says_what_it_owns(path: Path) -> None:
    text = path.read_text()
    docstring = ast.get_docstring(ast.parse(text)) or ""
    assert docstring.startswith("Owns "), "the first line says what the module owns"
    assert text.count("\n") <= 400


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_a_function_fits_on_a_screen(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno
            assert length <= 75, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_nothing_is_loaded_unsafely_or_swallowed(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"strict\s*=\s*False", text)
    assert not re.search(r"weights_only\s*=\s*False", text)
    assert not re.search(r"pickle\.(loads?|Unpickler)\b", text)
    assert not re.search(r"except\s*:", text)
    for call in re.finditer(r"torch\.load\((?:[^()]|\([^()]*\))*\)", text):
        assert "weights_only=True" in call.group()


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_no_sinks_for_keywords(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            sink = node.args.kwarg
            assert sink is None or ast.unparse(sink.annotation or sink) == "P.kwargs", (
                f"{node.name}(**{sink.arg}) swallows misspelt names"
            )


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_every_module_has_its_mirror_test(path: Path) -> None:
    mirror = ROOT / "tests" / path.relative_to(SOURCE).parent / f"test_{path.name}"
    assert mirror.exists(), f"write {mirror.relative_to(ROOT)}"
