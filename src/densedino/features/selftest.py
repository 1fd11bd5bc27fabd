"""Owns the self-test: does this machine compute what it should? Golden numbers for made and for released weights.

The made weights are integer arithmetic scaled by powers of two: bit for bit the same wherever this runs. Their golden
tokens were computed by `transformers`, not by this package (`dev/make_golden.py`).
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import tempfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from densedino.engines.eager import EagerEngine, choose_device
from densedino.errors import DenseDinoError
from densedino.features.extractor import FeatureExtractor, load
from densedino.images.transforms import Transform
from densedino.models.catalog import create_model
from densedino.weights.card import WeightsCard
from densedino.weights.catalog import IMAGENET_STATS
from densedino.weights.files import tensors_sha256
from densedino.weights.loading import load_weights

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from numpy.typing import NDArray

    from densedino.features.tokens import Features
    from densedino.models.convnext import ConvNeXt
    from densedino.models.vit import VisionTransformer

__all__ = [
    "GOLDEN_MODELS",
    "RELEASED",
    "Check",
    "check_parity",
    "check_random_weights",
    "check_released",
    "check_store",
    "run_checks",
]

GOLDEN_MODELS = ("debug_vit", "debug_vit_swiglu", "debug_convnext", "vitt16")
TOLERANCE = 1e-4
"""Largest difference of one value of a token (their deviation is about 1) in float32 on a CPU; it is 1e-6 usually."""
_COSINE = 0.999
"""Least cosine between tokens elsewhere: GPUs round products of convolutions and in bfloat16."""

RELEASED: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "vits16": (
        (0.463562, -0.415609, 0.408237, -0.126613, -0.286637),
        (-0.038754, -0.250895, -0.016393, -0.455474, 0.571582),
    ),
    "vits16plus": (
        (-0.471349, -1.365779, -0.317983, 0.377219, -0.769085),
        (0.144552, -0.388117, -0.393434, -0.157695, -0.600380),
    ),
    "vitb16": (
        (1.034643, -0.180609, -0.341018, -0.066377, -0.011384),
        (-0.082524, -0.456273, -0.728030, -0.430680, -0.152880),
    ),
    "vitl16": (
        (0.484527, -0.582215, 0.480636, 0.592040, 0.945166),
        (-0.211367, -0.490864, -0.257131, 0.101764, 0.154511),
    ),
    "vith16plus": (
        (-0.064576, -0.148867, -0.621524, 0.634879, 0.152696),
        (0.093817, 0.287407, -0.050037, 0.428043, 0.094562),
    ),
    "vit7b16": (
        (0.275440, -0.261354, 0.067772, 0.049936, -0.158747),
        (0.044442, -0.052542, 0.070777, -0.065112, -0.026547),
    ),
}
"""First five values of CLS and of the first patch, LVD-1689M, for COCO's val2017/000000039769.jpg squashed to 224×224
as floats. From the tests of an early conversion script of `transformers`."""
_COCO_SIZE = (480, 640)


@dataclass(frozen=True, kw_only=True)
class Check:
    """What one check found."""

    name: str
    status: Literal["ok", "warning", "failed", "skipped"]
    found: str
    fix: str = ""
    """What to do about a warning or a failure."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return asdict(self)


def run_checks() -> list[Check]:
    """Run every check that needs nothing from the user, on the CPU and on the device that `load` would choose."""
    device = choose_device()
    devices = ["cpu"] if device.type == "cpu" else ["cpu", str(device)]
    parity = [check for name in devices for check in check_parity(device=name)]
    random = _attempt("seeded random weights", check_random_weights, fix="report this output")
    fix = "pip install --force-reinstall pylance pyarrow; and see that the temporary folder can be written"
    return [*parity, random, _attempt("feature store", check_store, fix=fix)]


def _attempt(name: str, check: Callable[[], Check], *, fix: str) -> Check:
    """Turn whatever goes wrong inside a check into its failure: a doctor that crashes helps nobody."""
    try:
        return check()
    except Exception as error:
        return Check(name=name, status="failed", found=f"{type(error).__name__}: {error}", fix=fix)


def golden_numbers() -> dict[str, Any]:
    """The stored numbers, by model."""
    text = importlib.resources.files("densedino.features").joinpath("golden/selftest.json").read_text("utf-8")
    numbers: dict[str, Any] = json.loads(text)
    return numbers


