"""Owns the `densedino` command: the table of verbs, dispatch, and how errors look. Imports nothing heavy."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from typing import TYPE_CHECKING

from densedino.errors import DenseDinoError, UnknownNameError, UntrainedWarning

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

__all__ = ["VERBS", "main"]

VERBS = {
    "extract": "images, folders, lists, videos in; dense features on disk out; resumable",
    "adapt": "labelled images in; a head on the backbone, or LoRA and a head, out",
    "view": "pictures of features: PCA colours, similarity to a patch, attention",
    "search": "what in a store is like an image, or like a place in one; with an index for millions of patches",
    "select": "near-duplicates in a store, or few images that stand for all",
    "classify": "pictures in; which of ImageNet's classes they show out, by a released head",
    "depth": "pictures in; depth or canopy height in metres at each pixel out, by a released head",
    "detect": "pictures in; boxes of objects out, as COCO has them, by a released head",
    "text": "pictures and names in; which of the names is where out, by dino.txt, without training",
    "segment": "a few clicks in a photograph or scene in; classes of all of it, with confidence, out",
    "change": "two pictures of one place in; a map of what changed out",
    "pretrain": "images in; a backbone of your own out, without labels; goes on after any interruption",
    "distill": "images and teachers in; a small backbone that tells what they say out",
    "plan": "what a model takes on this machine, and which ways to run it fit",
    "export": "a model as ONNX, OpenVINO, torch.export, for transformers or timm; checked before it is kept",
    "quantize": "weights and images in; the model in int8 or int4 out, with what that costs",
    "prune": "weights and images in; a smaller ViT out, taught by the larger one, with what that costs",
    "fidelity": "two ways to run a model, on the same images: how near they are",
    "eval": "features and a data set in; how good they are for the task, against baselines, with error bars",
    "serve": "a page that shows dense features, and the same over HTTP",
    "models": "list the architectures",
    "weights": "list the weights, or convert a checkpoint between dialects",
    "doctor": "check this installation, and your weights against golden values",
}


def _help() -> str:
    lines = [f"  {verb:<10}{what}" for verb, what in VERBS.items()]
    return "\n".join(
        [
            "usage: densedino VERB ...",
            "",
            "Dense visual features in the manner of DINOv3: images in, one vector per patch out.",
            "",
            "verbs:",
            *lines,
            "",
            "densedino VERB --help    what a verb takes",
            "densedino --version      the version",
            "",
            "Start with:  densedino extract photos/ -o features/",
        ]
    )


def _command(module: ModuleType, verb: str, rest: list[str]) -> tuple[Callable[..., object], str, list[str]]:
    """The function to run, the program name for its help, and its arguments."""
    commands: dict[str, Callable[..., object]] | None = getattr(module, "COMMANDS", None)
    if commands is None:
        choose = getattr(module, "choose", None)  # of a verb that does several things under one name
        return module.run if choose is None else choose(rest), f"densedino {verb}", rest
    if rest and rest[0] in commands and rest[0]:
        return commands[rest[0]], f"densedino {verb} {rest[0]}", rest[1:]
    return commands[""], f"densedino {verb}", rest


def main(argv: Sequence[str] | None = None) -> int:
    """Run `densedino` with `argv` (the process' arguments if not given) and return the exit status.

    0: done. 1: a job ended without a result. 2: wrong arguments or input; one line on stderr says which.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return 0
    if args[0] in ("-V", "--version"):
        from densedino import __version__

        print(f"densedino {__version__}")
        return 0
    verb, *rest = args
    warnings.simplefilter("ignore", UntrainedWarning)  # every verb says it in its own words
    try:
        if verb not in VERBS:
            raise UnknownNameError("verb", verb, VERBS)
        import tyro

        function, prog, rest = _command(importlib.import_module(f"densedino.cli.{verb}"), verb, rest)
        status = tyro.cli(function, prog=prog, args=rest, config=(tyro.conf.FlagCreatePairsOff,))
    except DenseDinoError as error:
        print(f"densedino: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("densedino: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status if isinstance(status, int) else 0


def entry() -> None:
    """The console script."""
    sys.exit(main())
