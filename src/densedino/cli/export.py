"""Owns `densedino export`: what is exported where to, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from densedino.errors import InputError

if TYPE_CHECKING:
    from densedino.weights.card import WeightsCard

__all__ = ["run", "split_source"]


def split_source(source: str, weights: str | None) -> tuple[str | None, str | None]:
    """(name, weights) of a positional argument that is either, and of `--weights`."""
    from densedino.models.catalog import MODELS
    from densedino.weights.catalog import WEIGHTS

    if weights is not None:
        return source, weights
    return (source, None) if source in MODELS or source in WEIGHTS else (None, source)


def run(
    source: Annotated[str, tyro.conf.Positional],
    *,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    to: Literal["onnx", "openvino", "torch", "safetensors-hf", "timm"],
    weights: str | None = None,
    layers: tuple[int, ...] = (),
    input: Literal["normalised", "unit", "uint8"] = "normalised",  # noqa: A002 (the option's name)
    batch: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> None:
    """Write a model for another runtime; the file is kept only if its tokens there are those of PyTorch.

    Any size of image, normalised outside: densedino export dinov3_vits16.pth --to onnx -o vits16.onnx

    Bytes in, one fixed size: densedino export v.pth --to openvino -o v.xml --input uint8 --height 512 --width 512

    Args:
        source: a checkpoint, weights or an architecture by name, or an adapter's folder (to onnx: pixels to labels).
        out: the file: .onnx, .xml (OpenVINO; its weights stand beside it in .bin), .pt2 (torch), .safetensors (timm),
            or a folder (safetensors-hf).
        to: onnx, openvino, torch (torch.export), safetensors-hf (a folder for transformers), timm.
        weights: a checkpoint, where the source is a name; "random" for untrained ones.
        layers: blocks whose tokens come out too; 0 is the first, -1 the last.
        input: what the image is: normalised (mean and std outside), unit (floats in 0 to 1), uint8.
        batch: images, if always the same number.
        height: pixels, if always the same.
        width: pixels, if always the same.
    """
    if (Path(source) / "adapter.json").is_file():
        _export_adapter(source, weights, out, to=to, takes=input, batch=batch, height=height, width=width)
        return
    name, checkpoint = split_source(source, weights)
    if to == "safetensors-hf" or to == "timm":
        from densedino.weights.convert import convert

        done = convert(checkpoint, out, to="huggingface" if to == "safetensors-hf" else "timm", name=name)
        print(f"wrote {done.path}")
        print("\n".join(_identity(done.card, done.fingerprint)))
        print("  tensors     those of the source, bit for bit")
        return
    from densedino.engines.export import Sizes, export_model
    from densedino.weights.loading import load_weights

    model, card = load_weights(name, weights=checkpoint)
    sizes = Sizes(batch=batch, height=height, width=width)
    exported = export_model(model, card, out, to=to, layers=layers, takes=input, sizes=sizes)
    tried = ", ".join("×".join(map(str, shape)) for shape in exported.checked)
    print(f"wrote {exported.path}")
    print("\n".join(_identity(card, exported.metadata["densedino.fingerprint"])))
    print(f"  input       {exported.metadata['densedino.input']}")
    print(f"  outputs     {', '.join(exported.outputs)}")
    print(f"  checked     in its runtime at {tried}: at most {exported.error:.1e} from PyTorch in float32")


def _export_adapter(
    source: str,
    weights: str | None,
    out: Path,
    *,
    to: str,
    takes: Literal["normalised", "unit", "uint8"],
    batch: int | None,
    height: int | None,
    width: int | None,
) -> None:
    from densedino.adapters.adapted import load_adapter
    from densedino.adapters.export import export_adapter
    from densedino.engines.export import Sizes

    if to != "onnx":
        raise InputError(f"{source} is an adapter, which is exported --to onnx; {to} is for backbones alone.")
    adapter = load_adapter(source, weights=weights, device="cpu", engine="eager", precision="fp32")
    sizes = Sizes(batch=batch, height=height, width=width)
    exported = export_adapter(adapter, out, takes=takes, sizes=sizes)
    tried = ", ".join("×".join(map(str, shape)) for shape in exported.checked)
    print(f"wrote {exported.path}")
    print(f"  adapter     {adapter.spec.task.kind}, {adapter.spec.head.kind} on {adapter.dino.card.name}")
    print(f"  outputs     {', '.join(exported.outputs)}")
    print(f"  checked     at {tried}: logits at most {exported.error:.1e} of the largest from PyTorch's")


def _identity(card: WeightsCard, fingerprint: str) -> list[str]:
    return [
        f"  weights     {card.name}{', UNTRAINED: random numbers' if card.untrained else ''}",
        f"  licence     {card.licence} {card.licence_url}".rstrip(),
        f"  fingerprint {fingerprint}",
    ]
