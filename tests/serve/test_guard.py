"""Who may ask, and what browsers are told."""

import json
import logging

import pytest

from densedino.serve.guard import JsonLines
from densedino.serve.settings import Settings


def test_answers_carry_an_id_and_a_strict_policy(server):
    for path in ("/", "/v1/models", "/nothing", "/app/main.js"):
        headers = server.ask("GET", path).headers
        assert len(headers["x-request-id"]) == 32 and headers["x-content-type-options"] == "nosniff"
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe-inline" not in policy and "'unsafe-eval'" not in policy
        assert "access-control-allow-origin" not in headers and "server" not in headers


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::2]", "localhost.evil"]
)
def test_a_foreign_host_name_is_refused(server, host):
    assert server.ask("GET", "/v1/models", headers={"Host": host}).status == 403


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "[::1]:80", "127.0.0.1"])
def test_this_machine_has_several_names(server, host):
    assert server.ask("GET", "/v1/models", headers={"Host": host}).status == 200


def test_pages_of_other_origins_may_not_ask(server):
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        answer = server.ask("GET", "/v1/models", headers=headers)
        assert answer.status == 403 and answer.json["error"]["kind"] == "origin"
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in server.ask("OPTIONS", "/v1/features", headers=preflight).headers
    assert server.ask("GET", "/v1/models", headers={"Origin": server.url}).status == 200


def test_a_token_opens_and_allowed_origins_are_told(tiny, serve_with):
    token, origin = "a-secret-of-some-length", "https://app.example.org"
    with serve_with(tiny, Settings(port=0, host="127.0.0.1", token=token, origins=(origin,), decoders=1)) as server:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": f"Basic {token}"},
            {"Authorization": "Bearer \xff"},
        ):
            for path in ("/v1/models", "/metrics", "/v1/nothing"):
                answer = server.ask("GET", path, headers=headers)
                assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert server.ask("POST", "/v1/features", body=b"x").status == 401
        for path in ("/healthz", "/readyz", "/"):
            assert server.ask("GET", path).status == 200
        answer = server.ask("GET", "/v1/models", headers={"Authorization": f"Bearer {token}", "Origin": origin})
        assert answer.status == 200 and answer.headers["access-control-allow-origin"] == origin
        preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        answer = server.ask("OPTIONS", "/v1/features", headers=preflight)
        assert answer.status == 204 and "authorization" in answer.headers["access-control-allow-headers"]


def test_a_log_line_is_json_and_cannot_be_forged():
    record = logging.LogRecord("densedino.serve", logging.INFO, "", 0, "request", (), None)
    record.fields = {"path": '/x\n{"level": "forged"}'}
    line = JsonLines().format(record)
    assert "\n" not in line and json.loads(line)["path"].startswith("/x\n") and json.loads(line)["level"] == "info"
