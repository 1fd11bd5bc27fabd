"""Owns one HTTP download that survives a bad network: resumed by range, never mixed from two versions of a file.

The partial file lies beside a note of the version it is part of. The query of a signed URL is a secret: it is neither
stored nor printed. No torch is imported.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import asdict, dataclass
from http.client import HTTPException
from typing import IO, TYPE_CHECKING, Any

from densedino.checkpoint import atomic_path
from densedino.errors import DownloadError, InputError

if TYPE_CHECKING:
    from http.client import HTTPResponse
    from pathlib import Path

    from rich.progress import Progress

__all__ = ["REQUEST_FORM", "Transfer", "Version", "check_url", "describe_head", "read_json", "redact"]

REQUEST_FORM = "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/"
TIMEOUT = 30.0  # seconds without a byte before a connection counts as broken
RETRIES = 4  # attempts in a row that bring nothing new before giving up
BACKOFF = 0.5  # seconds before the first retry, doubled each time
_CHUNK = 1 << 20


def redact(url: str) -> str:
    """The URL without user, password, query and fragment: what may be printed and stored."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def check_url(url: str) -> None:
    """Refuse what anyone on the way could change.

    Raises:
        InputError: neither https nor http to this machine itself.
    """
    parts = urllib.parse.urlsplit(url)
    local = parts.hostname in {"localhost", "127.0.0.1", "::1"}
    if parts.scheme != "https" and not (parts.scheme == "http" and local):
        raise InputError(f"{redact(url)}: weights are downloaded over https:// only, so that nobody can change them.")


