import pytest

from densedino.errors import InputError
from densedino.serve.settings import Settings, read_token

SECRET = "0123456789abcdef"


def test_other_machines_need_a_token():
    with pytest.raises(InputError, match="DENSEDINO_TOKEN"):
        Settings(host="0.0.0.0")
    with pytest.raises(InputError, match="DENSEDINO_TOKEN"):
        Settings(host="example.org")  # wherever that leads
    assert not Settings(host="0.0.0.0", token=SECRET).loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1"])
def test_loopback_needs_none(host):
    assert Settings(host=host).loopback


@pytest.mark.parametrize(
    "wrong",
    [
        {"token": "short"},
        {"token": "with a space in it, long"},
        {"token": "ü" * 20},
        {"port": 70000},
        {"max_batch": 0},
        {"max_wait": float("nan")},
        {"origins": ("*",)},
        {"origins": ("https://a.org/path",)},
    ],
)
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(InputError):
        Settings(**wrong)


def test_a_token_comes_from_the_file_before_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DENSEDINO_TOKEN", "environment")
    assert read_token(None) == "environment"
    (tmp_path / "token").write_text(f"{SECRET}\n")
    assert read_token(tmp_path / "token") == SECRET
    (tmp_path / "token").write_text("\n")
    with pytest.raises(InputError, match="empty"):
        read_token(tmp_path / "token")
    with pytest.raises(InputError, match="token-file"):
        read_token(tmp_path / "nothing")
