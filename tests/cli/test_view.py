"""`densedino view` as a user runs it: real photographs, a tiny model, one PNG."""

import numpy as np
import pytest
from PIL import Image
from skimage import data

from densedino.cli.main import main

TINY = ["--model", "debug_vit", "--weights", "random", "--panel", "96"]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, image in (("astronaut", data.astronaut()), ("chelsea", data.chelsea())):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    return tmp_path


def sheet(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")), dict(image.info)


def test_the_bare_command_writes_pca_beside_the_photo_and_says_untrained(photos, capsys):
    assert main(["view", "astronaut.png", *TINY]) == 0
    pixels, info = sheet(photos / "astronaut_pca.png")
    assert (pixels == (196, 30, 30)).all(-1).any(), "the red band that says UNTRAINED"
    assert (
        info["Untrained"] == "yes" and info["Weights"].startswith("debug_vit ") and "48x48 patches" in info["Comment"]
    )
    assert "UNTRAINED" in capsys.readouterr().out
    small = Image.open(photos / "astronaut.png").resize((96, 96), Image.Resampling.LANCZOS)
    assert _holds(pixels, np.asarray(small)), "the photograph itself is on the sheet"


def _holds(sheet_, part):
    windows = np.lib.stride_tricks.sliding_window_view(sheet_, (4, 4, 3))[:, :, 0]
    return (windows == part[40:44, 40:44]).all((-1, -2, -3)).any()


def test_every_kind_of_picture_for_several_images(photos):
    what = ["--what", "pca", "foreground", "similarity", "attention", "--point", "220,100", "--joint"]
    assert main(["view", "astronaut.png", "chelsea.png", "-o", "out/all.png", *what, *TINY]) == 0
    pixels, info = sheet(photos / "out" / "all.png")
    assert pixels.shape[1] > 5 * 96 and pixels.shape[0] > 96 + 64
    assert "astronaut.png" in info["Comment"] and "chelsea.png" in info["Comment"]


def test_a_point_alone_means_similarity_and_names_the_file_so(photos):
    assert main(["view", "chelsea.png", "--point", "130,80", *TINY]) == 0
    by_point, _ = sheet("chelsea_similarity.png")
    # 451x300 is seen at 944x624, so the patch is in column 130.5 * 944 / 451 / 16 = 17, row 80.5 * 624 / 300 / 16 = 10.
    assert main(["view", "chelsea.png", "--patch", "10,17", "-o", "by_patch.png", *TINY]) == 0
    by_patch, _ = sheet("by_patch.png")
    assert np.array_equal(by_point, by_patch)


@pytest.mark.parametrize(
    ("resize", "seen"),
    [("native", "451x300: 29x19 patches"), ("64", "96x64: 6x4 patches"), ("48x80", "80x48: 5x3 patches")],
)
def test_resize_is_what_the_model_sees(photos, resize, seen):
    assert main(["view", "chelsea.png", "--resize", resize, "--nearest", *TINY]) == 0
    assert f"seen at {seen}" in sheet("chelsea_pca.png")[1]["Comment"]


def test_layer_head_and_panels(photos):
    assert main(["view", "chelsea.png", "--what", "attention", "--layer", "0", "--head", "1", *TINY]) == 0
    assert "layer 0" in sheet("chelsea_attention.png")[1]["Comment"]


def test_a_convnext_has_pca_but_no_attention(photos, capsys):
    convnext = ["--model", "debug_convnext", "--weights", "random", "--panel", "96"]
    assert main(["view", "chelsea.png", *convnext]) == 0
    assert main(["view", "chelsea.png", "--what", "attention", *convnext]) == 2
    assert "has no attention" in capsys.readouterr().err


def test_palette_grey_alpha_and_16_bit_images_are_drawn(photos):
    Image.fromarray(data.chelsea()).convert("P").save("palette.png")
    Image.fromarray(data.camera()).save("grey.png")
    rgba = np.dstack([data.chelsea(), np.full(data.chelsea().shape[:2], 255, np.uint8)])
    rgba[:, :100, 3] = 0
    Image.fromarray(rgba).save("alpha.png")
    Image.fromarray(data.camera().astype(np.uint16) * 257).save("deep.png")
    assert main(["view", "palette.png", "grey.png", "alpha.png", "deep.png", "-o", "odd.png", *TINY]) == 0
    pixels, _ = sheet("odd.png")
    assert (pixels == 158).all(-1).any() and (pixels == 204).all(-1).any(), "transparent patches are hatched"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "0 images"),
        (["none.png"], "none.png"),
        (["astronaut.png", "--what", "similarity"], "--point x,y"),
        (["astronaut.png", "--point", "512,0"], "512 pixels wide and 512 high"),
        (["astronaut.png", "--point", "here"], "two whole numbers"),
        (["astronaut.png", "--point", "1,1", "--patch", "1,1"], "one of them"),
        (["astronaut.png", "--patch", "48,0"], "48×48"),
        (["astronaut.png", "--what", "pca", "--patch", "1,1"], "Add similarity"),
        (["astronaut.png", "--resize", "big"], "512x768"),
        (["astronaut.png", "--resize", "0"], "512x768"),
        (["astronaut.png", "--layer", "7"], "7"),
        (["astronaut.png", "--what", "attention", "--head", "2"], "0 to 1"),
        (["astronaut.png", "-o", "picture.jpg"], "PNG"),
        (["astronaut.png", "-o", "astronaut.png"], "overwritten"),
        (["astronaut.png", "--panel", "3"], "--panel"),
    ],
)
def test_what_cannot_be_drawn_is_one_line_with_the_fix_and_leaves_nothing(photos, capsys, args, said):
    before = sorted(photos.iterdir())
    assert main(["view", *args, *(TINY[:4] if "--panel" in args else TINY)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert sorted(photos.iterdir()) == before


def test_a_broken_image_is_named(photos, capsys):
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0not a picture")
    assert main(["view", "astronaut.png", "broken.jpg", *TINY]) == 2
    assert "broken.jpg" in capsys.readouterr().err


def test_out_may_be_a_folder(photos):
    (photos / "pictures").mkdir()
    assert main(["view", "chelsea.png", "-o", "pictures", *TINY]) == 0
    assert (photos / "pictures" / "chelsea_pca.png").is_file()
