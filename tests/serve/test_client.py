import numpy as np
import pytest

from densedino.errors import ImageError, InputError
from densedino.serve import Client
from densedino.serve.client import ServerError


@pytest.fixture
def client(server):
    return Client(server.url, patience=0)


def test_features_come_back_as_the_extractor_has_them(client, tiny, png, tmp_path):
    (tmp_path / "a.png").write_bytes(png(40, 64))
    there, here = client.features(tmp_path / "a.png", layers=[0, -1]), tiny(tmp_path / "a.png", layers=[0, -1])
    assert np.allclose(there.patches, here.patches[0], atol=1e-5) and np.allclose(there.cls, here.cls[0], atol=1e-5)
    assert np.array_equal(there.valid, here.valid[0])
    assert np.allclose(there.layers[0][0], here.layers[0].patches[0], atol=1e-5)
    assert there.info["model"] == "debug_vit" and client.ready() and client.models()[0]["id"] == "debug_vit"


def test_points_and_masks(client, png):
    assert client.similarity(png(64, 64), point=(5, 5)).shape == (4, 4)
    mask = client.segment(png(50, 64), positive=[(5, 5)], negative=[(60, 40)])
    assert mask.shape == (50, 64) and mask.dtype == bool


def test_search(client, folder):
    import time

    for _ in range(100):
        if client.search(folder / "0.png", k=3).__len__() == 3:
            break
        time.sleep(0.05)
    assert client.search(folder / "1.png", k=1)[0]["item"] == 1
    assert client.search(vector=np.ones(32), k=2)
    with pytest.raises(InputError, match="one of them"):
        client.search()


def test_errors_are_those_of_the_package(client, tmp_path, png):
    with pytest.raises(ImageError):
        client.features(b"rubbish")
    with pytest.raises(ImageError, match="cannot be opened"):
        client.features(tmp_path / "nothing.jpg")
    with pytest.raises(InputError, match="99"):
        client.features(png(32, 32), layers=[99])
    with pytest.raises(InputError, match="path"):
        client.features(3)
    with pytest.raises(InputError, match="http"):
        Client("localhost:80")
    with pytest.raises(ServerError, match="Is it running") as gone:
        Client("http://127.0.0.1:9").features(png(32, 32))
    assert gone.value.status == 0 and not Client("http://127.0.0.1:9").ready()


def test_a_busy_server_is_given_up_when_patience_ends(server, png):
    object.__setattr__(server.service.settings, "max_requests", 0)
    try:
        with pytest.raises(ServerError, match="still busy") as busy:
            Client(server.url, patience=0).features(png(32, 32))
        assert busy.value.status == 429
    finally:
        object.__setattr__(server.service.settings, "max_requests", 32)


def test_a_token_is_sent(tiny, serve_with, png, monkeypatch):
    from densedino.serve.settings import Settings

    token = "a-secret-of-some-length"
    with serve_with(tiny, Settings(port=0, token=token, decoders=1)) as server:
        assert Client(server.url, token=token).features(png(32, 32)).patches.shape == (2, 2, 32)
        with pytest.raises(ServerError, match="token") as refused:
            Client(server.url).features(png(32, 32))
        assert refused.value.status == 401 and len(refused.value.request_id) == 32
        monkeypatch.setenv("DENSEDINO_TOKEN", token)
        assert Client(server.url).models()
