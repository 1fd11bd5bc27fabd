"""Owns where training pictures come from: anything that holds pictures in, numbered pictures with names out."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from densedino.errors import ImageError, InputError
from densedino.images.datasets import list_inputs
from densedino.images.decoding import read_image
from densedino.pretrain.packed import PackedText
from densedino.pretrain.shards import Shards, expand_braces, find_shards
from densedino.pretrain.tables import HubRows, is_hub_dataset, is_lance, is_saved_dataset, open_hub, open_lance_pictures

if TYPE_CHECKING:
    from torch import Tensor

    from densedino.images.decoding import ImageSource
    from densedino.pretrain.crops import CropConfig
    from densedino.pretrain.settings import DataConfig, StageConfig

__all__ = ["Pictures", "Source", "open_source", "open_sources"]

OVERSAMPLING = 3
"""Of `fast_jpeg`. Crops of photographs then differ by 0.5 of 255 (root mean square); by 0.8 with 2, by 2 with 1."""

NARROWEST = 3 / 4
"""Aspect ratio of the narrowest crop."""


class Source(Protocol):
    """Numbered pictures. It is sent to worker processes, so it must be picklable."""

    def __len__(self) -> int:
        """The number of pictures; it does not change while a run lasts."""

    def name(self, index: int, /) -> str:
        """What the picture is called in reports."""

    def read(self, index: int, /) -> Tensor:
        """The picture [C,H,W]: uint8 (255 is white), uint16 (65535) or float (1).

        Raises:
            ImageError: it cannot be used; another is taken, and it is reported with this message.
        """


class Collection(Protocol):
    """What holds pictures that are yet to be decoded."""

    def __len__(self) -> int: ...

    def name(self, index: int, /) -> str: ...

    def get(self, index: int, /) -> ImageSource: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures:
    """A source: a collection, decoded by `densedino.images.decoding.read_image` as everywhere else."""

    collection: Collection
    in_chans: int = 3
    max_value: float | None = None
    """The value that means white, for data other than 8-bit."""
    enough_pixels: int | None = None
    """JPEGs may be decoded smaller than they are, to no fewer pixels than these."""

    def __len__(self) -> int:
        return len(self.collection)

    def name(self, index: int) -> str:
        """What the picture is called in reports."""
        return self.collection.name(index)

    def read(self, index: int) -> Tensor:
        """One picture, upright, [in_chans,H,W]: uint8, uint16 or float32 in [0, 1].

        Values that `max_value` puts on a scale of their own become float32. What alpha hides is shown.

        Raises:
            ImageError: it cannot be read, or has other channels.
        """
        pixels = read_image(
            self.collection.get(index),
            in_chans=self.in_chans,
            max_value=self.max_value,
            enough_pixels=self.enough_pixels,
        )
        image = torch.from_numpy(pixels.array).permute(2, 0, 1)
        white = {torch.uint8: 255.0, torch.uint16: 65535.0}.get(image.dtype, 1.0)
        return image if pixels.max_value == white else image.float() / pixels.max_value


class Files:
    """Files, each a picture."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = PackedText(map(str, paths))
        self._folder = Path.cwd()  # of relative paths: workers may have another

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        """The path as given."""
        path = Path(self._paths[index]).as_posix()
        return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

    def get(self, index: int) -> Path:
        """The path."""
        return self._folder / self._paths[index]


class InMemory:
    """A sequence of pictures: whatever `read_image` takes, or pairs or dicts that begin with or call one "image"."""

    def __init__(self, items: Any, *, name: str) -> None:
        self._items, self._name = items, name

    def __len__(self) -> int:
        return len(self._items)

    def name(self, index: int) -> str:
        """`name#index`."""
        return f"{self._name}#{index}"

    def get(self, index: int) -> ImageSource:
        """The picture.

        Raises:
            ImageError: the item holds none.
        """
        item = self._items[index]
        if isinstance(item, tuple | list) and item:
            return item[0]
        if isinstance(item, Mapping):
            if "image" not in item:
                raise ImageError(f"{self.name(index)} is a dict without 'image'; it has: {', '.join(map(str, item))}.")
            return item["image"]
        return item


class ArrayFile:
    """A .npy file with [N,H,W,C] or [N,H,W] numbers, mapped into memory by every process itself."""

    def __init__(self, path: Path) -> None:
        self._path, self._label = path.absolute(), str(path)
        self._array: Any = None
        try:
            shape = self._open().shape
        except (OSError, ValueError) as error:
            raise InputError(
                f"{str(path)!r} is no .npy file of numbers ({error}). Write it with numpy.save."
            ) from error
        if len(shape) not in (3, 4):
            raise InputError(f"{str(path)!r} has the shape {shape}; pictures in one file are [N,H,W,C] or [N,H,W].")
        self._length = shape[0]

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        """`path#index`."""
        return f"{self._label}#{index}"

    def get(self, index: int) -> ImageSource:
        """One [H,W,C] or [H,W]."""
        return np.array(self._open()[index])

    def __getstate__(self) -> dict[str, Any]:
        """Leave the map behind: it would be sent as a copy of the file."""
        return {**self.__dict__, "_array": None}

    def _open(self) -> Any:
        if self._array is None:
            self._array = np.load(self._path, mmap_mode="r", allow_pickle=False)
        return self._array


