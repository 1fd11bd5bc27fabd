"""Pictures against scenes whose objects, parts and geometry are known because the test made them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from densedino.engines.eager import LayerTokens
from densedino.errors import InputError
from densedino.features.colours import heat_colours
from densedino.features.pictures import attention_images, patch_at, pca_images, picture_size, similarity_images
from densedino.features.tokens import Features


def features_of(tokens, *, stride=16, input_size=None, source_size=None, valid=None, layers=None):
    """Features of one image whose tokens [h, w, D] are given."""
    h, w, dim = tokens.shape
    extent = input_size or (h * stride, w * stride)
    return Features(
        patches=tokens[None].float(),
        cls=torch.zeros(1, dim),
        registers=torch.zeros(1, 4, dim),
        valid=torch.ones(1, h, w, dtype=torch.bool) if valid is None else valid[None],
        stride=stride,
        grids=((h, w),),
        input_sizes=(extent,),
        source_sizes=(source_size or extent,),
        layers=layers or {},
    )


def scene(h=40, w=56, dim=96, *, noise=0.35, shift=0.0, seed=0):
    """A creature (body, head, legs) before a backdrop that drifts slowly: tokens [h, w, D], object mask, part masks.

    Directions are the same for every seed, so that scenes of several seeds show the same kind of creature.
    """
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    x = x - shift
    body = ((x / 0.45) ** 2 + (y / 0.4) ** 2) < 1
    head = (((x - 0.5) / 0.16) ** 2 + ((y + 0.35) / 0.24) ** 2 < 1) & ~body
    legs = (((x + 0.25).abs() < 0.07) | ((x - 0.25).abs() < 0.07)) & (y > 0.2) & (y < 0.85) & ~body
    thing = body | head | legs
    directions = torch.linalg.qr(torch.randn(dim, 8, generator=torch.Generator().manual_seed(7)))[0].T
    object_, backdrop, along, head_, legs_, drift = directions[:6]
    tokens = torch.where(thing[..., None], 6 * object_, 6 * backdrop)
    tokens = tokens + thing[..., None] * (3 * x[..., None] * along)
    tokens = (
        tokens
        + 5 * head[..., None] * head_
        + 4 * legs[..., None] * legs_
        + ~thing[..., None] * 2 * y[..., None] * drift
    )
    tokens = tokens + noise * torch.randn(h, w, dim, generator=torch.Generator().manual_seed(seed)) + 3.0
    return tokens, thing, (body, head, legs)


def pixels(picture):
    return torch.from_numpy(np.asarray(picture.image).copy()).float() / 255


def up(mask, factor):
    return mask.repeat_interleave(factor, 0).repeat_interleave(factor, 1)


@pytest.mark.parametrize("smooth", [True, False])
def test_the_foreground_is_found_and_the_backdrop_is_black(smooth):
    tokens, thing, _ = scene()
    rgb = pixels(pca_images(features_of(tokens), foreground=True, smooth=smooth)[0])
    found = rgb.sum(-1) > 0
    truth = up(thing, 16)
    iou = float((found & truth).sum() / (found | truth).sum())
    assert iou > 0.9


def test_parts_get_colours_of_their_own_that_change_smoothly_within_them():
    tokens, _, parts = scene(noise=0.15)
    rgb = pixels(pca_images(features_of(tokens), foreground=True, smooth=False)[0])[8::16, 8::16]
    means = torch.stack([rgb[part].mean(0) for part in parts])
    assert torch.cdist(means, means)[torch.triu_indices(3, 3, 1).unbind()].min() > 0.3
    body = parts[0]
    neighbours = (rgb[:, 1:] - rgb[:, :-1]).norm(dim=-1)[body[:, 1:] & body[:, :-1]]
    assert neighbours.median() < 0.12
    rows, cols = body.nonzero(as_tuple=True)
    ends = rgb[rows[cols == cols.min()], cols.min()].mean(0) - rgb[rows[cols == cols.max()], cols.max()].mean(0)
    assert ends.norm() > 4 * neighbours.median(), "the gradient along the body must show"


def test_keeping_the_background_changes_no_colour_of_the_foreground():
    tokens, _, _ = scene()
    black = pixels(pca_images(features_of(tokens), foreground=True)[0])
    kept = pixels(pca_images(features_of(tokens), foreground=True, background="keep")[0])
    inside = black.sum(-1) > 0
    assert torch.equal(black[inside], kept[inside])
    assert (kept[~inside].sum(-1) > 0).float().mean() > 0.9


def test_a_joint_basis_gives_equal_parts_equal_colours_in_all_images():
    scenes = [scene(seed=0), scene(seed=1, shift=-0.3), scene(h=30, w=44, seed=2, shift=0.2)]
    features = [features_of(tokens) for tokens, _, _ in scenes]
    pictures = pca_images(features, joint=True, smooth=False)
    for part in range(3):
        means = torch.stack(
            [pixels(p)[8::16, 8::16][parts[part]].mean(0) for p, (_, _, parts) in zip(pictures, scenes, strict=True)]
        )
        assert torch.cdist(means, means).max() < 0.12
    backdrop, thing = (pixels(pictures[0])[8::16, 8::16][m].mean(0) for m in (~scenes[0][1], scenes[0][1]))
    assert (backdrop - thing).norm() > 0.4


def test_joint_and_single_agree_for_one_image():
    features = features_of(scene()[0])
    assert pca_images(features)[0].image == pca_images([features], joint=True)[0].image


def test_pictures_are_the_same_every_time():
    features = features_of(scene()[0])
    torch.manual_seed(1)
    first = pca_images(features, foreground=True)[0].image
    torch.manual_seed(2)
    assert first == pca_images(features, foreground=True)[0].image


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 2), (1, 9)])
def test_tiny_grids_are_drawn(grid):
    tokens = torch.randn(*grid, 24, generator=torch.Generator().manual_seed(0))
    features = features_of(tokens)
    for picture in (
        *pca_images(features),
        *pca_images(features, foreground=True),
        *similarity_images(features, patch=(0, 0)),
        *attention_images(features, [torch.rand(3, *grid)]),
    ):
        assert picture.image.size == (grid[1] * 16, grid[0] * 16)


def test_constant_tokens_are_grey_not_noise():
    rgb = pixels(pca_images(features_of(torch.full((6, 7, 32), 0.37)))[0])
    assert ((rgb - 0.5).abs() < 0.01).all()


HATCH = {(0.62, 0.62, 0.62), (0.80, 0.80, 0.80)}


def hatched(picture):
    rgb = np.asarray(picture.image)
    greys = np.array(sorted(round(c[0] * 255) for c in HATCH), dtype=np.uint8)
    return np.isin(rgb, greys).all(-1) & (rgb == rgb[..., :1]).all(-1)


@pytest.mark.parametrize("smooth", [True, False])
def test_invalid_patches_are_hatched_and_have_no_part_in_the_basis(smooth):
    tokens, _, _ = scene(noise=0.2)
    valid = torch.ones(tokens.shape[:2], dtype=torch.bool)
    valid[:, 50:] = False
    valid[3:6, 3:6] = False
    broken = torch.where(valid[..., None], tokens, 1e4 * torch.randn(tokens.shape))
    clean = pca_images(features_of(tokens, valid=valid), smooth=smooth)[0]
    dirty = pca_images(features_of(broken, valid=valid), smooth=smooth)[0]
    assert clean.image == dirty.image
    assert np.array_equal(hatched(clean), ~up(valid, 16).numpy())


def test_edge_patches_with_some_padding_are_shown():
    tokens, _, _ = scene(h=20, w=30)
    valid = torch.ones(20, 30, dtype=torch.bool)
    valid[-1] = valid[:, -1] = False
    features = features_of(tokens, valid=valid, input_size=(20 * 16 - 5, 30 * 16 - 13))
    for picture in (pca_images(features)[0], similarity_images(features, patch=(19, 29))[0]):
        assert picture.image.size == (30 * 16 - 13, 20 * 16 - 5)
        assert not hatched(picture).any()


def test_nothing_valid_is_an_error_that_says_so():
    features = features_of(torch.randn(4, 4, 8), valid=torch.zeros(4, 4, dtype=torch.bool))
    with pytest.raises(InputError, match="no valid tokens"):
        pca_images(features)
    with pytest.raises(InputError, match="padding or nodata"):
        similarity_images(features, patch=(1, 1))


def test_similarity_is_the_cosine_and_the_scale_says_its_range():
    tokens, _, _ = scene()
    features = features_of(tokens)
    picture = similarity_images(features, patch=(20, 28), smooth=False)[0]
    cosine = torch.cosine_similarity(tokens, tokens[20, 28].expand_as(tokens), dim=-1)
    assert picture.scale == pytest.approx((float(cosine.min()), 1.0), abs=1e-5)
    lightness = pixels(picture)[8::16, 8::16] @ torch.tensor([0.3, 0.6, 0.1])
    order = cosine.flatten().argsort()
    assert (lightness.flatten()[order][::40].diff() > -0.01).all()


def test_similarity_finds_the_same_part_in_another_image():
    (one, _, parts), (two, _, others) = scene(seed=0), scene(seed=1, shift=-0.3)
    head = parts[1].nonzero()[len(parts[1].nonzero()) // 2].tolist()
    first, second = similarity_images([features_of(one), features_of(two)], patch=tuple(head), smooth=False)
    assert first.scale == second.scale and first.box and second.box is None
    lightness = pixels(second)[8::16, 8::16].sum(-1)
    assert lightness[others[1]].min() > lightness[~others[1]].max()


def test_the_box_frames_the_patch():
    features = features_of(torch.randn(4, 6, 8), input_size=(60, 90), source_size=(120, 180))
    box = similarity_images(features, patch=(3, 5))[0].box
    assert box == pytest.approx((80 / 90, 48 / 60, 1.0, 1.0))


@pytest.mark.parametrize("patch", [(-1, 0), (0, 6), (4, 0)])
def test_a_patch_off_the_grid_is_refused_with_the_grid(patch):
    with pytest.raises(InputError, match="4×6"):
        similarity_images(features_of(torch.randn(4, 6, 8)), patch=patch)


@pytest.mark.parametrize("point", [(-1, 0), (180, 0), (0, 120), (float("nan"), 0)])
def test_a_point_off_the_image_is_refused_with_the_size(point):
    features = features_of(torch.randn(4, 6, 8), input_size=(60, 90), source_size=(120, 180))
    with pytest.raises(InputError, match="180 pixels wide and 120 high"):
        patch_at(features, point)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(16, 200), st.integers(16, 200), st.data())
@settings(max_examples=100, deadline=None)
def test_a_point_is_in_the_patch_that_is_drawn_over_it(height, width, input_h, input_w, data):
    grid = (math.ceil(input_h / 16), math.ceil(input_w / 16))
    features = features_of(torch.zeros(*grid, 2), input_size=(input_h, input_w), source_size=(height, width))
    x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    row, col = patch_at(features, (x, y))
    # Draw the map of one hot patch without interpolation: the pixel asked about must be the hot one.
    hot = torch.zeros(1, *grid)
    hot[0, row, col] = 1
    if hot.numel() > 1:
        rgb = pixels(attention_images(features, [hot], smooth=False)[0])
        assert rgb[y, x].sum() > 2.5


def test_smooth_pictures_interpolate_exactly_to_the_half_pixel():
    values = torch.rand(1, 8, 11, generator=torch.Generator().manual_seed(0))
    features = features_of(torch.zeros(8, 11, 2), input_size=(128, 170), source_size=(256, 340))
    heat = pixels(attention_images(features, [values])[0])
    whole = F.interpolate(values[None], scale_factor=32, mode="bilinear")[0, 0, :, :340]  # half-pixel centres
    low, high = values.min(), values.max()
    torch.testing.assert_close(heat, heat_colours((whole - low) / (high - low)), atol=1 / 255, rtol=0)


def test_attention_mean_and_heads():
    features = features_of(torch.randn(3, 5, 8))
    maps = torch.rand(4, 3, 5, generator=torch.Generator().manual_seed(0))
    mean = attention_images(features, [maps])[0]
    assert mean.scale == pytest.approx((float(maps.mean(0).min()), float(maps.mean(0).max())))
    assert "mean of 4 heads" in mean.title
    one = attention_images(features, [maps], head=2)[0]
    assert one.scale == pytest.approx((float(maps[2].min()), float(maps[2].max())))
    with pytest.raises(InputError, match="0 to 3"):
        attention_images(features, [maps], head=4)


def test_layers_and_their_finer_grids():
    coarse, fine = torch.randn(3, 4, 8), torch.randn(6, 8, 5)
    tokens = LayerTokens(fine[None], torch.zeros(1, 5), torch.zeros(1, 0, 5))
    features = features_of(coarse, stride=32, layers={1: tokens})
    assert pca_images(features, layer=1)[0].image.size == (128, 96)
    assert patch_at(features, (127, 95), layer=1) == (5, 7)
    assert patch_at(features, (127, 95)) == (2, 3)
    with pytest.raises(InputError, match=r"layers=\[0\]"):
        pca_images(features, layer=0)


def test_a_batch_of_several_sizes_is_drawn_image_by_image():
    tokens, _, _ = scene(h=12, w=16)
    features = features_of(tokens)
    both = replace(
        features,
        patches=torch.cat([features.patches, torch.zeros_like(features.patches)]),
        cls=torch.zeros(2, 96),
        registers=torch.zeros(2, 4, 96),
        valid=torch.cat([features.valid, torch.zeros_like(features.valid)]),
        grids=((12, 16), (5, 6)),
        input_sizes=((192, 256), (80, 96)),
        source_sizes=((192, 256), (80, 96)),
    )
    both.patches[1, :5, :6] = tokens[:5, :6]
    both.valid[1, :5, :6] = True
    first, second = pca_images(both)
    assert first.image == pca_images(features)[0].image
    assert second.image.size == (96, 80)
    assert not hatched(second).any()


def test_long_side_sets_the_size():
    picture = pca_images(features_of(torch.randn(4, 6, 8)), long_side=300)[0]
    assert picture.image.size == (300, 200)
    assert picture_size((1, 20000), 768) == (1, 768)


def test_many_wide_tokens_are_quick():
    tokens = torch.randn(64, 64, 1024)
    assert pca_images(features_of(tokens), long_side=256)[0].image.size == (256, 256)
