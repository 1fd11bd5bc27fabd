from __future__ import annotations

import numpy as np
import pytest
import torch

import densedino as dd
from densedino.adapters.channels import ChannelAdapter, align_channels, inflate, save_channels
from densedino.errors import InputError, UnknownNameError


@pytest.fixture(scope="module", params=["debug_vit", "debug_convnext"])
def dino(request):
    dino = dd.load(request.param, weights="random", engine="eager")
    for name, parameter in dino.model.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.constant_(parameter, 0.5)
    return dino


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)


def test_zero_gives_what_the_colours_alone_gave(dino, image) -> None:
    six = np.random.default_rng(1).integers(0, 256, (64, 96, 6), dtype=np.uint8)
    six[..., [5, 0, 2]] = image
    wide = inflate(dino, channels=6, how="zero", rgb=(5, 0, 2))
    torch.testing.assert_close(wide(six).patches, dino(image).patches, atol=1e-4, rtol=1e-4)
    assert wide.transform.in_chans == wide.card.in_chans == 6 and dino.transform.in_chans == 3
    assert wide.transform.mean[5] == pytest.approx(dino.transform.mean[0])
    assert wide.fingerprint != dino.fingerprint


@pytest.mark.parametrize(("how", "channels"), [("copy", 3), ("copy", 6), ("mean", 5), ("copy", 1), ("mean", 1)])
def test_grey_gives_what_grey_gave(dino, how, channels) -> None:
    dino = dino.with_transform(dino.transform)
    wide = inflate(dino, channels=channels, how=how, mean=(0.5,) * channels, std=(0.25,) * channels)
    grey = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    if how == "copy" and channels == 1:  # red's filters alone, thrice
        expected = dino.model.get_intermediate_layers(torch.cat([3 * grey, 0 * grey, 0 * grey], 1), n=1)
    else:
        expected = dino.model.get_intermediate_layers(grey.expand(-1, 3, -1, -1), n=1)
    (patches,) = wide.model.get_intermediate_layers(grey.expand(-1, channels, -1, -1), n=1)
    torch.testing.assert_close(patches, expected[0], atol=1e-4, rtol=1e-4)


def test_an_adapter_folds_into_the_model_and_is_saved_with_it(dino, tmp_path) -> None:
    adapter = ChannelAdapter(4)
    torch.nn.init.normal_(adapter.mix, generator=torch.Generator().manual_seed(0))
    torch.nn.init.constant_(adapter.shift, 0.3)
    pixels = torch.rand(1, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    mean, std = (0.1, 0.2, 0.3, 0.4), (0.5, 0.4, 0.3, 0.2)
    folded = adapter.fold(dino, mean=mean, std=std)
    normal = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        (expected,) = dino.model.get_intermediate_layers(adapter(normal), n=1)
    torch.testing.assert_close(folded(pixels).patches.flatten(1, 2), expected, atol=1e-4, rtol=1e-4)
    save_channels(folded, tmp_path / "four.safetensors")
    loaded = dd.load(weights=tmp_path / "four.safetensors", engine="eager")
    assert (loaded.transform.mean, loaded.transform.std) == (mean, std)
    assert "a channel adapter is folded in" in loaded.card.notes
    torch.testing.assert_close(loaded(pixels).patches, folded(pixels).patches, atol=0, rtol=0)


def test_an_adapter_begins_as_the_colours() -> None:
    adapter = ChannelAdapter(5, rgb=(3, 1, 0))
    pixels = torch.randn(2, 5, 32, 32)
    torch.testing.assert_close(adapter(pixels), pixels[:, [3, 1, 0]])
    torch.testing.assert_close(ChannelAdapter(5)(pixels)[:, 0], pixels.mean(1))


def test_channels_learn_to_give_the_features_of_the_colours(dino) -> None:
    random = torch.Generator().manual_seed(0)
    secret = torch.randn(5, 3, generator=random)

    def pair():
        colours = torch.randn(4, 3, 64, 64, generator=random)
        return torch.einsum("nc,bchw->bnhw", secret, colours), colours

    adapter = ChannelAdapter(5)
    before = {name: tensor.clone() for name, tensor in dino.model.state_dict().items()}
    losses = align_channels(dino, adapter, (pair() for _ in range(30)), learning_rate=0.05)
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:2])
    assert all(torch.equal(tensor, before[name]) for name, tensor in dino.model.state_dict().items())
    assert all(parameter.grad is None for parameter in dino.model.parameters())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda d: inflate(d, channels=4, how="kopy"), UnknownNameError, "did you mean 'copy'"),
        (lambda d: inflate(d, channels=4, how="zero", rgb=(0, 1, 4)), InputError, r"rgb=\(0, 1, 4\)"),
        (lambda d: inflate(d, channels=4, mean=(0.5,)), InputError, "mean has 1 values for 4 channels"),
        (lambda d: inflate(inflate(d, channels=4), channels=5), InputError, "4 channels to 5"),
        (lambda d: ChannelAdapter(4, rgb=(0, 1)), InputError, "three numbers of channels"),
        (lambda d: ChannelAdapter(4).fold(d, mean=(0.5,), std=(1.0,)), InputError, "mean has 1 values"),
        (lambda d: ChannelAdapter(4).fold(inflate(d, channels=4), mean=(0.5,) * 4, std=(1.0,) * 4), InputError, "of 3"),
    ],
)
def test_what_does_not_fit_is_said(dino, call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(dino)