def describe_head(head: bytes) -> str | None:
    """What a file that begins with `head` is, if that is plainly no weights file; None if it may be one."""
    text = head[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "an empty file"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page (a log-in, consent or error page of a web site)"
    if text.startswith((b"<?xml", b"<error")):
        return "an XML error message of a storage server"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (`git lfs pull` fetches the file itself)"
    return None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file or no object in it."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


@dataclass(frozen=True)
class Version:
    """What tells one state of the file on the server from another."""

    etag: str = ""
    modified: str = ""
    total: int = -1
    """Bytes, -1 if the server does not say."""

    @classmethod
    def of(cls, response: HTTPResponse, total: str | None) -> Version:
        """The version that a response says it is of."""
        number = int(total) if total is not None and total.isdecimal() else -1
        return cls(response.headers.get("ETag", ""), response.headers.get("Last-Modified", ""), number)

    @property
    def validator(self) -> str:
        """For If-Range, which must not be a weak ETag (RFC 9110, 13.1.5)."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified


class _Restart(Exception):  # noqa: N818 (a signal, not an error)
    """The partial file cannot be continued."""


@dataclass(frozen=True)
class Transfer:
    """One file on its way: as many attempts as bring something new."""

    url: str
    part: Path
    """The partial file; complete when `run` returns."""
    note: Path
    """JSON of the version that `part` is of."""
    hashed: bool
    """The content will be compared with a hash, so that a wrong continuation would be noticed."""

    def run(self, *, unless: Version | None = None) -> Version | None:
        """Complete `part`; None if the server says that the file is still the version `unless`.

        Raises:
            DownloadError: refused, not weights, no room, or incomplete after several attempts.
        """
        if self._offset() and self._offset() == self._noted().total:
            return self._noted()  # an earlier run was stopped between the last byte and the check
        best, failures, reason = self._offset(), 0, ""
        with _progress() as progress:
            while failures <= RETRIES:
                time.sleep(BACKOFF * 2 ** (failures - 1) if failures else 0.0)
                try:
                    with self._open(unless) as response:
                        if response.status == 304:
                            return None
                        version = self._receive(response, progress)
                    if version.total in (-1, self._offset()):
                        return version
                    reason = f"the connection ended after {self._offset():,} of {version.total:,} bytes"
                except _Restart as error:
                    self.part.unlink(missing_ok=True)
                    reason = str(error)
                except (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
                    reason = str(getattr(error, "reason", error)) or type(error).__name__
                failures = 0 if self._offset() > best else failures + 1
                best = max(best, self._offset())
        kept = f"{self._offset():,} bytes are kept: run the same command again and it continues."
        advice = kept if self._offset() else "Check the address and the connection."
        raise DownloadError(f"{redact(self.url)}: download incomplete ({reason}). {advice}")

    def _offset(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _noted(self) -> Version:
        return Version(**read_json(self.note))

    def _open(self, unless: Version | None) -> HTTPResponse:
        headers = {"User-Agent": "densedino", "Accept-Encoding": "identity"}
        noted = self._noted()
        if self._offset() and not (noted.validator or self.hashed):
            self.part.unlink()  # nothing would tell a file that has changed meanwhile
        if offset := self._offset():
            headers["Range"] = f"bytes={offset}-"
            headers |= {"If-Range": noted.validator} if noted.validator else {}
        elif unless is not None:
            headers |= {"If-None-Match": unless.etag} if unless.etag else {}
            headers |= {"If-Modified-Since": unless.modified} if unless.modified else {}
        request = urllib.request.Request(self.url, headers=headers)
        try:
            response: HTTPResponse = urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            return self._refused(error)
        return response

    def _refused(self, error: urllib.error.HTTPError) -> HTTPResponse:
        if error.code == 304:
            return error  # type: ignore[return-value]  # an HTTPError is a response too
        if error.code == 416:
            raise _Restart("the server has less of the file than is here") from None
        if error.code >= 500 or error.code in (408, 429):
            raise urllib.error.URLError(f"the server answered {error.code} {error.reason}") from None
        raise DownloadError(_refusal(self.url, error.code, error.read(4096))) from None

    def _receive(self, response: HTTPResponse, progress: Progress) -> Version:
        """Append the response to `part`, or begin it anew, until the connection ends."""
        offset = self._offset() if response.status == 206 else 0
        if response.status == 206:
            version = self._continued(response, offset)
        else:
            version = Version.of(response, response.headers.get("Content-Length"))
        if version.total - offset > shutil.disk_usage(self.part.parent).free:
            raise DownloadError(self._no_room(version.total - offset))
        head = response.read(512)
        if offset == 0:
            if (head or version.total == 0) and (what := describe_head(head)):
                raise DownloadError(_not_weights(self.url, what))
            with atomic_path(self.note) as scratch:
                scratch.write_text(json.dumps(asdict(version)))
        with self.part.open("ab" if offset else "wb") as file:
            self._write(head, response, file, progress, version.total)
        return version

    def _continued(self, response: HTTPResponse, offset: int) -> Version:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        noted, version = self._noted(), Version.of(response, match[2] if match else None)
        if match is None or int(match[1]) != offset or (noted.total >= 0 and version.total not in (-1, noted.total)):
            raise _Restart("the server sent another part of the file than was asked for")
        if noted.validator and version.validator and version.validator != noted.validator:
            raise _Restart("the file on the server has changed")
        return version

    def _write(self, head: bytes, response: HTTPResponse, file: IO[bytes], progress: Progress, total: int) -> None:
        name = redact(self.url).rpartition("/")[2]
        task = progress.add_task(name, total=total if total >= 0 else None, completed=file.tell())
        try:
            while head:
                file.write(head)
                progress.update(task, advance=len(head))
                head = response.read1(_CHUNK)  # what has come is on disk even if the next byte never comes
            file.flush()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DownloadError(self._no_room(total - file.tell())) from None
        finally:
            progress.remove_task(task)

    def _no_room(self, needed: int) -> str:
        return (
            f"no room on the disk for {redact(self.url)}: {max(needed, 0) / 1e6:,.0f} MB more are needed in "
            f"{self.part.parent}. Free some, or put the cache elsewhere with the environment variable DENSEDINO_CACHE."
        )


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow a redirect only to where the first request could have gone as well."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        check_url(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _not_weights(url: str, what: str) -> str:
    return (
        f"{redact(url)}: the server sent {what} instead of weights. Open the link in a browser to see what it says; if "
        f"it is a signed link, it has expired or was cut off: pass it in quotes, or request a new one at {REQUEST_FORM}"
    )


def _refusal(url: str, code: int, body: bytes) -> str:
    shown, parts = redact(url), urllib.parse.urlsplit(url)
    if (parts.hostname or "").endswith(("huggingface.co", "hf.co")) and code in (401, 403):
        return (
            f"{shown}: {code}, a gated repository. Accept its licence on the model's page, log in (hf auth login) and "
            "pass the repository's name (weights='facebook/…'); the copies under weights='timm/…' are not gated."
        )
    if code == 403 and (parts.query or b"AccessDenied" in body or b"expired" in body.lower()):
        return (
            f"{shown}: 403 AccessDenied, the signed URL has expired or was cut off. Pass all of it, in quotes (a shell "
            f"cuts at '&'), or request a new one at {REQUEST_FORM} and run again; what is here already is continued."
        )
    if code in (401, 403):
        return f"{shown}: {code}, a signed URL is needed. Request one at {REQUEST_FORM} and pass all of it, in quotes."
    if code in (404, 410):
        return f"{shown}: {code}, there is no such file. Compare the address with the one that you were sent."
    return f"{shown}: the server answered {code}. Try again later, or download the file by hand and pass its path."


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
