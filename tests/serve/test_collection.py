import io

import pytest
import torch

import densedino as dd
from densedino.errors import ImageError, InputError, StoreError
from densedino.serve.collection import open_collection


@pytest.fixture(scope="module")
def store(tiny, folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("stored") / "features"
    dd.extract(tiny, [folder], output=path, layers=[0])
    return path


def test_nothing_files_and_stores_are_told_apart(folder, store, tmp_path):
    assert len(open_collection([])) == 0
    assert len(open_collection([str(folder)])) == 3 and open_collection([str(folder)]).store is None
    assert open_collection([str(store)]).searchable == 3
    with pytest.raises(InputError, match="alone"):
        open_collection([str(store), str(folder)])
    with pytest.raises(InputError, match="no file or folder"):
        open_collection([str(tmp_path / "nowhere")])


def test_files_are_read_by_number_up_to_a_limit(folder):
    collection = open_collection([str(folder)])
    assert collection.read(1, limit=10**6) == (folder / "1.png").read_bytes()
    assert 2 in collection and 3 not in collection and -1 not in collection
    with pytest.raises(ImageError, match="more than 100 bytes"):
        collection.read(0, limit=100)


@pytest.mark.parametrize("stored", [True, False])
def test_a_patch_finds_its_own_image_first_and_its_own_place(tiny, folder, store, stored):
    collection = open_collection([str(store if stored else folder)])
    for item in range(3):
        features = tiny(io.BytesIO(collection.read(item, limit=10**6)))
        collection.keep(item, features)
    hits = collection.search(features.patches[0][1, 2], k=2)
    assert [hits[0].item, hits[0].row, hits[0].column] == [2, 1, 2] and hits[0].score > 0.999
    assert hits[0].grid == features.grid and len(hits) == 2 and hits[0].score >= hits[1].score
    assert collection.search(features.cls[0], k=1, whole=True)[0].item == 2


def test_a_query_of_another_length_is_refused(folder, tiny):
    collection = open_collection([str(folder)])
    collection.keep(0, tiny(folder / "0.png"))
    with pytest.raises(InputError, match="have 32"):
        collection.search(torch.ones(5), k=1)


def test_features_of_other_weights_do_not_meet_those_of_a_store(store, tiny):
    collection = open_collection([str(store)])
    collection.check_model(tiny)
    with pytest.raises(StoreError, match="weights that made it"):
        collection.check_model(dd.load("debug_vit_swiglu", weights="random"))


def test_the_index_of_densedino_search_is_used_and_finds_the_same(tiny, folder, tmp_path):
    from densedino.features.search import indexed_search

    dd.extract(tiny, [folder], output=tmp_path / "store")
    exact = open_collection([str(tmp_path / "store")])
    assert exact._index is None
    indexed_search(exact.store)
    indexed = open_collection([str(tmp_path / "store")])
    assert indexed._index is not None
    query = exact.stored(1).patches[0][2, 3]
    found, truth = indexed.search(query, k=3), exact.search(query, k=3)
    assert (found[0].item, found[0].row, found[0].column) == (1, 2, 3) == (truth[0].item, truth[0].row, truth[0].column)
    assert found[0].score == pytest.approx(truth[0].score, abs=1e-3)
    assert indexed.search(exact.stored(2).cls[0], k=1, whole=True)[0].item == 2
