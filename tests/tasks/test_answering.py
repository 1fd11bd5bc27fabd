from __future__ import annotations

import json

import numpy as np
import pytest

import densedino as dd
from densedino.images.decoding import read_image
from densedino.tasks.answering import (
    classes_csv,
    classifying,
    coco_json,
    detecting,
    estimating,
    heading_of,
    reading,
    segmenting,
)

PHOTO = read_image(np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8))


def test_each_task_keeps_what_it_says() -> None:
    lc, dpt, m2f, detr, txt = (
        dd.load(f"debug_vit-{kind}", weights="random") for kind in ("lc", "chm", "m2f", "detr", "txt")
    )
    assert heading_of(lc)[1].startswith("UNTRAINED")
    assert len(classifying(lc, top=3)(PHOTO).record["classes"]) == 3
    depth = estimating(dpt, flip=False)(PHOTO)
    assert depth.images["depth"].size == (96, 64) and depth.record["metres"][0] <= depth.record["metres"][1]
    small = type(m2f)(m2f.headed, resize=(64, 96), crop=96, stride=96)
    masks = segmenting(small, augment=False)(PHOTO)
    assert sum(masks.record["shares"].values()) == pytest.approx(1, abs=1e-4) and set(masks.images) == {
        "classes",
        "sheet",
    }
    boxes = detecting(detr, threshold=0.0)(PHOTO)
    assert len(boxes.record["objects"]) == 20 and boxes.record["height"] == 64
    words = reading(txt, ["roof", "tree"], prompts="plain", maps=False)(PHOTO)
    assert [one["name"] for one in words.record["classes"]] in (["roof", "tree"], ["tree", "roof"]) and not words.images


def test_tables() -> None:
    records = [{"image": "a,b.jpg", "classes": [{"name": "x", "probability": 0.5}, {"name": "y", "probability": 0.25}]}]
    assert classes_csv(records).splitlines() == [
        "image,rank,class,probability",
        '"a,b.jpg",1,x,0.5',
        '"a,b.jpg",2,y,0.25',
    ]
    found = {"category_id": 2, "name": "n", "bbox": [1.0, 2.0, 3.0, 4.0], "score": 0.5}
    coco = json.loads(coco_json([{"image": "a", "height": 5, "width": 6, "objects": [found]}], ["", "m", "n"]))
    assert coco["annotations"] == [
        {"id": 1, "image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4], "area": 12, "score": 0.5, "iscrowd": 0}
    ]
    assert coco["categories"] == [{"id": 1, "name": "m"}, {"id": 2, "name": "n"}]
