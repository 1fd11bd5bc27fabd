from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from densedino.heads import deformable
from densedino.heads.deformable import DeformableAttention, cell_centres, sample_levels

if TYPE_CHECKING:
    from collections.abc import Callable

    from heads.conftest import Golden

SHAPES = [(6, 5), (3, 4), (2, 2)]


def _inputs(seed: int = 0, queries: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, sum(h * w for h, w in SHAPES), 4, 8, generator=generator)
    locations = torch.rand(2, queries, 4, 3, 4, 2, generator=generator) * 1.4 - 0.2  # some outside
    weights = torch.rand(2, queries, 4, 3, 4, generator=generator).flatten(3).softmax(-1).unflatten(3, (3, 4))
    return values, locations, weights


def test_function_and_module_are_golden(golden: Callable[[str], Golden]) -> None:
    file = golden("msda")
    shapes = [tuple(row) for row in file["in/spatial_shapes"].tolist()]
    core = sample_levels(file["in/core_value"], shapes, file["in/core_locations"], file["in/core_weights"])
    assert torch.allclose(core, file["out/core"], atol=1e-6, rtol=0)
    module = DeformableAttention(32, heads=4, levels=3, points=4, ratio=0.5)
    module.load_state_dict(file.weights(), strict=True)
    query, values, padding = file["in/query"], file["in/value_input"], file["in/padding_mask"]
    for reference, mask, name in (
        ("in/ref2", None, "module_ref2"),
        ("in/ref2", padding, "module_ref2_masked"),
        ("in/ref4", None, "module_ref4"),
    ):
        out = module(query, file[reference], values, shapes, padding=mask)
        assert torch.allclose(out, file[f"out/{name}"], atol=1e-6, rtol=0), name


@pytest.mark.parametrize("at_once", [1, 1 << 14, 1 << 30])
def test_equal_to_transformers(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    monkeypatch.setattr(deformable, "_SAMPLE_BYTES", at_once)
    values, locations, weights = _inputs()
    theirs = MultiScaleDeformableAttention()(values, torch.tensor(SHAPES), SHAPES, None, locations, weights, 64)
    assert (sample_levels(values, SHAPES, locations, weights) - theirs).abs().max() <= 1e-6


def test_gradients_reach_values_places_and_weights() -> None:
    inputs = [t[:1].double().requires_grad_() for t in _inputs(queries=2)]
    assert torch.autograd.gradcheck(
        lambda v, p, w: sample_levels(v, SHAPES, p, w), inputs, eps=1e-7, atol=1e-4, fast_mode=True
    )


def test_a_fresh_module_looks_around_each_place() -> None:
    module = DeformableAttention(16, heads=4, levels=1, points=2)
    offsets = module.sampling_offsets.bias.view(4, 1, 2, 2)
    assert torch.allclose(offsets[:, 0, 1], 2 * offsets[:, 0, 0])
    assert torch.allclose(offsets[:, 0, 0].detach(), torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]), atol=1e-6)


def test_it_is_exported() -> None:
    torch.manual_seed(0)
    module = DeformableAttention(16, heads=4, levels=2, points=2, ratio=0.5).eval()
    shapes = ((4, 3), (2, 2))
    reference = cell_centres(shapes, device=torch.device("cpu"))[None, :, None].expand(2, -1, 2, -1)
    query = torch.randn(2, 16, 16)

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, query: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
            return self.module(query, reference, query, shapes)

    with torch.no_grad():
        program = torch.export.export(Wrapped(), (query, reference)).module()
        assert torch.allclose(program(query, reference), module(query, reference, query, shapes), atol=1e-6)
