from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import densedino as dd
from densedino.errors import InputError, StateDictError
from densedino.models.catalog import MODELS, create_model, model_spec
from densedino.weights.convert import convert, write_weights
from densedino.weights.loading import load_stored, load_weights
from densedino.weights.packing import pack_weights
from densedino.weights.shape import pack_spec, spec_of, unpack_spec

PRUNED = replace(model_spec("debug_vit"), name="debug_vit-pruned", pruned=((1, 32), (2, 64)))


def test_a_row_of_the_table_needs_no_entry_and_another_comes_back():
    assert all(pack_spec(spec) == {} for spec in MODELS.values())
    assert unpack_spec({}) is None
    assert unpack_spec(pack_spec(PRUNED)) == PRUNED
    assert spec_of("debug_vit", {}) == model_spec("debug_vit")
    assert spec_of("debug_vit", pack_spec(PRUNED)) == PRUNED


@pytest.mark.parametrize("entry", ["{", "[]", '{"name": "a"}', '{"nam": 1}'])
def test_a_damaged_entry_is_said_to_be(entry):
    with pytest.raises(StateDictError, match=r"densedino\.spec"):
        unpack_spec({"densedino.spec": entry})


@pytest.fixture
def pruned(tmp_path):
    _, card = load_weights("debug_vit", weights="random")
    torch.manual_seed(0)
    model = create_model(PRUNED)
    write_weights(model.state_dict(), tmp_path / "a.safetensors", card=replace(card, model=PRUNED.name), spec=PRUNED)
    return model, tmp_path / "a.safetensors"


def test_it_loads_strictly_with_its_own_shape(pruned):
    model, path = pruned
    dino = dd.load(weights=path)
    assert dino.model.spec == PRUNED
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in dino.model.state_dict().items())
    with pytest.raises(StateDictError, match=r"holds debug_vit-pruned\. Leave the name out"):
        dd.load("debug_vit", weights=path)


def test_tensors_that_are_not_of_the_shape_are_refused(pruned, tmp_path):
    model, path = pruned
    _, card = load_weights(weights=path)
    other = replace(PRUNED, pruned=((1, 32), (1, 64)))
    with pytest.raises(StateDictError, match="of another shape"):
        write_weights(model.state_dict(), tmp_path / "b.safetensors", card=card, spec=other)


def test_it_is_converted_to_our_dialect_alone(pruned, tmp_path):
    _, path = pruned
    for to, name in (("huggingface", "hf"), ("timm", "t.safetensors"), ("meta", "m.pth")):
        with pytest.raises(InputError, match="is pruned"):
            convert(path, tmp_path / name, to=to)
    done = convert(path, tmp_path / "c.safetensors", to="densedino")
    assert dd.load(weights=done.path).model.spec == PRUNED


def test_it_is_packed_with_its_shape(pruned, tmp_path):
    _, path = pruned
    packed = pack_weights(load_stored(weights=path), tmp_path / "p.safetensors", to="bf16")
    assert dd.load(weights=packed).model.spec == PRUNED
