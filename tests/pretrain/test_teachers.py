from __future__ import annotations

import pytest
import torch
from torch import nn

from densedino.errors import InputError
from densedino.models.catalog import create_model
from densedino.pretrain.teachers import BackboneTeacher, ModuleTeacher, OnnxTeacher, as_tokens, open_teacher
from densedino.weights.convert import write_weights
from densedino.weights.loading import load_weights


def test_reads_maps_and_cls_in_any_nesting():
    fine, coarse, cls = torch.zeros(2, 8, 4, 4), torch.zeros(2, 16, 2, 2), torch.zeros(2, 5)
    for output in ((fine, coarse, cls), {"a": [fine], "b": (cls, coarse), "n": 3}):
        tokens = as_tokens(output)
        assert [m.shape[1] for m in tokens.maps] == [8, 16]
        assert tokens.summary() is cls
    assert as_tokens(fine).summary().shape == (2, 8)


def test_refuses_what_has_no_map():
    with pytest.raises(InputError, match=r"student returned \(2, 9, 8\).*unflatten"):
        as_tokens(torch.zeros(2, 9, 8), what="the student")


def test_a_backbone_teaches_by_its_final_tokens_or_a_blocks():
    model = create_model("debug_vit")
    model.init_weights()
    statistics = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    pixels = torch.rand(2, 3, 32, 48)
    normal = (pixels - torch.tensor(statistics[0]).view(3, 1, 1)) / torch.tensor(statistics[1]).view(3, 1, 1)
    final = BackboneTeacher(model, name="d", statistics=statistics)(pixels)
    expected = model.get_intermediate_layers(normal, n=1, reshape=True, return_class_token=True)[0]
    torch.testing.assert_close(final.maps[0], expected[0])
    torch.testing.assert_close(final.cls, expected[1])
    first = BackboneTeacher(model, name="d", layer=0, statistics=statistics)(pixels)
    torch.testing.assert_close(first.maps[0], model.get_intermediate_layers(normal, n=[0], reshape=True, norm=False)[0])
    assert not first.maps[0].requires_grad


def test_fingerprints_tell_weights_blocks_and_statistics_apart():
    one, other = create_model("debug_vit"), create_model("debug_vit")
    prints = [
        BackboneTeacher(one, name="d").fingerprint,
        BackboneTeacher(other, name="d").fingerprint,
        BackboneTeacher(one, name="d", layer=0).fingerprint,
        BackboneTeacher(one, name="d", statistics=((0.0,) * 3, (1.0,) * 3)).fingerprint,
    ]
    assert len(set(prints)) == 4
    assert BackboneTeacher(one, name="d").fingerprint == prints[0]


def test_any_function_teaches():
    teacher = ModuleTeacher(
        lambda x: x[:, :, ::8, ::8] * 2, name="twice", stride=8, statistics=((0.5,) * 3, (1.0,) * 3)
    )
    pixels = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(teacher(pixels).maps[0], (pixels[:, :, ::8, ::8] - 0.5) * 2)


def test_opens_weights_with_their_own_statistics(tmp_path):
    model, card = load_weights("debug_vit", weights="random")
    write_weights(model.state_dict(), tmp_path / "w.safetensors", card=card)
    pixels = torch.rand(1, 3, 32, 32)
    opened = open_teacher(str(tmp_path / "w.safetensors"))
    torch.testing.assert_close(
        opened(pixels).maps[0], BackboneTeacher(model, name="x", statistics=(card.mean, card.std))(pixels).maps[0]
    )
    with pytest.raises(InputError, match="of ONNX files"):
        open_teacher(str(tmp_path / "w.safetensors"), stride=14)


def test_an_onnx_graph_teaches_by_any_of_its_tensors(tmp_path):
    import onnx

    torch.manual_seed(0)
    net = nn.Conv2d(3, 6, 8, stride=8)
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Conv", ["x", "w", "b"], ["inner"], strides=[8, 8]),
            onnx.helper.make_node("Relu", ["inner"], ["out"]),
        ],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["B", 3, "H", "W"])],
        [onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, None)],
        [
            onnx.numpy_helper.from_array(net.weight.detach().numpy(), "w"),
            onnx.numpy_helper.from_array(net.bias.detach().numpy(), "b"),
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(tmp_path / "t.onnx"))
    none = ((0.0,) * 3, (1.0,) * 3)
    pixels = torch.rand(2, 3, 16, 24)
    inner = OnnxTeacher(tmp_path / "t.onnx", tensor="inner", stride=8, statistics=none)(pixels)
    torch.testing.assert_close(inner.maps[0], net(pixels), rtol=1e-4, atol=1e-5)
    assert (OnnxTeacher(tmp_path / "t.onnx", stride=8, statistics=none)(pixels).maps[0] >= 0).all()
    with pytest.raises(InputError, match="no tensor 'inn'; it has, for instance, inner"):
        OnnxTeacher(tmp_path / "t.onnx", tensor="inn", stride=8)
