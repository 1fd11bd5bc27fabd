from __future__ import annotations

import torch

from densedino.heads.attention import MultiheadAttention, ReluMlp, learned


@torch.no_grad()
def test_equal_to_pytorchs() -> None:
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True).eval()
    ours = MultiheadAttention(16, heads=4)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    q, k, v = torch.randn(2, 5, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    blocked = torch.rand(5, 7) < 0.4
    blocked[:, 0] = False
    for mask in (None, blocked):
        expected = theirs(q, k, v, attn_mask=mask, need_weights=False)[0]
        assert torch.allclose(ours(q, k, v, mask=None if mask is None else ~mask), expected, atol=1e-6)


def test_an_mlp_has_relu_between_its_layers_alone() -> None:
    mlp = ReluMlp(3, 5, 2, depth=3)
    assert [tuple(layer.weight.shape) for layer in mlp.layers] == [(5, 3), (5, 5), (2, 5)]
    assert (mlp(torch.randn(50, 3)) < 0).any()


def test_a_learned_table_has_the_deviation_asked_for() -> None:
    torch.manual_seed(0)
    weight = learned(200, 50, deviation=0.5).weight
    assert abs(weight.std().item() - 0.5) < 0.02 and abs(weight.mean().item()) < 0.02
