"""Owns what the verbs with released heads share: their options, going through the inputs, and what is said of it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from densedino.cli.progress import progress
from densedino.errors import ImageError, InputError, UnknownNameError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from densedino.images.datasets import Item
    from densedino.tasks.answering import Answerer
    from densedino.tasks.folder import AnswerFolder

__all__ = ["AS_PUBLISHED", "ModelOptions", "Run", "load_model"]


@dataclass(frozen=True)
class ModelOptions:
    """Which head, on which backbone, run how.

    Args:
        model: a released head by name; the verb's own if not given.
        weights: the head's file or https:// URL, alone or with the backbone; or random, to try the software.
        backbone_weights: the backbone's file, https:// URL or hub id; what is in the cache if not given.
        device: auto, cpu, cuda, mps.
        engine: what runs the backbone: auto, eager, compile, openvino, onnx, stream.
        precision: of the backbone: auto, fp32, bf16, int8, int4.
        memory: with --engine stream, what may be used of RAM at the peak: 3GB.
    """

    model: str | None = None
    weights: str | None = None
    backbone_weights: str | None = None
    device: str = "auto"
    engine: str = "auto"
    precision: str = "auto"
    memory: str | None = None


AS_PUBLISHED = ModelOptions()


def load_model(options: ModelOptions, *, task: str, default: str, resize: Any = None) -> Any:
    """The model that the options ask for, which must be one for `task`.

    Raises:
        UnknownNameError: no head of that name does this.
    """
    from densedino.heads.catalog import HEADS
    from densedino.tasks.loading import head_named, load

    name = options.model or default
    spec = head_named(name)
    if spec is None or spec.task != task:
        able = [row.name for row in HEADS.values() if row.task == task]
        raise UnknownNameError(f"head for {task}", name, able)
    model: Any = load(
        spec.name,
        weights=options.weights,
        backbone_weights=options.backbone_weights,
        device=options.device,
        engine=options.engine,
        precision=options.precision,
        memory=options.memory,
        resize=resize,
    )
    print(f"model      {model.headed}", file=sys.stderr, flush=True)
    return model


@dataclass
class Run:
    """One verb's way through its inputs."""

    inputs: Sequence[str]
    out: Path
    model: Any
    options: Mapping[str, Any]
    """What besides the model decides the answers."""
    every: int = 1

    def __call__(self, answerer: Answerer, *, table: tuple[str, Callable[[list[Any]], str]] | None = None) -> int:
        """Answer for every picture, and frame of a video; go on where an earlier run ended; return the exit status.

        Args:
            answerer: of one picture.
            table: the name of a file, and what makes it of all records, in the order of the inputs.
        """
        from densedino.checkpoint import atomic_path
        from densedino.images.datasets import list_inputs
        from densedino.tasks.folder import AnswerFolder

        if not self.inputs:
            raise InputError("no inputs; give files, folders, patterns, .txt lists or videos.")
        listing = list_inputs(self.inputs)
        headed = self.model.headed
        about = {
            "head": headed.spec.name,
            "head_sha256": headed.sha256,
            "backbone": headed.card.name,
            "backbone_sha256": headed.card.sha256,
            "precision": headed.engine.precision,
            **self.options,
        }
        folder = AnswerFolder(self.out, about)
        records: list[dict[str, Any]] = []
        with progress("images") as (begin, advance):
            begin(0 if any(item.is_video for item in listing) else len(listing))
            for record in self._records(listing, folder, answerer):
                advance(1)
                if record is not None:
                    records.append(record)
        if table is not None:
            name, make = table
            with atomic_path(self.out / name) as work:
                work.write_text(make(records), encoding="utf-8")
        written = self.out / table[0] if table is not None else self.out
        print(f"{written}: answers for {len(records)} images" + (f", {self.failed} not usable" if self.failed else ""))
        return 0 if records else 1

    failed: int = 0

    def _records(self, items: Any, folder: AnswerFolder, answerer: Answerer) -> Iterator[dict[str, Any] | None]:
        for item in items:
            try:
                yield from self._of_item(item, folder, answerer)
            except (ImageError, OSError) as error:
                self.failed += 1
                print(f"densedino: {error}", file=sys.stderr)
                yield None

    def _of_item(self, item: Item, folder: AnswerFolder, answerer: Answerer) -> Iterator[dict[str, Any]]:
        from densedino.images.datasets import video_frames
        from densedino.images.decoding import read_image

        pictures = video_frames(item, every=self.every) if item.is_video else [(item, item.path)]
        for one, source in pictures:
            standing = folder.standing(one.key, one.path)
            yield standing or folder.write(one.key, one.path, answerer(read_image(source)))
