"""What a look measures, and that it changes nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from densedino.errors import ImageError, InputError
from densedino.models.catalog import create_model
from densedino.pretrain.looks import FIXED, Observer, Sizes, encode, middle_square, scale_image
from densedino.pretrain.settings import MonitorConfig

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

SIZES = Sizes(images=20, bank=6, queries=2, train=4, val=2)
CONFIG = MonitorConfig(size=32, images=20)
STATISTICS = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


class Pictures:
    """Pictures of noise; some cannot be read."""

    def __init__(self, count: int = 30, *, broken: tuple[int, ...] = (), channels: int = 3, start: int = 0) -> None:
        self.count, self.broken, self.channels, self.start = count, broken, channels, start

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        assert 0 <= index < self.count
        return f"picture {self.start + index}"

    def read(self, index: int) -> torch.Tensor:
        if index in self.broken:
            raise ImageError("truncated")
        generator = torch.Generator().manual_seed(self.start + index)
        return torch.randint(0, 256, (self.channels, 40, 48), generator=generator, dtype=torch.uint8)


@pytest.fixture
def backbone() -> nn.Module:
    torch.manual_seed(0)
    return create_model("debug_vit")


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Two classes that differ in colour."""
    for label, colour in (("dark", 40), ("light", 210)):
        (tmp_path / "classes" / label).mkdir(parents=True)
        for i in range(12):
            noise = np.random.default_rng(i).integers(-20, 20, (36, 40, 3))
            Image.fromarray((colour + noise).astype(np.uint8)).save(tmp_path / "classes" / label / f"{i}.png")
    return tmp_path / "classes"


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    """Pictures whose left part is dark and class 0, the right light and class 1, with a border that is no class."""
    for name in ("images", "masks"):
        (tmp_path / "masks" / name).mkdir(parents=True)
    for i in range(8):
        cut = 16 * (1 + i % 3)
        pixels = np.full((64, 64, 3), 200, np.uint8)
        pixels[:, :cut] = 30
        labels = np.ones((64, 64), np.uint8)
        labels[:, :cut] = 0
        labels[:, cut] = 7
        Image.fromarray(pixels).save(tmp_path / "masks" / "images" / f"{i}.png")
        Image.fromarray(labels).save(tmp_path / "masks" / "masks" / f"{i}.png")
    return tmp_path / "masks"


def test_a_look_measures_what_it_is_given(backbone: nn.Module, classes: Path, masks: Path) -> None:
    config = replace(CONFIG, knn=str(classes), segmentation=str(masks), ignore_label=7)
    look = Observer(config, sources=[Pictures()], **STATISTICS, sizes=SIZES).look(backbone)
    assert look.patches.shape == (FIXED, 2, 2, 32)
    assert look.measures["knn"] == look.measures["knn_majority"] == 1
    assert look.measures["miou"] > 0.6
    assert look.measures["pixel_accuracy"] > 0.8
    assert look.measures["effective_rank"] <= look.measures["effective_rank_limit"] == 20
    assert -1 <= look.measures["coherence"] <= 1


def test_a_look_changes_nothing_and_is_repeatable(backbone: nn.Module) -> None:
    observer = Observer(CONFIG, sources=[Pictures()], **STATISTICS, sizes=SIZES)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    rng = torch.get_rng_state()
    one, other = observer.look(backbone), observer.look(backbone)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(p.requires_grad for p in backbone.parameters())
    assert not backbone.training
    assert one.measures == other.measures
    assert torch.equal(one.patches, other.patches)


def test_training_goes_on_after_a_look_at_the_same_module(backbone: nn.Module) -> None:
    """What the model caches meanwhile, RoPE tables say, must be fit for a backward pass."""
    Observer(CONFIG, sources=[Pictures()], **STATISTICS, sizes=SIZES).look(backbone)
    backbone.train()(torch.zeros(1, 3, 32, 32)).sum().backward()


