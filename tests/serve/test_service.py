import asyncio

import numpy as np
import pytest
import torch

from densedino.errors import ImageError, InputError
from densedino.serve.refusal import RefusalError
from densedino.serve.service import Service, View
from densedino.serve.settings import Settings


def run(tiny, test, **settings):
    async def main():
        async with Service(tiny, Settings(decoders=1, **settings)) as service:
            return await asyncio.wait_for(test(service), 60)

    return asyncio.run(main())


def test_features_are_those_of_the_extractor(tiny, png, tmp_path):
    (tmp_path / "a.png").write_bytes(png(40, 64))
    there = run(tiny, lambda service: service.features(png(40, 64), View(layers=(0,))))
    here = tiny(tmp_path / "a.png", layers=[0])
    assert torch.allclose(there.patches, here.patches, atol=1e-5) and there.source_sizes == ((40, 64),)
    assert torch.allclose(there.layers[0].patches, here.layers[0].patches, atol=1e-5)
    assert torch.equal(there.valid, here.valid)


@pytest.mark.parametrize("size", [(64, 64), (32, 200), (200, 32), (16, 1600)])
@pytest.mark.parametrize("tokens", [1, 64, 100, 256, 5000])
def test_about_as_many_patches_as_asked_never_more_than_allowed(tiny, size, tokens):
    service = Service(tiny, Settings(max_tokens=256))
    pixels = np.zeros((*size, 3), np.uint8)
    grid = service._transform(*size, View(tokens=tokens))(pixels).valid.shape
    asked = min(tokens, 256)
    assert grid[0] * grid[1] <= asked
    if max(size) / min(size) < 10 and asked >= 64:
        assert grid[0] * grid[1] >= 0.75 * asked


def test_bad_images_and_layers_are_refused_and_leave_no_place_taken(tiny, png):
    async def test(service):
        for data, view, error in (
            (b"rubbish", View(), ImageError),
            (png(8, 8), View(), ImageError),
            (png(32, 32), View(layers=(99,)), InputError),
        ):
            with pytest.raises(error):
                await service.features(data, view)
        return service.working

    assert run(tiny, test) == 0


def test_places_are_bounded(tiny, png):
    async def test(service):
        tasks = [asyncio.create_task(service.features(png(64, 64, seed=i))) for i in range(12)]
        done = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [one for one in done if isinstance(one, RefusalError)]
        assert len(refused) == 9 and all(one.status == 429 for one in refused)
        return [one for one in done if not isinstance(one, RefusalError)]

    assert all(one.grid == (4, 4) for one in run(tiny, test, max_requests=3))
