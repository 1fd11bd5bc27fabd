from __future__ import annotations

import errno
import io
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from densedino.errors import DownloadError, InputError
from densedino.weights import transfer
from densedino.weights.transfer import Transfer, Version, check_url, describe_head, redact


@pytest.fixture
def job(tmp_path, site):
    """A function that makes a transfer of the site's file."""

    def make(*, query="", hashed=False):
        url = f"{site.url}/dinov3.pth{query}"
        return Transfer(url=url, part=tmp_path / "x.part", note=tmp_path / "x.note", hashed=hashed)

    return make


def ranges(site):
    return [headers.get("Range") for _, headers in site.requests]


def test_brings_the_whole_file(job, site):
    version = job().run()
    assert job().part.read_bytes() == site.content
    assert version == Version(etag='"one"', total=len(site.content))


def test_a_chunked_answer_of_unknown_length_works(job, site):
    site.chunked = True
    job().run()
    assert job().part.read_bytes() == site.content


def test_a_dropped_connection_is_continued_where_it_broke(job, site):
    site.script += [("drop", 100_000), ("drop", 5), ("drop", 300_000)]
    job().run()
    assert job().part.read_bytes() == site.content
    assert ranges(site) == [None, "bytes=100000-", "bytes=100005-", "bytes=400005-"]
    assert site.requests[1][1]["If-Range"] == '"one"'


def test_a_later_run_continues(job, site):
    site.script += [("drop", 700_000)] + [("drop", 0)] * 5
    with pytest.raises(
        DownloadError, match=r"700,000 of 1,048,576 bytes.*700,000 bytes are kept: run the same command"
    ):
        job().run()
    site.requests.clear()
    job().run()
    assert job().part.read_bytes() == site.content and ranges(site) == ["bytes=700000-"]


def test_a_new_signature_for_the_same_file_continues(job, site):
    site.script += [("drop", 500_000), ("status", 403, b"<Error><Code>AccessDenied</Code></Error>", "application/xml")]
    with pytest.raises(DownloadError, match="expired"):
        job(query="?Signature=old").run()
    job(query="?Signature=new").run()
    assert job().part.read_bytes() == site.content and ranges(site)[-1] == "bytes=500000-"


def test_a_server_that_ignores_ranges_starts_over(job, site):
    site.script += [("drop", 100_000), "ignore-range"]
    job().run()
    assert job().part.read_bytes() == site.content


@pytest.mark.parametrize("obedient", [True, False])
def test_two_versions_of_a_file_are_never_mixed(job, site, obedient):
    site.script += [("drop", 100_000)] + [("drop", 0)] * 5
    with pytest.raises(DownloadError):
        job().run()
    site.content, site.etag = bytes(reversed(site.content)), '"two"'
    site.script += [] if obedient else ["blind"]
    version = job().run()
    assert job().part.read_bytes() == site.content and version.etag == '"two"'


def test_another_part_than_asked_for_is_not_taken(job, site):
    site.script += [("drop", 100_000), "shifted"]
    job().run()
    assert job().part.read_bytes() == site.content


@pytest.mark.parametrize("hashed", [True, False])
def test_without_a_validator_only_a_hash_allows_to_continue(job, site, hashed):
    site.etag = ""
    site.script += [("drop", 100_000)]
    job(hashed=hashed).run()
    assert job().part.read_bytes() == site.content
    assert ranges(site) == [None, "bytes=100000-" if hashed else None]


def test_a_weak_etag_is_not_used_to_continue(job, site):
    site.etag, site.modified = 'W/"weak"', "Wed, 01 Jan 2025 00:00:00 GMT"
    site.script += [("drop", 100_000)]
    job().run()
    assert site.requests[1][1]["If-Range"] == site.modified
    assert job().part.read_bytes() == site.content


def test_a_part_that_was_complete_already_needs_no_network(job, site):
    job().run()
    site.requests.clear()
    assert job().run() == Version(etag='"one"', total=len(site.content))
    assert site.requests == []


def test_a_part_longer_than_the_file_starts_over(job, site):
    job().part.write_bytes(b"x" * 2_000_000)
    job().note.write_text(json.dumps({"etag": '"one"', "modified": "", "total": 3_000_000}))
    job().run()
    assert job().part.read_bytes() == site.content


def test_the_same_version_is_not_brought_again(job, site):
    version = job().run()
    job().part.unlink()
    assert job().run(unless=version) is None
    assert job().run(unless=Version(etag='"zero"')) == version


def test_busy_and_hanging_servers_are_asked_again(job, site, monkeypatch):
    monkeypatch.setattr(transfer, "TIMEOUT", 0.2)
    site.script += [("status", 503, b"busy"), ("status", 429, b"slow down"), "hang"]
    job().run()
    assert job().part.read_bytes() == site.content and len(site.requests) == 4


