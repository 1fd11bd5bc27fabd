"""The mask transformer: queries and patches see each other; one query for each class."""

from __future__ import annotations

import torch

from densedino.adapters.mask_transformer import MaskTransformer
from densedino.engines.eager import LayerTokens


def test_masks_are_finer_than_patches_and_see_all_of_them() -> None:
    torch.manual_seed(0)
    head = MaskTransformer(64, out=3).eval()
    patches = torch.randn(1, 4, 6, 64, requires_grad=True)
    logits = head([LayerTokens(patches, patches[:, 0, 0], patches[:, :0, 0])])
    assert logits.shape == (1, 3, 16, 24)
    logits[0, 0, 0, 0].backward()
    assert bool((patches.grad.abs().sum(-1) > 0).all())


def test_each_class_has_a_query_of_its_own() -> None:
    torch.manual_seed(0)
    head = MaskTransformer(64, out=3).eval()
    tap = LayerTokens(torch.randn(1, 4, 4, 64), torch.randn(1, 64), torch.zeros(1, 0, 64))
    before = head([tap])
    with torch.no_grad():
        head.queries[0, 1] += 5
    changed = (head([tap]) - before).abs().amax((0, 2, 3))
    assert int(changed.argmax()) == 1
