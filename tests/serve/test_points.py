import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from densedino.errors import InputError
from densedino.features.tokens import Features
from densedino.serve.points import quantise, segment, similarity


def halves(height=4, width=6):
    """Features whose left half points one way and whose right half another."""
    patches = torch.zeros(1, height, width, 4)
    patches[:, :, : width // 2, 0] = 3.0
    patches[:, :, width // 2 :, 1] = 5.0
    patches += 0.01
    size = (16 * height, 16 * width)
    valid = torch.ones(1, height, width, dtype=torch.bool)
    return Features(patches, torch.zeros(1, 4), torch.zeros(1, 0, 4), valid, 16, ((height, width),), (size,), (size,))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 400), st.floats(1e-3, 1e3))
def test_cosines_of_quantised_tokens_are_the_cosines(seed, dim, size):
    tokens = torch.randn(40, dim, generator=torch.Generator().manual_seed(seed)) * size
    whole, scale = quantise(tokens)
    exact = F.normalize(tokens, dim=-1) @ F.normalize(tokens, dim=-1).T
    found = (whole.float() @ whole.float().T) * scale[:, None] * scale
    assert (exact - found).abs().max() < 0.02
    assert torch.allclose(found.diagonal(), torch.ones(40), atol=1e-5)


def test_a_token_of_zeros_is_like_nothing():
    whole, scale = quantise(torch.zeros(1, 8))
    assert not whole.any() and torch.isfinite(scale).all()


def test_similarity_is_one_where_it_was_asked_and_low_elsewhere():
    features = halves()
    cosine = similarity(features.patches[0][0, 0], features)
    assert torch.allclose(cosine[:, :3], torch.ones(4, 3), atol=1e-5) and (cosine[:, 3:] < 0.05).all()


@pytest.mark.parametrize("negative", [(), ((90.0, 30.0),)])
def test_one_point_cuts_its_half_out_to_the_pixel(negative):
    result = segment(halves(), positive=[(10.0, 10.0)], negative=negative)
    assert result.mask.shape == (64, 96)
    assert result.mask[:, :44].all() and not result.mask[:, 52:].any()


def test_a_threshold_can_be_given():
    assert not segment(halves(), positive=[(10.0, 10.0)], threshold=2.0).mask.any()
    assert segment(halves(), positive=[(10.0, 10.0)], threshold=-2.0).mask.all()


def test_points_must_lie_inside_and_be_there():
    with pytest.raises(InputError, match="positive"):
        segment(halves(), positive=[])
    with pytest.raises(InputError, match="outside the image"):
        segment(halves(), positive=[(96.0, 0.0)])
