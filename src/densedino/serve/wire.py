"""Owns how features are written into answers: JSON, npy, safetensors, Arrow."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import safetensors.numpy

from densedino.errors import InputError
from densedino.serve.points import quantise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from densedino.features.extractor import FeatureExtractor
    from densedino.features.tokens import Features

__all__ = ["MEDIA", "DType", "Format", "Part", "Wanted", "arrow", "choose_format", "encode", "npy", "png"]

Part = Literal["cls", "patches", "registers"]
Format = Literal["json", "npy", "safetensors", "arrow"]
DType = Literal["float32", "float16", "int8"]

MEDIA: dict[Format, str] = {
    "json": "application/json",
    "npy": "application/x-npy",
    "safetensors": "application/x-safetensors",
    "arrow": "application/vnd.apache.arrow.stream",
}
_DIGITS = 6  # of a number in JSON, after the point


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What of the features an answer is to hold, and how."""

    format: Format = "json"
    parts: tuple[Part, ...] = ()
    """CLS and patches if empty; of npy, which holds one array, patches."""
    dtype: DType = "float32"

    def __post_init__(self) -> None:
        if unknown := [part for part in self.parts if part not in get_args(Part)]:
            raise InputError(f"parts has {unknown[0]!r}; valid are {', '.join(get_args(Part))}.")
        if self.format == "npy" and len(self.parts) > 1:
            raise InputError("npy holds one array: ask for one part, or for safetensors.")
        if self.dtype == "int8" and self.format != "safetensors":
            raise InputError(f"dtype int8 needs scales beside it, which {self.format} does not hold; use safetensors.")

    @property
    def of(self) -> tuple[Part, ...]:
        """The parts, with the default filled in."""
        return self.parts or (("patches",) if self.format == "npy" else ("cls", "patches"))


def choose_format(asked: Format | None, accept: str) -> Format:
    """The format asked for by name, else the first known one in the header `Accept`, else JSON."""
    if asked is not None:
        return asked
    for entry in accept.split(","):
        for name, media in MEDIA.items():
            if entry.split(";")[0].strip().lower() == media:
                return name
    return "json"


def npy(array: NDArray[Any]) -> bytes:
    """An array as the bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def png(mask: NDArray[np.bool_]) -> bytes:
    """A mask [H, W] as a PNG: white where it is True."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(file, "PNG")
    return file.getvalue()


def encode(features: Features, wanted: Wanted, dino: FeatureExtractor) -> bytes:
    """The answer's body for one image (B = 1).

    Raises:
        InputError: npy with further layers.
    """
    about = _about(features, dino)
    if wanted.format == "npy" and features.layers:
        raise InputError("npy holds one array: leave layers out, or use safetensors.")
    if wanted.format == "safetensors" and wanted.dtype == "int8":
        return _safetensors(_quantised(features, wanted.of), about)
    arrays = _arrays(features, wanted.of, np.float16 if wanted.dtype == "float16" else np.float32)
    match wanted.format:
        case "npy":
            return npy(next(iter(arrays.values())))
        case "safetensors":
            return _safetensors({**arrays, "valid": features.valid[0].cpu().numpy()}, about)
        case "arrow":
            return arrow(arrays, about)
        case "json":
            return _json(arrays, features, about)


def _about(features: Features, dino: FeatureExtractor) -> dict[str, Any]:
    card = dino.card
    return {
        "model": card.model,
        "weights": card.name,
        "licence": card.licence,
        "untrained": card.untrained,
        "precision": dino.precision,
        "stride": features.stride,
        "grid": list(features.grids[0]),
        "source_size": list(features.source_sizes[0]),
        "input_size": list(features.input_sizes[0]),
    }


def _named(features: Features, parts: Sequence[Part]) -> dict[str, Tensor]:
    """Tensors of the parts, of the last layer and of others, as `layer5.cls`."""
    named: dict[str, Tensor] = {part: getattr(features, part)[0] for part in parts}
    for number, tokens in features.layers.items():
        named |= {f"layer{number}.{part}": getattr(tokens, part)[0] for part in parts}
    return named


def _arrays(features: Features, parts: Sequence[Part], dtype: type[np.floating[Any]]) -> dict[str, NDArray[Any]]:
    named = _named(features, parts)
    return {name: np.ascontiguousarray(tensor.cpu().numpy().astype(dtype)) for name, tensor in named.items()}


def _quantised(features: Features, parts: Sequence[Part]) -> dict[str, NDArray[Any]]:
    """Unit vectors as int8, each with `<name>.scale`: see `points.quantise`."""
    arrays: dict[str, NDArray[Any]] = {"valid": features.valid[0].cpu().numpy()}
    for name, tensor in _named(features, parts).items():
        whole, scale = quantise(tensor)
        arrays[name], arrays[f"{name}.scale"] = whole.cpu().numpy(), scale.cpu().numpy()
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _safetensors(arrays: dict[str, NDArray[Any]], about: dict[str, Any]) -> bytes:
    return safetensors.numpy.save(arrays, metadata={"densedino": json.dumps(about)})


def _json(arrays: dict[str, NDArray[Any]], features: Features, about: dict[str, Any]) -> bytes:
    lists: dict[str, Any] = {
        name: np.round(array.astype(np.float64), _DIGITS).tolist() for name, array in arrays.items()
    }
    return json.dumps({**about, **lists, "valid": features.valid[0].tolist()}).encode()


def arrow(arrays: dict[str, NDArray[Any]], about: dict[str, Any]) -> bytes:
    """One row as an Arrow IPC stream: each array [..., D] as its vectors, fixed-size lists of D, grids row by row."""
    import pyarrow as pa

    columns: dict[str, pa.Array] = {
        "grid_h": pa.array([about["grid"][0]], pa.int32()),
        "grid_w": pa.array([about["grid"][1]], pa.int32()),
    }
    for name, array in arrays.items():
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[-1])
        columns[name] = vectors if array.ndim == 1 else pa.ListArray.from_arrays(pa.array([0, len(vectors)]), vectors)
    table = pa.table(columns).replace_schema_metadata({"densedino": json.dumps(about)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())
