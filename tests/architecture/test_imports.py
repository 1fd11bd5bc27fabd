"""What importing and asking for help may load: `import densedino` and `densedino --help` are instant."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

import densedino
from densedino.cli.main import VERBS

LOADED = """
import sys
before = set(sys.modules)
{action}
print("\\n".join(sorted(set(sys.modules) - before)))
"""
QUIETLY = """
import contextlib, io
from densedino.cli.main import main
with contextlib.redirect_stdout(io.StringIO()):
    main({args!r})
"""
HEAVY = {
    "torch",
    "torchvision",
    "numpy",
    "PIL",
    "lance",
    "pyarrow",
    "safetensors",
    "transformers",
    "timm",
    "av",
    "xarray",
    "datasets",
    "openvino",
    "nncf",
    "onnx",
    "onnxruntime",
    "tensorboard",
}


def loaded_by(action: str) -> set[str]:
    result = subprocess.run(
        [sys.executable, "-c", LOADED.format(action=action)], capture_output=True, text=True, check=True, timeout=60
    )
    return {line.split(".")[0] for line in result.stdout.splitlines()}


def test_importing_the_package_loads_nothing_but_itself() -> None:
    loaded = loaded_by("import densedino")
    assert {name for name in loaded if name not in sys.stdlib_module_names} == {"densedino"}
    assert len(loaded) < 40, "the standard library is not free either"


@pytest.mark.parametrize("args", [["--help"], ["--version"], []])
def test_help_loads_nothing_outside_the_standard_library(args: list[str]) -> None:
    loaded = loaded_by(QUIETLY.format(args=args))
    assert {name for name in loaded if name not in sys.stdlib_module_names} <= {"densedino"}


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_loads_nothing_heavy(verb: str) -> None:
    action = f"""
from densedino.cli.main import main
import io
sys.stdout, o = io.StringIO(), sys.stdout
try: main([{verb!r}, "--help"])
except SystemExit as stop: assert stop.code == 0
text = sys.stdout.getvalue(); sys.stdout = o
assert "usage: densedino {verb}" in text, text
"""
    assert not loaded_by(action) & HEAVY


def test_public_names_are_there_sorted_and_complete() -> None:
    assert densedino.__all__ == sorted(densedino.__all__)
    for name in densedino.__all__:
        assert getattr(densedino, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        densedino.lod  # noqa: B018


def test_every_module_imports_and_its_all_exists() -> None:
    for info in pkgutil.walk_packages(densedino.__path__, "densedino."):
        if info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name), f"{info.name}.__all__ has {name!r}"
