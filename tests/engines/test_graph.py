from __future__ import annotations

import pytest
import torch

from densedino.engines.eager import EagerEngine
from densedino.engines.graph import Graph, Normalise, export_graph, output_names
from densedino.errors import InputError
from densedino.models.catalog import MODELS, create_model, model_spec

DEBUG = ("debug_vit", "debug_vit_swiglu", "debug_convnext")


def by_name(graph, image):
    with torch.no_grad():
        return dict(zip(graph.names, graph(image), strict=True))


@pytest.mark.parametrize("name", DEBUG)
@pytest.mark.parametrize("norm", [True, False])
def test_a_graph_gives_the_tokens_of_the_model(lively, name, norm) -> None:
    model = lively(name)
    image = torch.randn(2, 3, 2 * model.stride, 3 * model.stride)
    layers = range(model.depth)
    got = by_name(Graph(model, layers=layers, norms=(True, False)), image)
    expected = EagerEngine(model, device=torch.device("cpu"), precision="fp32")(image, layers=layers, norm=norm)
    for i, tokens in zip(layers, expected, strict=True):
        names = output_names(model, i, norm=norm)
        assert torch.allclose(got[names[0]], tokens.cls, atol=1e-5)
        assert torch.allclose(got[names[-1]], tokens.patches, atol=1e-5)
        if tokens.registers.numel():
            assert torch.allclose(got[names[1]], tokens.registers, atol=1e-5)


def test_names_tell_block_and_norm() -> None:
    vit, convnext = create_model("debug_vit", device="meta"), create_model("debug_convnext", device="meta")
    assert Graph(vit).names == ["cls", "registers", "patches"]
    assert Graph(vit, layers=(0, -1)).names[:3] == ["layer_0_cls", "layer_0_registers", "layer_0_patches"]
    assert output_names(vit, 1, norm=False) == ["prenorm_cls", "prenorm_registers", "prenorm_patches"]
    assert Graph(convnext, layers=(0, 3), norms=(True, False)).names == [
        "layer_0_cls",
        "layer_0_patches",
        "cls",
        "patches",
        "prenorm_cls",
        "prenorm_patches",
    ]


@pytest.mark.parametrize("name", DEBUG)
def test_an_exported_graph_runs_at_sizes_never_traced(lively, name) -> None:
    graph = Graph(lively(name))
    module = export_graph(graph).module()
    stride = graph.model.stride
    for batch, rows, columns in ((1, 2, 2), (3, 4, 2), (1, 2, 7)):
        image = torch.randn(batch, 3, rows * stride, columns * stride)
        for got, expected in zip(module(image), graph(image), strict=True):
            assert got.shape == expected.shape
            assert torch.allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_exports_with_dynamic_shapes(name) -> None:
    graph = Graph(create_model(model_spec(name), device="meta"))
    image = next(node for node in export_graph(graph).graph.nodes if node.name == "image")
    shape = image.meta["val"].shape
    assert [isinstance(size, torch.SymInt) for size in shape] == [True, False, True, True]


def test_preprocessing_inside_takes_bytes_or_unit_floats(lively) -> None:
    model = lively("debug_vit")
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    raw = torch.randint(0, 256, (1, 3, 32, 48), dtype=torch.uint8)
    normalised = (raw / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    expected = Graph(model)(normalised)[0]
    assert torch.allclose(Graph(model, before=Normalise(mean=mean, std=std, uint8=True))(raw)[0], expected, atol=1e-5)
    unit = Graph(model, before=Normalise(mean=mean, std=std, uint8=False))(raw / 255)[0]
    assert torch.allclose(unit, expected, atol=1e-5)


def test_sizes_can_be_fixed_and_must_fit(lively) -> None:
    graph = Graph(lively("debug_vit"))
    image = next(n for n in export_graph(graph, batch=2, height=64, width=32).graph.nodes if n.name == "image")
    assert tuple(image.meta["val"].shape) == (2, 3, 64, 32)
    with pytest.raises(InputError, match="height 50: give a positive multiple of 16"):
        export_graph(graph, height=50)


def test_what_would_be_left_out_of_the_graph_is_refused(lively) -> None:
    model = lively("debug_vit")
    handle = model.blocks[0].register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="hooks"):
        Graph(model)
    handle.remove()
    model.blocks[0].mlp.fc3 = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match="changed"):
        Graph(model)
