from __future__ import annotations

import tomllib
from pathlib import Path

from densedino.features import machine


def test_extras_are_those_of_the_package() -> None:
    root = Path(__file__).parents[2]
    table = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    declared = {
        name: {requirement.partition(">")[0].partition("[")[0] for requirement in requirements}
        for name, requirements in table.items()
        if name != "dev"
    }
    assert {extra.name: set(extra.packages) for extra in machine.EXTRAS} == declared


def test_the_environment_names_what_decides_speed() -> None:
    found = machine.environment()
    text = " ".join(f"{key} {value}" for key, value in found.items()).lower()
    assert all(word in text for word in ("python", "torch", "thread", "memory"))


def test_speed_is_measured_on_this_machine() -> None:
    speed = machine.measure_speed("debug_vit")
    assert speed.images_per_second > 0
    assert speed.matmul_gflops.keys() == {"fp32", "bf16"}
    assert all(value > 0 for value in speed.matmul_gflops.values())
