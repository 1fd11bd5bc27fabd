from __future__ import annotations

import json

from densedino.cli.main import main


def test_a_plan_says_what_a_model_takes_and_what_to_do(capsys):
    assert main(["plan", "vit7b16-lvd1689m", "--images", "8", "--size", "512", "--memory", "3GB"]) == 0
    out = capsys.readouterr().out
    assert "6,716,043,264 parameters" in out and "13.43 GB in bf16" in out and "1,029 tokens" in out
    assert "--engine stream --precision bf16 --memory 3GB" in out and "3.00 GB given" in out
    assert main(["plan", "vit7b16", "--images", "8", "--memory", "700MB"]) == 0
    assert "Nothing fits" in capsys.readouterr().out


def test_a_plan_is_had_as_json(capsys):
    assert main(["plan", "debug_vit", "--size", "64x96", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 4 * 6 + 5 and {way["engine"] for way in found["ways"]} >= {"eager", "stream"}


def test_what_cannot_be_planned_is_said(capsys):
    assert main(["plan", "vits17"]) == 2 and main(["plan", "vits16", "--size", "native"]) == 2
    assert main(["plan", "vits16", "--memory", "much"]) == 2
    error = capsys.readouterr().err
    assert "did you mean 'vits16'" in error and "needs pixels" in error and "'3GB'" in error
