from __future__ import annotations

import pytest
import torch

from densedino.pretrain.projection import ProjectionHead


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_head_is_the_formula(num_layers):
    head = ProjectionHead(12, hidden_dim=20, bottleneck_dim=7, num_prototypes=33, num_layers=num_layers)
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    y = x.double()
    for i in range(num_layers):
        layer = head.mlp[2 * i]
        y = y @ layer.weight.double().T + layer.bias.double()
        if i < num_layers - 1:
            y = y * (1 + torch.erf(y / 2**0.5)) / 2
    y = y / y.norm(dim=-1, keepdim=True)
    features = head(x)
    torch.testing.assert_close(features.double(), y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        head.logits(features).double(), y @ head.last_layer.weight.double().T, rtol=1e-5, atol=1e-6
    )


def test_keys_and_initial_weights():
    head = ProjectionHead(64, hidden_dim=128, bottleneck_dim=32, num_prototypes=500)
    assert set(head.state_dict()) == {
        "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias", "mlp.4.weight", "mlp.4.bias", "last_layer.weight",
    }  # fmt: skip
    for name, parameter in head.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05)


def test_bottleneck_is_fp32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = ProjectionHead(8, hidden_dim=8, bottleneck_dim=4, num_prototypes=5)(torch.randn(3, 8))
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(3))
