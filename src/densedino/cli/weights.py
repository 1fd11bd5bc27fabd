"""Owns `densedino weights`: the table of weights, and conversion of checkpoints between dialects."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 (tyro reads the annotations)
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from densedino.models.catalog import MODELS
from densedino.models.counts import parameter_count
from densedino.weights.catalog import DEFAULT_WEIGHTS, WEIGHTS, WeightsRecord, list_weights

if TYPE_CHECKING:
    from collections.abc import Iterable

    from densedino.weights.card import WeightsCard
    from densedino.weights.convert import Converted

__all__ = ["COMMANDS", "convert", "list_", "pack", "show"]


def list_(pattern: Annotated[str, tyro.conf.Positional] = "*") -> None:
    """List the weights that densedino knows.

    What a checkpoint is: densedino weights show FILE

    Write it in another dialect: densedino weights convert FILE

    Args:
        pattern: names to list, with shell wildcards: 'vit*', '*sat493m'.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("weights", "trained on", "parameters", "licence", "here"):
        table.add_column(heading, justify="right" if heading == "parameters" else "left", no_wrap=True)
    for name in list_weights(pattern):
        record = WEIGHTS[name]
        size = f"{parameter_count(MODELS[record.model]):,}"
        table.add_row(name, record.data, size, record.licence, _where(record))
    console = Console()
    console.print(table) if console.is_terminal else Console(width=200).print(table)  # a pipe gets whole lines
    print(f"\nWithout a name the package's own {DEFAULT_WEIGHTS} is used. The others are Meta's: give a file, the URL")
    print("that Meta mails (in quotes), or a hub repository (facebook/… on request, timm/… without).")


def _where(record: WeightsRecord) -> str:
    from densedino.weights.hub import cached_snapshot
    from densedino.weights.sources import cached

    if cached(record.sha256) is not None:
        return "yes"
    for repository in (record.huggingface, record.timm):
        if cached_snapshot(repository) is not None:
            return f"yes, {repository}"
    return "no"


def convert(
    source: Annotated[str, tyro.conf.Positional],
    *,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    to: Literal["meta", "huggingface", "timm", "densedino"],
    name: str | None = None,
) -> None:
    """Write a checkpoint in another dialect; its tensors stay what they are, bit for bit.

    densedino weights convert dinov3_vits16_pretrain_lvd1689m-08c60483.pth -o vits16/ --to huggingface

    Args:
        source: a file, a Hugging Face folder, an https URL, a hub id, or "random" for seeded untrained weights.
        out: what to write: a folder for huggingface, a .pth file for meta, a .safetensors file for the others.
        to: meta (the reference), huggingface (transformers), timm, or densedino.
        name: which weights these are, if the file does not say: `vitl16-sat493m`.
    """
    from densedino.weights.convert import convert as convert_weights

    print("\n".join(_report(convert_weights(source, out, to=to, name=name))))


def show(source: Annotated[str, tyro.conf.Positional], *, name: str | None = None) -> None:
    """Say what a checkpoint is: which weights, which dialect, what of it would be used and what not.

    densedino weights show checkpoint.pth

    Args:
        source: a file, a Hugging Face folder, an https URL, a hub id, or "random".
        name: which weights these are, if the file does not say: `vitl16-sat493m`.
    """
    from densedino.weights.loading import read_weights

    fitted, card = read_weights(name, weights=source)
    print("\n".join([*_identity(card), *_rows("not used", fitted.module_state()[1]), *_rows("note", card.notes)]))


def pack(
    source: Annotated[str, tyro.conf.Positional],
    *,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    to: Literal["bf16", "int8", "int4"],
    name: str | None = None,
) -> None:
    """Write a ViT's matrices in fewer bits, so that less is read from disk; made for `--engine stream`.

    densedino weights pack dinov3_vit7b16_pretrain_lvd1689m-a955f4ea.pth -o vit7b16-int8.safetensors --to int8

    Products are computed in bf16 from all of them. For integer products there is `densedino quantize`.

    Args:
        source: a file, a Hugging Face folder, an https URL or a hub id; it may be larger than the memory.
        out: the .safetensors file to write.
        to: bf16 (half of fp32), int8 (half of that), or int4 (a quarter).
        name: which weights these are, if the file does not say: `vitl16-sat493m`.
    """
    from densedino.weights.loading import load_stored
    from densedino.weights.packing import pack_weights

    stored = load_stored(name, weights=source)
    path = pack_weights(stored, out, to=to)
    print("\n".join([f"wrote {path}, {path.stat().st_size / 1e9:.2f} GB", *_identity(stored.card)]))


def _report(done: Converted) -> list[str]:
    """What was written and how to open it, then all that is not as plain as that."""
    opened = {
        "meta": f"torch.load({str(done.path)!r}, weights_only=True)",
        "huggingface": f"transformers.AutoModel.from_pretrained({str(done.path)!r})",
        "timm": f"timm.create_model({done.timm_name!r}, checkpoint_path={str(done.path)!r})",
        "densedino": f"densedino.load(weights={str(done.path)!r})",
    }[done.card.dialect]
    if done.card.dialect == "timm" and done.timm_name is None:
        opened = f"timm has no {done.card.model}; the names are those of its Eva and ConvNeXt classes"
    carried = [(key, "no place for it in this dialect, so it is in the metadata") for key in done.kept]
    return [
        f"wrote {done.path}",
        *_rows("open", [opened]),
        *_identity(done.card),
        *_rows("tensors", [f"SHA-256 {done.fingerprint}"]),
        *_rows("carried", carried),
        *_rows("not written", done.dropped),
        *_rows("note", done.card.notes),
    ]


def _identity(card: WeightsCard) -> list[str]:
    return [
        *_rows("weights", [f"{card.name}{', UNTRAINED' if card.untrained else ''}, {card.dialect} dialect"]),
        *_rows("trained on", [card.data]),
        *_rows("mean, std", [f"{list(card.mean)}, {list(card.std)}"]),
        *_rows("licence", [f"{card.licence} {card.licence_url}".rstrip()]),
        *_rows("source file", [f"SHA-256 {card.sha256}"] if card.source != "random" else ["random"]),
    ]


def _rows(heading: str, values: Iterable[str | tuple[str, str]]) -> list[str]:
    return [f"  {heading:<12}{value if isinstance(value, str) else ': '.join(value)}" for value in values]


COMMANDS = {"": list_, "convert": convert, "pack": pack, "show": show}
