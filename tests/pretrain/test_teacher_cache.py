from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from densedino.errors import ImageError, InputError, StoreError
from densedino.pretrain import teacher_cache
from densedino.pretrain.teacher_cache import TeacherCache, cut, pixels_digest
from densedino.pretrain.teachers import ModuleTeacher

PLAIN = ((0.0,) * 3, (1.0,) * 3)


class Made:
    def __init__(self, number, *, prefix="p", bad=()):
        self.number, self.prefix, self.bad = number, prefix, bad

    def __len__(self):
        return self.number

    def name(self, index):
        return f"{self.prefix}{index}"

    def read(self, index):
        if index in self.bad:
            raise ImageError("broken")
        g = torch.Generator().manual_seed(index)
        return torch.randint(0, 256, (3, 32 + 8 * (index % 2), 48), generator=g, dtype=torch.uint8)


def teacher(calls=None):
    def features(x):
        if calls is not None:
            calls.append(x.shape)
        return F.avg_pool2d(x, 8)

    return ModuleTeacher(features, name="mean", stride=8, statistics=PLAIN)


def test_cut_reads_positions_exactly():
    # A map that says where it is: any window of it must say where the window's cells are.
    rows, cols = torch.meshgrid((torch.arange(12) + 0.5) / 12, (torch.arange(20) + 0.5) / 20, indexing="ij")
    tokens = torch.stack([rows, cols])
    part = cut(tokens, torch.tensor([0.25, 0.2, 0.5, 0.6, 0.0]), grid=(4, 6))
    torch.testing.assert_close(part[0, :, 0], 0.25 + 0.5 * (torch.arange(4) + 0.5) / 4)
    torch.testing.assert_close(part[1, 0], 0.2 + 0.6 * (torch.arange(6) + 0.5) / 6)
    mirrored = cut(tokens, torch.tensor([0.25, 0.2, 0.5, 0.6, 1.0]), grid=(4, 6))
    torch.testing.assert_close(mirrored, part.flip(-1))
    coarse = cut(tokens, torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0]), grid=(3, 5))
    torch.testing.assert_close(coarse, F.avg_pool2d(tokens[None], (4, 4))[0])  # the mean of what lies in a cell


def test_asks_once_about_each_content_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "SHARD", 2)
    calls = []
    cache = TeacherCache(tmp_path, teacher(calls), size=32)
    assert cache.fill([Made(3, bad=(1,))]) == 2
    again = TeacherCache(tmp_path, teacher(calls), size=32)
    assert len(again) == 2
    assert again.fill([Made(3, prefix="renamed"), Made(3)]) == 1
    assert len(calls) == 3
    assert {path.name for path in again.folder.iterdir()} == {"shard-00000.safetensors", "shard-00001.safetensors"}
    assert TeacherCache(tmp_path, teacher(), size=64).folder != again.folder


def test_gives_crops_their_part(tmp_path):
    source = Made(2)
    cache = TeacherCache(tmp_path, teacher(), size=32)
    cache.fill([source])
    windows = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0], [0.0, 0.5, 1.0, 0.5, 1.0]])
    found = cache.targets(["p0", "p0"], windows, grid=(4, 6)).maps[0]
    exact = F.avg_pool2d(source.read(0).float() / 255, 8)
    torch.testing.assert_close(found[0], exact, atol=2e-3, rtol=0)
    assert found[1].shape == (3, 4, 6)
    with pytest.raises(InputError, match=r"no features of 'x' and 1 more.*fill"):
        cache.targets(["x", "y"], windows, grid=(4, 6))


def test_a_damaged_shard_is_named(tmp_path):
    cache = TeacherCache(tmp_path, teacher(), size=32)
    cache.fill([Made(1)])
    (cache.folder / "shard-00000.safetensors").write_bytes(b"x")
    with pytest.raises(StoreError, match=r"shard-00000.*Remove it"):
        TeacherCache(tmp_path, teacher(), size=32)


def test_digest_is_of_the_content():
    image = torch.arange(24, dtype=torch.uint8).view(2, 3, 4)
    assert pixels_digest(image) == pixels_digest(image.permute(1, 2, 0).contiguous().permute(2, 0, 1))
    assert pixels_digest(image) != pixels_digest(image.view(3, 2, 4))
