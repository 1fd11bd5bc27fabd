from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from densedino.errors import ImageError, InputError
from densedino.pretrain.crops import CropConfig, make_crops
from densedino.pretrain.loading import Loader, resolution_of
from densedino.pretrain.masking import draw_masks
from densedino.pretrain.schedules import constant
from densedino.pretrain.settings import (
    DataConfig,
    MaskConfig,
    OptimizerConfig,
    Resolution,
    SourceConfig,
    StageConfig,
)
from densedino.pretrain.sources import open_source

if TYPE_CHECKING:
    from densedino.pretrain.step import Batch

SMALL = CropConfig(mean=(0.5,) * 3, std=(0.2,) * 3, global_size=32, local_size=16, num_local=2)
STAGE = StageConfig(
    name="pretrain",
    steps=6,
    batch_size=8,
    resolutions=(
        Resolution(crops=SMALL),
        Resolution(crops=replace(SMALL, global_size=48, gram_size=64, local_from_global=True)),
    ),
    optimizer=OptimizerConfig(lr=constant(1e-3)),
    masks=MaskConfig(circular_shift=True),
)


def write_pictures(folder: Path, count: int, *, bad: set[int] = frozenset()) -> Path:  # type: ignore[assignment]
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"{i:03d}.{('jpg', 'png', 'tif')[i % 3]}"
        if i % 3 == 2:
            Image.fromarray(rng.integers(0, 65536, (40, 50), dtype=np.uint16)).save(path)
        else:
            Image.fromarray(rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)).save(path)
        if i in bad:
            path.write_bytes(path.read_bytes()[:200])
    return folder


def loader(*sources: Any, **arguments: Any) -> Loader:
    stage = arguments.pop("stage", STAGE)
    data = DataConfig(workers=arguments.pop("workers", 0), homogeneous=arguments.pop("homogeneous", False))
    return Loader([open_source(source) for source in sources], stage=stage, seed=3, data=data, **arguments)


def tensors(batch: Batch) -> list[Tensor]:
    crops = batch.crops
    found = (crops.global_crops, crops.local_crops, crops.gram_crops, crops.offsets, batch.masks)
    return [tensor for tensor in found if tensor is not None]


def assert_same(one: Batch, other: Batch) -> None:
    assert (one.sample_ids, one.places) == (other.sample_ids, other.places)
    assert len(tensors(one)) == len(tensors(other))
    assert all(map(torch.equal, tensors(one), tensors(other)))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("loading") / "pictures", 21, bad={1, 5, 8, 12})


