"""Owns features of whole pictures on disk: a teacher is asked once, and crops are cut from what it said."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torchvision.ops import roi_align

from densedino.checkpoint import atomic_path
from densedino.errors import ImageError, InputError, StoreError
from densedino.pretrain.teachers import Tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from densedino.pretrain.sources import Source
    from densedino.pretrain.teachers import Teacher

__all__ = ["TeacherCache", "cut", "pixels_digest"]

SHARD = 256
"""Pictures of a file."""


def pixels_digest(image: Tensor) -> str:
    """Hex digest of a picture's type, shape and values: what its features are kept by."""
    digest = hashlib.blake2b(f"{image.dtype}/{tuple(image.shape)}".encode(), digest_size=16)
    digest.update(image.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cut(tokens: Tensor, window: Tensor, *, grid: tuple[int, int]) -> Tensor:
    """The part of a map that a crop shows, on the crop's grid.

    Each cell of the crop is the mean of what lies in it, as bilinear interpolation has it: nothing is aliased where
    the map is finer than the crop, and nothing moves by half a token where it is coarser.

    Args:
        tokens: [D, h, w] of the whole picture.
        window: [5], a row of `Crops.windows`.
        grid: rows and columns of the crop.

    Returns:
        [D, *grid] fp32.
    """
    h, w = tokens.shape[1:]
    top, left, height, width, mirrored = window.tolist()
    box = torch.tensor([[0.0, left * w, top * h, (left + width) * w, (top + height) * h]], device=tokens.device)
    samples = max(1, round(max(height * h / grid[0], width * w / grid[1])))
    part = roi_align(tokens[None].float(), box, grid, sampling_ratio=samples, aligned=True)[0]
    return part.flip(-1) if mirrored else part


@dataclass(frozen=True)
class _Row:
    file: Path
    number: int
    maps: int


class TeacherCache:
    """A teacher's maps of the pictures of a run, by content: a picture is known again under another name.

    FOLDER/<fingerprint of teacher and size>/shard-00000.safetensors …, each written whole or not at all, so that a
    computation that was killed goes on with the pictures that are missing. Files are mapped into memory, not read.

    Args:
        folder: of the cache; any number of teachers and runs may share it.
        teacher: whose features they are.
        size: pixels of a picture's short side as the teacher sees it.
    """

    def __init__(self, folder: Path, teacher: Teacher, *, size: int) -> None:
        self.teacher = teacher
        self.size = max(1, round(size / teacher.stride)) * teacher.stride
        key = hashlib.sha256(f"{teacher.fingerprint}/{self.size}".encode()).hexdigest()[:32]
        self.folder = Path(folder) / key
        self.names: dict[str, str] = {}
        """Digest of each picture's pixels, by name, after `fill`."""
        self._rows: dict[str, _Row] = {}
        self._open: dict[Path, Any] = {}
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            self._index(path)

    def __len__(self) -> int:
        return len(self._rows)

    def fill(self, sources: Sequence[Source], *, advance: Callable[[int, int], None] | None = None) -> int:
        """Ask the teacher about each picture that is not in the cache; pictures that cannot be read are passed over.

        Args:
            sources: of pictures; all are read once, to be known by their content.
            advance: takes (pictures done, of how many).

        Returns:
            How many were computed.
        """
        total, done, computed = sum(map(len, sources)), 0, 0
        pending: dict[str, tuple[Tensor, ...]] = {}
        for source in sources:
            for index in range(len(source)):
                done += 1
                if advance is not None:
                    advance(done, total)
                try:
                    image = source.read(index)
                except (ImageError, OSError):
                    continue  # the loader quarantines it
                digest = pixels_digest(image)
                self.names[source.name(index)] = digest
                if digest in self._rows or digest in pending:
                    continue
                pending[digest] = self._ask(image)
                computed += 1
                if len(pending) == SHARD:
                    self._write(pending)
                    pending = {}
        if pending:
            self._write(pending)
        return computed

    def targets(self, names: Sequence[str], windows: Tensor, *, grid: tuple[int, int]) -> Tokens:
        """Features of crops, from those of the pictures.

        Args:
            names: of the pictures, as `Source.name` has them.
            windows: [B, 5] of `Crops.windows`.
            grid: rows and columns of the result.

        Returns:
            Maps [B, D, *grid]. CLS is the mean of the map over the crop: what a crop shows, not what the picture does.

        Raises:
            InputError: a picture that the cache has not: call `fill` first.
        """
        unknown = [name for name in names if self.names.get(name) not in self._rows]
        if unknown:
            raise InputError(
                f"the cache of {self.teacher.name} has no features of {unknown[0]!r}"
                f"{f' and {len(unknown) - 1} more' if len(unknown) > 1 else ''}. Call fill(sources) first."
            )
        pictures = [self._read(self.names[name]) for name in names]
        maps = tuple(
            torch.stack([cut(picture[i], window, grid=grid) for picture, window in zip(pictures, windows, strict=True)])
            for i in range(len(pictures[0]))
        )
        return Tokens(cls=None, maps=maps)

    def _ask(self, image: Tensor) -> tuple[Tensor, ...]:
        white = {torch.uint8: 255.0, torch.uint16: 65535.0}.get(image.dtype, 1.0)
        pixels = image[None].float() / white
        H, W = image.shape[1:]
        stride, scale = self.teacher.stride, self.size / min(H, W)
        size = [max(1, round(side * scale / stride)) * stride for side in (H, W)]
        pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp_(0, 1)
        device = getattr(self.teacher, "device", "cpu")
        return tuple(m[0].half().cpu().contiguous() for m in self.teacher(pixels.to(device)).maps)

    def _write(self, rows: dict[str, tuple[Tensor, ...]]) -> None:
        number = len(list(self.folder.glob("shard-*.safetensors")))
        tensors = {f"{row}.{i}": m for row, maps in enumerate(rows.values()) for i, m in enumerate(maps)}
        path = self.folder / f"shard-{number:05d}.safetensors"
        about = {"digests": json.dumps(list(rows)), "teacher": self.teacher.name, "size": str(self.size)}
        with atomic_path(path) as scratch:
            save_file(tensors, scratch, metadata=about)
        self._index(path)

    def _index(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise StoreError(f"{path} is damaged ({error}). Remove it: its pictures are computed again.") from error
        self._open[path] = file
        digests = json.loads(file.metadata()["digests"])
        maps = len(file.keys()) // len(digests)
        self._rows |= {digest: _Row(path, number, maps) for number, digest in enumerate(digests)}

    def _read(self, digest: str) -> list[Tensor]:
        row = self._rows[digest]
        file = self._open[row.file]
        return [file.get_tensor(f"{row.number}.{i}") for i in range(row.maps)]
