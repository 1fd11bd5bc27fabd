from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from densedino.heads.bins import Bins, depth_of
from densedino.heads.linear import LinearClassifier, LinearDepth, LinearSegmentation
from densedino.heads.tapping import centre_pad

if TYPE_CHECKING:
    from collections.abc import Callable

    from heads.conftest import Golden


class _Map:
    def __init__(self, x: torch.Tensor) -> None:
        self.patches, self.cls, self.registers = x.permute(0, 2, 3, 1), x.mean((2, 3)), x.mean((2, 3))[:, None]


@torch.no_grad()
def test_the_classifier_gives_the_golden_logits(golden: Callable[[str], Golden]) -> None:
    file = golden("lc")
    head = LinearClassifier(32, classes=10)
    head.load_state_dict(file.weights("linear_head."), strict=True)
    logits = head(file["in/image"], file.taps("backbone.", (3,)))
    assert torch.allclose(logits, file["out/logits"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_linear_depth_is_golden(golden: Callable[[str], Golden]) -> None:
    file = golden("linear_depth")
    head = LinearDepth(32, bins=16).eval()
    head.load_state_dict(file.weights("decoder."), strict=True)
    taps = file.taps("encoder.backbone.", (3,))(centre_pad(file["in/image"], 16))
    logits = head(taps)
    assert torch.allclose(logits, file["mid/logits"], atol=1e-4, rtol=0)
    depth = depth_of(logits, Bins(number=16, most=10.0))
    assert torch.allclose(depth, file["out/depth"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_linear_segmentation_is_golden(golden: Callable[[str], Golden]) -> None:
    file = golden("linear_seg")
    head = LinearSegmentation(32, classes=7).eval()
    head.load_state_dict(file.weights(), strict=True)
    logits = head([_Map(file["in/feat"])])
    assert torch.allclose(logits, file["out/logits_lowres"], atol=1e-5, rtol=0)
    assert torch.allclose(F.interpolate(logits, size=(48, 64), mode="bilinear"), file["out/logits_48x64"], atol=1e-5)


def test_full_sizes_have_the_names_of_the_tables(key_table: Callable[..., dict[str, tuple]]) -> None:
    for table, build in (
        ("linear_depth", lambda: LinearDepth(4096, bins=256)),
        ("linear_seg", lambda: LinearSegmentation(4096, classes=150)),
    ):
        with torch.device("meta"):
            head = build()
        assert {k: tuple(v.shape) for k, v in head.state_dict().items()} == {
            k: shape for k, (shape, *_) in key_table(table).items()
        }


def test_maps_of_several_blocks_are_brought_to_the_size_of_the_first() -> None:
    taps = [_Map(torch.randn(2, 8, 4, 6)), _Map(torch.randn(2, 8, 2, 3))]
    assert LinearSegmentation(8, classes=3, taps=2).eval()(taps).shape == (2, 3, 4, 6)
    assert LinearDepth(8, bins=5, taps=2).eval()(taps).shape == (2, 5, 4, 6)
