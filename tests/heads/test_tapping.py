from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from densedino.heads.tapping import backbone_taps, centre_pad, maps_of
from densedino.models.catalog import create_model


@given(st.integers(1, 70), st.integers(1, 70))
def test_padding_is_the_least_and_around(height: int, width: int) -> None:
    out = centre_pad(torch.ones(1, 1, height, width), 16)
    H, W = out.shape[2:]
    assert H % 16 == W % 16 == 0 and H - height < 16 and W - width < 16
    rows = out[0, 0].amax(1).nonzero()[:, 0]
    assert len(rows) == height and rows[0] == (H - height) // 2 and out.sum() == height * width


@torch.no_grad()
def test_taps_are_normed_and_in_order() -> None:
    model = create_model("debug_vit")
    image = torch.randn(1, 3, 32, 48)
    first, last = backbone_taps(model, (0, 1))(image)
    features = model.forward_features(image)
    assert torch.equal(last.patches.flatten(1, 2), features["x_norm_patchtokens"])
    assert torch.equal(last.cls, features["x_norm_clstoken"]) and last.registers.shape == (1, 4, 32)
    assert maps_of([first])[0].shape == (1, 32, 2, 3)