def open_source(data: Any, *, in_chans: int = 3, max_value: float | None = None) -> Pictures:
    """Open what holds pictures.

    Args:
        data: one of
            - a folder (all pictures below it), a pattern as `photos/**/*.jpg`, a list of paths in a `.txt`, a picture;
              braces are expanded: `{cats,dogs}/*.jpg`;
            - tar shards with WebDataset's names: `train-{000..146}.tar`, a pattern, a `.txt` that lists them, or a
              folder that holds shards and no pictures. Never extracted;
            - a folder that `datasets.Dataset.save_to_disk` wrote, `hf://NAME:SPLIT:COLUMN` (split and column may be
              left out; NAME is an id on the Hugging Face Hub, or such a folder), or a `datasets.Dataset`;
            - a Lance data set with a column of encoded pictures or paths, `lance://PATH:COLUMN` to name the column; a
              feature store, for the files that it was made of;
            - a `.npy` file [N,H,W,C];
            - in Python: any sequence of paths, Pillow images, arrays [H,W,C] or tensors [C,H,W], or of tuples (image,
              …) or dicts with "image"; one array [N,H,W,C].
        in_chans: channels that the model takes. Grey is repeated where it takes three.
        max_value: the value that means white, for data other than 8-bit: 4095 for 12 bits in 16, say.

    Raises:
        InputError: it is not there, holds no pictures, or is nothing of these.
        MissingExtraError: an optional package is needed for it.
    """
    is_place = isinstance(data, str | os.PathLike)
    collection = _open_place(os.fspath(data)) if is_place else _open_object(data)
    if not len(collection):
        raise InputError(f"no pictures in {os.fspath(data) if is_place else type(data).__name__!r}: it is empty.")
    return Pictures(collection=collection, in_chans=in_chans, max_value=max_value)


def open_sources(data: DataConfig, *, stages: Sequence[StageConfig]) -> tuple[Pictures, ...]:
    """All sources of a run, with the channels that the crops of its `stages` have.

    Raises:
        InputError: none is named, or one cannot be opened.
        MissingExtraError: an optional package is needed for one.
    """
    if not data.sources:
        raise InputError("no data: name a folder, pattern, list, shards or data set in DataConfig.sources.")
    crops = [resolution.crops for stage in stages for resolution in stage.resolutions]
    enough = max(map(_enough_pixels, crops)) if data.fast_jpeg else None
    opened = (open_source(s.path, in_chans=len(crops[0].mean), max_value=data.max_value) for s in data.sources)
    return tuple(replace(source, enough_pixels=enough) for source in opened)


def _enough_pixels(crops: CropConfig) -> int:
    """Pixels of a picture of which the smallest window is `OVERSAMPLING` times its crop's size, down and across."""
    largest = max(crops.global_size, crops.gram_size or 0)
    sizes = ((crops.local_scale[0], crops.local_size), (crops.global_scale[0], largest))
    return math.ceil(max((OVERSAMPLING * size) ** 2 / (scale * NARROWEST) for scale, size in sizes))


def _open_place(given: str) -> Collection:
    scheme, separator, rest = given.partition("://")
    if separator and scheme == "hf":
        return open_hub(rest)
    if separator and scheme == "lance":
        folder, _, column = rest.partition(":")
        return _lance(Path(folder), column)
    path = Path(given)
    if path.is_dir():
        return _open_folder(path)
    if given.endswith(".npy") and path.is_file():
        return ArrayFile(path)
    if not separator and (shards := find_shards(given)) is not None:
        return Shards(shards)
    return _files([given] if os.path.lexists(given) else list(expand_braces(given)))


def _open_folder(path: Path) -> Collection:
    if is_saved_dataset(path):
        return open_hub(os.fspath(path))
    if is_lance(path):
        return _lance(path, "")
    try:
        return _files([os.fspath(path)])
    except InputError:
        if shards := sorted(path.glob("*.tar")):
            return Shards(shards)
        raise


def _lance(path: Path, column: str) -> Collection:
    found = open_lance_pictures(path, column=column)
    return Files(found) if isinstance(found, list) else found


def _files(inputs: list[str]) -> Collection:
    """The pictures among what `list_inputs` finds, or the shards that a text list names."""
    listing = list_inputs(inputs)
    paths = [item.path for item in listing if not item.is_video]
    if not paths:
        raise InputError(
            f"{', '.join(map(repr, inputs))} holds {len(listing)} videos and no pictures. Training draws single "
            "pictures: write frames first, as with: ffmpeg -i clip.mp4 -vf fps=2 frames/%06d.jpg"
        )
    archives = [path for path in paths if path.suffix == ".tar"]
    if archives and len(archives) < len(paths):
        raise InputError(f"{', '.join(map(repr, inputs))} names tar shards and pictures. Make two sources of them.")
    return Shards(archives) if archives else Files(paths)


def _open_object(data: Any) -> Collection:
    if is_hub_dataset(data):
        return HubRows(data)
    name = type(data).__name__
    if isinstance(data, np.ndarray | torch.Tensor) and data.ndim not in (3, 4):
        raise InputError(f"a {name} of shape {tuple(data.shape)} is no stack of pictures: they are [N,H,W,C].")
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")) or isinstance(data, bytes | Mapping):
        raise InputError(
            f"{name} is no source of pictures. Valid: a path or pattern, a datasets.Dataset, or any sequence of "
            "pictures: something with __len__ and __getitem__."
        )
    return InMemory(data, name=name)
