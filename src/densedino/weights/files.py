"""Owns reading tensors from local files safely: memory-mapped, never unpickling code, with an error that says why not.

A file's content decides how it is read, not its name: safetensors, or a PyTorch file of tensors only.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from densedino.errors import StateDictError, WeightsNotFoundError
from densedino.weights.sources import file_sha256, sample_sha256, verified_sha256
from densedino.weights.transfer import describe_head, read_json

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LARGE", "METADATA_ATTRIBUTE", "Checkpoint", "read_checkpoint", "tensors_sha256"]

LARGE = 1 << 30
"""Bytes of a checkpoint above which loading does not read all of it merely to know its hash, or to look for NaN."""

METADATA_ATTRIBUTE = "densedino_metadata"
"""Attribute of the ordered dict in a .pth file that holds what a safetensors file has in its header."""
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint holds, as it is."""

    state: Mapping[str, Any]
    """Tensors by name, perhaps nested, perhaps among other things."""
    source: str
    sha256: str
    file_name: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Of a safetensors header, or of a .pth file that our converter wrote."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Of `config.json` beside the file (transformers, timm)."""
    preprocessor: Mapping[str, Any] = field(default_factory=dict)
    """Of `preprocessor_config.json` beside the file (transformers)."""
    large: bool = False
    """Above `LARGE`."""
    sampled: bool = False
    """`sha256` is of a sample of the content, because the file is large and was to be ready at once."""


def read_checkpoint(path: Path, *, source: str | None = None, thorough: bool = True) -> Checkpoint:
    """Read a checkpoint file, or a folder as transformers and timm save it (in one file or in shards).

    Tensors are views of the mapped files: nothing of them is read yet, but for the hash.

    Args:
        path: file or folder.
        source: what to call it; the path if not given.
        thorough: hash all of the content; otherwise, of files above 1 GiB in all, a sample of it.

    Raises:
        WeightsNotFoundError: nothing there, or no weights file in the folder.
        StateDictError: not a checkpoint, truncated, or one that cannot be read without running code from it.
    """
    files = _find_files(path)
    state: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for file in files:
        tensors, described = _read_file(file)
        if twice := state.keys() & tensors.keys():
            raise StateDictError(f"{path}: {sorted(twice)[0]} stands in more than one shard.")
        state |= tensors
        metadata |= described
    large = sum(file.stat().st_size for file in files) > LARGE
    known = [verified_sha256(file) if large and not thorough else None for file in files]
    sampled = large and not thorough and None in known
    hashed = sample_sha256 if sampled else file_sha256
    hashes = [sha or hashed(file) for file, sha in zip(files, known, strict=True)]
    folder = files[0].parent
    return Checkpoint(
        state=state,
        source=source or str(path),
        sha256=hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest(),
        file_name=files[0].name,
        metadata=metadata,
        config=read_json(folder / "config.json"),
        preprocessor=read_json(folder / "preprocessor_config.json"),
        large=large,
        sampled=sampled,
    )


def _find_files(path: Path) -> list[Path]:
    if path.is_file():
        if match := re.search(r"-(\d+)-of-(\d+)\.", path.name):
            raise StateDictError(f"{path} is shard {int(match[1])} of {int(match[2])}; pass its folder, {path.parent}.")
        return _shards(path) if path.name.endswith(".index.json") else [path]
    if not path.is_dir():
        near = sorted(p.name for p in path.parent.glob("*") if p.suffix in _SUFFIXES) if path.parent.is_dir() else []
        there = f" That folder has {', '.join(near[:5])}." if near else ""
        raise WeightsNotFoundError(f"no file or folder {path}.{there} Check the path (now in {Path.cwd()}).")
    for name in _FOLDER_FILES:
        if (path / name).is_file():
            return _shards(path / name) if name.endswith(".json") else [path / name]
    loose = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES)
    if len(loose) == 1:
        return loose
    if any(path.glob("*.distcp")):
        raise StateDictError(
            f"{path} is a torch.distributed.checkpoint folder, whose index is a pickle. Convert it where it was made: "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} checkpoint.pth"
        )
    found = f"it has {', '.join(p.name for p in loose[:5])}; pass one of them" if loose else "it has none"
    raise WeightsNotFoundError(f"{path} is a folder without {_FOLDER_FILES[0]}, and {found}.")


def _shards(index: Path) -> list[Path]:
    names = sorted({str(name) for name in read_json(index).get("weight_map", {}).values()})
    files = [index.parent / name for name in names if Path(name).name == name]
    if not names or len(files) != len(names):
        raise StateDictError(
            f"{index} lists no shards in its own folder; get it again, or pass the weights file itself."
        )
    if missing := [file.name for file in files if not file.is_file()]:
        raise StateDictError(
            f"{index.parent} lacks the shards {', '.join(missing)} that {index.name} lists; get them too."
        )
    return files


def _read_file(path: Path) -> tuple[Mapping[str, Any], dict[str, str]]:
    with path.open("rb") as file:
        head = file.read(512)
    if what := describe_head(head):
        raise StateDictError(f"{path} is {what}, not a weights file. Get it again.")
    if len(head) > 8 and head[8:9] == b"{":
        return _read_safetensors(path)
    if head.startswith((b"PK", b"\x80")):
        return _read_torch(path, head)
    raise StateDictError(
        f"{path} is neither safetensors nor a PyTorch file (it begins with {head[:8]!r}): compressed, encrypted "
        "or of another framework, perhaps."
    )


def _read_safetensors(path: Path) -> tuple[Mapping[str, Any], dict[str, str]]:
    from safetensors import SafetensorError, safe_open  # here, so that a .pth needs PyTorch alone (torch.hub)

    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise StateDictError(
            f"{path}: truncated or damaged ({path.stat().st_size:,} bytes; {str(error).rpartition(': ')[2]}). "
            "Get it again."
        ) from error


def _is_script(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _load_torch(path: Path, *, mmap: bool) -> Any:
    if path.suffix == ".safetensors":  # torch.load goes by the name, and needs one to map the file
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap or None)


def _read_torch(path: Path, head: bytes) -> tuple[Mapping[str, Any], dict[str, str]]:
    zipped = head.startswith(b"PK")
    try:
        script = zipped and _is_script(path)
        loaded = None if script else _load_torch(path, mmap=zipped)
    except zipfile.BadZipFile as error:
        raise StateDictError(
            f"{path}: truncated, its last part is missing ({path.stat().st_size:,} bytes are here). Get it again; "
            "a download by densedino (weights='https://…') continues where it stopped."
        ) from error
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise StateDictError(
            f"{path} holds Python objects{f' ({found[1]})' if found else ''} besides tensors, and reading them could "
            "run code from the file, so densedino does not. Where it was made, save the tensors alone: "
            "torch.save(model.state_dict(), 'tensors.pth')"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise StateDictError(f"{path}: damaged, or not a PyTorch checkpoint ({reason}). Get it again.") from error
    if script:
        raise StateDictError(f"{path} is a TorchScript program. Save its tensors: torch.save(model.state_dict(), …).")
    if not isinstance(loaded, Mapping):
        raise StateDictError(f"{path} holds a {type(loaded).__name__}, not a state dict: save model.state_dict().")
    metadata = getattr(loaded, METADATA_ATTRIBUTE, {})
    return loaded, {str(key): str(value) for key, value in metadata.items()} if isinstance(metadata, Mapping) else {}


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes: equal for equal tensors, in whatever file and order they stand."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
