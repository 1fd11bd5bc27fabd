from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from densedino.errors import InputError
from densedino.models.catalog import create_model
from densedino.models.draws import Draws
from densedino.models.rope import RopeAugment
from densedino.models.vit import block_indices


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = create_model("debug_vit_swiglu")
    for block in model.blocks:
        torch.nn.init.constant_(block.ls1.gamma, 0.5)
        torch.nn.init.constant_(block.ls2.gamma, 0.5)
    return model


def test_forward_features_has_the_reference_keys(model: torch.nn.Module) -> None:
    x = torch.randn(2, 3, 32, 64)
    masks = torch.zeros(2, 8, dtype=torch.bool)
    masks[:, 3] = True
    out = model.forward_features(x, masks)
    assert set(out) == {"x_norm_clstoken", "x_storage_tokens", "x_norm_patchtokens", "x_prenorm", "masks"}
    assert out["x_norm_clstoken"].shape == (2, 32)
    assert out["x_storage_tokens"].shape == (2, 4, 32)
    assert out["x_norm_patchtokens"].shape == (2, 8, 32)
    assert out["x_prenorm"].shape == (2, 13, 32)
    assert out["masks"] is masks
    torch.testing.assert_close(model.norm(out["x_prenorm"])[:, 5:], out["x_norm_patchtokens"])
    assert not torch.equal(out["x_norm_patchtokens"], model.forward_features(x)["x_norm_patchtokens"])
    torch.testing.assert_close(model(x), model.forward_features(x)["x_norm_clstoken"])


def test_a_masked_patch_does_not_see_its_pixels(model: torch.nn.Module) -> None:
    x = torch.randn(1, 3, 32, 32)
    masks = torch.tensor([[True, False, False, False]])
    other = x.clone()
    other[:, :, :16, :16] = 5.0
    torch.testing.assert_close(model(x, masks), model(other, masks))


def test_a_list_gives_what_each_gives_alone(model: torch.nn.Module) -> None:
    big, small = torch.randn(2, 3, 64, 64), torch.randn(3, 3, 32, 32)
    together = model.forward_features([big, small], [None, None])
    for x, out in zip((big, small), together, strict=True):
        torch.testing.assert_close(out["x_prenorm"], model.forward_features(x)["x_prenorm"])
    with pytest.raises(InputError, match="list of 2 batches"):
        model.forward_features([big, small], [None])


def test_local_cls_norm_is_for_local_crops_in_training_only(model: torch.nn.Module) -> None:
    torch.nn.init.constant_(model.local_cls_norm.bias, 3.0)
    x = [torch.randn(1, 3, 32, 32), torch.randn(1, 3, 32, 32)]
    model.train()
    training = model.forward_features(x)
    model.eval()
    evaluation = model.forward_features(x)
    torch.testing.assert_close(training[0]["x_norm_clstoken"], evaluation[0]["x_norm_clstoken"])
    torch.testing.assert_close(training[1]["x_norm_clstoken"], evaluation[1]["x_norm_clstoken"] + 3.0)
    torch.testing.assert_close(training[1]["x_norm_patchtokens"], evaluation[1]["x_norm_patchtokens"])


def test_intermediate_layers_come_in_the_order_asked(model: torch.nn.Module) -> None:
    x = torch.randn(2, 3, 32, 48)
    first, last = model.get_intermediate_layers(x, n=2)
    for asked, expected in (([1, 0], (last, first)), ([-1, -2], (last, first)), ([0, 0], (first, first))):
        for got, want in zip(model.get_intermediate_layers(x, n=asked), expected, strict=True):
            torch.testing.assert_close(got, want)
    torch.testing.assert_close(last, model.forward_features(x)["x_norm_patchtokens"])


def test_intermediate_layers_in_every_form(model: torch.nn.Module) -> None:
    x = torch.randn(2, 3, 32, 48)
    full = model.forward_features(x)
    ((patches, cls, registers),) = model.get_intermediate_layers(
        x, reshape=True, return_class_token=True, return_extra_tokens=True
    )
    assert patches.shape == (2, 32, 2, 3)
    torch.testing.assert_close(patches.flatten(2).transpose(1, 2), full["x_norm_patchtokens"])
    torch.testing.assert_close(cls, full["x_norm_clstoken"])
    torch.testing.assert_close(registers, full["x_storage_tokens"])
    (raw,) = model.get_intermediate_layers(x, norm=False)
    torch.testing.assert_close(raw, full["x_prenorm"][:, 5:])
    (pair,) = model.get_intermediate_layers(x, return_extra_tokens=True)
    assert [t.shape for t in pair] == [(2, 6, 32), (2, 4, 32)]


def test_no_block_runs_after_the_last_one_asked(model: torch.nn.Module) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("block 1 was run")

    model.blocks[1].register_forward_pre_hook(fail)
    model.get_intermediate_layers(torch.randn(1, 3, 32, 32), n=[0])


@pytest.mark.parametrize("n", [0, 3, [], [2], [0, -3]])
def test_blocks_that_do_not_exist_are_named(n: int | list[int]) -> None:
    with pytest.raises(InputError, match=r"2|at least one"):
        block_indices(n, 2)


