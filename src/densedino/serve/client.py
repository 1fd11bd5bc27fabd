"""Owns the Python client: images out, NumPy arrays back. Needs no extra: the standard library's HTTP and NumPy."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy

from densedino.errors import DenseDinoError, ImageError, InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

__all__ = ["Client", "RemoteFeatures", "ServerError"]

Image = str | os.PathLike[str] | bytes
_LONGEST_PAUSE = 30.0


class ServerError(DenseDinoError, RuntimeError):
    """The server is not there, or refused for good."""

    def __init__(self, message: str, *, status: int = 0, request_id: str = "") -> None:
        super().__init__(message)
        self.status = status
        """Of HTTP; 0 if there was no answer."""
        self.request_id = request_id
        """Under which the server's log has it."""


@dataclass(frozen=True, eq=False)
class RemoteFeatures:
    """Features of one image, as the server computed them."""

    patches: NDArray[Any]
    """[h, w, D]."""
    cls: NDArray[Any]
    """[D]."""
    valid: NDArray[np.bool_]
    """[h, w]: the patches all of whose pixels are the image's."""
    layers: Mapping[int, tuple[NDArray[Any], NDArray[Any]]]
    """Patches and CLS of the blocks asked for."""
    info: Mapping[str, Any]
    """Model, weights, licence, grid, stride, sizes."""


class Client:
    """Talks to `densedino serve`.

        client = Client("http://127.0.0.1:8188")
        client.features("photo.jpg").patches        # [h, w, D]

    A busy server (429) is asked again as it says, for up to `patience` seconds.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8188",
        *,
        token: str | None = None,
        timeout: float = 60.0,
        patience: float = 60.0,
    ) -> None:
        """Nothing is sent yet.

        Args:
            url: of the server.
            token: if it wants one; `DENSEDINO_TOKEN` of the environment if not given.
            timeout: seconds that one answer may take.
            patience: seconds in which a busy server is asked again.
        """
        if not url.startswith(("http://", "https://")):
            raise InputError(f"url {url!r}: write http://HOST:PORT.")
        self.url = url.rstrip("/")
        self._token = token or os.environ.get("DENSEDINO_TOKEN") or None
        self._timeout, self._patience = timeout, patience
        proxies = urllib.request.ProxyHandler({}) if "://127.0.0.1" in url or "://localhost" in url else None
        self._opener = urllib.request.build_opener(*([proxies] if proxies else []))

    def features(
        self, image: Image, *, tokens: int | None = None, layers: Sequence[int] = (), dtype: str = "float32"
    ) -> RemoteFeatures:
        """Features of an image: a path, or the bytes of a file.

        Args:
            image: sent as it is.
            tokens: resize to about so many patches; the image's own size if not given.
            layers: blocks wanted besides the last; negative ones count from the end.
            dtype: float32 or float16.

        Raises:
            ImageError: the server could not use the image.
            InputError: a parameter that makes no sense.
            ServerError: no answer, no access, or still busy after `patience`.
        """
        query = {"format": "safetensors", "dtype": dtype, "layers": ",".join(map(str, layers)), "tokens": tokens}
        arrays, info = _tensors(self._ask("/v1/features", query, _bytes(image)))
        of_layers = {n: (arrays[f"layer{n}.patches"], arrays[f"layer{n}.cls"]) for n in layers}
        return RemoteFeatures(arrays["patches"], arrays["cls"], arrays["valid"], of_layers, info)

    def similarity(self, image: Image, *, point: tuple[float, float], tokens: int | None = None) -> NDArray[np.float32]:
        """Cosine [h, w] of every patch to the one at `point`, (x, y) in pixels. Raises as `features`."""
        query = {"point": _point(point), "tokens": tokens, "format": "npy"}
        return _npy(self._ask("/v1/similarity", query, _bytes(image)))

    def segment(
        self,
        image: Image,
        *,
        positive: Sequence[tuple[float, float]],
        negative: Sequence[tuple[float, float]] = (),
        threshold: float | None = None,
        tokens: int | None = None,
    ) -> NDArray[np.bool_]:
        """Mask [H, W] in the image's pixels, from points inside and outside. Raises as `features`."""
        query = {
            "positive": [_point(point) for point in positive],
            "negative": [_point(point) for point in negative],
            "threshold": threshold,
            "tokens": tokens,
            "format": "npy",
        }
        return _npy(self._ask("/v1/segment", query, _bytes(image)))

    def search(
        self, image: Image | None = None, *, vector: Any = None, point: tuple[float, float] | None = None, k: int = 20
    ) -> list[dict[str, Any]]:
        """The nearest images of the server's collection: to an image, to its patch at `point`, or to a vector [D].

        Raises:
            As `features`.
        """
        if (image is None) == (vector is None):
            raise InputError("search for an image or for a vector: give one of them.")
        if vector is not None:
            body = json.dumps({"vector": np.asarray(vector, np.float64).tolist(), "k": k}).encode()
            answer = self._ask("/v1/search", {}, body, kind="application/json")
        else:
            query = {"k": k, "point": None if point is None else _point(point)}
            answer = self._ask("/v1/search", query, _bytes(image))
        results: list[dict[str, Any]] = json.loads(answer)["results"]
        return results

    def models(self) -> list[dict[str, Any]]:
        """What computes the features there, and its limits. Raises as `features`."""
        models: list[dict[str, Any]] = json.loads(self._ask("/v1/models", {}))["models"]
        return models

    def ready(self) -> bool:
        """Whether the server takes requests now."""
        try:
            self._once("/readyz", None, "")
        except ServerError:
            return False
        return True

    def _ask(
        self, path: str, query: Mapping[str, Any], body: bytes | None = None, *, kind: str = "application/octet-stream"
    ) -> bytes:
        given = {key: value for key, value in query.items() if value not in (None, "", [])}
        target = f"{path}?{urllib.parse.urlencode(given, doseq=True)}" if given else path
        end = time.monotonic() + self._patience
        while True:
            try:
                return self._once(target, body, kind)
            except _BusyError as error:
                if time.monotonic() + error.after > end:
                    raise ServerError(f"{self.url} is still busy: {error}", status=429) from None
                time.sleep(error.after)

    def _once(self, target: str, body: bytes | None, kind: str) -> bytes:
        request = urllib.request.Request(self.url + target, data=body)
        if body is not None:
            request.add_header("Content-Type", kind)
        if self._token:
            request.add_header("Authorization", f"Bearer {self._token}")
        try:
            with self._opener.open(request, timeout=self._timeout) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            with error:
                raise _reason(error, error.read(2**16)) from None
        except (OSError, urllib.error.URLError) as error:
            raise ServerError(
                f"no answer from {self.url}: {getattr(error, 'reason', error)}. Is it running? densedino serve"
            ) from error


