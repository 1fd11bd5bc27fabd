"""Owns integer weights on disk: matrices of int8 or int4 in groups with a scale each, to read less, not to multiply.

Value = integer × scale of its group, symmetric, with the scale such that the largest value of a group is hit exactly.
int4 stands two to a byte: the low half of a byte belongs to the first half of the row, the high half to the second.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from densedino.errors import InputError, StateDictError, UnknownNameError
from densedino.weights.identity import CARD_KEY
from densedino.weights.shape import pack_spec
from densedino.weights.stored import CHUNK, Piece, locate
from densedino.weights.writing import write_tensors

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping

    from densedino.weights.loading import StoredModel

__all__ = ["Packed", "dense", "pack_weights", "quantize_groups", "unpack_state"]

_KEY = "densedino.packed"
_SCALE = ".scale"
_MATRIX = re.compile(r"blocks\.\d+\.(attn|mlp)\.\w+\.weight")
_GROUP = 64
_BITS = {"bf16": 16, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class Packed:
    """A matrix [rows, columns] of integers of `bits` bits, with a scale [rows, columns / group]."""

    values: Piece
    """int8 [rows, columns], or for 4 bits [rows, columns / 2]."""
    scales: Piece
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix."""
        rows, stored = self.values.tensor.shape
        return rows, stored * 8 // self.bits

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.values.tensor.nbytes + self.scales.tensor.nbytes

    def read(self, out: Tensor) -> None:
        """Write the numbers into `out` [rows, columns], contiguous, bfloat16 or float32."""
        rows, columns = self.shape
        scales = torch.empty(self.scales.tensor.shape, dtype=out.dtype)
        self.scales.read(scales)
        stored = self.values.tensor.shape[1]
        stage = torch.empty(max(1, (1 << 22) // stored), stored, dtype=torch.int8)
        step = max(1, CHUNK // columns)
        for first in range(0, rows, len(stage)):
            part = stage[: rows - first]
            if self.values.path:
                self.values.read_bytes(part.view(torch.uint8).numpy().data.cast("B"), first * stored)
            else:
                part.copy_(self.values.tensor[first : first + len(part)])
            for row in range(0, len(part), step):
                here = slice(first + row, first + min(row + step, len(part)))
                _scale(part[row : row + step], scales[here], out[here], self.bits)


def _scale(values: Tensor, scales: Tensor, out: Tensor, bits: int) -> None:
    group = out.shape[1] // scales.shape[1]
    grouped = out.view(len(out), -1, group)
    if bits == 8:
        torch.mul(values.view(grouped.shape), scales[..., None], out=grouped)
        return
    middle = grouped.shape[1] // 2
    low = (values << 4) >> 4
    torch.mul(low.view(len(out), middle, group), scales[:, :middle, None], out=grouped[:, :middle])
    torch.mul((values >> 4).view(len(out), middle, group), scales[:, middle:, None], out=grouped[:, middle:])


def dense(packed: Packed) -> Tensor:
    """The matrix in bfloat16."""
    out = torch.empty(packed.shape, dtype=torch.bfloat16)
    packed.read(out)
    return out


def quantize_groups(weight: Tensor, *, bits: int, group: int = _GROUP) -> tuple[Tensor, Tensor]:
    """Integers and scales of a matrix: (int8 [rows, columns × bits / 8], bfloat16 [rows, columns / group]).

    The scale is the group's largest value over -2^(bits - 1), which is then hit exactly, and the range is used whole.
    """
    rows, columns = weight.shape
    grouped = weight.float().view(rows, columns // group, group)
    largest = grouped.gather(2, grouped.abs().argmax(2, keepdim=True))
    low = -(2 ** (bits - 1))
    scales = (largest / low).bfloat16()
    safe = torch.where(scales == 0, torch.ones_like(scales), scales).float()
    integers = (grouped / safe).round_().clamp_(low, -low - 1).to(torch.int8).view(rows, columns)
    if bits == 4:
        first, second = integers.chunk(2, dim=1)
        integers = (first & 15) | (second << 4)
    return integers, scales.squeeze(2)


def unpack_state(state: Mapping[str, Any], metadata: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Packed]]:
    """A checkpoint's tensors, in which packed ones stand empty (device meta), and these.

    Raises:
        StateDictError: packed in a way that this version does not know, or a scale without its matrix.
    """
    if _KEY not in metadata:
        return dict(state), {}
    try:
        bits = int(json.loads(metadata[_KEY])["bits"])
    except (ValueError, KeyError, TypeError) as error:
        raise StateDictError(f"the metadata entry {_KEY} is damaged ({error}); pack the original again.") from error
    out = {key: value for key, value in state.items() if not key.endswith(_SCALE)}
    pairs = {key: (out.get(key), state[key + _SCALE]) for key in _scaled(state)}
    packed: dict[str, Packed] = {}
    for key, (values, scales) in pairs.items():
        if bits not in (4, 8) or values is None or values.dtype != torch.int8 or values.ndim != 2 or scales.ndim != 2:
            raise StateDictError(f"{key} is packed in a way that this version of densedino does not know.")
        pieces = locate({"values": (values,), "scales": (scales,)})
        packed[key] = Packed(pieces["values"].pieces[0], pieces["scales"].pieces[0], bits)
        out[key] = torch.empty(packed[key].shape, dtype=torch.bfloat16, device="meta")
    return out, packed


def _scaled(state: Mapping[str, Any]) -> list[str]:
    return [key.removesuffix(_SCALE) for key in state if key.endswith(_SCALE)]


def pack_weights(source: StoredModel, path: str | os.PathLike[str], *, to: str) -> Path:
    """Write a ViT with the matrices of its blocks in fewer bits; the rest stays as it is. Takes little memory.

    An int8 file is about a half, and an int4 file a quarter, of a bf16 one; products are computed in bfloat16 from all
    of them. For integer products, with calibration and a report, there is `densedino quantize`.

    Args:
        source: of `load_stored`.
        path: ends in .safetensors; must not exist.
        to: bf16, int8 or int4.

    Returns:
        The file.

    Raises:
        UnknownNameError: to something else.
        InputError: another suffix, a file that exists, or a model whose rows do not divide into groups.
    """
    target = Path(path).expanduser()
    if to not in _BITS:
        raise UnknownNameError("packing", to, _BITS)
    bits = _BITS[to]
    if target.exists():
        raise InputError(f"{target} exists, and nothing is overwritten. Give another path, or remove it first.")
    if target.suffix != ".safetensors":
        raise InputError(f"{target}: packed weights are a safetensors file. Name it {target.stem}.safetensors.")
    meta = {key: value for key, value in source.model.state_dict().items() if not key.endswith(".bias_mask")}
    matrices = [key for key in meta if _MATRIX.fullmatch(key)]
    if not matrices or (to != "bf16" and any(meta[key].shape[1] % (2 * _GROUP) for key in matrices)):
        raise InputError(
            f"{source.card.model} cannot be packed: that needs blocks of a ViT, of widths that {2 * _GROUP} divides."
        )
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for key, value in meta.items():
        if key in matrices and to == "bf16":
            shapes[key] = tuple(value.shape), torch.bfloat16
        elif key in matrices:
            rows, columns = value.shape
            shapes[key] = (rows, columns * bits // 8), torch.int8
            shapes[key + _SCALE] = (rows, columns // _GROUP), torch.bfloat16
        else:
            shapes[key] = tuple(value.shape), value.dtype
    groups = "" if to == "bf16" else f" in groups of {_GROUP}"
    note = f"matrices packed to {to}{groups}, from SHA-256 {source.card.sha256}"
    card = replace(source.card, dropped=(), dialect="densedino", notes=(*source.card.notes, note))
    metadata = {"format": "pt", CARD_KEY: json.dumps(card.to_dict(), ensure_ascii=False, sort_keys=True)}
    metadata |= pack_spec(source.model.spec)
    if to != "bf16":
        metadata[_KEY] = json.dumps({"bits": bits, "group": _GROUP})

    def written() -> Iterator[Tensor]:
        for key, value in meta.items():
            whole = torch.empty(value.shape, dtype=torch.bfloat16 if key in matrices and to == "bf16" else value.dtype)
            source.tensors[key].read(whole)
            if key in matrices and to != "bf16":
                yield from quantize_groups(whole, bits=bits)
            else:
                yield whole

    write_tensors(target, shapes, written(), metadata=metadata)
    return target
