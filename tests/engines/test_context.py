from __future__ import annotations

import pytest
import torch

import densedino as dd
from densedino.engines.context import ContextEngine
from densedino.engines.eager import EagerEngine
from densedino.errors import InputError


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def engine(request):
    torch.manual_seed(0)
    model = dd.create_model("debug_vit")
    for block in model.blocks:
        torch.nn.init.constant_(block.ls1.gamma, 0.5)
        torch.nn.init.constant_(block.ls2.gamma, 0.5)
    return EagerEngine(model, device=torch.device("cpu"), precision=request.param)


def test_at_full_size_a_part_is_that_part_of_the_whole(engine) -> None:
    pixels = torch.randn(1, 3, 96, 160, generator=torch.Generator().manual_seed(1))
    (whole,) = engine(pixels)
    context = ContextEngine(engine, pixels, grid=(6, 10), real=torch.ones(6, 10))
    patches, cls = context(torch.cat([pixels[..., 16:80, 32:96], pixels[..., :64, 96:]]), [(1, 2), (0, 6)])
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if engine.precision == "fp32" else {"atol": 0.1, "rtol": 0.1}
    torch.testing.assert_close(patches[0], whole.patches[0, 1:5, 2:6], **tolerance)
    torch.testing.assert_close(patches[1], whole.patches[0, :4, 6:], **tolerance)
    torch.testing.assert_close(cls, whole.cls.expand(2, -1), **tolerance)


def test_a_shrunk_patch_counts_for_what_it_covers_outside_of_the_part(engine) -> None:
    context = ContextEngine(engine, torch.zeros(1, 3, 32, 32), grid=(8, 8), real=torch.tensor([[1, 1], [1, 0]]))
    weights = context._scores((0, 2), (4, 4)).exp()
    first = 1 + engine.model.num_register_tokens
    # The part covers half of both upper cells of 4 × 4 patches; the lower left is outside, the lower right is nothing.
    assert weights[:first].tolist() == [1.0] * first
    assert weights[first : first + 4].tolist() == pytest.approx([8, 8, 16, 0])
    assert weights[first + 4 :].tolist() == [1.0] * 16


def test_what_cannot_be_done_is_said() -> None:
    convnext = EagerEngine(dd.create_model("debug_convnext"), device=torch.device("cpu"), precision="fp32")
    with pytest.raises(InputError, match="context is for ViTs in plain PyTorch; this is debug_convnext"):
        ContextEngine(convnext, torch.zeros(1, 3, 32, 32), grid=(1, 1), real=torch.ones(1, 1))
    training = EagerEngine(dd.create_model("debug_vit").train(), device=torch.device("cpu"), precision="fp32")
    with pytest.raises(InputError, match="training mode"):
        ContextEngine(training, torch.zeros(1, 3, 32, 32), grid=(2, 2), real=torch.ones(2, 2))
