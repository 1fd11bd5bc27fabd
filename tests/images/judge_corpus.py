"""Reads every file of a corpus, in a process of its own with little memory, and judges what became of it.

python judge_corpus.py FOLDER    prints one JSON object: problems, counts, peak memory, the slowest file
"""

from __future__ import annotations

import faulthandler
import json
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from densedino.errors import ImageError
from densedino.images.decoding import Pixels, read_image
from densedino.images.transforms import Prepared, Transform

SECONDS_PER_FILE = 60
ADDRESS_SPACE = 8 * 2**30  # torch alone maps about 2 GiB; what is resident is reported
MAX_TOKENS = 2048

TRANSFORM = Transform((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), max_tokens=MAX_TOKENS)


def levels(array: np.ndarray, max_value: float) -> np.ndarray:
    return array.astype(np.float64) * (255 / max_value)


def wrong_picture(pixels: Pixels, must: dict[str, Any], folder: Path) -> str:
    """What is wrong with a picture that was read, or nothing."""
    low, high = pixels.array.min(), pixels.array.max()
    if pixels.array.ndim != 3 or pixels.array.shape[2] != 3 or not (0 <= low <= high <= pixels.max_value):
        return f"malformed: {pixels.array.shape} {pixels.array.dtype} {low}–{high}"
    if "like" in must:
        like = np.load(folder / "expected" / f"{must['like']}.npy")
        if like.shape != pixels.array.shape:
            return f"is {pixels.array.shape}, should be {like.shape}"
        difference = np.abs(
            levels(pixels.array, pixels.max_value) - levels(like, 65535 if like.dtype == np.uint16 else 255)
        )
        shown = difference[pixels.valid].mean() if pixels.valid is not None else difference.mean()
        if not shown <= must["within"]:
            return f"differs by {shown:.3f} levels on average, {must['within']} allowed"
        if must["must"] == "equal" and (pixels.valid is not None) != must.get("transparent", False):
            return "mask missing, or not expected"
    return ""


def wrong_tensor(prepared: Prepared, name: str) -> str:
    h, w = prepared.valid.shape
    if prepared.pixels.shape != (3, h * 16, w * 16) or h * w > MAX_TOKENS:
        return f"{name}: tensor {tuple(prepared.pixels.shape)} with grid {h}×{w}"
    return "" if bool(prepared.pixels.isfinite().all()) else f"{name}: not finite"


def judge(name: str, must: dict[str, Any], folder: Path) -> tuple[str, str]:
    """The outcome ("refused", "read", "too small") and the problem with it, if any."""
    path = folder / "images" / name
    try:
        pixels = read_image(path)
    except ImageError as error:
        message = str(error)
        if must["must"] == "equal":
            return "refused", f"refused: {message}"
        return "refused", "" if len(message) < 1500 + len(name) else f"message of {len(message)} characters"
    if must["must"] == "refuse":
        return "read", "was read"
    problem = wrong_picture(pixels, must, folder)
    try:
        prepared = TRANSFORM(path)
    except ImageError as error:
        too_small = min(pixels.array.shape[:2]) < 16
        return "too small", problem or ("" if too_small else f"transform refused: {error}")
    if must.get("transform") == "refuse":
        return "read", "the transform should refuse it"
    return "read", problem or wrong_tensor(prepared, name)


def main(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    warnings.simplefilter("error")
    manifest = json.loads((folder / "manifest.json").read_text())
    problems: dict[str, str] = {}
    counts: dict[str, int] = {}
    slowest = ("", 0.0)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, must in manifest.items():
        faulthandler.dump_traceback_later(SECONDS_PER_FILE, exit=True)
        start = time.perf_counter()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            outcome, problem = judge(name, must, folder)
        except Exception as error:
            outcome, problem = "crashed", f"{type(error).__name__}: {error}"
        seconds = time.perf_counter() - start
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if grown > 100_000 or seconds > 3:
            print(f"{name!r}: {grown // 1024} MiB more at the peak, {seconds:.1f} s", file=sys.stderr)
        slowest = max(slowest, (name, seconds), key=lambda pair: pair[1])
        counts[outcome] = counts.get(outcome, 0) + 1
        if problem:
            problems[name] = problem
    faulthandler.cancel_dump_traceback_later()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"problems": problems, "counts": counts, "base_kib": base, "peak_kib": peak, "slowest": slowest}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
