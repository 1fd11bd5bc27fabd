"""Owns `densedino plan`: what a model takes on this machine, printed before anything is loaded."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import tyro

from densedino.cli.options import parse_resize
from densedino.errors import InputError
from densedino.models.catalog import ConvNeXtSpec, ViTSpec, model_spec

if TYPE_CHECKING:
    from rich.console import Console

    from densedino.features.forecast import Forecast, Way

__all__ = ["run"]


def run(
    model: Annotated[str, tyro.conf.Positional],
    *,
    images: int = 1,
    size: str = "512",
    batch: int = 8,
    memory: str | None = None,
    json: bool = False,
) -> None:
    """What a model takes on this machine: parameters, memory, time, and which ways to run it fit. Nothing is loaded.

    ViT-7B on eight images of 512×512 pixels in 3 GB: densedino plan vit7b16 --images 8 --memory 3GB

    Memory is the peak of a process that runs batches in Python, `dino(images, batch_size=…)`, Python and PyTorch
    included; several batches at a time, as `extract` runs small models, take more. Time is arithmetic: the model's
    multiplications at the rate of matrix products measured here now, and what usually comes on top.

    Args:
        model: an architecture or weights by name, see `densedino models` and `densedino weights`.
        images: how many.
        size: what the model sees: 512 (a square), or 512x768 (height x width).
        batch: images at a time.
        memory: what may be used, such as 3GB; what this machine has free if not given.
        json: print everything as one JSON object.
    """
    from densedino.engines.budget import parse_bytes
    from densedino.weights.catalog import WEIGHTS

    spec = model_spec(WEIGHTS[model].model if model in WEIGHTS else model)
    parsed = parse_resize(size)
    if parsed is None:
        raise InputError("--size native: a plan needs pixels; give 512, or 512x768 (height x width).")
    sides = (parsed, parsed) if isinstance(parsed, int) else parsed
    budget = parse_bytes(memory) if memory else None
    from densedino.features.forecast import forecast

    found = forecast(spec, images=images, size=sides, batch=batch, memory=budget)
    if json:
        _print_json(found)
        return
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    _print(console, spec, found, images=images, size=sides, batch=min(batch, images), memory=budget)
    _advise(console, found, model, size=size, batch=min(batch, images), memory=memory)


def _print_json(found: Forecast) -> None:
    import json
    from dataclasses import asdict

    print(json.dumps(asdict(found), indent=2))


def _print(
    console: Console,
    spec: ViTSpec | ConvNeXtSpec,
    found: Forecast,
    *,
    images: int,
    size: tuple[int, int],
    batch: int,
    memory: int | None,
) -> None:
    from rich.table import Table

    from densedino.engines.budget import format_bytes

    weights = ", ".join(
        f"{format_bytes(found.parameters * bits / 8)} in {name}"
        for name, bits in (("fp32", 32), ("bf16", 16), ("int8", 8.25), ("int4", 4.25))
    )
    room = f"{format_bytes(memory)} given" if memory else f"{format_bytes(found.available_bytes)} free here"
    rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in found.rates.items())
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    busy = (
        [("but", "other programs keep this machine busy; idle, it is faster")] if load > (os.cpu_count() or 1) else []
    )
    grid = Table.grid(padding=(0, 2))
    for name, value in (
        ("model", f"{spec.name}, {found.parameters:,} parameters: {weights}"),
        ("images", f"{images:,} of {size[0]}×{size[1]} pixels, {batch} at a time, {found.tokens:,} tokens each"),
        ("products", f"{found.multiply_adds / 1e9:,.1f} G multiply-adds per image; this CPU does {rates}"),
        ("activations", f"{format_bytes(found.activation_bytes)} per batch in fp32"),
        *busy,
        ("memory", f"{room}; Python and PyTorch themselves take {format_bytes(found.floor_bytes)}"),
    ):
        grid.add_row(f"[dim]{name}[/]", value)
    console.print(grid)
    console.print()
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("engine", "precision", "peak memory", "time", "fits", ""):
        table.add_column(heading, justify="right" if heading in ("peak memory", "time") else "left", no_wrap=True)
    for way in found.ways:
        mark = "[green]yes[/]" if way.fits else "[red]no[/]"
        table.add_row(way.engine, way.precision, format_bytes(way.memory_bytes), _time(way.seconds), mark, way.note)
    console.print(table)
    console.print()


def _time(seconds: float) -> str:
    for unit, length, most in (("ms", 0.001, 1), ("s", 1, 100), ("min", 60, 7200)):
        if seconds < most:
            return f"{seconds / length:.{0 if unit == 'ms' else 1}f} {unit}"
    return f"{seconds / 3600:.1f} h"


def _advise(console: Console, found: Forecast, model: str, *, size: str, batch: int, memory: str | None) -> None:
    best = found.best
    if best is None:
        console.print("[red]Nothing fits.[/] Fewer images at a time (--batch), smaller ones, or more memory.")
        return
    console.print("The fastest that fits, for a folder of images:")
    command = f"densedino extract IMAGES --model {model} --resize {size} --batch-size {batch}"
    console.print(f"  {command} {_options(best, memory)}", soft_wrap=True)


def _options(way: Way, memory: str | None) -> str:
    from densedino.engines.budget import format_bytes

    options = f"--engine {way.engine} --precision {way.precision}"
    if way.engine != "stream":
        return options
    return f"{options} --memory {memory or format_bytes(max(way.memory_bytes, 3e9)).replace(' ', '')}"
