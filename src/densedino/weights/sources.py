"""Owns the cache of weights files, keyed by content: `<cache>/weights/<sha256>/<file name>`.

A file lands there only whole and with the right hash; whoever wants the same URL meanwhile waits for it. No torch is
imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import urllib.parse
from pathlib import Path

from densedino.checkpoint import atomic_path
from densedino.errors import DownloadError
from densedino.weights.transfer import Transfer, Version, check_url, read_json, redact

__all__ = [
    "cache_dir",
    "cached",
    "download",
    "file_sha256",
    "first_sight",
    "sample_sha256",
    "verified_sha256",
]


def cache_dir() -> Path:
    """Folder of everything cached: `$DENSEDINO_CACHE`, else `$XDG_CACHE_HOME/densedino`, else `~/.cache/densedino`."""
    if override := os.environ.get("DENSEDINO_CACHE"):
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "densedino"


def cached(sha256: str) -> Path | None:
    """The cached file whose content hash starts with `sha256` (8 hex digits or more), or None."""
    if not re.fullmatch(r"[0-9a-f]{8,64}", sha256):
        return None
    return next((path for path in sorted((cache_dir() / "weights").glob(f"{sha256}*/*")) if path.is_file()), None)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verified_sha256(path: Path) -> str | None:
    """The hash under which a file lies in the cache, where it was checked when it came; None for a file elsewhere."""
    folder = path.absolute().parent
    inside = folder.parent == (cache_dir() / "weights").absolute() and re.fullmatch(r"[0-9a-f]{64}", folder.name)
    return folder.name if inside else None


def sample_sha256(path: Path) -> str:
    """SHA-256 over the size of a file, its first MiB, and 4 KiB at each of 1,024 places: read in no time."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"densedino sample 1, {size} bytes".encode())
    with path.open("rb", buffering=0) as file:
        digest.update(file.read(1 << 20))
        for place in range(1, 1025):
            file.seek(max(0, size * place // 1024 - 4096))
            digest.update(file.read(4096))
    return digest.hexdigest()


def first_sight(sha256: str) -> bool:
    """True the first time that a content hash is asked about in this cache, False ever after."""
    marker = cache_dir() / "licences" / sha256
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # a cache that cannot be written: say it every time rather than never
        return True
    return True


def download(url: str, *, sha256: str = "") -> Path:
    """Bring the file at `url` into the cache, or find it there.

    Args:
        url: https; http only to this machine itself.
        sha256: leading hex digits of the content's hash; read from a name like `…-08c60483.pth` if not given.

    Returns:
        The verified file in the cache.

    Raises:
        InputError: not a usable URL.
        DownloadError: expired or refused, not weights, truncated, of another hash, or no room for it.
    """
    check_url(url)
    name = _file_name(url)
    expected = sha256.lower() or _hash_in_name(name)
    if path := cached(expected):
        return path
    folder = cache_dir() / "partial"
    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(redact(url).encode()).hexdigest()[:32]
    from filelock import FileLock

    with FileLock(folder / f"{key}.lock"):
        if path := cached(expected):
            return path
        done = folder / f"{key}.done"  # what this URL brought last time, for names without a hash
        known = read_json(done)
        have = None if expected or not known else cached(known["sha256"])
        transfer = Transfer(url=url, part=folder / f"{key}.part", note=folder / f"{key}.note", hashed=bool(expected))
        version = transfer.run(unless=Version(**known["version"]) if have else None)
        if version is None and have:
            return have
        path = _land(transfer.part, name=name, expected=expected, shown=redact(url))
        with atomic_path(done) as scratch:
            scratch.write_text(json.dumps({"sha256": path.parent.name, "version": read_json(transfer.note)}))
        transfer.note.unlink()
        return path


def _file_name(url: str) -> str:
    name = urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2])
    return re.sub(r"[^\w.()+=,-]", "_", name).lstrip(".")[-128:] or "weights"


def _hash_in_name(name: str) -> str:
    match = re.search(r"-([0-9a-f]{8,64})\.\w+$", name)
    return match[1] if match else ""


def _land(part: Path, *, name: str, expected: str, shown: str) -> Path:
    actual = file_sha256(part)
    if not actual.startswith(expected):
        part.unlink()
        raise DownloadError(
            f"{shown}: the file has SHA-256 {actual[:16]}…, but {expected}… is expected. It was damaged on the way or "
            "is another file, and has been deleted. Run the same command again; if this repeats, the URL is wrong."
        )
    final = cache_dir() / "weights" / actual / name
    with atomic_path(final) as scratch:
        part.replace(scratch)
    return final