def test_a_backbone_in_training_mode_is_refused(backbone: nn.Module) -> None:
    with pytest.raises(InputError, match=r"call \.eval\(\)"):
        list(encode(backbone.train(), [torch.zeros(1, 3, 32, 32)]))


@pytest.mark.parametrize("model", ["debug_vit", "debug_vit_swiglu", "debug_convnext"])
def test_every_kind_of_backbone_can_be_looked_at(model: str) -> None:
    backbone = create_model(model)
    (tokens,) = encode(backbone, [torch.zeros(2, 3, 64, 96)])
    stride = backbone.stride
    assert tokens.patches.shape == (2, 64 // stride, 96 // stride, 32)
    assert tokens.cls.shape == (2, 32)


def test_pictures_that_cannot_be_read_are_left_out(backbone: nn.Module) -> None:
    observer = Observer(CONFIG, sources=[Pictures(broken=(0, 1, 2))], **STATISTICS, sizes=SIZES)
    look = observer.look(backbone)
    assert len(look.names) < FIXED
    assert len(look.patches) == len(look.names)
    everything = Observer(CONFIG, sources=[Pictures(broken=tuple(range(30)))], **STATISTICS, sizes=SIZES)
    with pytest.raises(InputError, match="none of the chosen"):
        everything.look(backbone)


def test_several_sources_are_looked_at_as_one(backbone: nn.Module) -> None:
    parts = [Pictures(7), Pictures(0, start=7), Pictures(23, start=7)]
    one = Observer(CONFIG, sources=[Pictures()], **STATISTICS, sizes=SIZES).look(backbone)
    other = Observer(CONFIG, sources=parts, **STATISTICS, sizes=SIZES).look(backbone)
    assert one.names == other.names
    assert one.measures == other.measures
    with pytest.raises(InputError, match="no training images"):
        Observer(CONFIG, sources=[], **STATISTICS)


def test_named_pictures_come_first(backbone: nn.Module, photos: Path) -> None:
    config = replace(CONFIG, pictures=(str(photos / "coffee.jpg"),))
    look = Observer(config, sources=[Pictures()], **STATISTICS, sizes=SIZES).look(backbone)
    assert look.names[0].endswith("coffee.jpg")
    assert len(look.names) == FIXED


def test_other_numbers_of_channels_can_be_looked_at() -> None:
    observer = Observer(CONFIG, sources=[Pictures(channels=5)], mean=(0.5,) * 5, std=(0.2,) * 5, sizes=SIZES)
    assert observer.look(create_model("debug_vit", in_chans=5)).measures["feature_std"] >= 0


def test_the_first_look_sets_sizes_that_fit_the_time_and_keeps_them(backbone: nn.Module, classes: Path) -> None:
    config = replace(CONFIG, knn=str(classes), images=5000, seconds=1e-6)
    observer = Observer(config, sources=[Pictures()], **STATISTICS)
    observer.look(backbone)
    assert observer.sizes == Sizes(images=FIXED, bank=10, queries=5, train=10, val=5)
    generous = Observer(replace(config, seconds=1e6), sources=[Pictures()], **STATISTICS)
    generous.look(backbone)
    assert generous.sizes == Sizes(images=5000)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_pixels_of_every_type_mean_the_same(dtype: torch.dtype) -> None:
    image = torch.rand(3, 40, 50, generator=torch.Generator().manual_seed(0))
    white = {torch.uint8: 255, torch.uint16: 65535}.get(dtype, 1)
    found = scale_image((image * white).to(dtype), size=(20, 20))
    torch.testing.assert_close(found, scale_image(image, size=(20, 20)), atol=0.005, rtol=0)
    assert torch.equal(scale_image(image * 4095, size=(8, 8), max_value=4095.0) <= 1, torch.ones(3, 8, 8).bool())


def test_the_square_is_the_middle() -> None:
    image = torch.zeros(1, 32, 96)
    image[..., 32:64] = 1
    assert torch.equal(middle_square(image, side=32), torch.ones(1, 32, 32))
    assert middle_square(image.mT, side=48).shape == (1, 48, 48)
