from __future__ import annotations

import pytest
import torch

from densedino.errors import InputError
from densedino.heads.windows import windowed_features


class _Tap:
    def __init__(self, pixels: torch.Tensor) -> None:
        patches = torch.nn.functional.avg_pool2d(pixels, 16).permute(0, 2, 3, 1)
        self.patches, self.cls, self.registers = patches, patches[:, 0, 0], patches[:, 0, :0]


@pytest.mark.parametrize("size", [(96, 96), (96, 112), (112, 80)])
def test_windows_are_put_together_where_they_were_cut(size: tuple[int, int]) -> None:
    image = torch.randn(2, 3, *size)
    seen = []

    def tokens_of(pixels: torch.Tensor) -> list[_Tap]:
        seen.append(tuple(pixels.shape[2:]))
        return [_Tap(pixels), _Tap(2 * pixels)]

    out = windowed_features(image, tokens_of, windows=2)
    whole = torch.nn.functional.avg_pool2d(image, 16)
    assert torch.allclose(out[:, 6:9], whole, atol=1e-6) and torch.allclose(out[:, 9:], 2 * whole, atol=1e-6)
    assert len(seen) == 5 and seen[-1] == seen[0]


@pytest.mark.parametrize("size", [(96, 100), (16, 96)])
def test_what_cannot_be_cut_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="cannot be cut into 2 windows"):
        windowed_features(torch.zeros(1, 3, *size), lambda pixels: [_Tap(pixels)], windows=2)
