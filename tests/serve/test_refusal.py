import json

from densedino.serve.refusal import busy, error_body


def test_an_error_of_any_text_is_ascii_json():
    body = error_body("image", 'broken "\ud800" ü \x00', "id")
    assert body.isascii() and json.loads(body)["error"]["kind"] == "image"


def test_busy_says_when_to_come_again_at_least_a_second():
    assert busy("Full.", after=0.0).headers == {"retry-after": "1"}
    assert busy("Full.", after=2.1).headers == {"retry-after": "3"}
    assert "3 s" in str(busy("Full.", after=2.1))
