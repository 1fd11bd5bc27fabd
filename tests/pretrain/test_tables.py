from __future__ import annotations

import io
from pathlib import Path

import datasets
import lance
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import densedino as dd
from densedino.errors import ImageError, InputError, StoreError, UnknownNameError
from densedino.pretrain.tables import (
    HubRows,
    LanceRows,
    is_hub_dataset,
    is_lance,
    is_saved_dataset,
    open_hub,
    open_lance_pictures,
)

pytestmark = pytest.mark.filterwarnings("ignore::densedino.errors.UntrainedWarning")


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def rows(count: int = 3) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict(
        {"image": [{"bytes": png(i), "path": None} for i in range(count)], "label": list(range(count))}, features
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    both = datasets.DatasetDict({"train": rows(3), "test": rows(2)})
    both.save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_pictures_of_a_saved_data_set_are_given_encoded(saved: Path) -> None:
    assert is_saved_dataset(saved) and is_saved_dataset(saved / "test") and not is_saved_dataset(saved.parent)
    found = open_hub(str(saved))
    assert len(found) == 3 and found.name(1) == f"hf://{saved}:train#1"
    assert [found.get(i).getvalue() for i in range(3)] == [png(0), png(1), png(2)]
    assert found.get(2).name == found.name(2)
    assert len(open_hub(f"{saved}:test:image")) == 2
    assert len(open_hub(str(saved / "test"))) == 2


def test_what_a_data_set_does_not_have_is_said(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"'tset'; did you mean 'test'\?.*As in hf://NAME:train"):
        open_hub(f"{saved}:tset")
    with pytest.raises(UnknownNameError, match=r"column of .* 'imag'; did you mean 'image'"):
        open_hub(f"{saved}:test:imag")
    with pytest.raises(InputError, match=r"no Hugging Face data set 'no/such'.*hf://OWNER/NAME:SPLIT:COLUMN"):
        open_hub("no/such")
    rows(1).save_to_disk(tmp_path / "one")
    assert len(open_hub(f"{tmp_path / 'one'}")) == 1
    with pytest.raises(InputError, match="is one split, 'None', not 'test'"):
        open_hub(f"{tmp_path / 'one'}:test")


def test_a_data_set_that_was_loaded() -> None:
    loaded = rows().with_format("torch").map(lambda row: {"double": 2 * row["label"]})
    assert is_hub_dataset(loaded) and not is_hub_dataset([1])
    assert HubRows(loaded).get(1).getvalue() == png(1), "whatever its format"
    assert len(HubRows(datasets.DatasetDict(only=rows(2)))) == 2
    with pytest.raises(InputError, match="is streamed"):
        HubRows(loaded.to_iterable_dataset())
    two = rows().add_column("other", [{"bytes": png(9), "path": None}] * 3, feature=datasets.Image())
    with pytest.raises(InputError, match=r"columns \['image', 'other'\]. Name one"):
        HubRows(two)
    assert HubRows(two, column="other").get(0).getvalue() == png(9)


def test_columns_of_bytes_numbers_and_paths(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(4))
    encoded = datasets.Dataset.from_dict({"png": [png(1), None], "n": [1, 2]})
    assert HubRows(encoded).get(0).getvalue() == png(1)
    with pytest.raises(ImageError, match="'dataset#1' is empty"):
        HubRows(encoded).get(1)
    features = datasets.Features({"x": datasets.Array3D((2, 3, 4), "uint8")})
    array = np.arange(24).reshape(2, 3, 4)
    found = HubRows(datasets.Dataset.from_dict({"x": [array]}, features)).get(0)
    assert np.array_equal(np.asarray(found), array)
    paths = datasets.Dataset.from_dict({"caption": ["a"], "path": [str(tmp_path / "a.png")]})
    assert HubRows(paths).get(0) == str(tmp_path / "a.png")
    with pytest.raises(InputError, match="no column of pictures or paths among n, text"):
        HubRows(datasets.Dataset.from_dict({"n": [1], "text": ["a"]}))


def test_a_lance_column_of_pictures(tmp_path: Path) -> None:
    table = pa.table({"id": [1, 2], "jpg": pa.array([png(1), None], pa.large_binary())})
    lance.write_dataset(table, tmp_path / "l")
    assert is_lance(tmp_path / "l") and not is_lance(tmp_path)
    found = open_lance_pictures(tmp_path / "l")
    assert isinstance(found, LanceRows) and len(found) == 2 and found.name(1) == f"{tmp_path / 'l'}#1"
    assert found.get(0).getvalue() == png(1)
    assert "_opened" in found.__dict__ and found.__getstate__()["_opened"] is None
    with pytest.raises(ImageError, match="l#1' is empty"):
        found.get(1)
    with pytest.raises(UnknownNameError, match="'jpeg'; did you mean 'jpg'"):
        open_lance_pictures(tmp_path / "l", column="jpeg")
    with pytest.raises(StoreError, match="does not exist"):
        open_lance_pictures(tmp_path / "m")


def test_a_lance_column_of_blobs(tmp_path: Path) -> None:
    schema = pa.schema([pa.field("image", pa.large_binary(), metadata={"lance-encoding:blob": "true"})])
    lance.write_dataset(pa.table({"image": [png(1), png(2)]}, schema=schema), tmp_path / "l")
    found = open_lance_pictures(tmp_path / "l")
    assert [found.get(i).getvalue() for i in (1, 0)] == [png(2), png(1)]


def test_a_lance_column_of_paths(tmp_path: Path) -> None:
    lance.write_dataset(pa.table({"path": ["a.png", "/b.png", "a.png"]}), tmp_path / "l")
    assert open_lance_pictures(tmp_path / "l") == [tmp_path / "l" / "a.png", Path("/b.png")]
    lance.write_dataset(pa.table({"n": [1]}), tmp_path / "m")
    with pytest.raises(InputError, match="no column of pictures or paths among n"):
        open_lance_pictures(tmp_path / "m")


def test_a_feature_store_names_its_files(photos: Path, tmp_path: Path) -> None:
    dd.extract(dd.load("debug_vit", weights="random"), [photos], output=tmp_path / "store")
    assert open_lance_pictures(tmp_path / "store") == sorted(path.resolve() for path in photos.iterdir())