@pytest.mark.parametrize("shape", [(1, 3, 33, 32), (1, 3, 32, 40), (1, 4, 32, 32), (3, 32, 32), (1, 3, 0, 32)])
def test_wrong_input_is_refused(model: torch.nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"multiples of 16|takes"):
        model(torch.zeros(shape))


def test_attention_maps_explain_the_output(model: torch.nn.Module) -> None:
    x = torch.randn(1, 3, 32, 48)
    last, first = model.get_attention_maps(x, n=[-1, 0])
    assert last.shape == first.shape == (1, 2, 11, 11)
    torch.testing.assert_close(last.sum(-1), torch.ones(1, 2, 11))
    (cls,) = model.get_attention_maps(x, queries=slice(0, 1))
    torch.testing.assert_close(cls, last[:, :, :1])
    block = model.blocks[0]
    tokens = block.norm1(model._embed(x, None))
    rope = model.rope_embed(2, 3, x.device)
    values = block.attn.qkv(tokens)[..., 64:].unflatten(-1, (2, 16)).transpose(1, 2)
    torch.testing.assert_close(
        block.attn.proj((first @ values).transpose(1, 2).flatten(2)), block.attn(tokens, rope), rtol=1e-4, atol=1e-6
    )


def test_outputs_are_deterministic_and_independent_of_the_batch(model: torch.nn.Module) -> None:
    x = torch.randn(4, 3, 32, 32)
    for train in (False, True):
        model.train(train)
        torch.testing.assert_close(model(x), model(x), rtol=0, atol=0)
        torch.testing.assert_close(model(x)[2:3], model(x[2:3]))


@pytest.mark.parametrize("local", [False, True])
def test_training_features_are_the_forwards(local: bool) -> None:
    model = create_model("debug_vit_swiglu").train()
    x, masks = torch.randn(3, 3, 32, 48), torch.rand(3, 6) > 0.5
    torch.nn.init.normal_(model.local_cls_norm.weight)
    whole = model.forward_features([x, x], [masks, masks])[int(local)]
    cls, patches = model.training_features(x, masks=masks, local=local)
    torch.testing.assert_close(cls, whole["x_norm_clstoken"])
    torch.testing.assert_close(patches, whole["x_norm_patchtokens"])
    chosen = model.training_features(x, masks=masks, patches=masks.flatten().nonzero()[:, 0])[1]
    torch.testing.assert_close(chosen, whole["x_norm_patchtokens"][masks])


@pytest.mark.parametrize(("blocks", "distinct"), [(1, 1), (2, 2)])
def test_rope_is_warped_once_or_in_every_block(model: torch.nn.Module, blocks: int, distinct: int) -> None:
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[1][0]))
    rng = np.random.default_rng(0)
    warps = tuple(RopeAugment(rescale=2.0).draw(rng) for _ in range(blocks))
    model.training_features(torch.randn(1, 3, 32, 32), draws=Draws(warps=warps))
    assert len({tuple(cos.flatten().tolist()) for cos in seen}) == distinct


def test_rope_tables_are_made_once_per_grid_and_serve_training_later(model: torch.nn.Module) -> None:
    with torch.inference_mode():
        model(torch.randn(1, 3, 32, 32))
    first = model.rope_embed(2, 2, torch.device("cpu"))
    assert model.rope_embed(2, 2, torch.device("cpu"))[0] is first[0]
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    for size in range(1, 40):
        model.rope_embed(size, 1, torch.device("cpu"))
    assert len(model.rope_embed._cache) <= 8
    assert not copy.deepcopy(model).rope_embed._cache


def test_bfloat16_parameters_leave_rope_in_float32(model: torch.nn.Module) -> None:
    cos, sin = copy.deepcopy(model).bfloat16().rope_embed(2, 2, torch.device("cpu"))
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos, model.rope_embed(2, 2, torch.device("cpu"))[0], rtol=0, atol=0)


def test_key_bias_is_zero_whatever_the_file_says() -> None:
    model = create_model("debug_vit")
    x = torch.randn(1, 3, 32, 32)
    before = model(x)
    with torch.no_grad():
        model.blocks[0].attn.qkv.bias[32:64] = 100.0
    torch.testing.assert_close(model(x), before)
    model(x).sum().backward()
    assert model.blocks[0].attn.qkv.bias.grad[32:64].count_nonzero() == 0


@pytest.mark.parametrize("name", ["debug_vit", "debug_vit_swiglu", "debug_convnext"])
def test_every_kind_exports_with_dynamic_shapes(name: str) -> None:
    model = create_model(name)
    batch = torch.export.Dim("batch", min=1, max=16)
    height, width = (torch.export.Dim(n, min=2, max=16) * model.stride for n in ("h", "w"))
    program = torch.export.export(
        model, (torch.randn(2, 3, 64, 96),), dynamic_shapes={"x": {0: batch, 2: height, 3: width}}
    )
    x = torch.randn(3, 3, 160, 64)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_residuals_stay_in_float32_under_autocast(model: torch.nn.Module) -> None:
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model.forward_features(torch.randn(1, 3, 32, 32))
    assert seen == [torch.float32] * len(model.blocks)
    assert out["x_norm_patchtokens"].dtype == torch.float32