def test_a_batch_is_what_its_parts_are(pictures: Path) -> None:
    source = open_source(pictures)
    load = loader(pictures)
    for step, batch in enumerate(load):
        resolution = resolution_of(STAGE, seed=3, step=step)
        assert batch.places == range(8) and len(batch.sample_ids) == 8
        names = [source.name(i) for i in range(len(source))]
        for place, name in enumerate(batch.sample_ids):
            crops = make_crops(source.read(names.index(name)), resolution.crops, seed=3, step=step, index=place)
            assert torch.equal(batch.crops.global_crops[:, place], crops.global_crops)
            assert torch.equal(batch.crops.local_crops[:, place], crops.local_crops)
        grid = (resolution.crops.global_size // 16,) * 2
        masks = draw_masks(grid, batch_size=8, seed=3, step=step, circular_shift=True)
        assert torch.equal(batch.masks, masks)
    assert step == 5 and len(load) == 6


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")  # on two cores
def test_every_step_is_the_same_with_any_number_of_workers(pictures: Path) -> None:
    """Also with unreadable pictures among them, and from any step on."""
    alone = loader(pictures)
    expected = list(alone)
    assert len({tuple(batch.crops.global_crops.shape) for batch in expected}) == 2, "both resolutions came"
    for workers in (1, 3):
        load = loader(pictures, workers=workers)
        for one, other in zip(expected, load, strict=True):
            assert_same(one, other)
        assert load.failures == alone.failures and len(load.failures) == 4
    late = loader(pictures, workers=1, steps=range(4, 6))
    for one, other in zip(expected[4:], late, strict=True):
        assert_same(one, other)


def test_processes_share_a_batch_by_places(pictures: Path) -> None:
    whole = list(loader(pictures))
    ranks = [list(loader(pictures, rank=rank, world_size=4)) for rank in range(4)]
    for step, batch in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        assert [part.places for part in parts] == [range(2), range(2, 4), range(4, 6), range(6, 8)]
        assert sum((part.sample_ids for part in parts), ()) == batch.sample_ids
        for i, tensor in enumerate(tensors(batch)):
            assert torch.equal(torch.cat([tensors(part)[i] for part in parts], dim=1), tensor)
    with pytest.raises(InputError, match=r"8 pictures cannot be split evenly over 3.*such as 9"):
        loader(pictures, rank=0, world_size=3)


def test_threads_and_the_shared_generator_are_left_alone(pictures: Path) -> None:
    state, before = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        two = list(loader(pictures, steps=range(2)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    for one, other in zip(two, loader(pictures, steps=range(2), workers=1), strict=True):
        assert_same(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_pictures_are_replaced_and_written_down(pictures: Path, tmp_path: Path) -> None:
    load = loader(pictures)
    bad = {f"{i:03d}" for i in (1, 5, 8, 12)}
    seen = [name for batch in load for name in batch.sample_ids]
    assert len(seen) == 48 and not {Path(name).stem for name in seen} & bad
    assert {Path(name).stem for name in load.failures} == bad
    assert all("damaged or incomplete" in reason for reason in load.failures.values())
    assert load.write_quarantine(tmp_path) == 4 and load.write_quarantine(tmp_path) == 0
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert {line["key"]: line["reason"] for line in lines} == load.failures
    again = loader(pictures)
    list(again)
    assert again.write_quarantine(tmp_path) == 0, "a run that goes on does not repeat them"


def test_within_an_epoch_no_batch_has_a_picture_twice(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pictures", 64, bad=set(range(0, 64, 5)))
    stage = replace(STAGE, batch_size=16, steps=4)
    for batch in loader(folder, stage=stage):  # four steps of 16 of 64 pictures
        assert len(set(batch.sample_ids)) == 16


def test_too_many_bad_pictures_stop_the_run(tmp_path: Path) -> None:
    most = write_pictures(tmp_path / "most", 30, bad=set(range(22)))
    messages = []
    for workers in (0, 2):
        with pytest.raises(ImageError, match=r"of the last \d+ pictures cannot be used") as caught:
            list(loader(most, workers=workers))
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and "damaged or incomplete" in messages[0]
    every = write_pictures(tmp_path / "every", 3, bad={0, 1, 2})
    with pytest.raises(ImageError, match=r"26 of the last 26 pictures cannot be used \(3 different ones\)"):
        list(loader(every))


def test_homogeneous_batches(tmp_path: Path) -> None:
    one, two = (write_pictures(tmp_path / name, 20) for name in ("one", "two"))
    stage = replace(STAGE, steps=8, resolutions=STAGE.resolutions[:1])
    sides = [
        {Path(name).parent.name for name in batch.sample_ids}
        for batch in loader(one, two, stage=stage, homogeneous=True)
    ]
    assert {frozenset(side) for side in sides} == {frozenset({"one"}), frozenset({"two"})}
    mixed = [{Path(name).parent.name for name in batch.sample_ids} for batch in loader(one, two, stage=stage)]
    assert {"one", "two"} in mixed


def test_weights_come_from_the_settings(pictures: Path) -> None:
    named = tuple(SourceConfig(path=str(pictures), weight=w) for w in (3.0, 1.0))
    load = Loader([open_source(pictures)] * 2, stage=STAGE, seed=0, data=DataConfig(sources=named, workers=0))
    assert load.sampler.quotas == (7500, 2500)


class Held:
    """A source of one's own, as a user may write it; this one cannot be sent to another process."""

    def __init__(self) -> None:
        self.get = lambda: torch.zeros(3, 20, 20, dtype=torch.uint8)

    def __len__(self) -> int:
        return 4

    def name(self, index: int) -> str:
        return f"held {index}"

    def read(self, index: int) -> Tensor:
        if index == 0:
            raise OSError("disk on fire")
        return self.get()


def test_a_source_of_ones_own() -> None:
    load = Loader([Held()], stage=STAGE, seed=0, data=DataConfig(workers=0))
    assert len(list(load)) == 6 and load.failures == {"held 0": "disk on fire"}
    with pytest.raises(InputError, match=r"sources \(Held\) cannot be sent to worker processes.*Set workers=0"):
        list(Loader([Held()], stage=STAGE, seed=0, data=DataConfig(workers=1)))


def test_a_picture_that_crops_refuse_is_named() -> None:
    bands = open_source(np.full((4, 20, 20, 5), 0.5, np.float32), in_chans=5)
    for workers in (0, 1):
        with pytest.raises(InputError, match=r"^ndarray#\d: crops are made of pictures \[C, H, W\] with 3 channels"):
            list(Loader([bands], stage=STAGE, seed=0, data=DataConfig(workers=workers)))


def test_large_batches_come_in_parts() -> None:
    stage = replace(STAGE, batch_size=70, steps=1, resolutions=(Resolution(crops=SMALL),))
    (batch,) = Loader(
        [open_source(np.zeros((80, 20, 20, 3), np.uint8))], stage=stage, seed=0, data=DataConfig(workers=0)
    )
    assert len(batch) == 70 and batch.places == range(70)


def test_resolutions_come_by_their_shares() -> None:
    stage = replace(STAGE, resolutions=(replace(STAGE.resolutions[0], share=3.0), STAGE.resolutions[1]))
    first = sum(resolution_of(stage, seed=0, step=step) is stage.resolutions[0] for step in range(1000))
    assert 700 < first < 800
