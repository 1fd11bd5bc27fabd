"""Rows into Arrow and out again, whatever their sizes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import densedino as dd
from densedino.features.extract import store_metadata
from densedino.features.layout import METADATA_KEY, Row, column_of, describe, store_schema, to_table

DIM = 32


@pytest.fixture(scope="module")
def metadata():
    return store_metadata(dd.load("debug_vit", weights="random"), layers=[0])


def row(number, grid, registers, finer, seed):
    random = np.random.default_rng(seed)
    h, w = grid

    def numbers(*shape):
        return random.standard_normal(shape).astype(np.float16)

    return Row(
        key=f"{number}",
        source=f"/{number}",
        sha256="0" * 64,
        stamp=(number, 2**62 + number),
        frame=number if number % 2 else None,
        last_frame=None,
        source_size=(16 * h, 16 * w),
        input_size=(16 * h, 16 * w),
        grid=grid,
        cls=numbers(DIM),
        registers=numbers(registers, DIM),
        patches=numbers(h, w, DIM),
        valid=random.random(grid) > random.random(),
        layers={0: (numbers(DIM), numbers(h * finer, w * finer, DIM))},
    )


@given(
    grids=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6),
    registers=st.sampled_from([0, 4]),
    finer=st.sampled_from([1, 8]),
    start=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_what_goes_in_comes_out(metadata, grids, registers, finer, start, seed):
    rows = [row(number, grid, registers, finer, seed) for number, grid in enumerate(grids)]
    table = to_table(rows, store_schema(metadata))
    assert json.loads(table.schema.metadata[METADATA_KEY]) == metadata
    start = min(start, len(rows) - 1)  # a slice: offsets do not begin at 0
    (batch,) = table.slice(start).to_batches()
    rows, grids = rows[start:], grids[start:]
    columns = {name: column_of(name, batch[name], grids) for name in batch.schema.names}
    for i, one in enumerate(rows):
        for name, array in (
            ("cls", one.cls),
            ("registers", one.registers),
            ("patches", one.patches),
            ("valid", one.valid),
            ("cls_layer0", one.layers[0][0]),
            ("patches_layer0", one.layers[0][1]),
        ):
            assert np.array_equal(columns[name][i], array), name
        for name, value in describe(one).items():
            assert batch[name][i].as_py() == value
