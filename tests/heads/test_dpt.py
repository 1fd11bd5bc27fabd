from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import pytest
import torch

from densedino.heads.bins import Bins
from densedino.heads.configs import DptConfig
from densedino.heads.dpt import Dpt
from densedino.heads.tapping import centre_pad, maps_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from heads.conftest import Golden

CONFIGS = {
    "dd": DptConfig(
        reassembled=(24, 24, 24, 24),
        width=32,
        hidden=32,
        bins=Bins(number=16, most=100.0),
        norms_inputs=True,
        projects_fused=True,
    ),
    "chmv2": DptConfig(
        reassembled=(8, 16, 24, 32),
        width=32,
        hidden=16,
        bins=Bins(number=16, most=96.0, spacing="mixlog"),
        reads_cls=True,
        residual_bias=True,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_depth_is_golden(name: str, golden: Callable[[str], Golden]) -> None:
    file = golden(name)
    head = Dpt(32, CONFIGS[name]).eval()
    head.load_state_dict(file.weights("decoder."), strict=True)
    tokens_of = file.taps("encoder.backbone.")
    padded = centre_pad(file["in/image"], 16)
    assert torch.equal(padded, file["mid/padded_image"])
    taps = tokens_of(padded)
    for i, features in enumerate(maps_of(taps)):
        assert torch.allclose(features, file[f"mid/feat{i}"], atol=1e-5, rtol=0)
    for i, level in enumerate(head.reassemble_blocks(taps)):
        assert torch.allclose(level, file[f"mid/reassembled{i}"], atol=1e-4, rtol=0)
    assert torch.allclose(head.fused(taps), file["mid/fused"], atol=1e-4, rtol=0)
    assert torch.allclose(head.logits(taps), file["mid/logits"], atol=1e-4, rtol=0)
    assert torch.allclose(head(file["in/image"], tokens_of), file["out/depth"], atol=1e-4, rtol=0)


class _Tap:
    def __init__(self, height: int, width: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.patches = torch.randn(1, height, width, 24, generator=generator)
        self.cls = torch.randn(1, 24, generator=generator)
        self.registers = torch.empty(1, 0, 24)


@torch.no_grad()
def test_logits_are_those_of_transformers_chmv2_head() -> None:
    from transformers.models.chmv2.configuration_chmv2 import CHMv2Config
    from transformers.models.chmv2.modeling_chmv2 import CHMv2Head

    config = DptConfig(
        reassembled=(8, 16, 24, 32),
        width=16,
        hidden=8,
        bins=Bins(number=12, most=96.0, spacing="mixlog"),
        reads_cls=True,
        residual_bias=True,
    )
    torch.manual_seed(0)
    ours = Dpt(24, config).eval()
    backbone = {"model_type": "dinov3_vit", "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    theirs = CHMv2Head(
        CHMv2Config(
            backbone_config=backbone,
            post_process_channels=[8, 16, 24, 32],
            fusion_hidden_size=16,
            head_hidden_size=8,
            number_output_channels=12,
        )
    ).eval()
    theirs.load_state_dict({_their_name(key): value for key, value in ours.state_dict().items()}, strict=True)
    for height, width in ((4, 6), (3, 5)):
        taps = [_Tap(height, width, seed) for seed in range(4)]
        tokens = [(tap.patches.permute(0, 3, 1, 2), tap.cls) for tap in taps]
        expected = theirs(tokens, height, width)
        assert expected.shape == (1, 12, 32 * math.ceil(height / 2), 32 * math.ceil(width / 2))
        assert torch.allclose(ours.logits(taps), expected, atol=1e-6, rtol=0)


def _their_name(key: str) -> str:
    key = re.sub(r"reassemble_blocks.projects.(\d).conv", r"reassemble_stage.layers.\1.projection", key)
    key = re.sub(r"reassemble_blocks.resize_layers.(\d)", r"reassemble_stage.layers.\1.resize", key)
    key = key.replace("reassemble_blocks.readout", "reassemble_stage.readout").replace("fusion_blocks", "fusion_layers")
    key = key.replace(".project.conv", ".projection").replace("res_conv_unit", "residual_layer")
    key = re.sub(r"conv(\d).conv", r"convolution\1", key)
    return re.sub(r"^convs.(\d).conv", r"convs.\1", key)
