"""The queue, with a model that does nothing but say what it was asked."""

import asyncio
import threading
import time

import pytest
import torch

from densedino.features.tokens import Features
from densedino.images.transforms import Prepared
from densedino.serve.batching import Batcher
from densedino.serve.refusal import RefusalError


def prepared(height=2, width=2, mark=0.0):
    pixels = torch.full((3, 16 * height, 16 * width), mark)
    size = (16 * height, 16 * width)
    return Prepared(pixels=pixels, valid=torch.ones(height, width, dtype=torch.bool), source_size=size, input_size=size)


def model(batches, *, seconds=0.0, gate=None):
    def run(images, layers):
        batches.append([float(image.pixels[0, 0, 0]) for image in images])
        if gate is not None:
            gate.wait(10)
        time.sleep(seconds)
        pixels = torch.stack([image.pixels for image in images])
        h, w = images[0].valid.shape
        return Features(
            patches=pixels[:, :1, :h, :w].permute(0, 2, 3, 1),
            cls=pixels[:, :1, 0, 0],
            registers=torch.zeros(len(images), 0, 1),
            valid=torch.stack([image.valid for image in images]),
            stride=16,
            grids=((h, w),) * len(images),
            input_sizes=tuple(image.input_size for image in images),
            source_sizes=tuple(image.source_size for image in images),
        )

    return run


def drive(test, run, *, max_batch=4, max_wait=10.0):
    async def main():
        batcher = Batcher(run, max_batch=max_batch, max_wait=max_wait)
        batcher.start()
        try:
            return await asyncio.wait_for(test(batcher), 20)
        finally:
            await batcher.close()

    return asyncio.run(main())


def test_images_that_gather_while_the_model_runs_go_together_and_come_back_to_whom_they_belong():
    batches, gate = [], threading.Event()

    async def test(batcher):
        first = asyncio.create_task(batcher.submit(prepared(mark=1.0)))
        while not batches:
            await asyncio.sleep(0.01)
        rest = [asyncio.create_task(batcher.submit(prepared(mark=float(i)))) for i in range(2, 8)]
        await asyncio.sleep(0.05)
        gate.set()
        return [float(one.cls[0, 0]) for one in await asyncio.gather(first, *rest)]

    assert drive(test, model(batches, gate=gate)) == [1, 2, 3, 4, 5, 6, 7]
    assert batches == [[1], [2, 3, 4, 5], [6, 7]]


def test_sizes_and_layers_do_not_mix_and_the_oldest_goes_first():
    batches, gate = [], threading.Event()

    async def test(batcher):
        tasks = [asyncio.create_task(batcher.submit(prepared(mark=0.0)))]
        while not batches:
            await asyncio.sleep(0.01)
        for mark, (height, layers) in enumerate([(2, ()), (3, ()), (2, (1,)), (2, ()), (3, ())], 1):
            tasks.append(asyncio.create_task(batcher.submit(prepared(height, 2, float(mark)), layers=layers)))
        await asyncio.sleep(0.05)
        gate.set()
        await asyncio.gather(*tasks)

    drive(test, model(batches, gate=gate))
    assert batches == [[0], [1, 4], [2, 5], [3]]


def test_large_images_go_alone():
    batches, gate = [], threading.Event()

    async def test(batcher):
        tasks = [asyncio.create_task(batcher.submit(prepared(64, 64, float(i)))) for i in range(4)]
        await asyncio.sleep(0.05)
        gate.set()
        await asyncio.gather(*tasks)

    drive(test, model(batches, gate=gate))
    assert max(map(len, batches)) == 2, "two of 4,096 patches fill a batch"


def test_who_would_wait_too_long_is_refused_at_once_with_the_time_to_come_again():
    batches = []

    async def test(batcher):
        await batcher.submit(prepared())  # from now on it knows its speed
        tasks = [asyncio.create_task(batcher.submit(prepared())) for _ in range(12)]
        await asyncio.sleep(0.05)
        start = time.monotonic()
        with pytest.raises(RefusalError, match="queue") as refused:
            await batcher.submit(prepared())
        assert time.monotonic() - start < 0.1
        assert refused.value.status == 429 and int(refused.value.headers["retry-after"]) >= 1
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = drive(test, model(batches, seconds=0.2), max_batch=1, max_wait=0.5)
    assert {type(one) for one in results} <= {Features, RefusalError} and isinstance(results[0], Features)


def test_who_has_waited_too_long_is_refused_when_its_turn_comes():
    batches, gate = [], threading.Event()

    async def test(batcher):
        first = asyncio.create_task(batcher.submit(prepared()))
        while not batches:
            await asyncio.sleep(0.01)
        late = asyncio.create_task(batcher.submit(prepared(mark=9.0)))
        await asyncio.sleep(0.3)
        gate.set()
        await first
        with pytest.raises(RefusalError, match="waited"):
            await late

    drive(test, model(batches, gate=gate), max_wait=0.2)
    assert batches == [[0.0]], "nothing was computed for nobody"


def test_an_error_of_the_model_reaches_its_batch_and_no_other():
    fine = model([])

    def run(images, layers):
        if float(images[0].pixels[0, 0, 0]) == 1.0:
            raise ValueError("broken")
        return fine(images, layers)

    async def test(batcher):
        with pytest.raises(ValueError, match="broken"):
            await batcher.submit(prepared(mark=1.0))
        assert float((await batcher.submit(prepared(mark=2.0))).cls) == 2.0

    drive(test, run)


def test_closing_refuses_those_who_wait():
    batches, gate = [], threading.Event()

    async def main():
        batcher = Batcher(model(batches, gate=gate), max_batch=1, max_wait=10)
        batcher.start()
        tasks = [asyncio.create_task(batcher.submit(prepared())) for _ in range(3)]
        await asyncio.sleep(0.1)
        gate.set()
        await batcher.close()
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert RefusalError in {type(one) for one in asyncio.run(main())}
