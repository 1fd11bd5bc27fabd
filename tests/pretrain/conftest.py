"""Fixtures of this folder."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """The folder of a killed run: two stages, 13 looks of which one failed, patches that degrade from step 600."""
    from densedino.pretrain.look_files import LookRecord, write_fixed, write_look

    run = tmp_path / "my <run>"
    run.mkdir()
    stages = [{"name": "pretrain", "steps": 1000}, {"name": "gram", "steps": 500}]
    (run / "config.json").write_text(json.dumps({"model": "debug_vit", "stages": stages, "note": "a < b & c"}))
    lines = [
        json.dumps(
            {
                "step": step,
                "stage": "pretrain",
                "finite": step != 500,
                "images": 8 * step,
                "images_per_second": 20.0,
                "losses": {"total": None if step == 500 else 10 * math.exp(-step / 300), "dino": 5.0},
                "grad_norms": {"backbone": 1.0 + step % 7},
                "values": {"lr": 1e-3 * step / 1200},
                "prototype_entropy": {"dino": 0.8},
            }
        )
        for step in range(10, 1201, 10)
    ]
    (run / "metrics.jsonl").write_text("\n".join([*lines, lines[-1], '{"step": 12']))
    (run / "quarantine.jsonl").write_text(json.dumps({"name": "<b>.jpg", "reason": "truncated"}) + "\n")
    generator = torch.Generator().manual_seed(0)
    names = [f"photos/{i}.jpg" for i in range(3)]
    write_fixed(run, [(n, torch.rand(3, 32, 32, generator=generator)) for n in names], rgb=(0, 1, 2))
    clean = torch.nn.functional.interpolate(torch.randn(3, 8, 3, 3, generator=generator), (6, 6)).permute(0, 2, 3, 1)
    for step in range(0, 1201, 100):
        learnt, lost = 1 - math.exp(-step / 300), max(0, step - 600) / 600
        if step == 300:
            write_look(run, LookRecord(step=step, stage="pretrain", failed="OSError: <disk> full"))
            continue
        measures = {
            "feature_std": 0.2 + 0.7 * learnt,
            "effective_rank": 5 + 20 * learnt,
            "effective_rank_limit": 32.0,
            "cls_patch_cosine": 0.2 + 0.3 * lost,
            "near_cosine": 0.8 - 0.2 * lost,
            "far_cosine": 0.3 - 0.2 * learnt,
            "coherence": 0.5 + 0.2 * learnt - 0.4 * lost,
            "knn": 0.3 + 0.5 * learnt,
            "knn_majority": 0.3 + 0.45 * learnt,
            "miou": 0.15 + 0.25 * learnt - 0.1 * lost,
        }
        record = LookRecord(
            step=step, stage="pretrain", seconds=1.0, measures=measures, names=tuple(names), grid=(6, 6)
        )
        write_look(run, record, patches=clean + 2 * lost * torch.randn(clean.shape, generator=generator))
    return run
