"""Owns pictures in tables: Hugging Face data sets, Lance data sets, and the files that a feature store was made of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from densedino.errors import ImageError, InputError, UnknownNameError, require
from densedino.pretrain.shards import NamedBytes

if TYPE_CHECKING:
    from densedino.images.decoding import ImageSource

__all__ = ["HubRows", "LanceRows", "is_hub_dataset", "is_lance", "is_saved_dataset", "open_hub", "open_lance_pictures"]

PATH_COLUMNS = ("path", "image_path", "file", "filename", "uri", "source")
"""Names of columns of text that are taken for paths of pictures if no column holds pictures."""


class HubRows:
    """The pictures in a column of a `datasets.Dataset`: encoded, paths, or numbers."""

    def __init__(self, dataset: Any, *, split: str = "", column: str = "", name: str = "dataset") -> None:
        datasets = _datasets()
        if isinstance(dataset, datasets.IterableDataset | datasets.IterableDatasetDict):
            raise InputError(f"{name} is streamed, and has no order to draw from. Load it without streaming=True.")
        if isinstance(dataset, datasets.DatasetDict):
            splits = list(dataset)
            split = split or (splits[0] if len(splits) == 1 else "train")
            if split not in dataset:
                raise UnknownNameError(f"split of {name}:", split, splits, hint=f"As in hf://NAME:{splits[0]}.")
            dataset, name = dataset[split], f"{name}:{split}"
        elif split and split != str(dataset.split):
            raise InputError(f"{name} is one split, {str(dataset.split)!r}, not {split!r}. Leave the split empty.")
        kinds = {key: _kind_of_feature(feature) for key, feature in dataset.features.items()}
        self._column = _choose_column(column, kinds, name=name)
        self._data = dataset.with_format(None).select_columns([self._column])
        if isinstance(dataset.features[self._column], datasets.Image):
            self._data = self._data.cast_column(self._column, datasets.Image(decode=False))  # we decode
        self._name = name

    def __len__(self) -> int:
        return len(self._data)

    def name(self, index: int) -> str:
        """`name#row`."""
        return f"{self._name}#{index}"

    def get(self, index: int) -> ImageSource:
        """The picture in one row, not decoded.

        Raises:
            ImageError: there is none.
        """
        value = self._data[index][self._column]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        return _as_source(value, self.name(index))


class LanceRows:
    """The encoded pictures in a column of bytes of a Lance data set."""

    def __init__(self, path: Path, *, column: str) -> None:
        self._path, self._column, self._label = path.absolute(), column, str(path)
        dataset = _open_lance(path)
        self._length = dataset.count_rows()
        self._is_blob = _is_blob(dataset.schema.field(column))
        self._opened: Any = None
        self._process = 0

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        """`path#row`."""
        return f"{self._label}#{index}"

    def get(self, index: int) -> ImageSource:
        """The picture in one row, not decoded.

        Raises:
            ImageError: there is none.
            StoreError: the data set is damaged.
        """
        from densedino.features.store import reading

        if self._opened is None or self._process != os.getpid():  # Lance's threads do not survive a fork
            self._opened, self._process = _open_lance(self._path), os.getpid()
        with reading(self._path):
            if self._is_blob:
                blob = self._opened.take_blobs(self._column, indices=[index])[0]
                value = None if blob is None else blob.readall()
            else:
                value = self._opened.take([index], columns=[self._column])[self._column][0].as_py()
        return _as_source(value, self.name(index))

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open data set behind: it cannot move to another process."""
        return {**self.__dict__, "_opened": None}


def open_hub(spec: str) -> HubRows:
    """Open `NAME[:split[:column]]`: a data set of the Hugging Face Hub, or a folder that `save_to_disk` wrote.

    Raises:
        MissingExtraError: `datasets` is not installed.
        InputError: no such data set, split or column.
    """
    datasets = _datasets()
    name, split, column = (*spec.split(":", 2), "", "")[:3]
    try:
        if Path(name).is_dir() and is_saved_dataset(Path(name)):
            dataset = datasets.load_from_disk(name)
        else:
            dataset = datasets.load_dataset(name, split=split or None)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise InputError(
            f"no Hugging Face data set {name!r}{split and f' with a split {split!r}'}: {reason}. Give the id of one on "
            "the Hub, as hf://OWNER/NAME:SPLIT:COLUMN, or a folder that Dataset.save_to_disk wrote."
        ) from error
    return HubRows(dataset, split=split, column=column, name=f"hf://{name}")