class _BusyError(Exception):
    def __init__(self, message: str, after: float) -> None:
        super().__init__(message)
        self.after = after


def _reason(error: urllib.error.HTTPError, body: bytes) -> Exception:
    try:
        detail = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        detail = {"kind": "", "message": body[:200].decode("utf-8", "replace"), "request_id": ""}
    message = str(detail["message"])
    if error.code == 429:
        after = error.headers.get("Retry-After", "1")
        return _BusyError(message, min(float(after) if after.isdigit() else 1.0, _LONGEST_PAUSE))
    if detail["kind"] == "image":
        return ImageError(message)
    if error.code == 422:
        return InputError(message)
    return ServerError(f"{error.code}: {message}", status=error.code, request_id=str(detail["request_id"]))


def _bytes(image: Image | None) -> bytes:
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str | os.PathLike):
        raise InputError(f"image is {type(image).__name__}; give a path, or the bytes of an image file.")
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise ImageError(f"{os.fspath(image)!r} cannot be opened: {error.strerror}.") from error


def _point(point: tuple[float, float]) -> str:
    return f"{point[0]:g},{point[1]:g}"


def _npy(data: bytes) -> NDArray[Any]:
    import io

    array: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
    return array


def _tensors(data: bytes) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Arrays of a safetensors answer, and what its metadata says."""
    arrays = safetensors.numpy.load(data)
    size = int.from_bytes(data[:8], "little")
    info: dict[str, Any] = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["densedino"])
    return arrays, info
