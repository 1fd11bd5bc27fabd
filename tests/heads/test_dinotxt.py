from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from densedino.heads.configs import DinoTxtConfig
from densedino.heads.dinotxt import DinoTxt

if TYPE_CHECKING:
    from collections.abc import Callable

    from heads.conftest import Golden

TINY = DinoTxtConfig(
    vision_heads=2,
    vision_hidden=128,
    text_dim=48,
    text_heads=3,
    text_blocks=3,
    text_hidden=192,
    context=12,
    vocabulary=100,
)
BACKBONE = "visual_model.backbone."


@torch.no_grad()
def test_embeddings_are_golden(golden: Callable[[str], Golden]) -> None:
    file = golden("dinotxt")
    head = DinoTxt(32, TINY).eval()
    head.load_state_dict(file.weights(without=BACKBONE), strict=True)
    tokens_of = file.taps(BACKBONE, (3,))
    image, text, scale, patches = head(file["in/image"], file["in/tokens"], tokens_of)
    assert torch.allclose(image, file["out/image_features"], atol=1e-5, rtol=0)
    assert torch.allclose(text, file["out/text_features"], atol=1e-5, rtol=0)
    assert torch.allclose(scale, file["out/logit_scale_exp"], atol=1e-4, rtol=0)
    assert torch.allclose(patches, file["out/patch_tokens"], atol=1e-5, rtol=0)
    assert torch.allclose(scale * image @ text.T, file["out/image_logits"], atol=1e-4, rtol=0)
    embedding, grid = head.encode_image(file["in/image"], tokens_of)
    assert torch.allclose(embedding, file["out/image_features_raw"], atol=1e-5, rtol=0) and grid.shape == (2, 3, 4, 32)
    assert torch.allclose(head.encode_text(file["in/tokens"]), file["out/text_features_raw"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_text_tower_is_clips_of_transformers() -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    ours = DinoTxt(32, TINY).eval().text_model
    theirs = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=100,
            hidden_size=48,
            intermediate_size=192,
            projection_dim=64,
            num_hidden_layers=3,
            num_attention_heads=3,
            max_position_embeddings=12,
            hidden_act="gelu",
            layer_norm_eps=1e-5,
            eos_token_id=99,
        )
    ).eval()
    state = {}
    for key, value in ours.state_dict().items():
        if key.endswith("attention.qkv.weight"):
            for name, part in zip("qkv", value.chunk(3), strict=True):
                state[key.replace("attention.qkv", f"self_attn.{name}_proj")] = part
        else:
            state[key] = value
    renamed = {}
    for key, value in state.items():
        for a, b in (
            ("backbone.token_embedding", "text_model.embeddings.token_embedding"),
            ("backbone.positional_embedding", "text_model.embeddings.position_embedding.weight"),
            ("backbone.blocks", "text_model.encoder.layers"),
            ("attention_norm", "layer_norm1"),
            ("attention.proj", "self_attn.out_proj"),
            ("ffn_norm", "layer_norm2"),
            ("feed_forward", "mlp"),
            ("backbone.ln_final", "text_model.final_layer_norm"),
            ("head.linear_projection", "text_projection"),
        ):
            key = key.replace(a, b)
        renamed[key] = value
    own = theirs.state_dict()
    zeros = {key: torch.zeros_like(own[key]) for key in own.keys() - renamed.keys()}
    assert all(key.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias", "position_ids")) for key in zeros)
    theirs.load_state_dict({**renamed, **zeros}, strict=True)
    tokens = torch.zeros(3, 12, dtype=torch.int64)
    for row, length in enumerate((2, 5, 10)):
        tokens[row, 1:length] = torch.randint(1, 98, (length - 1,))
        tokens[row, 0], tokens[row, length] = 98, 99
    assert torch.allclose(ours(tokens), theirs(input_ids=tokens).text_embeds, atol=1e-5, rtol=0)
