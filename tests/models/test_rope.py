from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densedino.errors import StateDictError
from densedino.models import rope
from densedino.models.catalog import create_model
from densedino.models.rope import RopeAugment, RopeEmbed, rope_angles, rope_coords, rope_periods, rotate


def test_periods_are_the_documented_ones() -> None:
    periods = rope_periods(64, 100.0)
    assert periods.shape == (16,)
    assert periods[0] == 1.0
    assert periods[-1].item() == pytest.approx(74.99, abs=0.01)


def test_coordinates_are_patch_centres_on_each_axis() -> None:
    coords = rope_coords(2, 4)
    assert coords.shape == (8, 2)
    assert coords[:, 0].unique().tolist() == [-0.5, 0.5]
    assert coords[:4, 1].tolist() == [-0.75, -0.25, 0.25, 0.75]


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 5), st.sampled_from([8, 16, 64]))
def test_rotation_by_a_naive_formula(height: int, width: int, prefix: int, head_dim: int) -> None:
    tables = RopeEmbed(head_dim, base=100.0, num_prefix_tokens=prefix).eval()(height, width, torch.device("cpu"))
    x = torch.randn(1, prefix + height * width, 2, head_dim)
    out = rotate(x, tables)
    torch.testing.assert_close(out[:, :prefix], x[:, :prefix], rtol=0, atol=0)
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1), rtol=1e-4, atol=1e-5)
    quarter = head_dim // 4
    token = height * width - 1  # the last patch
    row, col = 1 - 1 / height, 1 - 1 / width
    for channel in range(head_dim // 2):
        position = row if channel < quarter else col
        angle = 2 * math.pi * position / 100 ** ((channel % quarter) / (head_dim / 4))
        pair = complex(x[0, prefix + token, 0, channel], x[0, prefix + token, 0, channel + head_dim // 2])
        turned = pair * complex(math.cos(angle), math.sin(angle))
        got = out[0, prefix + token, 0]
        assert got[channel].item() == pytest.approx(turned.real, abs=1e-4)
        assert got[channel + head_dim // 2].item() == pytest.approx(turned.imag, abs=1e-4)


def test_threads_may_share_a_module() -> None:
    """Extraction runs one module in several threads; tables come and go under their hands."""
    rope = RopeEmbed(16, base=100.0, num_prefix_tokens=1).eval()
    cpu = torch.device("cpu")

    def ask(seed: int) -> None:
        for i in range(400):
            height = 1 + (i * 7 + seed) % 23
            assert rope(height, 2, cpu)[0].shape == (1 + 2 * height, 16)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(4)))
    assert len(rope._cache) <= 12


def test_augmentation_stays_in_its_ranges() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        (shift, factor) = RopeAugment(shift=0.5).draw(rng)
        assert shift.abs().max() <= 0.5
        assert shift[0] != shift[1]
        assert (factor == 1).all()
        shift, factor = RopeAugment(rescale=2.0).draw(rng)
        assert (shift == 0).all()
        assert 0.5 <= factor[0] == factor[1] <= 2.0
        shift, factor = RopeAugment(jitter=1.5).draw(rng)
        assert (factor <= 1.5).all()
        assert (factor >= 1 / 1.5).all()
        assert factor[0] != factor[1]


def test_a_warp_shifts_coordinates_and_then_stretches_them() -> None:
    rope = RopeEmbed(16, base=100.0, num_prefix_tokens=1)
    warp = torch.tensor([[0.25, -0.5], [2.0, 0.5]])
    cos, sin = rope(3, 2, torch.device("cpu"), warp=warp)
    angles = rope_angles((rope_coords(3, 2) + warp[0]) * warp[1], rope_periods(16, 100.0))
    torch.testing.assert_close(cos[1:, :8], angles.cos())
    torch.testing.assert_close(sin[1:], angles.sin())
    assert (sin[0] == 0).all(), "prefix tokens are not rotated"


def test_bf16_rounded_periods_of_a_file_are_recomputed_and_others_refused() -> None:
    model = create_model("debug_vit")
    state = model.state_dict()
    exact = state["rope_embed.periods"].clone()
    state["rope_embed.periods"] = exact.bfloat16().float()
    model.load_state_dict(state)
    torch.testing.assert_close(model.rope_embed.periods, exact, rtol=0, atol=0)
    state["rope_embed.periods"] = exact * 1.5
    with pytest.raises(StateDictError, match="another model"):
        model.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotating_piece_by_piece_is_the_same(dtype, monkeypatch):
    tables = RopeEmbed(16, base=100.0, num_prefix_tokens=5).eval()(7, 9, torch.device("cpu"))
    x = torch.randn(3, 68, 3, 4, 16).to(dtype)[:, :, :2]
    with torch.no_grad():
        whole = rotate(x, tables)
        monkeypatch.setattr(rope, "_LARGE_BYTES", 0)
        monkeypatch.setattr(rope, "_PIECE_BYTES", 3000)
        assert torch.equal(rotate(x, tables), whole)
    assert torch.equal(rotate(x, tables), whole)  # with gradients, all at once
