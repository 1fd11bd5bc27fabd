from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from densedino.heads.configs import AdapterConfig, Mask2FormerConfig, SegmentorConfig
from densedino.heads.mask2former import Mask2Former, Segmentor, semantic_map
from densedino.heads.vit_adapter import Pyramid

if TYPE_CHECKING:
    from collections.abc import Callable

    from heads.conftest import Golden

TINY = SegmentorConfig(
    adapter=AdapterConfig(stem=8, heads=4),
    mask2former=Mask2FormerConfig(dim=32, heads=4, hidden=64, encoder_layers=2, decoder_layers=4, queries=7, classes=5),
)
BACKBONE = "segmentation_model.0.backbone."


@torch.no_grad()
def test_masks_are_golden_in_every_state(golden: Callable[[str], Golden]) -> None:
    file = golden("ms")
    head = Segmentor(32, TINY).eval()
    head.load_state_dict(file.weights(without=BACKBONE), strict=True)
    out = head.predict(file["in/image"], file.taps(BACKBONE), size=(64, 96))
    assert torch.allclose(out["pred_logits"], file["out/pred_logits"], atol=1e-4, rtol=0)
    assert torch.allclose(out["pred_masks"], file["out/rescaled_masks_64x96"], atol=1e-4, rtol=0)
    assert len(out["aux_outputs"]) == 4
    for i, state in enumerate(out["aux_outputs"]):
        assert torch.allclose(state["pred_logits"], file[f"mid/aux{i}_logits"], atol=1e-4, rtol=0)
        assert torch.allclose(state["pred_masks"], file[f"mid/aux{i}_masks"], atol=1e-4, rtol=0)
    raw = head(file["in/image"], file.taps(BACKBONE))
    assert torch.allclose(raw["pred_masks"], file["out/pred_masks"], atol=1e-4, rtol=0)


def test_classes_of_a_pixel_are_those_of_the_queries_whose_masks_hold_it() -> None:
    logits = torch.full((1, 2, 4), -20.0)
    logits[0, 0, 1] = logits[0, 1, 3] = 20.0  # class 1, and no object
    masks = torch.full((1, 2, 1, 2), 20.0)
    masks[0, 0, 0, 1] = -20.0
    expected = torch.zeros(1, 3, 1, 2)
    expected[0, 1, 0, 0] = 1.0
    assert torch.allclose(semantic_map(logits, masks), expected, atol=1e-6)


RENAMES = (
    ("pixel_decoder.input_convs", "pixel_decoder.input_projections"),
    ("pixel_decoder.encoder.level_encoding", "pixel_decoder.level_embed"),
    ("pixel_decoder.lateral_convs.0.norm", "pixel_decoder.adapter_1.1"),
    ("pixel_decoder.lateral_convs.0", "pixel_decoder.adapter_1.0"),
    ("pixel_decoder.output_convs.0.norm", "pixel_decoder.layer_1.1"),
    ("pixel_decoder.output_convs.0", "pixel_decoder.layer_1.0"),
    ("pixel_decoder.mask_feature", "pixel_decoder.mask_projection"),
    ("pixel_decoder.encoder.encoder.layers", "pixel_decoder.encoder.layers"),
    ("predictor.query_feat", "queries_features"),
    ("predictor.query_embed", "queries_embedder"),
    ("predictor.level_embed", "level_embed"),
    ("predictor.post_norm", "decoder.layernorm"),
    ("predictor.mask_embed.layers.", "decoder.mask_predictor.mask_embedder."),
)


def _theirs(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of the pixel decoder and the transformer module of `transformers`."""
    out = {}
    for key, value in state.items():
        for ours, theirs in RENAMES:
            key = key.replace(ours, theirs)
        if key.startswith("pixel_decoder.encoder.layers"):
            for ours, theirs in (("linear", "fc"), ("norm1", "self_attn_layer_norm"), ("norm2", "final_layer_norm")):
                key = key.replace(ours, theirs)
        if "mask_embedder" in key:
            name, place = key.rsplit(".", 1)
            key = f"{name}.0.{place}"
        out[key] = value
    return out


@torch.no_grad()
def test_the_decoder_is_transformers(golden: Callable[[str], Golden]) -> None:
    """The pixel decoder against its public twin; the rest of the way is held by the golden file."""
    from transformers import Mask2FormerConfig as TheirConfig
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerPixelDecoder

    torch.manual_seed(0)
    config = Mask2FormerConfig(dim=32, heads=4, hidden=64, encoder_layers=2, decoder_layers=3, queries=5, classes=4)
    ours = Mask2Former(24, config).eval()
    for parameter in ours.parameters():
        parameter.normal_(std=0.2)
    theirs = Mask2FormerPixelDecoder(
        TheirConfig(
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            num_attention_heads=4,
            encoder_feedforward_dim=64,
            encoder_layers=2,
            dropout=0.0,
            feature_strides=[4, 8, 16, 32],
            common_stride=4,
        ),
        feature_channels=[24, 24, 24, 24],
    ).eval()
    state = _theirs(ours.state_dict())
    prefix = "pixel_decoder."
    theirs.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, strict=True)
    pyramid = [torch.randn(2, 24, 64 // s, 96 // s) for s in (4, 8, 16, 32)]
    mine, other = ours.pixel_decoder(Pyramid(pyramid[:1], tuple(pyramid[1:]))), theirs(pyramid)
    assert torch.allclose(mine.features, other.mask_features, atol=1e-5, rtol=0)
    for a, b in zip(mine.memory, other.multi_scale_features, strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_query_without_a_mask_looks_everywhere() -> None:
    from densedino.heads.mask2former import _visible

    masks = torch.full((1, 2, 4, 4), -5.0)
    masks[0, 1, :2, :2] = 5.0
    seen = _visible(masks, torch.zeros(1, 8, 2, 2))
    assert seen.shape == (1, 1, 2, 4) and seen[0, 0, 0].all()
    assert seen[0, 0, 1].tolist() == [True, False, False, False]


@torch.no_grad()
def test_a_batch_is_its_images() -> None:
    torch.manual_seed(0)
    head = Segmentor(32, TINY).eval()
    image = torch.randn(2, 3, 32, 64)

    class Tap:
        def __init__(self, patches: torch.Tensor) -> None:
            self.patches, self.cls, self.registers = patches, patches[:, 0, 0], patches[:, 0, :1]

    tokens = torch.randn(4, 2, 2, 4, 32)
    both = head(image, lambda _: [Tap(t) for t in tokens])
    one = head(image[1:], lambda _: [Tap(t[1:]) for t in tokens])
    assert torch.allclose(both["pred_masks"][1:], one["pred_masks"], atol=1e-4)
    assert F.softmax(both["pred_logits"], -1).shape == (2, 7, 6)
