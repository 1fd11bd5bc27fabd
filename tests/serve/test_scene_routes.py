import io

import numpy as np
from PIL import Image

from densedino.serve.scene_map import open_scene
from densedino.serve.settings import Settings


def test_the_map_over_http(tiny, serve_with, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 700, 3), dtype=np.uint8)).save(tmp_path / "s.tif")
    scene = open_scene(str(tmp_path / "s.tif"), tiny)
    with serve_with(tiny, Settings(port=0, decoders=1), scene=scene) as server:
        about = server.ask("GET", "/v1/scene").json
        assert about["size"] == [600, 700] and about["levels"] == 2 and not about["stored"]
        assert server.ask("GET", "/v1/collection").json["scene"]
        picture = server.ask("GET", "/v1/scene/1/0/0/image")
        assert Image.open(io.BytesIO(picture.body)).size == (350, 300)
        array = np.load(io.BytesIO(server.ask("GET", "/v1/scene/0/1/1/features?format=npy").body))
        assert array.shape == (6, 12, 32)
        for path in ("/v1/scene/2/0/0/image", "/v1/scene/0/2/0/features", "/v1/scene/0/99999999/0/image"):
            assert server.ask("GET", path).status == 404
        assert server.ask("GET", "/v1/scene/0/-1/0/image").status == 422
    scene.scene.close()


def test_without_a_scene_there_is_none(server):
    assert server.ask("GET", "/v1/scene").status == 404 and server.ask("GET", "/v1/scene/0/0/0/image").status == 404
