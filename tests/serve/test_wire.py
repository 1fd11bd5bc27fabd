import io
import json

import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy
from PIL import Image

from densedino.errors import InputError
from densedino.serve.wire import MEDIA, Wanted, choose_format, encode, npy, png


@pytest.fixture(scope="module")
def features(tiny, png):
    return tiny(io.BytesIO(png(40, 64)), layers=[0, -1])


def test_json_says_all_and_rounds_to_six_digits(features, tiny):
    answer = json.loads(encode(features, Wanted(), tiny))
    assert answer["grid"] == [3, 4] and answer["untrained"] and answer["source_size"] == [40, 64]
    assert answer["valid"] == features.valid[0].tolist()
    for name in ("patches", "layer0.patches", "layer-1.patches"):
        assert np.shape(answer[name]) == (3, 4, 32)
    assert np.allclose(answer["cls"], features.cls[0], atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_safetensors_and_arrow_hold_the_same_numbers(features, tiny, dtype):
    wanted = {"parts": ("patches", "cls", "registers"), "dtype": dtype}
    arrays = safetensors.numpy.load(encode(features, Wanted(format="safetensors", **wanted), tiny))
    table = pa.ipc.open_stream(encode(features, Wanted(format="arrow", **wanted), tiny)).read_all()
    assert np.array_equal(arrays["patches"], features.patches[0].numpy().astype(dtype))
    for name in ("patches", "cls", "registers", "layer0.patches", "layer-1.cls"):
        assert np.array_equal(np.array(table[name][0].as_py(), dtype).ravel(), arrays[name].ravel())
    assert table["grid_h"].to_pylist() == [3] and json.loads(table.schema.metadata[b"densedino"])["stride"] == 16


def test_int8_holds_directions(features, tiny):
    arrays = safetensors.numpy.load(encode(features, Wanted(format="safetensors", dtype="int8"), tiny))
    unit = arrays["patches"] * arrays["patches.scale"][..., None]
    exact = features.patches[0].numpy()
    exact = exact / np.linalg.norm(exact, axis=-1, keepdims=True)
    assert arrays["patches"].dtype == np.int8 and np.abs(unit - exact).max() < 0.01


def test_npy_holds_one_array_and_says_so_where_more_is_asked(features, tiny):
    alone = features.__class__(**{**features.__dict__, "layers": {}})
    assert np.load(io.BytesIO(encode(alone, Wanted(format="npy"), tiny))).shape == (3, 4, 32)
    assert np.load(io.BytesIO(encode(alone, Wanted(format="npy", parts=("cls",)), tiny))).shape == (32,)
    with pytest.raises(InputError, match="leave layers out"):
        encode(features, Wanted(format="npy"), tiny)
    for wrong in ({"format": "npy", "parts": ("cls", "patches")}, {"dtype": "int8"}, {"parts": ("cls", "clss")}):
        with pytest.raises(InputError):
            Wanted(**wrong)


@pytest.mark.parametrize(
    ("asked", "accept", "format"),
    [
        (None, "", "json"),
        (None, "*/*", "json"),
        ("npy", "application/json", "npy"),
        (None, "text/html, application/x-safetensors;q=0.9", "safetensors"),
        (None, MEDIA["arrow"].upper(), "arrow"),
    ],
)
def test_the_name_decides_then_accept(asked, accept, format):  # noqa: A002
    assert choose_format(asked, accept) == format


def test_masks_and_arrays_survive():
    mask = np.eye(5, 7, dtype=bool)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(mask)))) == 255, mask)
    assert np.array_equal(np.load(io.BytesIO(npy(mask))), mask)
