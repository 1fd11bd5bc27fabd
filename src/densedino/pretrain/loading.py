"""Owns getting batches ready: crops and masks of each step, by worker processes, the same however many there are."""

from __future__ import annotations

import pickle
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset

from densedino import distributed
from densedino.errors import ImageError, InputError
from densedino.features.quarantine import Entry, Quarantine
from densedino.pretrain.crops import CropConfig, Crops, make_crops, stack_crops
from densedino.pretrain.masking import draw_masks
from densedino.pretrain.sampling import Sampler, choose
from densedino.pretrain.settings import DataConfig
from densedino.pretrain.step import Batch
from densedino.pretrain.workers import default_workers, end_with_parent, one_thread, worker_context

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from densedino.pretrain.settings import Resolution, StageConfig
    from densedino.pretrain.sources import Source

__all__ = ["Loader", "resolution_of"]

CHUNK = 32
"""Most pictures that a worker hands over at once: it holds them twice while it stacks them."""

WINDOW = 50
"""Training stops if more than half of so many pictures in a row are unreadable."""


def resolution_of(stage: StageConfig, *, seed: int, step: int) -> Resolution:
    """The resolution that a step of a stage uses; the same in every process (DINOv3 §5.1)."""
    shares = [resolution.share for resolution in stage.resolutions]
    return stage.resolutions[choose(shares, purpose="resolution", seed=seed, step=step)]


