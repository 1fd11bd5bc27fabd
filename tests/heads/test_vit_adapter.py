from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from densedino.errors import InputError
from densedino.heads import vit_adapter
from densedino.heads.configs import AdapterConfig
from densedino.heads.vit_adapter import ViTAdapter

if TYPE_CHECKING:
    from collections.abc import Callable

    from heads.conftest import Golden


@pytest.mark.parametrize("strip_bytes", [1, 1 << 16, 1 << 27])
@torch.no_grad()
def test_the_pyramid_is_golden(
    strip_bytes: int, golden: Callable[[str], Golden], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vit_adapter, "_STRIP_BYTES", strip_bytes)
    file = golden("ms")
    prefix = "segmentation_model.0."
    adapter = ViTAdapter(32, AdapterConfig(stem=8, heads=4)).eval()
    weights = {k: v for k, v in file.weights(prefix).items() if not k.startswith("backbone.")}
    adapter.load_state_dict(weights, strict=True)
    image = file["in/image"]
    taps = file.taps(f"{prefix}backbone.")(image)
    for i, tap in enumerate(taps):
        assert torch.allclose(tap.patches.flatten(1, 2), file[f"mid/vit{i}_patches"], atol=1e-5, rtol=0)
    stem, pyramid = adapter.spm(image)
    assert torch.allclose(adapter.spm.fc1(stem), file["mid/spm1"], atol=1e-5, rtol=0)
    for i, level in enumerate(pyramid):
        assert torch.allclose(level.flatten(2).transpose(1, 2), file[f"mid/spm{i + 2}"], atol=1e-5, rtol=0)
    pyramid = adapter(image, taps)
    strips = list(pyramid.fine)
    assert len(strips) == (1 if strip_bytes == 1 << 27 else 2 if strip_bytes == 1 << 16 else 4)
    for i, level in enumerate((torch.cat(strips, dim=2), *pyramid.coarse)):
        assert torch.allclose(level, file[f"mid/adapter{i + 1}"], atol=1e-4, rtol=0)


def test_sides_are_multiples_of_32() -> None:
    adapter = ViTAdapter(32, AdapterConfig(stem=8, heads=4)).eval()
    with pytest.raises(InputError, match=r"64×80 pixels.*multiples of 32"):
        adapter(torch.zeros(1, 3, 64, 80), [])
