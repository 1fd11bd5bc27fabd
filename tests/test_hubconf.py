from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from densedino.errors import DenseDinoError
from densedino.models.catalog import create_model

ROOT = Path(__file__).parents[1]
NAMES = [
    *(f"dinov3_{n}" for n in ("vits16", "vits16plus", "vitb16", "vitl16", "vitl16plus", "vith16plus", "vit7b16")),
    *(f"dinov3_convnext_{n}" for n in ("tiny", "small", "base", "large")),
]


def hub(name: str, **kwargs: object) -> torch.nn.Module:
    return torch.hub.load(str(ROOT), name, source="local", **kwargs)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """A file as Meta releases it: the state dict itself, under whatever name the user gave it."""
    model = create_model("vits16")
    path = tmp_path_factory.mktemp("hub") / "my weights (1).pth"
    torch.save(model.state_dict(), path)
    return path, model


def test_the_reference_names_and_keywords_are_there() -> None:
    sys.path.insert(0, str(ROOT))
    import hubconf

    for name in NAMES:
        parameters = inspect.signature(getattr(hubconf, name)).parameters
        assert {"pretrained", "weights", "check_hash"} <= set(parameters)
        assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())


def test_released_heads_have_the_references_names_and_keywords() -> None:
    import hubconf

    for name in ("lc", "dd", "ms", "de"):
        parameters = inspect.signature(getattr(hubconf, f"dinov3_vit7b16_{name}")).parameters
        assert list(parameters) == ["pretrained", "weights", "backbone_weights", "check_hash", "autocast_dtype"]
    assert inspect.signature(hubconf.dinov3_vitl16_chmv2).parameters == parameters
    text = inspect.signature(hubconf.dinov3_vitl16_dinotxt_tet1280d20h24l).parameters
    assert list(text) == ["pretrained", "weights", "backbone_weights", "bpe_path_or_url", "check_hash"]
    with pytest.raises(DenseDinoError, match=r"chmv2_dpt_head-3703d643\.pth"):
        hub("dinov3_vitl16_chmv2")  # the release is not on this machine


def test_a_local_file_under_any_name_loads(checkpoint: tuple[Path, torch.nn.Module]) -> None:
    path, model = checkpoint
    loaded = hub("dinov3_vits16", weights=str(path))
    assert not loaded.training
    x = torch.randn(1, 3, 32, 48)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    assert set(loaded.forward_features(x)) == {
        "x_norm_clstoken", "x_storage_tokens", "x_norm_patchtokens", "x_prenorm", "masks",
    }  # fmt: skip


def test_wrong_weights_are_refused(checkpoint: tuple[Path, torch.nn.Module]) -> None:
    path, _ = checkpoint
    with pytest.raises(DenseDinoError, match="vits16"):
        hub("dinov3_vitb16", weights=str(path))
    with pytest.raises(DenseDinoError, match="no released file"):
        hub("dinov3_vits16", weights=str(path), check_hash=True)
    with pytest.raises(DenseDinoError, match=r"vits16|weights"):
        hub("dinov3_vits16")  # the release is not on this machine


def test_without_weights_in_any_number_of_channels() -> None:
    assert hub("dinov3_convnext_tiny", pretrained=False, in_chans=5)(torch.zeros(1, 5, 32, 32)).shape == (1, 768)


def test_a_clone_works_without_installation(checkpoint: tuple[Path, torch.nn.Module]) -> None:
    """A .pth needs PyTorch and what PyTorch needs: all else that the package depends on is hidden."""
    hidden = (
        "lance",
        "pyarrow",
        "PIL",
        "torchvision",
        "tyro",
        "rich",
        "safetensors",
        "transformers",
        "timm",
    )
    code = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
import torch
model = torch.hub.load({str(ROOT)!r}, "dinov3_vits16", source="local", weights={str(checkpoint[0])!r})
assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 384)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
