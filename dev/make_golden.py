"""Write src/densedino/features/golden/selftest.json: tokens that `transformers` computes of the self-test's weights.

    python dev/make_golden.py

Run it on x86-64 with AVX2 when an architecture's parameters are renamed or the self-test's image or weights change, and
never to make a failing self-test pass.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "parity"))

from oracles import huggingface_convnext, huggingface_vit  # noqa: E402

from densedino.features.selftest import GOLDEN_MODELS, excerpt, golden_features, golden_image, golden_model  # noqa: E402
from densedino.weights.catalog import IMAGENET_STATS  # noqa: E402
from densedino.weights.files import tensors_sha256  # noqa: E402
from densedino.weights.loading import load_weights  # noqa: E402


def oracle_tokens(name: str) -> dict[str, list[float]]:
    """Compute the excerpt with transformers, and the pixels by hand."""
    model = golden_model(name)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET_STATS)
    pixels = (torch.from_numpy(golden_image()).permute(2, 0, 1) / 255 - mean) / std
    vit = name != "debug_convnext"
    with torch.inference_mode():
        tokens = (huggingface_vit if vit else huggingface_convnext)(model)(pixels[None]).last_hidden_state[0]
    first = 5 if vit else 1
    grid = (96 // model.stride, 128 // model.stride)
    return excerpt(tokens[0], tokens[1:first], tokens[first:].unflatten(0, grid))


def main() -> None:
    """Write the file, and print how far this package is from it."""
    out = {}
    for name in GOLDEN_MODELS:
        random, _ = load_weights(name, weights="random")
        out[name] = {
            "parameters_sha256": tensors_sha256(dict(golden_model(name).named_parameters())),
            "random_sha256": tensors_sha256(dict(random.named_parameters())),
            "tokens": oracle_tokens(name),
        }
        ours = golden_features(name)
        here = excerpt(ours.cls[0], ours.registers[0], ours.patches[0])
        far = max(abs(a - b) for key in here for a, b in zip(here[key], out[name]["tokens"][key], strict=True))
        print(f"{name}: densedino differs from transformers by at most {far:.1e}")
    path = ROOT / "src/densedino/features/golden/selftest.json"
    path.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
