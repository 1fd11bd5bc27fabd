"""Owns snapshots of a training run: a folder for each, whole or not there, readable by any number of processes.

    snapshots/step-00001200/
        snapshot.json               position, configuration, versions, and size and SHA-256 of every file
        model.safetensors           student, teacher and Gram teacher, with their heads
        optimizer.safetensors       both moments and the step count of every parameter

Sharded runs (FSDP2) write torch.distributed.checkpoint files instead of the two safetensors files. Either kind is read
by one process or many, sharded or not.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded
from torch.distributed.tensor import DTensor, distribute_tensor

import densedino
from densedino.checkpoint import atomic_path
from densedino.distributed import rank, world_size
from densedino.errors import InputError, StateDictError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn

__all__ = [
    "Position",
    "Snapshot",
    "config_differences",
    "find_snapshot",
    "prune_snapshots",
    "read_snapshot",
    "training_tensors",
    "write_snapshot",
]

_NAME = re.compile(r"step-(\d{8,})")
_DESCRIPTION = "snapshot.json"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a run is; all counts are of steps that are done."""

    stage: int
    """Index of the stage, from 0."""
    step: int
    """Of that stage; equal to its number of steps when it is over."""
    total: int
    """Of all stages."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A snapshot on disk, found whole."""

    path: Path
    position: Position
    config: dict[str, Any]
    """The run's, as `densedino.config.to_dict` writes it."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What else the trainer wants back."""


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor that a run carries from step to step, by name; writing into them changes the run.

    Moments that AdamW has not made yet are made here, zero, which is what it would begin with.
    """
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if id(parameter) in trained:
            state = optimizer.state[parameter]
            if not state:
                # A plain float32 scalar where the parameter lies, as the fused step wants it.
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            tensors |= {f"optimizer.{name}.{key}": value.detach() for key, value in state.items()}
    return tensors


def write_snapshot(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    position: Position,
    config: dict[str, Any],
    notes: dict[str, Any] | None = None,
) -> Path:
    """Write `folder`/step-…, which appears whole or not at all. Every process calls it.

    Args:
        folder: of the run's snapshots.
        tensors: as `training_tensors` gives them; DTensors are written by the processes that hold them.
        position: where the run stands.
        config: the run's, as `densedino.config.to_dict` writes it.
        notes: what else is wanted back; JSON.
    """
    final = folder / f"step-{position.total:08d}"
    sharded = any(isinstance(value, DTensor) for value in tensors.values())
    with _shared_scratch(final) as scratch:
        if sharded:
            save_sharded(dict(tensors), checkpoint_id=scratch)
        elif rank() == 0:
            for part in ("model", "optimizer"):
                own = {k: v.detach().contiguous() for k, v in tensors.items() if k.startswith(f"{part}.")}
                save_file(own, scratch / f"{part}.safetensors")
        if rank() == 0:
            files = sorted(path for path in scratch.iterdir() if path.is_file())
            description = {
                "format": _FORMAT,
                "position": asdict(position),
                "files": {path.name: _identity(path, hashed=not sharded) for path in files},
                "versions": {"densedino": densedino.__version__, "torch": torch.__version__},
                "notes": notes or {},
                "config": config,
            }
            (scratch / _DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return final


def find_snapshot(folder: Path, *, announce: Callable[[str], None]) -> Snapshot | None:
    """The newest whole snapshot in `folder`, or None. Every process calls it, and gets the same.

    Snapshots that are damaged are renamed to damaged-step-…, and `announce` says so in process 0. Leftovers of writing
    are removed.
    """
    found: list[Any] = [_find(folder, announce) if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(found)
    newest: Snapshot | None = found[0]
    return newest


def read_snapshot(snapshot: Snapshot, tensors: Mapping[str, Tensor]) -> None:
    """Copy a snapshot into `tensors` (of `training_tensors`), however many processes wrote it or read it.

    Raises:
        StateDictError: it holds other tensors, or of other shapes or types.
    """
    if (snapshot.path / "model.safetensors").exists():
        _read_safetensors(snapshot.path, tensors)
        return
    described = FileSystemReader(snapshot.path).read_metadata().state_dict_metadata
    _check_names(snapshot.path, tensors, described)
    for name, entry in described.items():
        size = tuple(getattr(entry, "size", ()))
        if size != tuple(tensors[name].shape):
            raise _misfit(snapshot.path, name, size, tensors[name])
    targets = {name: value.detach() for name, value in tensors.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process reads what several wrote
        load_sharded(targets, checkpoint_id=snapshot.path)
    with torch.no_grad():
        for name, value in targets.items():  # mostly loaded in place; where not, the dict has another tensor
            if value.data_ptr() != tensors[name].data_ptr():
                tensors[name].copy_(value)


def prune_snapshots(folder: Path, *, keep_last: int, keep_every: int | None = None) -> None:
    """Remove all but the newest `keep_last` snapshots and those at multiples of `keep_every` steps. Process 0 does."""
    if rank() != 0:
        return
    numbered = sorted(_numbered(folder))
    for total, path in numbered[: max(len(numbered) - keep_last, 0)]:
        if not (keep_every and total % keep_every == 0):
            doomed = path.with_name(f".{path.name}.tmp")  # first out of sight: half a folder is no snapshot
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def config_differences(before: Mapping[str, Any], now: Mapping[str, Any], *, free: tuple[str, ...] = ()) -> list[str]:
    """Where two configurations (`to_dict`) differ: "stages[0].steps: 100 before, 200 now", one line each.

    `free` names fields, from the top, that may differ with all that is in them.
    """
    lines: list[str] = []

    def compare(one: Any, other: Any, place: str) -> None:
        if place in free:
            return
        if isinstance(one, dict) and isinstance(other, dict):
            for key in dict.fromkeys([*one, *other]):
                compare(one.get(key, _ABSENT), other.get(key, _ABSENT), f"{place}.{key}" if place else str(key))
        elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
            for i, (a, b) in enumerate(zip(one, other, strict=True)):
                compare(a, b, f"{place}[{i}]")
        elif one != other:
            lines.append(f"{place}: {_short(one)} before, {_short(other)} now")

    compare(dict(before), dict(now), "")
    return lines


_ABSENT = object()


def _short(value: Any) -> str:
    text = "nothing" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


@contextmanager
def _shared_scratch(final: Path) -> Iterator[Path]:
    """A folder that all processes fill, and that process 0 then renames to `final` (replacing what is there)."""
    if rank() != 0:
        told: list[Any] = [None]
        dist.broadcast_object_list(told)
        yield Path(told[0])
        dist.barrier()  # all have written
        dist.barrier()  # it stands
        return
    with atomic_path(final, directory=True) as scratch:
        if world_size() > 1:
            dist.broadcast_object_list([str(scratch)])
        yield scratch
        if world_size() > 1:
            dist.barrier()
        if final.exists():  # of a run that was continued from an earlier snapshot
            shutil.rmtree(final)
    if world_size() > 1:
        dist.barrier()


def _identity(path: Path, *, hashed: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"bytes": path.stat().st_size}
    if hashed:
        with path.open("rb") as file:
            entry["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return entry


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    names = [(_NAME.fullmatch(path.name), path) for path in folder.glob("step-*")]
    return [(int(match[1]), path) for match, path in names if match]


def _find(folder: Path, announce: Callable[[str], None]) -> Snapshot | None:
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    for _, path in sorted(_numbered(folder), reverse=True):
        try:
            return _verified(path)
        except StateDictError as error:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            announce(f"snapshot {path.name} is damaged ({error}); it is now {aside.name}, and the one before is used")
    return None


def _verified(path: Path) -> Snapshot:
    try:
        description = json.loads((path / _DESCRIPTION).read_text(encoding="utf-8"))
        files, position = description["files"], Position(**description["position"])
        config, notes, version = description["config"], description["notes"], description["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateDictError(f"{_DESCRIPTION}: {error!r}") from error
    if version != _FORMAT:
        raise InputError(
            f"{path} has format {version}, and this densedino reads {_FORMAT}. Go on with the densedino that wrote it,"
            f" {description.get('versions', {}).get('densedino')}, or begin a new run in another folder."
        )
    for name, expected in files.items():
        file = path / name
        found = _identity(file, hashed="sha256" in expected) if file.is_file() else None
        if found != expected:
            what = "is missing" if found is None else f"has other content than was written, {found['bytes']:,} bytes"
            raise StateDictError(f"{name} {what}")
    return Snapshot(path=path, position=position, config=config, notes=notes)


def _read_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        with (
            safe_open(path / "model.safetensors", framework="pt") as model,
            safe_open(path / "optimizer.safetensors", framework="pt") as moments,
        ):
            source = {name: file for file in (model, moments) for name in file.keys()}  # noqa: SIM118
            _check_names(path, tensors, source)
            for name, target in tensors.items():
                _copy(source[name].get_tensor(name), target, path, name)
    except SafetensorError as error:
        raise StateDictError(f"{path} cannot be read: {error}. Remove it to go on from the one before.") from error


@torch.no_grad()
def _copy(value: Tensor, target: Tensor, path: Path, name: str) -> None:
    if value.shape != target.shape or value.dtype != target.dtype:
        raise _misfit(path, name, tuple(value.shape), target)
    if isinstance(target, DTensor):
        local = value.to(target.device)
        target.copy_(distribute_tensor(local, target.device_mesh, target.placements, src_data_rank=None))
    else:
        target.copy_(value)


def _check_names(path: Path, tensors: Mapping[str, Tensor], stored: Mapping[str, Any]) -> None:
    missing, extra = sorted(tensors.keys() - stored.keys()), sorted(stored.keys() - tensors.keys())
    if missing or extra:
        parts = [f"lacks {', '.join(missing[:3])}" if missing else "", f"has {', '.join(extra[:3])}" if extra else ""]
        raise StateDictError(
            f"{path} {' and '.join(filter(None, parts))} ({len(missing)} missing and {len(extra)} too many): it is of"
            " another model or another densedino. Begin a new run in another folder."
        )


def _misfit(path: Path, name: str, shape: tuple[int, ...], target: Tensor) -> StateDictError:
    return StateDictError(
        f"{path}: {name} has shape {shape}, and the model's has {tuple(target.shape)}, {target.dtype}. It is of another"
        " model; begin a new run in another folder."
    )
