from __future__ import annotations

import json
import os
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from densedino.errors import StateDictError, WeightsNotFoundError
from densedino.weights.files import read_checkpoint, tensors_sha256

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "renamed.bin", "no_suffix"])
@pytest.mark.parametrize("kind", ["torch", "legacy", "safetensors"])
def test_content_decides_not_the_name(tmp_path, name, kind):
    path = tmp_path / name
    if kind == "safetensors":
        save_file(TENSORS, path, metadata={"x": "y"})
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=kind == "torch")
    checkpoint = read_checkpoint(path)
    assert all(torch.equal(checkpoint.state[key], value) for key, value in TENSORS.items())
    assert checkpoint.metadata == ({"x": "y"} if kind == "safetensors" else {})
    assert checkpoint.source == str(path) and checkpoint.file_name == name
    assert len(checkpoint.sha256) == 64


def test_reading_is_memory_mapped(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"big": torch.ones(20_000_000)}, path)
    before = _anonymous_megabytes()
    state = read_checkpoint(path).state
    assert _anonymous_megabytes() - before < 20
    assert state["big"][-1] == 1.0


def _anonymous_megabytes():
    with open("/proc/self/status") as status:  # noqa: PTH123
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("RssAnon"))


def test_code_in_a_pickle_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for legacy in (False, True):
        torch.save({"model": TENSORS, "args": Evil()}, "evil.pth", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(StateDictError, match=r"Python objects \(\w+.mkdir\).*save the tensors alone"):
            read_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("kind", ["torch", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_an_error(tmp_path, kind, share):
    path = tmp_path / "x"
    tensors = {f"t{i}": torch.randn(100, 10) for i in range(20)}
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "torch")
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(StateDictError, match=r"truncated|damaged|neither"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (b"  \n<!DOCTYPE html><html>Sign in</html>", "an HTML page"),
        (b"<html lang=en>", "an HTML page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML error message"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"\x1f\x8b\x08 gzip", "neither safetensors nor"),
        (b"random words", "neither safetensors nor"),
        (b"\xff" * 8 + b"{" + b"\xff" * 50, "truncated or damaged"),
        (b"\x80\x02]q\x00.", "damaged, or not a PyTorch checkpoint|not a state dict"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, content, words):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(StateDictError, match=words):
        read_checkpoint(tmp_path / "x.pth")


def test_other_zip_files_and_objects_are_errors(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(StateDictError, match="not a PyTorch checkpoint"):
        read_checkpoint(tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        archive.writestr("net/constants.pkl", "x")
    with pytest.raises(StateDictError, match="TorchScript"):
        read_checkpoint(tmp_path / "b.pt")
    torch.save([torch.ones(1)], tmp_path / "c.pt")
    with pytest.raises(StateDictError, match="holds a list"):
        read_checkpoint(tmp_path / "c.pt")


def test_a_folder_of_transformers_is_read_with_its_configuration(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov3_vit"}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0, 0, 0]}))
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.state.keys() == TENSORS.keys()
    assert checkpoint.config == {"model_type": "dinov3_vit"} and checkpoint.preprocessor == {"image_mean": [0, 0, 0]}
    assert read_checkpoint(tmp_path / "model.safetensors").config == checkpoint.config


def shards(folder):
    for number, key in enumerate(TENSORS, 1):
        save_file({key: TENSORS[key]}, folder / f"model-0000{number}-of-00002.safetensors")
    weight_map = {key: f"model-0000{number}-of-00002.safetensors" for number, key in enumerate(TENSORS, 1)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_put_together(tmp_path):
    shards(tmp_path)
    whole = read_checkpoint(tmp_path)
    assert whole.state.keys() == TENSORS.keys()
    assert read_checkpoint(tmp_path / "model.safetensors.index.json").sha256 == whole.sha256


def test_one_shard_alone_or_missing_is_an_error(tmp_path):
    shards(tmp_path)
    with pytest.raises(StateDictError, match="is shard 2 of 2; pass its folder"):
        read_checkpoint(tmp_path / "model-00002-of-00002.safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(StateDictError, match="lacks the shards model-00002"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd"])
def test_an_index_cannot_name_files_elsewhere(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(StateDictError, match="no shards in its own folder"):
        read_checkpoint(tmp_path)


def test_a_folder_with_one_weights_file_is_that_file(tmp_path):
    torch.save(TENSORS, tmp_path / "epoch9.pth")
    (tmp_path / "log.txt").write_text("hello")
    assert read_checkpoint(tmp_path).file_name == "epoch9.pth"
    torch.save(TENSORS, tmp_path / "epoch8.pth")
    with pytest.raises(WeightsNotFoundError, match=r"it has epoch8\.pth, epoch9\.pth; pass one"):
        read_checkpoint(tmp_path)


def test_folders_without_weights_say_what_they_are(tmp_path):
    with pytest.raises(WeightsNotFoundError, match="it has none"):
        read_checkpoint(tmp_path)
    (tmp_path / "__0_0.distcp").write_bytes(b"x")
    with pytest.raises(StateDictError, match="dcp_to_torch"):
        read_checkpoint(tmp_path)


def test_a_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "vits16 (1).pth").write_bytes(b"x")
    with pytest.raises(WeightsNotFoundError, match=r"That folder has vits16 \(1\)\.pth"):
        read_checkpoint(tmp_path / "vits16.pth")


def test_tensor_hash_depends_on_content_only(tmp_path):
    one = {"a": torch.randn(3, 4), "b": torch.randn(2)}
    other = {"b": one["b"].clone(), "a": one["a"].t().contiguous().t()}
    assert tensors_sha256(one) == tensors_sha256(other)
    assert tensors_sha256(one) != tensors_sha256({**one, "a": one["a"].t()})
    assert tensors_sha256(one) != tensors_sha256({**one, "a": one["a"].double()})
    assert tensors_sha256({"empty": torch.ones(0, 3), "scalar": torch.tensor(1.0)})
