"""Decoding processes as an operator meets them: killed, hung, fed with rubbish."""

import asyncio
import os
import signal

import numpy as np
import pytest

from densedino.errors import ImageError
from densedino.images.decoding import read_image
from densedino.serve.decoders import Decoders
from densedino.serve.settings import Settings


def run(test, **settings):
    async def main():
        replaced = []
        decoders = Decoders(Settings(**settings), in_chans=3, replaced=lambda: replaced.append(1))
        await decoders.start()
        try:
            return await asyncio.wait_for(test(decoders, replaced), 60)
        finally:
            await decoders.close()
            assert not decoders.processes

    return asyncio.run(main())


def test_pixels_are_those_of_this_process_and_may_be_written(png):
    async def test(decoders, replaced):
        return await decoders.pixels(png(40, 56))

    pixels, here = run(test, decoders=1), read_image(png(40, 56))
    assert np.array_equal(pixels.array, here.array) and pixels.valid is None and pixels.array.flags.writeable


def test_a_killed_process_is_replaced_and_nobody_notices(png):
    async def test(decoders, replaced):
        for _ in range(3):
            os.kill(decoders.processes[0], signal.SIGKILL)
            shapes = [(await pixels).array.shape for pixels in [decoders.pixels(png(32, 48)) for _ in range(3)]]
            assert shapes == [(32, 48, 3)] * 3
        both = await asyncio.gather(*(decoders.pixels(png(32, 32)) for _ in range(8)))
        assert len(both) == 8
        return len(replaced)

    assert run(test, decoders=2) >= 1


def test_an_image_that_hangs_its_process_costs_only_itself(png):
    async def test(decoders, replaced):
        for pid in decoders.processes:
            os.kill(pid, signal.SIGSTOP)  # as good as a decoder that never ends
        with pytest.raises(ImageError, match="takes longer than"):
            await decoders.pixels(png(32, 32))
        assert (await decoders.pixels(png(32, 32))).array.shape == (32, 32, 3)
        return len(replaced)

    assert run(test, decoders=1, decode_seconds=0.5) == 1


def test_rubbish_is_an_error_and_keeps_the_process(png):
    async def test(decoders, replaced):
        before = decoders.processes
        for data in (b"x", png(64, 64)[:200], b"\x89PNG\r\n\x1a\n" + bytes(50)):
            with pytest.raises(ImageError):
                await decoders.pixels(data)
        assert decoders.processes == before and not replaced

    run(test, decoders=1)


def test_a_bomb_is_refused_by_its_header(png):
    async def test(decoders, replaced):
        with pytest.raises(ImageError, match="max_pixels=1,000"):
            await decoders.pixels(png(64, 64))

    run(test, decoders=1, max_pixels=1000)
