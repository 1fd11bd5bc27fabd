import io
import json

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image


def test_features_in_every_format(server, png):
    shapes = {}
    for form in ("json", "npy", "safetensors", "arrow"):
        answer = server.ask("POST", f"/v1/features?format={form}&tokens=16", body=png(64, 64))
        assert answer.status == 200 and len(answer.headers["x-densedino-fingerprint"]) == 64
        shapes[form] = answer
    array = np.load(io.BytesIO(shapes["npy"].body))
    assert array.shape == (4, 4, 32)
    assert np.allclose(shapes["json"].json["patches"], array, atol=1e-6)
    assert np.array_equal(safetensors.numpy.load(shapes["safetensors"].body)["patches"], array)


def test_accept_chooses_the_format(server, png):
    answer = server.ask("POST", "/v1/features", body=png(32, 32), headers={"Accept": "application/x-npy"})
    assert answer.headers["content-type"] == "application/x-npy" and answer.body[:6] == b"\x93NUMPY"


@pytest.mark.parametrize(
    ("query", "word"),
    [
        ("layers=77", "77"),
        ("parts=clss", "clss"),
        ("format=xml", "format"),
        ("tokens=0", "tokens"),
        ("dtype=int8", "safetensors"),
    ],
)
def test_what_cannot_be_is_named(server, png, query, word):
    answer = server.ask("POST", f"/v1/features?{query}", body=png(32, 32))
    assert answer.status == 422 and word in answer.json["error"]["message"]


def test_a_bomb_and_a_broken_file_are_refused_as_images(server, png):
    bomb = io.BytesIO()
    Image.new("1", (4000, 4000)).save(bomb, "PNG")
    for data in (bomb.getvalue(), png(64, 64)[:120], b"GIF89a" + bytes(20)):
        answer = server.ask("POST", "/v1/features", body=data)
        assert answer.status == 422 and answer.json["error"]["kind"] == "image"


def test_similarity_is_one_at_the_point(server, png):
    answer = server.ask("POST", "/v1/similarity?point=40,20", body=png(64, 64))
    row, column = answer.json["patch"]
    assert (row, column) == (1, 2) and abs(answer.json["similarity"][row][column] - 1) < 1e-5
    array = np.load(io.BytesIO(server.ask("POST", "/v1/similarity?point=40,20&format=npy", body=png(64, 64)).body))
    assert np.allclose(array, answer.json["similarity"], atol=1e-5)
    assert server.ask("POST", "/v1/similarity?point=64,20", body=png(64, 64)).status == 422
    assert server.ask("POST", "/v1/similarity", body=png(64, 64)).status == 422


def test_a_mask_has_the_size_of_the_image(server):
    pixels = np.zeros((60, 90, 3), np.uint8)
    pixels[:, 45:] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    query = "positive=80,30&negative=8,30"
    mask = np.asarray(
        Image.open(io.BytesIO(server.ask("POST", f"/v1/segment?{query}&format=png", body=file.getvalue()).body))
    )
    assert mask.shape == (60, 90) and mask[30, 80] == 255 and mask[30, 8] == 0
    answer = json.loads(server.ask("POST", f"/v1/segment?{query}", body=file.getvalue()).body)
    assert answer["threshold"] == 0 and np.shape(answer["mask"]) == tuple(answer["grid"])
    assert server.ask("POST", "/v1/segment?negative=1,1", body=file.getvalue()).status == 422
