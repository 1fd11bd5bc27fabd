from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from densedino.errors import InputError
from densedino.features.tokens import Features, upsample_tokens


def features(patches: torch.Tensor, sizes: tuple[tuple[int, int], ...]) -> Features:
    batch = patches.shape[0]
    return Features(
        patches=patches,
        cls=torch.zeros(batch, patches.shape[-1]),
        registers=torch.zeros(batch, 4, patches.shape[-1]),
        valid=torch.ones(patches.shape[:3], dtype=torch.bool),
        stride=16,
        grids=tuple((-(-h // 16), -(-w // 16)) for h, w in sizes),
        input_sizes=sizes,
        source_sizes=sizes,
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 5))
def test_at_the_input_size_it_is_half_pixel_bilinear(height: int, width: int) -> None:
    patches = torch.randn(2, height, width, 3)
    want = F.interpolate(
        patches.permute(0, 3, 1, 2), size=(height * 16, width * 16), mode="bilinear", align_corners=False
    )
    torch.testing.assert_close(upsample_tokens(patches, (height * 16, width * 16)), want, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 6), st.integers(2, 6), st.integers(17, 90), st.integers(17, 90))
def test_a_linear_ramp_over_the_image_stays_that_ramp(height: int, width: int, rows: int, cols: int) -> None:
    """Tokens that hold their own centre's position give each output pixel its own position, away from the border."""
    y = (torch.arange(height) + 0.5) * 16
    x = (torch.arange(width) + 0.5) * 16
    patches = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)[None]
    extent = (height * 16 - 5, width * 16 - 9)  # padding of 5 rows and 9 columns is cut off
    out = upsample_tokens(patches, (rows, cols), extent=extent)[0]
    want_y = (torch.arange(rows) + 0.5) * extent[0] / rows
    want_x = (torch.arange(cols) + 0.5) * extent[1] / cols
    torch.testing.assert_close(out[0], want_y.clamp(8, height * 16 - 8)[:, None].expand(rows, cols))
    torch.testing.assert_close(out[1], want_x.clamp(8, width * 16 - 8)[None].expand(rows, cols))


def test_upsample_leaves_the_padding_out() -> None:
    out = features(torch.randn(1, 2, 3, 4), ((30, 33),))
    assert out.upsample().shape == (1, 4, 30, 33)
    assert out.upsample((60, 66)).shape == (1, 4, 60, 66)


def test_images_of_several_sizes_keep_their_own_grids() -> None:
    out = features(torch.randn(2, 2, 3, 4), ((32, 48), (16, 20)))
    assert out.grid == (2, 3)
    assert out[1].grid == (1, 2)
    assert [one.grid for one in out] == [(2, 3), (1, 2)]
    assert out[-1].input_sizes == ((16, 20),)
    with pytest.raises(InputError, match="2 sizes"):
        out.upsample()
    both = out.upsample((8, 8))
    torch.testing.assert_close(both[1:], out[1].upsample((8, 8)))
    with pytest.raises(IndexError):
        out[2]


def test_gradients_flow_to_the_tokens() -> None:
    patches = torch.randn(1, 2, 2, 3, requires_grad=True)
    upsample_tokens(patches, (32, 32)).sum().backward()
    torch.testing.assert_close(patches.grad.sum(), torch.tensor(32.0 * 32 * 3))
