from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from densedino.errors import InputError
from densedino.pretrain.optim import (
    adamw,
    clip_gradients,
    parameter_groups,
    set_hyperparameters,
    update_ema,
)
from densedino.pretrain.projection import ProjectionHead

VIT = {
    "cls_token": (1, 1, 4), "storage_tokens": (1, 4, 4), "mask_token": (1, 4), "patch_embed.proj.weight": (4, 3, 2, 2),
    "patch_embed.proj.bias": (4,), "blocks.0.norm1.weight": (4,), "blocks.0.attn.qkv.weight": (12, 4),
    "blocks.0.attn.qkv.bias": (12,), "blocks.0.ls1.gamma": (4,), "blocks.1.mlp.fc1.weight": (8, 4),
    "norm.weight": (4,), "local_cls_norm.bias": (4,),
}  # fmt: skip
CONVNEXT = {
    "downsample_layers.0.0.weight": (4, 3, 4, 4), "downsample_layers.0.1.weight": (4,),
    "stages.0.0.dwconv.weight": (4, 1),
    "stages.0.1.gamma": (4,), "downsample_layers.1.0.weight": (4,), "downsample_layers.1.1.weight": (4, 4),
    "stages.1.0.norm.bias": (4,), "stages.1.10.pwconv1.weight": (4, 4), "norm.weight": (4,),
}  # fmt: skip


class Named(nn.Module):
    """A module with given parameter names and shapes."""

    def __init__(self, shapes):
        super().__init__()
        for name, shape in shapes.items():
            *path, leaf = name.split(".")
            owner = self
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            owner.register_parameter(leaf, nn.Parameter(torch.zeros(shape)))


def by_name(module, groups):
    names = {id(p): name for name, p in module.named_parameters()}
    return {
        names[id(p)]: (g["lr_multiplier"], g["wd_multiplier"]) for g in groups for p in g["params"] if id(p) in names
    }


def test_multipliers_of_a_vit():
    module, head = Named(VIT), ProjectionHead(4, hidden_dim=4, bottleneck_dim=4, num_prototypes=5)
    groups = parameter_groups(module, heads=[head], layer_decay=0.5)
    got = by_name(module, groups)
    assert got["cls_token"] == (0.125, 1)  # the released code decays tokens
    assert got["patch_embed.proj.weight"] == (pytest.approx(0.125 * 0.2), 1)
    assert got["patch_embed.proj.bias"] == (pytest.approx(0.125 * 0.2), 0)
    assert got["blocks.0.attn.qkv.weight"] == (0.25, 1)
    assert got["blocks.0.norm1.weight"] == got["blocks.0.ls1.gamma"] == (0.25, 0)
    assert got["blocks.1.mlp.fc1.weight"] == (0.5, 1)
    assert got["norm.weight"] == got["local_cls_norm.bias"] == (1, 0)
    assert by_name(head, groups)["last_layer.weight"] == (1, 1)
    assert [len(g["params"]) for g in groups if g["is_last_layer"]] == [1]
    assert sum(len(g["params"]) for g in groups) == len(VIT) + 7


def test_fidelity_says_what_is_exempt_from_weight_decay():
    vit, convnext = Named(VIT), Named(CONVNEXT)
    paper = by_name(vit, parameter_groups(vit, fidelity="paper"))
    assert {name for name, (_, wd) in paper.items() if wd} == {
        "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.weight",
    }  # fmt: skip
    released = by_name(convnext, parameter_groups(convnext))
    assert released["downsample_layers.1.0.weight"][1] == 1
    assert by_name(convnext, parameter_groups(convnext, fidelity="paper"))["downsample_layers.1.0.weight"][1] == 0


def test_frozen_parameters_are_in_no_group():
    module = Named(VIT).requires_grad_(False)
    assert parameter_groups(module) == []


def test_adamw_step_is_the_formula():
    module, head = Named(VIT), ProjectionHead(4, hidden_dim=4, bottleneck_dim=4, num_prototypes=5)
    for p in module.parameters():
        nn.init.normal_(p)
    optimizer = adamw(parameter_groups(module, heads=[head], layer_decay=0.5), betas=(0.9, 0.99))
    weight = module.blocks.get_submodule("0").attn.qkv.weight
    last = head.last_layer.weight
    w, m, v = weight.detach().double(), 0.0, 0.0
    frozen = last.detach().clone()
    for t in range(1, 6):
        for p in [*module.parameters(), *head.parameters()]:
            p.grad = torch.randn_like(p)
        set_hyperparameters(optimizer, lr=0.01 * t, weight_decay=0.1, last_layer_lr=0.0)
        optimizer.step()
        g, lr = weight.grad.double(), 0.25 * 0.01 * t
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        w = w * (1 - lr * 0.1) - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
    torch.testing.assert_close(weight.double(), w, rtol=1e-6, atol=1e-6)
    assert torch.equal(last, frozen)


def test_ema_is_the_formula_and_copies_at_zero():
    student = ProjectionHead(4, hidden_dim=6, bottleneck_dim=4, num_prototypes=9)
    teacher = copy.deepcopy(student).requires_grad_(False)
    student.init_weights()
    before = [p.clone() for p in teacher.parameters()]
    update_ema(teacher, student, momentum=0.992)
    for t, b, s in zip(teacher.parameters(), before, student.parameters(), strict=True):
        torch.testing.assert_close(t.double(), 0.992 * b.double() + 0.008 * s.double(), rtol=1e-6, atol=1e-9)
    update_ema(teacher, student, momentum=1.0)
    next(teacher.parameters()).fill_(torch.nan)
    update_ema(teacher, student, momentum=0.0)
    assert all(torch.equal(t, s) for t, s in zip(teacher.parameters(), student.parameters(), strict=True))
    with pytest.raises(InputError, match="same specification"):
        update_ema(teacher, nn.Linear(3, 3), momentum=0.9)


def test_modules_are_clipped_each_by_itself():
    modules = {"backbone": nn.Linear(3, 4), "dino_head": nn.Linear(2, 2)}
    for module, size in zip(modules.values(), (10.0, 0.01), strict=True):
        for p in module.parameters():
            p.grad = torch.full_like(p, size)
    norms = clip_gradients(modules, max_norm=3.0)
    assert norms["backbone"].item() == pytest.approx(10 * 16**0.5)
    assert norms["dino_head"].item() == pytest.approx(0.01 * 6**0.5)
    after = torch.cat([p.grad.flatten() for p in modules["backbone"].parameters()]).norm()
    assert after.item() == pytest.approx(3.0, rel=1e-5)
    assert (modules["dino_head"].weight.grad == 0.01).all()
