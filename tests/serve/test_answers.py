import pytest
from hypothesis import given
from hypothesis import strategies as st

from densedino.errors import InputError
from densedino.serve.answers import layers_of, points_of


def test_layers_and_points_are_read():
    assert layers_of("") == () and layers_of("5,-1,5") == (5, -1)
    assert points_of(["240,130", "1.5,0"]) == [(240.0, 130.0), (1.5, 0.0)]


@given(st.text(max_size=12))
def test_any_other_text_is_refused_and_nothing_else_happens(text):
    try:
        ((x, y),) = points_of([text])
    except InputError:
        return
    assert 0 <= x < 1e6 and 0 <= y < 1e6


@pytest.mark.parametrize("text", ["1", "1,2,3", "nan,1", "inf,1", "-1,1", "1e9,1", "a,b", ""])
def test_what_is_no_point_is_named(text):
    with pytest.raises(InputError, match="write x,y"):
        points_of([text])
