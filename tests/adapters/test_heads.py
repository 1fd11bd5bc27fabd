"""Heads: every one in the table gives logits of the size it says, learns, and is the same for the same seed."""

from __future__ import annotations

import pytest
import torch

from densedino.adapters.heads import HEADS, HeadConfig, KnnHead, LinearHead, Purpose, build_head, head_layers, joined
from densedino.engines.eager import LayerTokens
from densedino.errors import InputError, UnknownNameError
from densedino.features.probes import knn_vote
from densedino.models.catalog import create_model

VIT, CONVNEXT = create_model("debug_vit"), create_model("debug_convnext")


def taps_of_vit(count: int, *, grid: tuple[int, int] = (4, 6), batch: int = 2) -> list[LayerTokens]:
    generator = torch.Generator().manual_seed(0)
    return [
        LayerTokens(
            torch.randn(batch, *grid, 32, generator=generator),
            torch.randn(batch, 32, generator=generator),
            torch.zeros(batch, 4, 32),
        )
        for _ in range(count)
    ]


def built(kind: str, *, out: int = 5, whole: bool = False) -> torch.nn.Module:
    head = build_head(HeadConfig(kind=kind, width=16), VIT, Purpose(out=out, whole=whole))  # type: ignore[arg-type]
    if isinstance(head, KnnHead):
        head.fill(torch.randn(40, 64 if whole else 32), torch.arange(40) % out)
    return head


@pytest.mark.parametrize("kind", HEADS)
def test_every_head_gives_logits_of_each_place(kind: str) -> None:
    taps = taps_of_vit(len(head_layers(HeadConfig(kind=kind), 4)))  # type: ignore[arg-type]
    logits = built(kind)(taps, torch.randn(2, 3, 64, 96))
    finer = {"linear": 1, "bn-linear": 1, "mlp": 1, "knn": 1, "dpt": 16}.get(kind, 4)
    assert logits.shape == (2, 5, 4 * finer, 6 * finer)
    assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("kind", ["linear", "bn-linear", "mlp", "knn"])
def test_some_tell_what_an_image_is(kind: str) -> None:
    assert built(kind, whole=True)(taps_of_vit(1)).shape == (2, 5, 1, 1)


@pytest.mark.parametrize("kind", [k for k in HEADS if k != "knn"])
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    head = built(kind).train()
    taps = taps_of_vit(len(head_layers(HeadConfig(kind=kind), 4)))  # type: ignore[arg-type]
    head(taps, torch.randn(2, 3, 64, 96)).square().sum().backward()
    assert [name for name, p in head.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("kind", [k for k in HEADS if k != "knn"])
def test_initial_weights_depend_on_the_seed_alone(kind: str) -> None:
    config = HeadConfig(kind=kind, width=16)  # type: ignore[arg-type]
    torch.manual_seed(1)
    one = build_head(config, VIT, Purpose(out=3), seed=4).state_dict()
    torch.manual_seed(2)
    two, other = (build_head(config, VIT, Purpose(out=3), seed=s).state_dict() for s in (4, 5))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_layers_are_spread_and_checked() -> None:
    assert head_layers(HeadConfig(), 12) == (11,)
    assert head_layers(HeadConfig(kind="dpt"), 12) == (2, 5, 8, 11)
    assert head_layers(HeadConfig(kind="fpn"), 24) == (5, 11, 17, 23)
    assert head_layers(HeadConfig(kind="linear", layers=(-4, -1)), 12) == (8, 11)
    with pytest.raises(InputError, match="takes four blocks"):
        head_layers(HeadConfig(kind="dpt", layers=(1, 2)), 12)
    with pytest.raises(InputError, match="takes one block"):
        head_layers(HeadConfig(kind="knn", layers=(1, 2)), 12)
    with pytest.raises(InputError, match="block indices"):
        head_layers(HeadConfig(layers=(12,)), 12)
    with pytest.raises(UnknownNameError, match="'bn-linear'"):
        HeadConfig(kind="bnlinear")  # type: ignore[arg-type]


def test_layers_are_joined_on_channels() -> None:
    taps = taps_of_vit(2)
    assert torch.equal(joined(taps)[:, 32:], taps[1].patches.permute(0, 3, 1, 2))
    head = build_head(HeadConfig(kind="linear", layers=(0, 1)), VIT, Purpose(out=3))
    assert isinstance(head, LinearHead) and head.conv.in_channels == 64


def test_a_convnext_has_its_own_pyramid() -> None:
    pixels = torch.randn(2, 3, 64, 96)
    maps = CONVNEXT.get_intermediate_layers(pixels, n=[0, 1, 2, 3], reshape=True)
    taps = [LayerTokens(m.permute(0, 2, 3, 1), m.mean((2, 3)), m[:, :0, 0]) for m in maps]
    head = build_head(HeadConfig(kind="upernet", width=16), CONVNEXT, Purpose(out=3)).eval()
    assert head(taps).shape == (2, 3, 16, 24)
    joined_head = build_head(HeadConfig(layers=(2, 3)), CONVNEXT, Purpose(out=3)).eval()
    assert joined_head(taps[2:]).shape == (2, 3, 4, 6)
    with pytest.raises(InputError, match=r"for ViTs.*fpn"):
        build_head(HeadConfig(kind="dpt"), CONVNEXT, Purpose(out=3))


def test_neighbours_vote_as_the_probe_does() -> None:
    generator = torch.Generator().manual_seed(3)
    bank, labels = torch.randn(200, 32, generator=generator), torch.randint(0, 5, (200,), generator=generator)
    head = KnnHead(32, out=5, whole=False, neighbours=20)
    head.fill(bank, labels)
    (tap,) = taps_of_vit(1, grid=(8, 8))
    told = head([tap]).argmax(1).flatten()
    assert torch.equal(told, knn_vote(tap.patches.flatten(0, 2), bank, labels, num_classes=5, k=20))
    with pytest.raises(InputError, match="labelled tokens"):
        head.fill(bank[:0], labels[:0])


def test_dense_heads_tell_nothing_of_whole_images() -> None:
    with pytest.raises(InputError, match="not what an image is"):
        build_head(HeadConfig(kind="fpn"), VIT, Purpose(out=3, whole=True))
    with pytest.raises(InputError, match="looks at the pixels"):
        built("vit-adapter")(taps_of_vit(4))
