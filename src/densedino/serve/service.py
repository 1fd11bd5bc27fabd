"""Owns the life of an image in the server: admitted, decoded elsewhere, made to fit, batched, turned into features."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch

from densedino.errors import DenseDinoError, InputError
from densedino.models.vit import block_indices
from densedino.serve.batching import Batcher
from densedino.serve.collection import Collection
from densedino.serve.decoders import Decoders
from densedino.serve.metrics import Metrics
from densedino.serve.refusal import RefusalError, busy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from densedino.features.extractor import FeatureExtractor
    from densedino.features.tokens import Features
    from densedino.images.decoding import Pixels
    from densedino.images.transforms import Prepared, Transform
    from densedino.serve.scene_map import SceneMap
    from densedino.serve.settings import Settings

__all__ = ["Service", "View"]

T = TypeVar("T")

_LARGEST_FILE = 2**30  # of the user's own collection
_INDEX_TOKENS = 1024  # patches of a file that are searched
_PREVIEW_THREADS = 2


@dataclass(frozen=True, kw_only=True)
class View:
    """How one image is to be seen."""

    tokens: int | None = None
    """Resize to about so many patches, aspect kept, up or down. None: its own size, if that is not too large."""
    layers: tuple[int, ...] = ()
    """Blocks wanted besides the last; negative ones count from the end."""


class Service:
    """A model, the processes that decode for it, and the queue between them.

    async with Service(dino, settings) as service:
        features = await service.features(data)
    """

    def __init__(
        self,
        dino: FeatureExtractor,
        settings: Settings,
        *,
        collection: Collection | None = None,
        scene: SceneMap | None = None,
    ) -> None:
        """Nothing is started yet."""
        self.dino, self.settings = dino, settings
        self.collection = collection or Collection((), ())
        self.scene = scene
        self.metrics = Metrics()
        self.decoders = Decoders(settings, in_chans=dino.transform.in_chans, replaced=self.metrics.decoder_replaced)
        self.batcher = Batcher(
            self._run, max_batch=settings.max_batch, max_wait=settings.max_wait, ran=self.metrics.ran
        )
        self.working = 0
        """Images that are decoded, waiting or computed."""
        self.buffered = 0
        """Bytes of requests that are being received or worked on."""
        self.ready = False
        self._threads = ThreadPoolExecutor(_PREVIEW_THREADS, thread_name_prefix="densedino-work")
        self._index: asyncio.Task[None] | None = None
        self.metrics.watch("working_images", "Images that are decoded, waiting or computed.", lambda: self.working)
        self.metrics.watch("waiting_images", "Images waiting for the model.", lambda: len(self.batcher))
        self.metrics.watch("buffered_bytes", "Bytes of requests being received.", lambda: self.buffered)

    async def __aenter__(self) -> Service:
        """Start decoding processes, run the model once, and take requests."""
        await self.decoders.start()
        side = 14 * self.dino.transform.stride
        warm = self.dino.transform.mean
        image = torch.tensor(warm)[:, None, None].expand(-1, side, side).contiguous()
        await self.thread(lambda: self._run([self.dino.transform(image)], ()))
        self.batcher.start()
        self.ready = True
        if len(self.collection) and self.collection.store is None:
            self._index = asyncio.create_task(self._index_files())
        return self

    async def __aexit__(self, *error: object) -> None:
        """Stop. Whoever should be answered has been by now."""
        self.ready = False
        if self._index is not None:
            self._index.cancel()
            await asyncio.gather(self._index, return_exceptions=True)
        await self.batcher.close()
        await self.decoders.close()
        self._threads.shutdown()

    async def thread(self, function: Callable[[], T]) -> T:
        """Run what takes more than a millisecond, and is not the model, beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    @contextlib.asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """Hold one of the places for images that are worked on.

        Raises:
            RefusalError: 429: all are taken, or the queue is too long.
        """
        if self.working >= self.settings.max_requests:
            raise busy(
                f"{self.working} images are being worked on, as many as the server takes.",
                after=self.batcher.expected_wait(),
            )
        self.batcher.check()
        self.working += 1
        try:
            yield
        finally:
            self.working -= 1

    async def features(self, data: bytes, view: View | None = None) -> Features:
        """Features of an image file's bytes, B = 1, on the CPU.

        Raises:
            ImageError: no usable image.
            InputError: a layer that the model has not, or an impossible size.
            RefusalError: 429: too much to do.
        """
        view = view or View()
        if view.layers:
            block_indices(view.layers, self.dino.model.depth)
        arrived = time.monotonic()
        async with self.admitted():
            pixels = await self.decoders.pixels(data)
            prepared = await self.thread(functools.partial(self._prepare, pixels, view))
            return await self.batcher.submit(prepared, layers=view.layers, arrived=arrived)

    async def item_features(self, item: int, view: View | None = None) -> Features:
        """Features of an image of the collection: the store's own, or computed of the file. Raises as `features`."""
        view = view or View()
        stored = await self.thread(lambda: self.collection.stored(item))
        if stored is None:
            return await self.features(await self._file(item), view)
        if unknown := [layer for layer in view.layers if layer not in stored.layers]:
            kept = ", ".join(map(str, stored.layers)) or "none"
            raise InputError(f"layer {unknown[0]} is not in this store; of layers besides the last it has {kept}.")
        return replace(stored, layers={layer: stored.layers[layer] for layer in view.layers})

    @property
    def search_view(self) -> View:
        """How an image is to be seen that is looked for: as those of the collection were, where that is known."""
        return View() if self.collection.store is not None else View(tokens=_INDEX_TOKENS)

    async def preview(self, item: int, *, side: int) -> bytes:
        """A JPEG of an image of the collection.

        Raises:
            ImageError: its file is gone or cannot be read.
            RefusalError: 429.
        """
        data = await self._file(item)
        async with self.admitted():
            return await self.decoders.preview(data, side=side)

    async def _file(self, item: int) -> bytes:
        return await self.thread(lambda: self.collection.read(item, limit=_LARGEST_FILE))

    async def tile_features(self, place: tuple[int, int, int], view: View) -> Features:
        """Features of a tile of the scene, B = 1. Raises as `features`."""
        scene = self.check_tile(place)
        if scene.store is not None:
            if view.layers:
                raise InputError("a scene's store has the last layer only; leave layers out.")
            stored = await self.thread(lambda: scene.stored(place))
            assert stored is not None
            return stored
        if view.layers:
            block_indices(view.layers, self.dino.model.depth)
        arrived = time.monotonic()
        async with self.admitted():
            prepared, skip = await self.thread(lambda: scene.prepared(place, self.dino))
            features = await self.batcher.submit(prepared, layers=view.layers, arrived=arrived)
        return scene.cut(features, place, skip)

    async def tile_picture(self, place: tuple[int, int, int]) -> bytes:
        """A JPEG of a tile of the scene."""
        scene = self.check_tile(place)
        return await self.thread(lambda: scene.picture(place))

    def check_tile(self, place: tuple[int, int, int]) -> SceneMap:
        """The scene, or a 404 if there is none, or no such tile in it."""
        if self.scene is None or place not in self.scene:
            raise RefusalError(404, "There is no such tile, or no scene.", kind="not_found")
        return self.scene

    def check_item(self, item: int) -> None:
        """Raise a 404 if there is no such image."""
        if item not in self.collection:
            count = len(self.collection)
            there = f"it has {count:,}: 0 to {count - 1}" if count else "it is empty"
            raise RefusalError(404, f"no image {item} in the collection; {there}.", kind="not_found")

    def _transform(self, height: int, width: int, view: View) -> Transform:
        transform = replace(self.dino.transform, max_tokens=self.settings.max_tokens)
        if view.tokens is None:
            return transform
        stride, most = transform.stride, min(view.tokens, self.settings.max_tokens)
        factor = math.sqrt(most * stride**2 / (height * width))
        rows = min(max(1, round(height * factor / stride)), most)
        columns = min(max(1, round(width * factor / stride)), most // rows)
        return replace(transform, resize=(rows * stride, columns * stride))

    def _prepare(self, pixels: Pixels, view: View) -> Prepared:
        height, width = pixels.array.shape[:2]
        return self._transform(height, width, view)(pixels)

    def _run(self, prepared: Sequence[Prepared], layers: tuple[int, ...]) -> Features:
        features = self.dino.run(prepared, layers=layers)
        if self.dino.device.type == "cpu":
            return features
        moved = {
            layer: replace(one, patches=one.patches.cpu(), cls=one.cls.cpu(), registers=one.registers.cpu())
            for layer, one in features.layers.items()
        }
        return replace(
            features,
            patches=features.patches.cpu(),
            cls=features.cls.cpu(),
            registers=features.registers.cpu(),
            valid=features.valid.cpu(),
            layers=moved,
        )

    async def _index_files(self) -> None:
        """Compute the features of the collection's files, one at a time, whenever nobody else wants the model."""
        item = 0
        while item < len(self.collection):
            if self.working:
                await asyncio.sleep(0.05)
                continue
            try:
                features = await self.item_features(item, View(tokens=_INDEX_TOKENS))
            except RefusalError:  # somebody else came first
                continue
            except DenseDinoError:  # no usable image: there is nothing to find in it
                item += 1
                continue
            item += 1
            if not await self.thread(functools.partial(self.collection.keep, item - 1, features)):
                return
