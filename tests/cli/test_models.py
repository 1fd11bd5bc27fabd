from __future__ import annotations

import subprocess
import sys

import pytest

from densedino.cli.main import main
from densedino.models.catalog import MODELS, create_model
from densedino.models.counts import multiplications, parameter_count


@pytest.mark.parametrize("name", MODELS)
def test_counts_are_those_of_the_model(name):
    for in_chans in (3, 7):
        model = create_model(name, in_chans=in_chans, device="meta")
        assert parameter_count(MODELS[name], in_chans=in_chans) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters", "gmac"),
    [
        ("vits16", 21_601_152, 4.70),
        ("vits16plus", 28_697_472, 6.12),
        ("vitb16", 85_669_632, 17.9),
        ("vitl16", 303_154_176, 62.8),
        ("vitl16plus", 403_915_776, None),
        ("vith16plus", 840_633_600, 172),
        ("vit7b16", 6_716_043_264, 1363),
        ("convnext_tiny", 27_820_128, 4.45),
        ("convnext_small", 49_454_688, 8.68),
        ("convnext_base", 87_566_464, 15.4),
        ("convnext_large", 196_230_336, 34.4),
    ],
)
def test_counts_are_those_measured_on_the_reference(name, parameters, gmac):
    assert parameter_count(MODELS[name]) == parameters
    assert gmac is None or multiplications(MODELS[name]) / 1e9 == pytest.approx(gmac, rel=0.005)


def test_the_command_lists_all_and_some(capsys):
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert all(f"{name} " in out for name in MODELS) and "6,716,043,264" in out and "…" not in out
    assert main(["models", "convnext_*"]) == 0
    assert "vits16" not in capsys.readouterr().out


def test_listing_needs_no_torch():
    code = "import sys; from densedino.cli.main import main; main(['models']); main(['weights']); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0
