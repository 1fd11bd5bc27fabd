"""The numbers of the paper's recipes, as a table of what is in effect at chosen steps."""

from __future__ import annotations

import pytest

from densedino.pretrain.settings import GramConfig
from densedino.pretrain.step import step_values
from densedino.recipes import recipe
from densedino.recipes.reference import vit7b16_gram, vit7b16_highres, vit7b16_pretrain, vitl16_in1k

M, K = 1_000_000, 1_000
#        stage, step in it, lr in effect, weight decay, momentum, teacher temperature, local weight, Gram weight
IN_EFFECT = [
    (vit7b16_highres, 0, 0, 0.0, 0.04, 0.994, 0.04, 1.0, 0.0),
    (vit7b16_highres, 0, 50 * K, 2.0e-4, 0.04, 0.994, 0.055, 1.0, 0.0),
    (vit7b16_highres, 0, 100 * K, 4.0e-4, 0.04, 0.994, 0.07, 1.0, 0.0),
    (vit7b16_highres, 0, M - 1, 4.0e-4, 0.04, 0.994, 0.07, 1.0, 0.0),
    (vit7b16_highres, 1, 0, 2.4e-4, 0.04, 0.999, 0.07, 1.0, 0.0),
    (vit7b16_highres, 1, 1000, 2.4e-4, 0.04, 0.999, 0.07, 0.5, 2.0),
    (vit7b16_highres, 1, 199_999, 2.4e-4, 0.04, 0.999, 0.07, 0.5, 2.0),
    (vit7b16_highres, 2, 0, 0.0, 0.04, 0.999, 0.07, 0.5, 1.5),
    (vit7b16_highres, 2, 10 * K, 7.07e-5, 0.04, 0.999, 0.07, 0.5, 1.5),
    (vitl16_in1k, 0, 12_499, 5.66e-3, 0.0482, 0.9922, 0.05, 1.0, 0.0),
    (vitl16_in1k, 0, 124_999, 5.66e-6, 0.4, 1.0, 0.07, 1.0, 0.0),
]


@pytest.mark.parametrize(
    ("make", "stage", "step", "lr", "decay", "momentum", "temperature", "local", "gram"), IN_EFFECT
)
def test_values_in_effect(make, stage, step, lr, decay, momentum, temperature, local, gram) -> None:
    values = step_values(make().stages[stage], step)
    assert values.lr == pytest.approx(lr, rel=2e-3)
    assert values.weight_decay == pytest.approx(decay, rel=3e-2)
    assert values.momentum == pytest.approx(momentum, abs=3e-4)
    assert values.teacher_temperature == pytest.approx(temperature, abs=1e-4)
    assert values.local_weight == pytest.approx(local)
    assert values.gram_weight == pytest.approx(gram)


def test_prototypes_are_frozen_for_the_first_epochs() -> None:
    for make, steps in ((vit7b16_pretrain, 5000), (vitl16_in1k, 1250)):
        stage = make().stages[0]
        assert step_values(stage, steps - 1).last_layer_lr == 0
        assert step_values(stage, steps).last_layer_lr == step_values(stage, steps).lr > 0
    assert all(stage.optimizer.last_layer_freeze_steps == 0 for stage in vit7b16_highres().stages[1:])


