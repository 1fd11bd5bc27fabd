"""Features of a data set in a store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from densedino.errors import InputError
from densedino.evals.backbones import View, load_backbone
from densedino.evals.datasets import Sample
from densedino.evals.labelled import find_labelled
from densedino.evals.tokens import Tokens, extract_tokens

pytestmark = pytest.mark.filterwarnings("ignore::densedino.errors.UntrainedWarning")


def test_what_comes_out_is_what_the_model_gives(class_folder: Path, tmp_path: Path) -> None:
    data = find_labelled(class_folder)
    dino = load_backbone("debug_vit:random", View(resize=64))
    extract_tokens(dino, data, output=tmp_path / "store", layers=(0, 1))
    last, both = Tokens(tmp_path / "store"), Tokens(tmp_path / "store", layers=(0, 1))
    sample = data.test[5]
    features = dino(sample.image, layers=[0, 1])
    torch.testing.assert_close(
        last.vectors([sample, data.train[0]])[:1], features.cls.half().float(), atol=2e-3, rtol=2e-3
    )
    one = last.map(sample)
    torch.testing.assert_close(one.float(), features.patches[0].half().float(), atol=4e-3, rtol=4e-3)
    assert (one.source_size, one.input_size, one.stride) == ((48, 48), (64, 64), 16)
    side_by_side = torch.cat([features.layers[0].patches, features.layers[1].patches], -1)[0]
    torch.testing.assert_close(both.map(sample).float(), side_by_side, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(last.means([sample])[0], one.float().mean((0, 1)))
    assert last.map(sample) is one, "kept"
    with pytest.raises(InputError, match="has no features"):
        last.map(Sample(key="x", image=Path("x.png")))
    np.testing.assert_equal(one.array.dtype, np.float16)