def is_saved_dataset(path: Path) -> bool:
    """Whether `datasets` wrote this folder (`save_to_disk`)."""
    return (path / "dataset_dict.json").is_file() or all(
        (path / name).is_file() for name in ("dataset_info.json", "state.json")
    )


def is_hub_dataset(data: object) -> bool:
    """Whether this is an object of `datasets`, without importing it."""
    return any(cls.__module__.partition(".")[0] == "datasets" for cls in type(data).__mro__)


def is_lance(path: Path) -> bool:
    """Whether this folder is a Lance data set, a feature store for one."""
    return (path / "_versions").is_dir()


def open_lance_pictures(path: Path, *, column: str = "") -> LanceRows | list[Path]:
    """Open the pictures in a Lance data set.

    Returns:
        The rows of a column of encoded pictures, or the files that a column of paths names. Of a feature store: the
        files that it was made of, without videos.

    Raises:
        InputError: no such column, or no pictures.
        StoreError: no Lance data set, or a damaged one.
    """
    from densedino.features.layout import METADATA_KEY
    from densedino.features.store import reading

    dataset = _open_lance(path)
    is_store = METADATA_KEY in (dataset.schema.metadata or {})
    if is_store:
        column, filtered = "source", "frame IS NULL"
    else:
        kinds = {field.name: _kind_of_arrow(field) for field in dataset.schema}
        column, filtered = _choose_column(column, kinds, name=repr(str(path))), None
        if kinds[column] == "bytes":
            return LanceRows(path, column=column)
    with reading(path):
        values = dataset.to_table(columns=[column], filter=filtered)[column].to_pylist()
    paths = [path / value for value in dict.fromkeys(values) if value]
    if not paths:
        raise InputError(
            f"{str(path)!r} names no pictures{', only frames of videos' if is_store and dataset.count_rows() else ''}."
        )
    return paths


def _open_lance(path: Path) -> Any:
    from densedino.features.store import open_lance

    return open_lance(path)


def _datasets() -> Any:
    return require("datasets", extra="train", purpose="a Hugging Face data set")


def _as_source(value: Any, name: str) -> ImageSource:
    if value is None:
        raise ImageError(f"{name!r} is empty.")
    if isinstance(value, bytes):
        return NamedBytes(value, name)
    return value if isinstance(value, str) else np.asarray(value)


def _kind_of_feature(feature: Any) -> str:
    datasets = _datasets()
    if isinstance(feature, datasets.Image):
        return "image"
    kind = getattr(feature, "dtype", "")
    if kind in ("binary", "large_binary"):
        return "bytes"
    if kind in ("string", "large_string"):
        return "text"
    return "numbers" if isinstance(feature, datasets.Array2D | datasets.Array3D) else "other"


def _kind_of_arrow(field: Any) -> str:
    import pyarrow as pa

    if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type) or _is_blob(field):
        return "bytes"
    return "text" if pa.types.is_string(field.type) or pa.types.is_large_string(field.type) else "other"


def _is_blob(field: Any) -> bool:
    """Whether Lance keeps the column's bytes apart, and gives places instead of them (by type, earlier by metadata)."""
    return "lance.blob" in str(field.type) or b"lance-encoding:blob" in (field.metadata or {})


def _choose_column(column: str, kinds: dict[str, str], *, name: str) -> str:
    """The column that was asked for, or the only one that can hold pictures."""
    if column:
        if column not in kinds:
            raise UnknownNameError(f"column of {name}:", column, kinds)
        return column
    for kind in ("image", "bytes", "numbers"):
        found = [key for key, value in kinds.items() if value == kind]
        if len(found) > 1:
            raise InputError(f"{name} has pictures in the columns {found}. Name one, as in …:{found[0]}.")
        if found:
            return found[0]
    paths = [key for key, value in kinds.items() if value == "text" and key in PATH_COLUMNS]
    if not paths:
        raise InputError(
            f"{name} has no column of pictures or paths among {', '.join(kinds)}. Name the one, as in …:COLUMN."
        )
    return paths[0]
