from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from densedino.engines import export
from densedino.engines.eager import EagerEngine
from densedino.engines.export import FORMATS, Sizes, export_model
from densedino.engines.onnx import OnnxSession
from densedino.engines.openvino import OpenVINOSession, compile_model, core
from densedino.errors import InputError
from densedino.models.catalog import MODELS, ConvNeXtSpec, create_model, model_spec
from densedino.weights.loading import load_weights

CARD = load_weights("debug_vit", weights="random")[1]
CPU = torch.device("cpu")


def shallow(name):
    """An architecture of the table with the fewest blocks that have every part; at 7B, narrower too."""
    spec = model_spec(name)
    if isinstance(spec, ConvNeXtSpec):
        return replace(spec, depths=(1, 1, 1, 1))
    small = {"embed_dim": 1024, "num_heads": 8, "hidden_dim": 2048} if spec.embed_dim > 2048 else {}
    return replace(spec, depth=1, **small)


def tokens_of(model, image, layers=(-1,)):
    return EagerEngine(model, device=CPU, precision="fp32")(image, layers=layers)


@pytest.mark.parametrize("to", FORMATS)
def test_a_file_runs_elsewhere_with_the_same_tokens(lively, tmp_path, to) -> None:
    model = lively("debug_vit")
    path = tmp_path / f"model{FORMATS[to]}"
    done = export_model(model, CARD, path, to=to, layers=(0,))
    assert done.path == path
    assert done.error < 2e-5
    parts = ("cls", "registers", "patches")
    assert done.outputs == (*(f"layer_0_{part}" for part in parts), *parts)
    image = torch.randn(2, 3, 96, 80)
    if to == "onnx":
        outputs = OnnxSession(path)(image)
    elif to == "openvino":
        outputs = OpenVINOSession(compile_model(path, precision="fp32"))(image)
    else:
        outputs = torch.export.load(path).module()(image)
    first, last = tokens_of(model, image, layers=(0, 1))
    for got, want in zip(outputs, (first.cls, first.registers, first.patches, last.cls, last.registers, last.patches)):  # noqa: B905
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "openvino"])
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_exports_and_agrees(tmp_path, name, to) -> None:
    model = create_model(shallow(name))
    for key, value in model.named_parameters():
        if key.endswith("gamma"):
            torch.nn.init.constant_(value, 0.3)
    done = export_model(model, CARD, tmp_path / f"x{FORMATS[to]}", to=to)
    assert done.error < 1e-4


def test_licence_and_fingerprint_are_in_every_file(lively, tmp_path) -> None:
    import onnx

    card = replace(CARD, licence="DINOv3 License", licence_url="https://example.org/licence")
    one = export_model(lively("debug_vit"), card, tmp_path / "x.onnx", to="onnx")
    two = export_model(lively("debug_vit"), card, tmp_path / "x.xml", to="openvino")
    three = export_model(lively("debug_vit"), card, tmp_path / "x.pt2", to="torch")
    assert one.metadata == two.metadata == three.metadata
    stored = {prop.key: prop.value for prop in onnx.load(one.path).metadata_props}
    assert stored.items() >= one.metadata.items()
    read = core().read_model(two.path)
    assert read.get_rt_info(["densedino", "licence"]).astype(str) == "DINOv3 License https://example.org/licence"
    assert read.get_rt_info(["densedino", "fingerprint"]).astype(str) == one.metadata["densedino.fingerprint"]
    extra = {"densedino.json": ""}
    torch.export.load(three.path, extra_files=extra)
    assert json.loads(extra["densedino.json"]) == three.metadata


def test_bytes_in_and_fixed_sizes(lively, tmp_path) -> None:
    model = lively("debug_convnext")
    sizes = Sizes(batch=1, height=64, width=96)
    done = export_model(model, CARD, tmp_path / "x.onnx", to="onnx", takes="uint8", sizes=sizes)
    assert done.checked == ((1, 3, 64, 96),)
    session = OnnxSession(done.path)
    assert session.inputs == {"image": [1, 3, 64, 96]}
    raw = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (CARD.mean, CARD.std))
    torch.testing.assert_close(
        session(raw)[1], tokens_of(model, (raw / 255 - mean) / std)[0].patches, atol=5e-5, rtol=0
    )


def test_a_file_whose_tokens_differ_is_not_kept(lively, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(export, "TOLERANCE", 0.0)
    with pytest.raises(InputError, match="differ by"):
        export_model(lively("debug_vit"), CARD, tmp_path / "x.xml", to="openvino")
    assert list(tmp_path.iterdir()) == []


def test_wrong_paths_are_refused_before_any_work(tmp_path) -> None:
    model = create_model("debug_vit", device="meta")
    with pytest.raises(InputError, match=r"written to a \.onnx file"):
        export_model(model, CARD, tmp_path / "x.xml", to="onnx")
    (tmp_path / "x.onnx").touch()
    with pytest.raises(InputError, match="exists"):
        export_model(model, CARD, tmp_path / "x.onnx", to="onnx")
    with pytest.raises(InputError, match="unknown format"):
        export_model(model, CARD, tmp_path / "x.trt", to="tensorrt")


def test_weights_of_gigabytes_stand_beside_an_onnx_file(lively, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("densedino.engines.onnx._ONE_FILE", 1000)
    done = export_model(lively("debug_vit"), CARD, tmp_path / "x.onnx", to="onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.onnx", "x.onnx.data"]
    torch.testing.assert_close(
        OnnxSession(done.path)(torch.ones(1, 3, 64, 64))[0],
        tokens_of(lively("debug_vit"), torch.ones(1, 3, 64, 64))[0].cls,
        atol=2e-5,
        rtol=0,
    )


def test_killed_at_any_moment_it_leaves_no_half_file(tmp_path) -> None:
    command = [sys.executable, "-m", "densedino", "export", "debug_vit", "--weights", "random", "--to", "openvino"]
    for wait in (2.0, 4.0, 6.0):
        path = tmp_path / f"{wait}.xml"
        process = subprocess.Popen([*command, "-o", str(path)], stdout=subprocess.DEVNULL, env=os.environ)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if path.exists():
            core().read_model(path)
