from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from densedino.errors import ImageError, InputError
from densedino.pretrain import shards
from densedino.pretrain.shards import Shards, expand_braces, find_shards, index_shard
from densedino.weights.sources import cache_dir


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_shard(path: Path, members: dict[str, bytes], *, kind: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_picture_is_found_and_read(tmp_path: Path, kind: int) -> None:
    long = "a" * 90 + "/" + "b" * 90 + ".PNG"
    first = {"a/0001.png": png(1), "a/0001.json": b"{}", "a/0001.seg.png": png(99), long: png(2), "a/._0001.png": b"x"}
    paths = [
        write_shard(tmp_path / "0.tar", first, kind=kind),
        write_shard(tmp_path / "1.tar", {}, kind=kind),
        write_shard(tmp_path / "2.tar", {"c.jpg": b"any", "d.e/0.png": png(3)}, kind=kind),
    ]
    found = Shards(paths)
    assert len(found) == 4
    assert [found.name(i) for i in range(4)] == [
        f"{paths[0]}#a/0001.png",
        f"{paths[0]}#{long}",
        f"{paths[2]}#c.jpg",
        f"{paths[2]}#d.e/0.png",
    ]
    assert [found.get(i).getvalue() for i in (3, 0, 1, 2)] == [png(3), png(1), png(2), b"any"]
    assert found.get(0).name == found.name(0)


def test_the_index_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_shard(tmp_path / "0.tar", {"ü.png": png(1)})
    calls: list[Path] = []
    monkeypatch.setattr(shards, "index_shard", lambda p: calls.append(p) or index_shard(p))
    assert Shards([path]).name(0) == Shards([path]).name(0) == f"{path}#ü.png"
    assert len(calls) == 1
    write_shard(path, {"other.png": png(1), "more.png": png(2)})
    assert len(Shards([path])) == 2 and len(calls) == 2, "another file, another index"
    for file in (cache_dir() / "shards").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert len(Shards([path])) == 2 and len(calls) == 3, "a damaged index is made again"


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    monkeypatch.setenv("DENSEDINO_CACHE", str(tmp_path / "cache"))
    assert len(Shards([write_shard(tmp_path / "0.tar", {"a.png": png(1)})])) == 1


def test_hostile_names_are_labels_and_no_paths(tmp_path: Path) -> None:
    names = ["/etc/absolute.png", "../../up.png", "new\nline.png", "a\\b.png", "sp ace/ü.png"]
    shard = write_shard(tmp_path / "0.tar", {name: png(i) for i, name in enumerate(names)})
    with tarfile.open(shard, "a") as archive:
        for kind, name in ((tarfile.SYMTYPE, "link.png"), (tarfile.LNKTYPE, "hard.png"), (tarfile.DIRTYPE, "dir.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        for kind in (tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo("device.png")
            info.type = kind
            archive.addfile(info)
    before = sorted(tmp_path.rglob("*"))
    found = Shards([shard])
    assert [found.name(i).partition("#")[2] for i in range(len(found))] == names
    assert [found.get(i).getvalue() for i in range(len(found))] == [png(i) for i in range(len(names))]
    assert sorted(tmp_path.rglob("*")) == before


def test_names_that_are_no_utf8_are_shown_escaped(tmp_path: Path) -> None:
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    shard = write_shard(tmp_path / "0.tar", {name: png(7)}, kind=tarfile.GNU_FORMAT)
    found = Shards([shard])
    assert found.name(0).endswith("#caf\\xe9.png") and found.get(0).getvalue() == png(7)


def header(name: bytes, size: bytes) -> bytes:
    """A tar header with a valid checksum and any size field."""
    block = bytearray(name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size.ljust(12, b"\0") + b"0" * 12)
    block += b" " * 8 + b"0" + b"\0" * 100 + b"ustar\x0000" + b"\0" * 247
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block[:512])


@pytest.mark.parametrize(
    "size",
    [
        b"77777777777\0",  # 8 GB in a file of 2 kB
        b"\xff" + (-512).to_bytes(11, "big", signed=True),  # back to itself: tarfile would go round for ever
        b"\xff" + (-1024).to_bytes(11, "big", signed=True),
        b"\x80" + b"\x7f" * 11,
    ],
)
def test_sizes_that_lie_are_refused(tmp_path: Path, size: bytes) -> None:
    good = header(b"good.png", b"00000000000\0")
    (tmp_path / "0.tar").write_bytes(good + header(b"bad.png", size) + bytes(1024))
    with pytest.raises(InputError, match=r"damaged or incomplete after 'good.png' "):
        index_shard(tmp_path / "0.tar")


def test_damaged_shards_are_refused_before_training(tmp_path: Path) -> None:
    whole = write_shard(tmp_path / "0.tar", {f"{i}.png": png(i) for i in range(9)}).read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[: 512 * 9 + 100])
    with pytest.raises(InputError, match=r"0.tar' is damaged or incomplete after '\d.png' .* or leave it out"):
        Shards([tmp_path / "0.tar"])
    (tmp_path / "1.tar").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(InputError, match="is no tar archive"):
        Shards([tmp_path / "1.tar"])
    with pytest.raises(InputError, match="cannot be opened: No such file"):
        Shards([tmp_path / "2.tar"])
    os.mkfifo(tmp_path / "3.tar")
    with pytest.raises(InputError, match="no regular file"):
        Shards([tmp_path / "3.tar"])


def test_a_shard_that_shrinks_later_is_reported(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "0.tar", {"a.png": png(0), "b.png": png(1)})
    found = Shards([path])
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ImageError, match=r"0.tar#b.png' is incomplete: the shard has become shorter"):
        found.get(1)
    path.unlink()
    with pytest.raises(ImageError, match="cannot be opened"):
        found.get(0)


def test_shards_without_pictures_say_what_they_have(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "0.tar", {"0.left.png": png(0), "0.json": b""})
    with pytest.raises(InputError, match=r"extensions \['json', 'left.png'\]; a picture's is all that follows"):
        Shards([path])


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("a", ["a"]),
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("{a}{}", ["{a}{}"]),
        ("x{a,}", ["xa", "x"]),
    ],
)
def test_braces(pattern: str, expanded: list[str]) -> None:
    assert list(expand_braces(pattern)) == expanded


def test_braces_without_end_are_refused() -> None:
    with pytest.raises(InputError, match="counts further than to a million"):
        list(expand_braces("{0..99999999999}.tar"))


def test_shards_are_found_by_braces_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("t-00.tar", "t-01.tar", "t-02.tar", "odd{1,2}.tar"):
        Path(name).touch()
    assert find_shards("t-{00..01}.tar") == [Path("t-00.tar"), Path("t-01.tar")]
    assert find_shards("t-*.tar") == [Path(f"t-0{i}.tar") for i in range(3)]
    assert find_shards("odd{1,2}.tar") == [Path("odd{1,2}.tar")]
    assert find_shards("photos/*.jpg") is None
    with pytest.raises(InputError, match=r"no tar shard 't-03.tar' .* one of 2 that"):
        find_shards("t-{02..03}.tar")
    with pytest.raises(InputError, match="compressed archive"):
        find_shards("t-{0..1}.tar.gz")