@pytest.mark.parametrize(
    ("name", "steps", "batch", "betas", "clip", "decay", "drop", "heads", "hflip"),
    [
        ("vit7b16_pretrain", M, 4096, (0.9, 0.99), 30, 0.98, 0.4, (8192, 512, 262_144, 4096, 384, 98_304), 0),
        ("vit7b16_gram", 200 * K, 4096, (0.9, 0.99), 30, 0.98, 0.4, (8192, 512, 262_144, 4096, 384, 98_304), 0),
        ("vit7b16_highres", 30 * K, 2048, (0.9, 0.99), 30, 0.98, 0.4, (8192, 512, 262_144, 4096, 384, 98_304), 0),
        ("vitl16_in1k", 125 * K, 2048, (0.9, 0.999), 3, 0.9, 0.3, (2048, 256, 65_536, 2048, 256, 65_536), 0.5),
    ],
)
def test_constants(name, steps, batch, betas, clip, decay, drop, heads, hflip) -> None:
    config = recipe(name)
    stage, optimizer = config.stages[-1], config.stages[-1].optimizer
    assert (stage.steps, stage.batch_size) == (steps, batch)
    assert (optimizer.betas, optimizer.clip, optimizer.layer_decay) == (betas, clip, decay)
    assert (optimizer.lr_scaling, optimizer.patch_embed_lr) == ("sqrt_wrt_1024", 0.2)
    assert stage.drop_path == drop
    dino, ibot = config.dino_head, config.ibot_head
    both = (dino.hidden_dim, dino.bottleneck_dim, dino.num_prototypes)
    assert (*both, ibot.hidden_dim, ibot.bottleneck_dim, ibot.num_prototypes) == heads
    assert stage.losses.koleo_weight == 0.1
    assert (stage.masks.probability, stage.masks.ratio) == (0.5, (0.1, 0.5))
    for resolution in stage.resolutions:
        crops = resolution.crops
        assert (crops.num_global, crops.num_local, crops.hflip) == (2, 8, hflip)
        assert (crops.global_scale, crops.local_scale) == ((0.32, 1.0), (0.05, 0.32))
        assert crops.blur_probabilities == (0.0, 0.9, 0.5), "as the released weights were trained"


def test_sizes_of_crops() -> None:
    sizes = {
        stage.name: [(r.crops.global_size, r.crops.local_size, r.crops.gram_size, r.share) for r in stage.resolutions]
        for stage in vit7b16_highres().stages
    }
    assert sizes["pretrain"] == [(256, 112, None, 1)]
    assert sizes["gram"] == [(256, 112, 512, 1)]
    assert sizes["highres"] == [
        (512, 112, 768, 0.3),
        (768, 112, 1152, 0.3),
        (768, 160, 1152, 0.3),  # 168 in the public configuration, of which its patch embedding sees 160
        (768, 224, 1152, 0.05),
        (768, 336, 1152, 0.05),
    ]
    assert [(r.crops.global_size, r.crops.local_size) for r in vitl16_in1k().stages[0].resolutions] == [(224, 96)]


def test_gram_and_koleo() -> None:
    pretrain, gram, highres = vit7b16_highres().stages
    assert pretrain.losses.gram is None
    anchor = gram.losses.gram
    assert anchor is not None
    assert (anchor.first_update, anchor.update_every, anchor.max_updates) == (10_000, 10_000, 3)
    assert (anchor.source, anchor.checkpoint, anchor.img_level, anchor.normalized) == ("checkpoint", None, True, True)
    assert highres.losses.gram == GramConfig(weight=highres.losses.gram.weight)
    assert highres.losses.gram.first_update is None
    assert not (pretrain.losses.koleo_distributed or gram.losses.koleo_distributed)
    assert not vitl16_in1k().stages[0].losses.koleo_distributed
    losses = highres.losses
    assert (losses.koleo_distributed, losses.koleo_group_size, losses.koleo_topk) == (True, 16, 1)


def test_models() -> None:
    spec = vit7b16_gram().spec
    assert (spec.norm_eps, spec.num_register_tokens, spec.local_cls_norm) == (1e-5, 4, True)
    spec = vitl16_in1k().spec
    assert (spec.norm_eps, spec.num_register_tokens, spec.local_cls_norm) == (1e-6, 0, False)
    assert vitl16_in1k().stages[0].rope is None
    for stage in vit7b16_highres().stages:
        assert (stage.rope.rescale, stage.rope.shift, stage.rope.jitter, stage.rope.per_block) == (2, None, None, True)
