import pytest
from pydantic import ValidationError

from densedino.serve.schema import ERRORS, SearchRequest


def test_a_search_is_strict():
    assert SearchRequest(vector=[1.0]).k == 20
    for wrong in ({"vector": []}, {"vector": [float("nan")]}, {"vector": [1], "kk": 3}, {"vector": [1], "k": 0}):
        with pytest.raises(ValidationError):
            SearchRequest.model_validate(wrong)


def test_no_error_of_the_server_is_promised():
    assert all(400 <= status < 500 for status in ERRORS)