class Loader:
    """The batches of a stage for this process, ready to be iterated over.

    The batch of a step depends on the seed, the step and the pictures alone: to the last bit the same with any number
    of workers and processes, and after any restart. Unreadable pictures are replaced by what the same place would get
    later in the epoch, and noted in `failures`. A batch can have a picture twice only where an epoch ends in it.

    Workers are fresh processes, not forks, since forks of a process with threads (Lance's, NCCL's) can hang. A script
    that trains with workers needs `if __name__ == "__main__":` around its calls.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        stage: StageConfig,
        seed: int,
        data: DataConfig | None = None,
        steps: range | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        """Prepare to load.

        Args:
            sources: of pictures, as many as `data.sources` has if it has any (for their weights).
            stage: batch size, resolutions and masks.
            seed: of the run, or of the stage where every stage is to have an order of its own.
            data: workers, prefetching, weights and the kind of mixture.
            steps: those to iterate over; by default all of the stage.
            rank: this process's place among `world_size`; by default, of `torch.distributed`.
            world_size: processes that share a batch.

        Raises:
            InputError: the batch cannot be split evenly, or weights do not fit.
        """
        data = DataConfig() if data is None else data
        rank = distributed.rank() if rank is None else rank
        world_size = distributed.world_size() if world_size is None else world_size
        if stage.batch_size % world_size:
            raise InputError(
                f"a batch of {stage.batch_size} pictures cannot be split evenly over {world_size} processes. Choose a "
                f"batch_size that {world_size} divides, such as {-(-stage.batch_size // world_size) * world_size}."
            )
        weights = [source.weight for source in data.sources if source.weight is not None]
        self.sampler = Sampler(
            lengths=tuple(map(len, sources)),
            batch_size=stage.batch_size,
            seed=seed,
            weights=tuple(weights) or None,
            homogeneous=data.homogeneous,
        )
        share = stage.batch_size // world_size
        self.places = range(rank * share, (rank + 1) * share)
        """Of the global batch, this process's."""
        self.steps = range(stage.steps) if steps is None else steps
        self.workers = default_workers() if data.workers is None else data.workers
        self.failures: dict[str, str] = {}
        """Why pictures could not be used, by name, of the batches that were yielded."""
        self._prefetch = data.prefetch
        self._chunks = _Chunks(list(sources), self.sampler, stage, seed)
        self._recent: deque[tuple[str, str]] = deque(maxlen=WINDOW)
        self._written = 0

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Batch]:
        """Yield a batch for each step.

        Raises:
            ImageError: too many pictures are unreadable.
        """
        batches = self._batches(self._start())
        if not self.workers:
            yield from batches
            return
        with ThreadPoolExecutor(1) as thread:  # puts the next batch together while this one is trained on
            following = thread.submit(next, batches, None)
            while (batch := following.result()) is not None:
                following = thread.submit(next, batches, None)
                yield batch

    def write_quarantine(self, folder: str | os.PathLike[str]) -> int:
        """Append what has failed since the last call to `quarantine.jsonl` in `folder`; returns how many."""
        new = list(self.failures.items())[self._written :]
        self._written += len(new)
        if not new:
            return 0
        Path(folder).mkdir(parents=True, exist_ok=True)  # it may be there on the first machine only
        quarantine = Quarantine(Path(folder) / "quarantine.jsonl")
        known = quarantine.entries
        entries = [Entry(key=k, path=k, reason=v, size=None, mtime_ns=None) for k, v in new if k not in known]
        quarantine.add(entries)
        return len(entries)

    def _start(self) -> Iterator[_Chunk]:
        """Begin to load, in the order of steps and places."""
        size = min(CHUNK, -(-len(self.places) // max(1, self.workers)))
        per_batch = -(-len(self.places) // size)
        loader = DataLoader(
            self._chunks,
            sampler=_Order(self.steps, self.places, size),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self.workers,
            prefetch_factor=max(1, -(-self._prefetch * per_batch // self.workers)) if self.workers else None,
            multiprocessing_context=worker_context() if self.workers else None,
            worker_init_fn=end_with_parent,
            generator=torch.Generator(),  # or it draws from the one that all share
        )
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Got pickle error")  # an error follows, which says it better
                return iter(loader)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            kinds = ", ".join(sorted({type(source).__name__ for source in self._chunks.sources}))
            raise InputError(
                f"the sources ({kinds}) cannot be sent to worker processes: {error}. Set workers=0, or define them in "
                "a module, without lambdas and open files."
            ) from error

    def _batches(self, chunks: Iterator[_Chunk]) -> Iterator[Batch]:
        parts: list[Batch] = []
        for chunk in chunks:
            parts.append(self._checked(chunk))
            if parts[-1].places.stop == self.places.stop:
                yield _joined(parts)
                parts = []

    def _checked(self, chunk: _Chunk) -> Batch:
        """The part of a batch, once it is noted what could not be used."""
        for name, reason in chunk.tried:
            self._recent.append((name, reason))
            if not reason:
                continue
            self.failures[name] = reason
            failed = [(name, reason) for name, reason in self._recent if reason]
            if len(failed) > WINDOW // 2:
                raise ImageError(_diagnosis(failed, len(self._recent)))
        if chunk.batch is None:
            raise InputError(chunk.problem)
        return chunk.batch


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """A part of a batch, as a worker hands it over."""

    batch: Batch | None
    """None if there was no getting at enough pictures."""
    tried: list[tuple[str, str]]
    """Name and, if it failed, reason of each picture that was read, in order."""
    problem: str = ""
    """What else went wrong: said by the main process, where no traceback of a worker hides it."""


class _Order:
    """Which part of which step comes when; never a list, as there may be millions."""

    def __init__(self, steps: range, places: range, size: int) -> None:
        self._steps, self._places, self._size = steps, places, size

    def __iter__(self) -> Iterator[tuple[int, range]]:
        for step in self._steps:
            for first in range(0, len(self._places), self._size):
                yield step, self._places[first : first + self._size]

    def __len__(self) -> int:
        return len(self._steps) * -(-len(self._places) // self._size)


class _Chunks(Dataset[_Chunk]):
    """All parts of all batches, each made from nothing but its step and places."""

    def __init__(self, sources: list[Source], sampler: Sampler, stage: StageConfig, seed: int) -> None:
        self.sources, self._sampler, self._stage, self._seed = sources, sampler, stage, seed

    def __getitem__(self, which: tuple[int, range]) -> _Chunk:
        step, places = which
        crops = resolution_of(self._stage, seed=self._seed, step=step).crops
        samples: list[Crops] = []
        names: list[str] = []
        tried: list[tuple[str, str]] = []
        with one_thread():
            for place in places:
                image = self._read(step, place, tried)
                if image is None:
                    return _Chunk(batch=None, tried=tried)
                names.append(tried[-1][0])
                try:
                    samples.append(make_crops(image, crops, seed=self._seed, step=step, index=place))
                except InputError as error:
                    return _Chunk(batch=None, tried=tried, problem=f"{names[-1]}: {error}")
            masks = self._masks(crops, step, places)
            batch = Batch(crops=stack_crops(samples), masks=masks, sample_ids=tuple(names), places=places)
            return _Chunk(batch=batch, tried=tried)

    def _read(self, step: int, place: int, tried: list[tuple[str, str]]) -> Tensor | None:
        """The first readable picture for a place, None if `WINDOW` are not; each that was tried is noted."""
        for source, index in islice(self._sampler.candidates(step, place), WINDOW):
            name = self.sources[source].name(index)
            try:
                image = self.sources[source].read(index)
            except (ImageError, OSError, MemoryError) as error:
                tried.append((name, str(error) or type(error).__name__))
                continue
            tried.append((name, ""))
            return image
        return None

    def _masks(self, crops: CropConfig, step: int, places: range) -> Tensor:
        side, masks = crops.global_size // crops.stride, self._stage.masks
        return draw_masks(
            (side, side),
            batch_size=self._sampler.batch_size,
            seed=self._seed,
            step=step,
            samples=places,
            num_crops=crops.num_global,
            probability=masks.probability,
            ratio=masks.ratio,
            circular_shift=masks.circular_shift,
        )


def _diagnosis(failed: list[tuple[str, str]], tried: int) -> str:
    different = list(dict(failed).items())
    lines = "".join(f"\n  {name}: {reason}" for name, reason in different[:3])
    return (
        f"{len(failed)} of the last {tried} pictures cannot be used ({len(different)} different ones). Remove or repair"
        f" them, or name another source. They are, for instance:{lines}"
    )


def _joined(parts: list[Batch]) -> Batch:
    """One batch of its parts, in memory that a GPU can fetch from by itself where there is one."""

    def join(name: str) -> Tensor | None:
        tensors = [x for part in parts if (x := getattr(part.crops, name)) is not None]
        return _cat(tensors) if tensors else None

    global_crops, local_crops = join("global_crops"), join("local_crops")
    assert global_crops is not None
    assert local_crops is not None
    return Batch(
        crops=Crops(
            global_crops=global_crops,
            local_crops=local_crops,
            gram_crops=join("gram_crops"),
            offsets=join("offsets"),
            windows=join("windows"),
        ),
        masks=_cat([part.masks for part in parts]),
        sample_ids=tuple(name for part in parts for name in part.sample_ids),
        places=range(parts[0].places.start, parts[-1].places.stop),
    )


def _cat(tensors: list[Tensor]) -> Tensor:
    """Of parts [·, b, …], the whole [·, B, …]."""
    pinned = torch.cuda.is_available()
    if len(tensors) == 1:
        return tensors[0].pin_memory() if pinned else tensors[0]
    first = tensors[0]
    shape = (len(first), sum(tensor.shape[1] for tensor in tensors), *first.shape[2:])
    return torch.cat(tensors, dim=1, out=torch.empty(shape, dtype=first.dtype, pin_memory=pinned))


def _as_it_is(chunk: Any) -> Any:
    return chunk
