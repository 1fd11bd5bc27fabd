"""Owns the choice of an engine and a precision for this machine, with the reason in one line."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

from densedino.engines.eager import EagerEngine, choose_precision
from densedino.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    import torch

    from densedino.engines.protocol import Engine
    from densedino.models.convnext import ConvNeXt
    from densedino.models.vit import VisionTransformer

__all__ = ["ENGINES", "PRECISIONS", "Choice", "build_engine", "choose_engine"]

ENGINES = ("auto", "eager", "compile", "openvino", "onnx", "stream")
PRECISIONS = ("auto", "fp32", "bf16", "int8", "int4")
_OFFERS = {
    "eager": ("fp32", "bf16"),
    "compile": ("fp32", "bf16"),
    "openvino": ("fp32", "bf16", "int8", "int4"),
    "onnx": ("fp32",),
    "stream": ("fp32", "bf16"),
}
_SMALL = 10_000_000  # parameters; compiling takes seconds, and such a model runs in milliseconds anyway


@dataclass(frozen=True)
class Choice:
    """How a backbone is to be run."""

    engine: str
    precision: str
    reason: str
    """One line, for the user."""


def choose_engine(
    engine: str = "auto", *, precision: str = "auto", device: torch.device, parameters: int, memory: bool = False
) -> Choice:
    """Resolve `auto`, and refuse what no engine does.

    Args:
        engine: of `ENGINES`.
        precision: of `PRECISIONS`.
        device: where the model is to run.
        parameters: of the model.
        memory: whether a budget of memory is given, which only `stream` keeps.

    Raises:
        UnknownNameError: no such engine or precision.
        InputError: fp16; a precision that the engine does not offer, or a device that it does not run on.
    """
    if engine not in ENGINES:
        raise UnknownNameError("engine", engine, ENGINES)
    if precision not in PRECISIONS:
        choose_precision(precision, device)  # knows why not fp16
        raise UnknownNameError("precision", precision, PRECISIONS)
    if engine == "auto":
        return _automatic(precision, device, parameters, memory=memory)
    if memory and engine != "stream":
        raise InputError(f"memory=… is a budget that engine='stream' keeps; engine {engine!r} does not. Leave it out.")
    if engine in ("openvino", "stream") and device.type != "cpu":
        raise InputError(f"engine {engine!r} runs on the CPU, not on {device}. Use device='cpu', or engine='compile'.")
    if precision == "auto":
        precision = {"stream": "bf16", "openvino": "fp32", "onnx": "fp32"}.get(engine) or choose_precision(
            "auto", device
        )
    if precision not in _OFFERS[engine]:
        able = [name for name, offers in _OFFERS.items() if precision in offers]
        raise InputError(
            f"engine {engine!r} has no precision {precision!r}; it has {', '.join(_OFFERS[engine])}. "
            f"{precision} runs with engine={' or '.join(map(repr, able))}."
        )
    return Choice(engine, precision, "as asked")


def _automatic(precision: str, device: torch.device, parameters: int, *, memory: bool) -> Choice:
    if memory:
        return Choice("stream", "bf16" if precision == "auto" else precision, "a budget of memory was given")
    if precision in ("int8", "int4"):
        if device.type != "cpu":
            raise InputError(
                f"precision {precision!r} runs on the CPU, through OpenVINO, not on {device}. Use precision='bf16' "
                "there, or device='cpu'."
            )
        return Choice("openvino", precision, f"{precision} runs through OpenVINO")
    exact = choose_precision(precision, device)
    if device.type != "cpu":
        return Choice("eager", exact, f"{device.type}: PyTorch's own kernels; engine='compile' fuses more")
    if parameters < _SMALL:
        return Choice("eager", exact, "a model this small runs at once; another engine would take seconds to begin")
    if importlib.util.find_spec("openvino") is None:
        return Choice("eager", exact, "OpenVINO, faster on CPUs, is not installed: pip install 'densedino[engines]'")
    if exact == "bf16" and not _openvino_has_bf16():
        return Choice("eager", exact, "OpenVINO has no bf16 on this CPU")
    return Choice("openvino", exact, "the fastest on a CPU")


def _openvino_has_bf16() -> bool:
    from densedino.engines.openvino import has_bf16

    return has_bf16()


def build_engine(choice: Choice, model: VisionTransformer | ConvNeXt, *, device: torch.device) -> Engine:
    """The engine that was chosen, around a model in memory; `stream` has its own way in, from the file.

    Raises:
        MissingExtraError: its packages are not installed.
        InputError: this machine cannot run it.
    """
    match choice.engine, choice.precision:
        case "eager", ("fp32" | "bf16") as precision:
            return EagerEngine(model, device=device, precision=precision)
        case "compile", precision:
            from densedino.engines.compiled import compiled_engine

            return compiled_engine(model, precision=precision, device=device)
        case "onnx", _:
            from densedino.engines.onnx import onnx_engine

            return onnx_engine(model, device=device)
        case "openvino", ("fp32" | "bf16") as precision:
            from densedino.engines.openvino import openvino_engine

            return openvino_engine(model, precision=precision)
        case "openvino", ("int8" | "int4") as precision:
            from densedino.engines.quantized import compressed_engine

            return compressed_engine(model, precision=precision)
        case _:
            raise UnknownNameError("engine", choice.engine, ENGINES)