def golden_model(name: str) -> VisionTransformer | ConvNeXt:
    """Build a model whose every parameter is large enough to matter and exactly the same on every machine."""
    model = create_model(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            unit = torch.from_numpy(_unit_values(parameter.numel(), seed=zlib.crc32(key.encode()))).view(
                parameter.shape
            )
            if parameter.ndim == 1:
                parameter.copy_(unit / 4 if key.endswith("bias") else 0.75 + unit / 4)
            else:
                fan_in = parameter.numel() // parameter.shape[0] if parameter.shape[0] > 1 else 1
                parameter.copy_(unit * 2.0 ** -round(float(np.log2(fan_in)) / 2))
    return model


def _unit_values(count: int, *, seed: int) -> NDArray[np.float32]:
    """Scattered values in [-1, 1) that are whole multiples of 2⁻¹⁵, by an integer hash ("lowbias32", C. Wellons)."""
    x = np.arange(count, dtype=np.uint32) + np.uint32(seed)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    x ^= x >> np.uint32(16)
    return ((x >> np.uint32(16)).astype(np.float32) - np.float32(32768)) / np.float32(32768)


def golden_image() -> NDArray[np.uint8]:
    """Slanted stripes in three colours, [96, 128, 3]."""
    y, x, c = np.ogrid[:96, :128, :3]
    stripes: NDArray[np.uint8] = ((3 * x + 5 * y + x * y // 16 + 80 * c) % 256).astype(np.uint8)
    return stripes


def golden_extractor(name: str, *, device: str = "cpu") -> FeatureExtractor:
    """Bind `golden_model` to a transform and an engine, as `load` does for real weights, in float32."""
    model = golden_model(name)
    mean, std = IMAGENET_STATS
    card = WeightsCard(
        name=name,
        model=name,
        source="golden",
        sha256="",
        mean=mean,
        std=std,
        in_chans=3,
        licence="Apache-2.0",
        licence_url="",
        data="nothing",
        dialect="densedino",
        untrained=True,
    )
    transform = Transform(mean=mean, std=std, stride=model.stride)
    engine = EagerEngine(model, device=torch.device(device), precision="fp32")
    return FeatureExtractor(engine, transform, card)


def golden_features(name: str, *, device: str = "cpu") -> Features:
    """Tokens of `golden_image`."""
    return golden_extractor(name, device=device)(golden_image())


def excerpt(cls: torch.Tensor, registers: torch.Tensor, patches: torch.Tensor) -> dict[str, list[float]]:
    """Cut out what is stored of cls [D], registers [R, D] and patches [h, w, D]."""
    parts = {
        "cls": cls,
        "first_patch": patches[0, 0],
        "last_patch": patches[-1, -1],
        "mean_patch": patches.mean((0, 1)),
    }
    if len(registers):
        parts["last_register"] = registers[-1]
    return {key: [round(float(v), 7) for v in value[:16]] for key, value in parts.items()}


def check_parity(*, device: str = "cpu") -> list[Check]:
    """Compare every golden model's tokens, computed here on `device`, with the stored ones."""
    checks = []
    for name in GOLDEN_MODELS:
        title = f"parity of {name} on {device}"
        compare = functools.partial(_check_model, title, name, device)
        checks.append(_attempt(title, compare, fix=_parity_fix(device)))
    return checks


def _check_model(title: str, name: str, device: str) -> Check:
    golden = golden_numbers()[name]
    if tensors_sha256(dict(golden_model(name).named_parameters())) != golden["parameters_sha256"]:
        return Check(
            name=title,
            status="failed",
            found="the test's own weights came out differently, so nothing can be compared",
            fix="reinstall densedino: its files do not belong together (pip install --force-reinstall densedino)",
        )
    features = golden_features(name, device=device)
    here = excerpt(features.cls[0].cpu(), features.registers[0].cpu(), features.patches[0].cpu())
    pairs = [(torch.tensor(here[key]), torch.tensor(golden["tokens"][key])) for key in golden["tokens"]]
    worst = max(float((a - b).abs().nan_to_num(torch.inf).max()) for a, b in pairs)
    cosine = min(float(torch.cosine_similarity(a, b, dim=0).nan_to_num(-1)) for a, b in pairs)
    good = worst <= TOLERANCE if device == "cpu" else cosine >= _COSINE
    allowed = f"at most {TOLERANCE:g}" if device == "cpu" else f"cosine at least {_COSINE}"
    return Check(
        name=title,
        status="ok" if good else "failed",
        found=f"largest difference {worst:.1e}, least cosine {cosine:.7f} ({allowed} allowed)",
        fix="" if good else _parity_fix(device),
    )


def _parity_fix(device: str) -> str:
    if device == "cpu":
        return "reinstall PyTorch (pip install --force-reinstall torch torchvision); if it stays, report this output"
    return f"load with device='cpu' until {device} is mended: update its driver, and PyTorch to match"


def check_random_weights() -> Check:
    """Tell whether seeded random weights are those of other machines.

    PyTorch's generator gives the same bits everywhere; what it makes of them is rounded as the CPU's vector unit does.
    """
    golden = golden_numbers()
    models = {name: load_weights(name, weights="random")[0] for name in GOLDEN_MODELS}
    other = [
        name
        for name, model in models.items()
        if tensors_sha256(dict(model.named_parameters())) != golden[name]["random_sha256"]
    ]
    if not other:
        return Check(name="seeded random weights", status="ok", found="bit for bit those of other machines")
    return Check(
        name="seeded random weights",
        status="warning",
        found=f"{', '.join(other)}: not bit for bit those of x86-64 with AVX2",
        fix="do not compare features of weights='random' with those of another machine",
    )


def check_store() -> Check:
    """Extract one image into a store in the temporary folder and read it back."""
    from PIL import Image

    from densedino.features.extract import extract
    from densedino.features.store import FeatureStore

    dino = golden_extractor("debug_vit")
    with tempfile.TemporaryDirectory(prefix="densedino-doctor-") as folder:
        image, output = Path(folder, "image.png"), Path(folder, "features")
        Image.fromarray(golden_image()).save(image)
        extract(dino, [image], output=output)
        stored = FeatureStore(output)[0].patches
    far = float((stored - dino(golden_image()).patches).abs().max())
    good = far <= 4e-3  # float16 has 11 bits, and these tokens are below 8
    found = f"written and read in {tempfile.gettempdir()}, largest difference {far:.1e} (float16: 4e-03 allowed)"
    fix = "" if good else "report this output: what is read is not what was written"
    return Check(name="feature store", status="ok" if good else "failed", found=found, fix=fix)


def check_released(weights: str | os.PathLike[str], image: str | os.PathLike[str] | None) -> list[Check]:
    """Compare released weights with the values published for one image.

    Args:
        weights: a checkpoint of one of `RELEASED`, LVD-1689M, in any dialect.
        image: COCO's val2017/000000039769.jpg (two cats, 640×480).
    """
    try:
        dino = load(weights=weights, device="cpu", engine="eager", precision="fp32")
    except DenseDinoError as error:
        return [Check(name="released weights", status="failed", found=str(error), fix="see there")]
    card = dino.card
    identity = Check(
        name="released weights",
        status="warning" if card.untrained else "ok",
        found=f"{card.name} ({card.data}), SHA-256 {card.sha256[:16]}, {card.dialect} dialect, strictly loaded",
        fix="these are random: give a file" if card.untrained else "",
    )
    return [identity, _check_values(dino, image)]


def _check_values(dino: FeatureExtractor, image: str | os.PathLike[str] | None) -> Check:
    name, model = f"golden values of {dino.card.name}", dino.card.model
    if image is None:
        fix = "give --image 000000039769.jpg (COCO val2017: http://images.cocodataset.org/val2017/000000039769.jpg)"
        return Check(name=name, status="skipped", found="no image", fix=fix)
    if model not in RELEASED or "LVD" not in dino.card.data:
        found = f"none are published for it; there are for LVD-1689M's {', '.join(RELEASED)}"
        return Check(name=name, status="skipped", found=found)
    try:
        features = dino.with_transform(dino.transform.preset("huggingface"))(image)
    except DenseDinoError as error:
        return Check(name=name, status="failed", found=str(error), fix="give COCO's 000000039769.jpg")
    if features.source_sizes[0] != _COCO_SIZE:
        height, width = features.source_sizes[0]
        found = f"the image is {width}×{height}, COCO's is {_COCO_SIZE[1]}×{_COCO_SIZE[0]}"
        return Check(name=name, status="failed", found=found, fix="give the original val2017/000000039769.jpg")
    here = (features.cls[0, :5], features.patches[0, 0, 0, :5])
    worst = max(float((a - torch.tensor(b)).abs().max()) for a, b in zip(here, RELEASED[model], strict=True))
    good = worst <= TOLERANCE
    fix = (
        "if the parity checks above pass, the arithmetic is right: make sure of the image (the original JPEG, not a "
        "re-saved one) and of the checkpoint (unchanged, the SHA-256 in its name); else mend those first"
    )
    found = f"largest difference {worst:.1e} over CLS and first patch ({TOLERANCE:g} allowed)"
    return Check(name=name, status="ok" if good else "failed", found=found, fix="" if good else fix)
