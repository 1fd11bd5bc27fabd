from __future__ import annotations

from densedino.cli.export import split_source
from densedino.cli.main import main


def test_the_source_is_a_name_or_a_checkpoint() -> None:
    assert split_source("vits16", None) == ("vits16", None)
    assert split_source("vits16-lvd1689m", None) == ("vits16-lvd1689m", None)
    assert split_source("model.pth", None) == (None, "model.pth")
    assert split_source("vits16", "model.pth") == ("vits16", "model.pth")


def test_it_says_what_was_written_and_checked(tmp_path, capsys) -> None:
    path = tmp_path / "x.xml"
    assert main(["export", "debug_vit", "--weights", "random", "--to", "openvino", "-o", str(path)]) == 0
    out = capsys.readouterr().out
    assert f"wrote {path}" in out
    assert "UNTRAINED" in out
    assert "Apache-2.0" in out
    assert "cls, registers, patches" in out
    assert "1×3×32×64" in out
    assert path.exists()


def test_other_libraries_get_their_dialect(tmp_path, capsys) -> None:
    folder = tmp_path / "hf"
    assert main(["export", "debug_vit", "--weights", "random", "--to", "safetensors-hf", "-o", str(folder)]) == 0
    assert (folder / "config.json").exists()
    assert "bit for bit" in capsys.readouterr().out


def test_a_wrong_name_is_one_line(tmp_path, capsys) -> None:
    assert main(["export", "debug_vit", "--weights", "random", "--to", "onnx", "-o", str(tmp_path / "x.pb")]) == 2
    assert "written to a .onnx file" in capsys.readouterr().err
