import io
import time

import numpy as np
from PIL import Image


def wait_until_indexed(server):
    for _ in range(200):
        if server.ask("GET", "/v1/collection").json["searchable"] == 3:
            return
        time.sleep(0.05)
    raise AssertionError("the collection was never indexed")


def test_the_list_the_pictures_and_the_features(server, folder):
    listing = server.ask("GET", "/v1/collection").json
    assert listing["count"] == 3 and [item["item"] for item in listing["items"]] == [0, 1, 2]
    assert server.ask("GET", "/v1/collection?first=2").json["items"][0]["name"].endswith("2.png")
    picture = server.ask("GET", "/v1/collection/1/image?side=32")
    assert picture.headers["content-type"] == "image/jpeg" and Image.open(io.BytesIO(picture.body)).size == (32, 26)
    array = np.load(io.BytesIO(server.ask("GET", "/v1/collection/0/features?format=npy").body))
    assert array.shape == (4, 4, 32)
    for path in ("/v1/collection/3/image", "/v1/collection/3/features"):
        assert server.ask("GET", path).status == 404


def test_a_search_by_image_by_point_and_by_vector_finds_the_image_itself(server, folder):
    wait_until_indexed(server)
    data = (folder / "2.png").read_bytes()
    for query in ("", "?point=70,20", "?k=2"):
        answer = server.ask("POST", f"/v1/search{query}", body=data).json
        assert answer["results"][0]["item"] == 2 and answer["searched"] == 3
    vector = np.load(io.BytesIO(server.ask("POST", "/v1/features?format=npy&tokens=1024", body=data).body))[1, 2]
    import json

    body = json.dumps({"vector": vector.tolist(), "k": 1})
    found = server.ask("POST", "/v1/search", body=body, headers={"Content-Type": "application/json"}).json["results"]
    assert len(found) == 1 and found[0]["item"] == 2
    wrong = json.dumps({"vector": [1.0]})
    assert server.ask("POST", "/v1/search", body=wrong, headers={"Content-Type": "application/json"}).status == 422
