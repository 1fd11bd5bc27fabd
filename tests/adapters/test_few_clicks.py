"""From clicks to labelled patches to a head: GeoJSON of every kind, areas, sparse masks, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densedino.adapters.few_clicks import Clicks, fit_head, mask_samples, read_points, samples_of
from densedino.errors import InputError, UnknownNameError


def write(path, *features, **more):
    made = [
        {"type": "Feature", "properties": properties, "geometry": {"type": kind, "coordinates": coordinates}}
        for properties, kind, coordinates in features
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": made} | more))
    return path


def test_points_and_areas_are_read(tmp_path):
    path = write(
        tmp_path / "p.geojson",
        ({"class": "water"}, "Point", [3, 4, 100]),
        ({"label": 2}, "MultiPoint", [[5, 6], [7, 8]]),
        ({"fid": 1, "class": 10.0}, "Polygon", [[[0, 0], [4, 0], [4, 4], [0, 0]]]),
        crs={"type": "name", "properties": {"name": "EPSG:32632"}},
    )
    clicks = read_points(path)
    assert clicks.classes == ("2", "10", "water") and clicks.crs == "EPSG:32632"
    assert [(name, points.tolist()) for name, points in clicks.shapes[:3]] == [
        ("water", [[3, 4]]),
        ("2", [[5, 6]]),
        ("2", [[7, 8]]),
    ]
    assert len(clicks.shapes[3][1]) == 4
    with pytest.raises(InputError, match=r"feature 0.*no property kind.*class.*--field"):
        read_points(path, field="kind")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "FeatureCollection"),
        ("nonsense", "FeatureCollection"),
        ('{"features": []}', "no points"),
        ('{"features": [{"properties": {"class": 1}, "geometry": {"type": "LineString"}}]}', "lines cannot"),
        ('{"features": [{"properties": {"class": 1}, "geometry": {"type": "Point", "coordinates": [1]}}]}', "pairs"),
        ('{"features": [{"properties": null, "geometry": null}]}', "no property"),
    ],
)
def test_what_is_no_file_of_points_is_refused(tmp_path, text, message):
    (tmp_path / "p.geojson").write_text(text)
    with pytest.raises(InputError, match=message):
        read_points(tmp_path / "p.geojson")
    with pytest.raises(InputError, match="cannot be read"):
        read_points(tmp_path / "none.geojson")


def clicks(*shapes):
    return Clicks(tuple((name, np.array(points, np.float64)) for name, points in shapes))


def test_the_patches_of_points_and_areas():
    square = [[1.2, 0.2], [3.8, 0.2], [3.8, 1.8], [1.2, 1.8]]  # holds the centres of columns 1–3 of rows 0, 1
    found = samples_of(
        clicks(("b", [[0.1, 3.9]]), ("a", square), ("b", [[1.5, 0.5]])), grid=(4, 5), to_grid=lambda points: points
    )
    assert found.classes == ("a", "b")
    shares = dict(zip(map(tuple, found.cells.tolist()), found.shares.tolist(), strict=True))
    assert shares[3, 0] == [0, 1] and shares[0, 1] == [0.5, 0.5] and shares[1, 3] == [1, 0]
    assert len(shares) == 7


def test_points_that_cannot_be_used_are_refused():
    with pytest.raises(InputError, match="at least two"):
        samples_of(clicks(("a", [[1, 1]])), grid=(4, 4), to_grid=lambda points: points)
    two = clicks(("a", [[1, 1]]), ("b", [[9, 1]]))
    with pytest.raises(InputError, match="1 of 2 points lie outside"):
        samples_of(two, grid=(4, 4), to_grid=lambda points: points)
    with pytest.raises(InputError, match="none of the 2"):
        samples_of(two, grid=(4, 4), to_grid=lambda points: points + 100)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), grid=st.tuples(st.integers(1, 5), st.integers(1, 5)), finer=st.integers(1, 20))
def test_shares_of_a_mask_are_counts_in_the_patches(seed, grid, finer):
    random = np.random.default_rng(seed)
    mask = random.integers(0, 4, (grid[0] * finer, grid[1] * finer))
    mask.reshape(-1)[:2] = [1, 2][: mask.size]
    if len(np.unique(mask[mask > 0])) < 2:
        with pytest.raises(InputError, match="two"):
            mask_samples(mask, grid=grid)
        return
    found = mask_samples(mask, grid=grid)
    blocks = mask.reshape(grid[0], finer, grid[1], finer).swapaxes(1, 2)
    labelled = [cell for cell in np.ndindex(grid) if (blocks[cell] > 0).any()]
    assert [tuple(cell) for cell in found.cells.tolist()] == labelled
    for cell, shares in zip(labelled, found.shares, strict=True):
        counts = [(blocks[cell] == int(name)).sum() for name in found.classes]
        np.testing.assert_allclose(shares, np.array(counts) / sum(counts), atol=1e-6)


@pytest.mark.parametrize("head", ["linear", "knn"])
def test_a_head_tells_what_it_was_shown_and_gives_probabilities(head):
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(3, 16, generator=generator)
    kinds = torch.arange(300) % 3
    tokens = centres[kinds] + torch.randn(300, 16, generator=generator)
    shares = torch.nn.functional.one_hot(kinds, 3).float()
    score = fit_head(tokens[:9], shares[:9], head=head)
    said = score(tokens[9:].reshape(3, 97, 16))
    assert said.shape == (3, 97, 3)
    torch.testing.assert_close(said.exp().sum(-1), torch.ones(3, 97), atol=1e-4, rtol=0)
    assert (said.reshape(-1, 3).argmax(-1) == kinds[9:]).float().mean() > 0.97
    again = fit_head(tokens[:9], shares[:9], head=head)(tokens[9:])
    torch.testing.assert_close(again.reshape(3, 97, 3), said)


def test_an_unknown_head_is_named():
    with pytest.raises(UnknownNameError, match="linear"):
        fit_head(torch.ones(2, 3), torch.eye(2), head="liner")
