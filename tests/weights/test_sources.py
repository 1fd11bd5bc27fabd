from __future__ import annotations

import hashlib
import json
import threading

import pytest

from densedino.errors import DownloadError, InputError
from densedino.weights.sources import cache_dir, cached, download, file_sha256, first_sight


def digest(content):
    return hashlib.sha256(content).hexdigest()


def named(site, suffix="pth"):
    return f"{site.url}/dir/dinov3_vits16_pretrain_lvd1689m-{digest(site.content)[:8]}.{suffix}"


def test_lands_under_its_content(site, cache):
    path = download(f"{site.url}/dir/my%20model.pth?Signature=SECRET")
    assert path == cache / "weights" / digest(site.content) / "my_model.pth"
    assert path.read_bytes() == site.content and file_sha256(path) == digest(site.content)
    assert "SECRET" not in "".join(p.read_text(errors="ignore") for p in cache.rglob("*") if p.is_file())
    assert [p.name for p in (cache / "partial").glob("*.part")] == []


def test_a_known_hash_needs_no_second_request(site):
    first = download(named(site))
    site.requests.clear()
    assert download(named(site) + "?Signature=another") == first
    assert download("https://elsewhere.example/x.pth", sha256=digest(site.content)) == first
    assert site.requests == []


def test_without_a_hash_the_server_is_asked_whether_it_changed(site):
    first = download(f"{site.url}/model.pth")
    assert download(f"{site.url}/model.pth") == first
    assert site.requests[-1][1]["If-None-Match"] == '"one"'
    site.content, site.etag = b"another" * 1000, '"two"'
    second = download(f"{site.url}/model.pth")
    assert second.read_bytes() == site.content and first.exists()


def test_equal_names_with_other_content_stand_side_by_side(site):
    one = download(f"{site.url}/a/model.pth")
    site.content, site.etag = b"another" * 1000, '"two"'
    two = download(f"{site.url}/b/model.pth")
    assert one.name == two.name and one != two and one.exists() and two.exists()


def test_a_wrong_hash_is_an_error_and_leaves_nothing(site, cache):
    with pytest.raises(DownloadError, match=rf"has SHA-256 {digest(site.content)[:16]}…, but 08c60483… is expected"):
        download(f"{site.url}/dinov3_vits16_pretrain_lvd1689m-08c60483.pth")
    assert list((cache / "weights").glob("*")) == [] and list((cache / "partial").glob("*.part")) == []


def test_a_download_that_failed_leaves_nothing_to_find(site, cache):
    site.script += [("drop", 1000)] + [("drop", 0)] * 9
    with pytest.raises(DownloadError, match="incomplete"):
        download(named(site))
    assert cached(digest(site.content)[:8]) is None
    assert download(named(site)).read_bytes() == site.content


def test_at_once_only_one_downloads(site):
    results = []
    threads = [threading.Thread(target=lambda: results.append(download(named(site)))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(results)) == 1 and len(results) == 6 and len(site.requests) == 1


def test_a_damaged_note_is_not_believed(site, cache):
    download(f"{site.url}/model.pth")
    (done,) = (cache / "partial").glob("*.done")
    done.write_text("{half")
    assert download(f"{site.url}/model.pth").read_bytes() == site.content
    assert json.loads(done.read_text())["sha256"] == digest(site.content)


def test_plain_http_to_elsewhere_is_refused():
    with pytest.raises(InputError, match="https"):
        download("http://example.com/model.pth")


def test_cached_takes_hashes_only(cache):
    folder = cache / "weights" / ("ab" * 32)
    folder.mkdir(parents=True)
    (folder / "x.pth").write_bytes(b"x")
    assert cached("abababab") == folder / "x.pth"
    assert [cached(text) for text in ("", "ab", "*" * 8, "cdcdcdcd")] == [None] * 4


def test_a_licence_is_due_once(cache):
    assert [first_sight("a" * 64), first_sight("a" * 64), first_sight("b" * 64)] == [True, False, True]


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("DENSEDINO_CACHE", str(tmp_path / "file"))
    assert first_sight("a" * 64) and first_sight("a" * 64)


def test_default_cache_is_the_platforms(monkeypatch):
    monkeypatch.delenv("DENSEDINO_CACHE")
    assert cache_dir().name == "densedino" or "densedino" in cache_dir().parts
