"""Owns the names of classes that released heads tell apart."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from densedino.heads.configs import DetectorConfig, LinearConfig, SegmentorConfig

if TYPE_CHECKING:
    from densedino.heads.catalog import HeadSpec

__all__ = ["names_of"]

_ADE20K = """
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, table,
mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair, seat,
fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter,
sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow,
screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop,
stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower,
chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel, pole, land, bannister,
escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything,
swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name,
microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray,
ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag
"""


def names_of(spec: HeadSpec) -> tuple[str, ...]:
    """Names of a head's classes, in its order; numbers where nothing names them.

    ImageNet's and COCO's are torchvision's (BSD). COCO's are by category id: the background, and ids without a
    category, have "".
    """
    named = _named(spec.name.partition("-")[2])
    match spec.config:
        case LinearConfig(classes=count) | DetectorConfig(classes=count):
            pass
        case SegmentorConfig(mask2former=decoder):
            count = decoder.classes
        case _:
            count = 0
    return named if len(named) == count else tuple(f"class {i}" for i in range(count))


@functools.cache
def _named(kind: str) -> tuple[str, ...]:
    if kind.startswith("ade20k"):
        return tuple(" ".join(name.split()) for name in _ADE20K.strip().split(","))
    if kind.startswith("imagenet1k"):
        from torchvision.models import ResNet18_Weights

        return tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
    if kind.startswith("coco2017"):
        from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

        categories = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
        return tuple("" if name in ("__background__", "N/A") else name for name in categories)
    return ()
