from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from densedino.engines.eager import EagerEngine
from densedino.engines.quantized import (
    Quantized,
    calibrate,
    check_target,
    compressed_engine,
    is_quantized,
    quantized_engine,
    read_quantized,
    write_quantized,
)
from densedino.errors import InputError, StateDictError
from densedino.weights.loading import load_weights

CARD = load_weights("debug_vit", weights="random")[1]


def cosine(got, want):
    return F.cosine_similarity(got.patches, want.patches, dim=-1).min()


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_calibrated_integers_in_one_file_give_nearly_the_same_tokens(lively, tmp_path, to) -> None:
    model = lively("debug_vit")
    exact = EagerEngine(model, device=torch.device("cpu"), precision="fp32")
    graph = calibrate(model, [torch.randn(1, 3, 64, 96) for _ in range(8)], to=to)
    path = tmp_path / "small.safetensors"
    assert not is_quantized(path)
    write_quantized(graph, path, card=CARD, precision=to, report='{"images": 8}')
    assert [found.name for found in tmp_path.iterdir()] == ["small.safetensors"]
    assert is_quantized(path)
    read = read_quantized(path)
    assert (read.precision, read.report, read.card.name) == (to, {"images": 8}, "debug_vit")
    assert read.card.sha256 != CARD.sha256
    assert any("by densedino quantize" in note for note in read.card.notes)
    engine = quantized_engine(read)
    assert (engine.name, engine.precision) == ("openvino", to)
    image = torch.randn(3, 3, 80, 64)
    for norm in (True, False):
        for got, want in zip(engine(image, layers=(-1, 0), norm=norm), exact(image, layers=(-1, 0), norm=norm)):  # noqa: B905
            assert got.patches.shape == want.patches.shape
            assert cosine(got, want) > 0.98


def test_a_convnext_keeps_its_convolutions(lively) -> None:
    model = lively("debug_convnext")
    exact = EagerEngine(model, device=torch.device("cpu"), precision="fp32")
    g = torch.Generator().manual_seed(0)
    graph = calibrate(model, [torch.randn(1, 3, 96, 64, generator=g) for _ in range(12)], to="int8")
    engine = quantized_engine(Quantized(graph, model, CARD, "int8", {}))
    image = torch.randn(2, 3, 96, 128, generator=g)
    got, want = engine(image)[0], exact(image)[0]
    assert not torch.equal(got.patches, want.patches)
    assert F.cosine_similarity(got.patches, want.patches, dim=-1).mean() > 0.99


@pytest.mark.parametrize(("precision", "least"), [("int8", 0.999), ("int4", 0.98)])
def test_integers_without_data_are_close_too(lively, precision, least) -> None:
    model = lively("debug_vit_swiglu")
    exact = EagerEngine(model, device=torch.device("cpu"), precision="fp32")
    image = torch.randn(2, 3, 64, 96)
    got, want = compressed_engine(model, precision=precision)(image)[0], exact(image)[0]
    assert not torch.equal(got.patches, want.patches)
    assert cosine(got, want) > least


def test_too_few_images_and_wrong_files_are_refused(lively, tmp_path) -> None:
    with pytest.raises(InputError, match="2 images to calibrate on; at least 8"):
        calibrate(lively("debug_vit"), [torch.zeros(1, 3, 32, 32)] * 2, to="int8")
    with pytest.raises(InputError, match=r"a \.safetensors file"):
        check_target(tmp_path / "x.bin")
    plain = tmp_path / "plain.safetensors"
    save_file({"x": torch.zeros(2)}, plain)
    assert not is_quantized(plain)
    assert not is_quantized({"x": torch.zeros(2)})
    with pytest.raises(InputError, match="exists"):
        check_target(plain)
    with pytest.raises(StateDictError, match="no quantised model"):
        read_quantized(plain)
