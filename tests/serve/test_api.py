"""The application as a whole: probes, OpenAPI, errors of one shape, and 300 requests that nobody would send."""

import contextlib
import json
import random

import pytest

from densedino.serve.schema import ErrorBody


def test_probes_and_metrics(server):
    assert server.ask("GET", "/healthz").json == {"status": "ok"}
    assert server.ask("GET", "/readyz").json == {"status": "ready"}
    metrics = server.ask("GET", "/metrics")
    assert metrics.headers["content-type"].startswith("text/plain") and b"densedino_requests_total" in metrics.body


def test_models_say_what_holds(server):
    (model,) = server.ask("GET", "/v1/models").json["models"]
    assert model["id"] == "debug_vit" and model["untrained"] and model["max_tokens"] == 256 and model["embed_dim"] == 32


def test_openapi_describes_every_route_with_its_body_and_its_refusals(server):
    document = server.ask("GET", "/openapi.json").json
    assert {"/v1/features", "/v1/similarity", "/v1/segment", "/v1/search", "/v1/models", "/healthz"} <= set(
        document["paths"]
    )
    for path in ("/v1/features", "/v1/similarity", "/v1/segment", "/v1/search"):
        operation = document["paths"][path]["post"]
        assert {"multipart/form-data", "image/jpeg"} <= set(operation["requestBody"]["content"])
        assert {"413", "422", "429"} <= set(operation["responses"]) and operation["description"]
    examples = json.dumps(document["paths"]["/v1/features"]["post"])
    assert '"examples"' in examples and '"example"' in examples


def test_the_page_is_handed_out_and_kept(server):
    page = server.ask("GET", "/")
    assert page.status == 200 and b"<title>densedino" in page.body
    assert server.ask("GET", "/", headers={"If-None-Match": page.headers["etag"]}).status == 304


@pytest.mark.parametrize(
    "path",
    [
        "/app/../service.py",
        "/app/..%2fservice.py",
        "/app/%2e%2e/x",
        "/../../etc/passwd",
        "/app//etc/passwd",
        "/app/a%00b",
        "//x",
    ],
)
def test_no_path_leads_to_a_file(server, path):
    answer = server.ask("GET", path)
    assert answer.status == 404 and ErrorBody.model_validate(answer.json)


def test_300_requests_at_random_get_an_answer_and_never_an_error_of_the_server(server, png):
    draw = random.Random(0)
    pieces = [
        "0",
        "-1",
        "1e9",
        "nan",
        "a",
        "",
        "%00",
        "%ff",
        "1,2",
        "9,9,9",
        "../..",
        "ü",
        "cls",
        "npy",
        "int8",
        "💥",
        "'--",
    ]
    names = [
        "tokens",
        "layers",
        "parts",
        "format",
        "dtype",
        "point",
        "positive",
        "negative",
        "threshold",
        "k",
        "side",
        "first",
    ]
    paths = [
        "/v1/features",
        "/v1/similarity",
        "/v1/segment",
        "/v1/search",
        "/v1/collection",
        "/v1/collection/0/features",
    ]
    paths += ["/v1/collection/-1/image", "/v1/collection/99999999999/image", "/v1/models", "/metrics", "/nothing"]
    kinds = [
        "image/png",
        "application/json",
        "multipart/form-data; boundary=x",
        "",
        "multipart/form-data; boundary=" + "x" * 300,
    ]
    for _ in range(300):
        query = "&".join(f"{draw.choice(names)}={draw.choice(pieces)}" for _ in range(draw.randint(0, 4)))
        target = f"{draw.choice(paths)}?{query}".encode("ascii", "xmlcharrefreplace").decode()
        data = bytearray(png(32, 32))
        for _ in range(draw.randint(0, 30)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        body = draw.choice([b"", b"{}", bytes(data), bytes(data[: draw.randrange(len(data))]), png(32, 32)])
        answer = server.ask(
            draw.choice(["GET", "POST", "PUT", "HEAD"]), target, body=body, headers={"Content-Type": draw.choice(kinds)}
        )
        assert answer.status < 500, (target, answer)
        if answer.status >= 400 and answer.body:
            assert ErrorBody.model_validate(answer.json)
    assert server.service.working == 0 and server.service.buffered == 0


def test_bytes_that_are_no_http_close_the_connection_and_nothing_else(server):
    for data in (
        b"\x00" * 100,
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET " + b"a" * 100_000,
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    ):
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            assert b" 200 " not in server.raw(data)[:20]
    assert server.ask("GET", "/healthz").status == 200
