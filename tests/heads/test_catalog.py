from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from densedino.errors import UnknownNameError
from densedino.heads.catalog import HEADS, create_head, head_spec, list_heads
from densedino.models.catalog import MODELS
from densedino.models.vit import block_indices

if TYPE_CHECKING:
    from collections.abc import Callable

TABLES = {
    "lc": ("dinov3_vit7b16_lc", 8_193_000),
    "dd": ("dinov3_vit7b16_dd", 230_687_776),
    "ms": ("dinov3_vit7b16_ms", 927_420_375),
    "de": ("dinov3_vit7b16_de", 129_070_745),
    "chmv2": ("dinov3_vitl16_chmv2", 33_747_200),
    "dinotxt": ("dinov3_vitl16_dinotxt_tet1280d20h24l", 563_457_537),
}
DEBUG = [name for name in HEADS if name.startswith("debug")]


@pytest.mark.parametrize("table", TABLES)
def test_names_and_shapes_are_those_of_the_release(table: str, key_table: Callable[..., dict[str, tuple]]) -> None:
    hub, parameters = TABLES[table]
    rows = key_table(table)
    wanted = {key: (shape, dtype) for key, (shape, dtype, where) in rows.items() if where == "yes"}
    head = create_head(hub, device="meta")
    assert {k: (tuple(v.shape), str(v.dtype)[6:]) for k, v in head.state_dict().items()} == wanted
    assert sum(p.numel() for p in head.parameters()) == parameters
    released = {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for key, (shape, dtype) in wanted.items()
    }
    head.load_state_dict(released, strict=True, assign=True)
    assert all(head.state_dict()[key] is not None for key in released)


@pytest.mark.parametrize("name", HEADS)
def test_a_row_fits_its_backbone(name: str) -> None:
    spec = HEADS[name]
    model = MODELS[spec.backbone]
    assert block_indices(spec.layers, model.depth) == list(spec.layers)
    assert bool(spec.hub) == (not name.startswith("debug"))
    if spec.hub:
        assert spec.file.endswith(f"-{spec.sha256}.pth") and len(spec.sha256) == 8
        assert head_spec(spec.hub) is spec


@pytest.mark.parametrize("name", DEBUG)
def test_a_state_dict_goes_round(name: str) -> None:
    first, second = create_head(name), create_head(name)
    second.load_state_dict(first.state_dict(), strict=True)
    assert not first.training
    for (key, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_names_are_listed_and_near_ones_named() -> None:
    assert "vit7b16-ade20k-m2f" in list_heads("vit7b16-*") and len(list_heads("vit7b16-*")) == 4
    with pytest.raises(UnknownNameError, match="did you mean 'vit7b16-ade20k-m2f'"):
        head_spec("vit7b16-ade20k-mf")
