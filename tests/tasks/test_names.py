from __future__ import annotations

from densedino.heads.catalog import HEADS
from densedino.tasks.names import names_of


def test_classes_have_the_names_of_their_datasets() -> None:
    imagenet = names_of(HEADS["vit7b16-imagenet1k-linear"])
    assert len(imagenet) == 1000 and imagenet[0] == "tench" and imagenet[999] == "toilet tissue"
    coco = names_of(HEADS["vit7b16-coco2017-detr"])
    assert len(coco) == 91 and coco[0] == "" and coco[1] == "person" and coco[12] == "" and coco[90] == "toothbrush"
    assert sum(map(bool, coco)) == 80
    ade = names_of(HEADS["vit7b16-ade20k-m2f"])
    assert len(ade) == len(set(ade)) == 150 and ade[0] == "wall" and ade[12] == "person" and ade[149] == "flag"


def test_unnamed_classes_are_numbered() -> None:
    assert names_of(HEADS["debug_vit-m2f"]) == tuple(f"class {i}" for i in range(5))
    assert names_of(HEADS["debug_vit-dpt"]) == ()
