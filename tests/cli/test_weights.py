from __future__ import annotations

import hashlib

import pytest
import torch

from densedino.cli.main import main
from densedino.weights.catalog import WEIGHTS
from densedino.weights.loading import load_weights


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DENSEDINO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


def test_the_table_has_every_row_whole(capsys):
    assert main(["weights"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert all(name in rows and record.data in rows[name] and "no" in rows[name] for name, record in WEIGHTS.items())
    assert "…" not in out.replace("facebook/…", "").replace("timm/…", "")
    assert main(["weights", "*sat493m"]) == 0
    assert "lvd1689m" not in capsys.readouterr().out


def test_what_is_here_is_said(cache, capsys, monkeypatch):
    content = b"weights"
    digest = hashlib.sha256(content).hexdigest()
    record = WEIGHTS["vits16-lvd1689m"]
    monkeypatch.setitem(WEIGHTS, record.name, record.__class__(**{**record.__dict__, "sha256": digest[:8]}))
    (cache / "weights" / digest).mkdir(parents=True)
    (cache / "weights" / digest / "x.pth").write_bytes(content)
    main(["weights", "vits16-*"])
    assert "yes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("to", "name", "words"),
    [
        ("huggingface", "folder", "AutoModel.from_pretrained("),
        ("meta", "x.pth", "torch.load("),
        ("timm", "x.safetensors", "timm.create_model('vit_tiny_patch16_dinov3_qkvb', checkpoint_path="),
        ("densedino", "x.safetensors", "densedino.load(weights="),
    ],
)
def test_convert_writes_and_says_how_to_open_it(tmp_path, capsys, to, name, words):
    assert main(["weights", "convert", "random", "-o", str(tmp_path / name), "--to", to]) == 0
    out = capsys.readouterr().out
    assert words in out and "UNTRAINED" in out and "Apache-2.0" in out and "SHA-256" in out
    assert load_weights(weights=tmp_path / name)[1].untrained


def test_convert_lists_what_was_left_out(tmp_path, capsys):
    model, _ = load_weights("debug_vit", weights="random")
    state = {f"teacher.backbone.{key}": value for key, value in model.state_dict().items()}
    torch.save({**state, "teacher.dino_head.weight": torch.ones(1)}, tmp_path / "training.pth")
    args = [str(tmp_path / "training.pth"), "-o", str(tmp_path / "x.safetensors"), "--to", "timm"]
    assert main(["weights", "convert", *args]) == 0
    out = capsys.readouterr().out
    assert "not written teacher.dino_head*: not part of the backbone" in out and "timm has no debug_vit" in out


def test_show_says_what_a_file_is(tmp_path, capsys):
    model, _ = load_weights("debug_vit", weights="random")
    torch.save(model.state_dict(), tmp_path / "x.pth")
    assert main(["weights", "show", str(tmp_path / "x.pth")]) == 0
    out = capsys.readouterr().out
    assert "debug_vit, meta dialect" in out and "blocks.*.attn.qkv.bias_mask: its values are known" in out
    assert "note        nothing says what these weights were trained on" in out


def test_errors_are_one_line(tmp_path, capsys):
    assert main(["weights", "convert", str(tmp_path / "no.pth"), "-o", str(tmp_path / "x"), "--to", "huggingface"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("densedino: error: no file or folder") and err.count("\n") == 1
