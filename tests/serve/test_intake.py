"""Bodies as hostile clients send them."""

import time

import pytest


def form(name="image", body=b"", *, boundary="x"):
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="../../etc/passwd"\r\n\r\n'
    return head.encode() + body + f"\r\n--{boundary}--\r\n".encode()


def post(server, body, kind, path="/v1/features?parts=cls"):
    return server.ask("POST", path, body=body, headers={"Content-Type": kind})


def test_the_bytes_alone_and_a_form_mean_the_same(server, png):
    alone = post(server, png(48, 64), "image/png")
    formed = post(server, form(body=png(48, 64)), "multipart/form-data; boundary=x")
    assert alone.status == formed.status == 200 and alone.json == formed.json
    assert post(server, png(48, 64), "text/html").status == 200, "the content decides"


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"", "image/png", 422),
        (form("file", b"x"), "multipart/form-data; boundary=x", 422),
        (form(body=b""), "multipart/form-data; boundary=x", 422),
        (b"rubbish", "multipart/form-data; boundary=x", 400),
        (b"rubbish", "multipart/form-data", 400),
        (b"--x\r\n\r\n", "multipart/form-data; boundary=x", 400),
        (form(body=b"1") * 20, "multipart/form-data; boundary=x; charset=nonsense", 422),
        (
            b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\ntext\r\n--x--\r\n',
            "multipart/form-data; boundary=x",
            422,
        ),
    ],
)
def test_forms_that_hold_no_image_are_refused(server, body, kind, status):
    answer = post(server, body, kind)
    assert answer.status == status and answer.json["error"]["message"]


def test_too_many_bytes_are_refused_declared_or_not(server):
    head = "POST /v1/features HTTP/1.1\r\nHost: localhost\r\n"
    declared = server.raw(f"{head}Content-Length: 999999999\r\n\r\n".encode())
    assert b" 413 " in declared.split(b"\r\n")[0]
    chunk = b"20000\r\n" + bytes(0x20000) + b"\r\n"
    assert b" 413 " in server.raw(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + 2 * chunk).split(b"\r\n")[0]
    assert server.service.buffered == 0


def test_a_body_that_never_ends_is_given_up(server):
    start = time.monotonic()
    answer = server.raw(b"POST /v1/features HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc")
    assert b" 408 " in answer.split(b"\r\n")[0] and time.monotonic() - start < 5
    assert server.service.buffered == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[1]",
        b'{"vector": "x"}',
        b'{"vector": [1e999]}',
        b"[" * 100_000,
        b'{"vector": [NaN]}',
        b"\xff\xfe",
        b'"\\ud800"',
    ],
)
def test_json_that_is_none_is_refused(server, body):
    answer = post(server, body, "application/json", "/v1/search")
    assert answer.status == 422 and answer.json["error"]["kind"] == "request"


def test_huge_json_is_refused(server):
    body = b'{"vector": [' + b"1," * 600_000 + b"1]}"
    assert post(server, body, "application/json", "/v1/search").status == 413