def test_a_server_that_stays_busy_is_given_up(job, site):
    site.script += [("status", 503, b"busy")] * 9
    with pytest.raises(DownloadError, match=r"the server answered 503.*Check the address and the connection"):
        job().run()
    assert len(site.requests) == transfer.RETRIES + 1


def test_no_server_at_all(tmp_path):
    nowhere = Transfer(url="http://127.0.0.1:9/x.pth", part=tmp_path / "p", note=tmp_path / "n", hashed=False)
    with pytest.raises(DownloadError, match="refused"):
        nowhere.run()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            ("status", 200, b"<!DOCTYPE html><html>Sign in", "text/html"),
            "sent an HTML page.*request a new one at https",
        ),
        (("status", 200, b"<html><body>Llama", "application/octet-stream"), "sent an HTML page"),
        (("status", 200, b"<?xml?><Error><Code>AccessDenied", "application/xml"), "sent an XML error message"),
        (("status", 200, b"", "application/octet-stream"), "sent an empty file"),
        (
            ("status", 403, b"<?xml?><Error><Code>AccessDenied</Code></Error>"),
            "403 AccessDenied, the signed URL has expired",
        ),
        (("status", 403, b"<Message>Request has expired</Message>"), "the signed URL has expired"),
        (("status", 403, b"Forbidden"), "a signed URL is needed"),
        (("status", 401, b""), "401, a signed URL is needed"),
        (("status", 404, b""), "404, there is no such file"),
        (("status", 418, b""), "the server answered 418"),
    ],
)
def test_each_refusal_has_its_message(job, site, answer, words):
    site.script.append(answer)
    with pytest.raises(DownloadError, match=words):
        job().run()
    assert not job().part.exists() and len(site.requests) == 1


def test_a_gated_repository_has_its_message():
    url = "https://huggingface.co/facebook/dinov3-vits16-pretrain-lvd1689m/resolve/main/model.safetensors"
    for code in (401, 403):
        assert "a gated repository" in transfer._refusal(url, code, b"")
        assert "timm" in transfer._refusal(url, code, b"")


@pytest.mark.parametrize("answer", [("status", 403, b"AccessDenied"), ("status", 200, b"<html>"), ("status", 404, b"")])
def test_the_query_of_a_signed_url_is_never_told(job, site, answer, caplog, capsys):
    site.script += [("drop", 10), answer]
    with pytest.raises(DownloadError) as caught:
        job(query="?Policy=SECRET&Signature=SECRET").run()
    told = str(caught.value) + repr(caught.value.__cause__) + caplog.text + "".join(capsys.readouterr())
    assert "SECRET" not in told and "SECRET" not in job().note.read_text()


def test_a_disk_without_room_is_seen_before(job, site, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(DownloadError, match=r"no room on the disk.*1 MB more are needed.*DENSEDINO_CACHE"):
        job().run()


def test_a_disk_that_fills_up_keeps_what_there_is(job, site, monkeypatch):
    class Full(io.FileIO):
        def write(self, data):
            room = 200_000 - self.tell()
            if len(data) > room:
                super().write(bytes(data)[:room])
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    plain = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode="r", **kw: (Full if mode == "wb" else plain)(self, mode, **kw))
    with pytest.raises(DownloadError, match="no room on the disk"):
        job().run()
    assert job().part.stat().st_size == 200_000
    monkeypatch.undo()
    job().run()
    assert job().part.read_bytes() == site.content


@pytest.mark.parametrize("url", ["http://example.com/a.pth", "ftp://example.com/a", "file:///etc/passwd", "a.pth"])
def test_only_https_is_used(url):
    with pytest.raises(InputError, match="https"):
        check_url(url)


def test_a_redirect_to_http_is_refused(job, site):
    site.redirect = "http://example.com/dinov3.pth"
    with pytest.raises(InputError, match="https"):
        job().run()


@given(
    secret=st.text("abcXYZ019%&=+/~", min_size=8, max_size=40),
    path=st.from_regex(r"(/[a-z0-9_.-]{1,9}){1,4}", fullmatch=True),
)
def test_redaction_leaves_host_and_path(secret, path):
    url = f"https://user:{'p' * 9}@host.example:8443{path}?{secret}#fragment"
    assert redact(url) == f"https://host.example:8443{path}"


@given(st.binary(max_size=600))
def test_weights_are_never_taken_for_something_else(body):
    assert describe_head(b"PK\x03\x04" + body) is None
    assert describe_head(b"\x80\x02" + body) is None
    assert describe_head(len(body).to_bytes(8, "little") + b"{" + body) is None or len(body) in range(0x20, 0x7F)
