from __future__ import annotations

import pytest
import torch

from densedino.errors import InputError
from densedino.models.catalog import create_model


def test_cls_is_the_mean_of_the_last_map_under_the_shared_norm() -> None:
    model = create_model("debug_convnext")
    x = torch.randn(2, 3, 64, 96)
    out = model.forward_features(x)
    assert out["x_norm_patchtokens"].shape == (2, 6, 32)
    assert out["x_storage_tokens"].shape == (2, 0, 32)
    torch.testing.assert_close(out["x_norm_clstoken"], model.norm(out["x_prenorm"].mean(1)))
    torch.testing.assert_close(model(x), out["x_norm_clstoken"])


def test_stages_come_in_the_order_asked_at_their_own_stride() -> None:
    model = create_model("debug_convnext")
    x = torch.randn(1, 3, 64, 96)
    last, first = model.get_intermediate_layers(x, n=[-1, 0], reshape=True)
    assert last.shape == (1, 32, 2, 3)
    assert first.shape == (1, 8, 16, 24)
    ((patches, cls, extra),) = model.get_intermediate_layers(x, return_class_token=True, return_extra_tokens=True)
    torch.testing.assert_close(cls, model(x))
    assert patches.shape == (1, 6, 32)
    assert extra.shape == (1, 0, 32)


def test_a_list_of_resolutions() -> None:
    model = create_model("debug_convnext")
    outs = model.forward_features([torch.randn(1, 3, 64, 64), torch.randn(2, 3, 32, 32)])
    assert [o["x_norm_clstoken"].shape[0] for o in outs] == [1, 2]


def test_sizes_that_are_no_multiple_of_32_are_refused() -> None:
    with pytest.raises(InputError, match="multiples of 32"):
        create_model("debug_convnext")(torch.zeros(1, 3, 48, 64))
