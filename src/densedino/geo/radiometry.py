"""Owns the way from a scene's numbers to [0, 1]: calibration by the product's metadata, and scaling, one for the scene.

Reflectance = gain · number + offset, from an MTL file (Landsat), an MTD_MSI file (Sentinel-2), a Planet XML file, or
the raster's own scale and offset. Statistics are taken over the whole scene, never per tile.
"""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from densedino.errors import ImageError, InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from densedino.geo.bands import Chosen
    from densedino.geo.raster import Scene

__all__ = ["Product", "Scaling", "find_product", "make_scaling", "read_product"]

_VISIBLE, _INFRARED = 0.3, 0.6
"""Reflectance that becomes white: below 700 nm, where little but clouds and roofs is brighter, and from there on, where
plants reflect half of the light."""
_PERCENTILES = (2.0, 98.0)
_STATISTICS_SIDE = 2048  # pixels on the longer side of the whole scene, shrunk, of which percentiles are taken


@dataclass(frozen=True, kw_only=True)
class Product:
    """What a product's metadata file says: per band name ("B4", or "1" for Planet) gain and offset to reflectance."""

    path: str
    spacecraft: str
    gains: dict[str, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Value = clip(number · gain + offset, 0, 1) per channel; kind "none" leaves 8-bit numbers as they are."""

    kind: str
    """none, physical, percentile or range."""
    gains: tuple[float, ...]
    offsets: tuple[float, ...]
    notes: tuple[str, ...]
    """Where the numbers come from, in words."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def apply(self, array: NDArray[Any], valid: NDArray[np.bool_]) -> tuple[NDArray[Any], float]:
        """Scale [C, h, w]; return [h, w, C] (uint8, or float32 in [0, 1]) and the value that means white.

        Pixels that are not `valid` may hold anything and become 0.
        """
        if self.kind == "none":
            return np.ascontiguousarray(array.transpose(1, 2, 0)), 255.0
        out = np.empty((*array.shape[1:], len(array)), np.float32)
        for channel, (plane, gain, offset) in enumerate(zip(array, self.gains, self.offsets, strict=True)):
            numbers = np.where(valid, plane, 0).astype(np.float32, copy=False)
            np.clip(numbers * np.float32(gain) + np.float32(offset), 0, 1, out=out[..., channel])
        return out, 1.0


def find_product(sources: Sequence[str]) -> Product | None:
    """The metadata file that lies beside the rasters (for Sentinel-2, up to four folders up), if one does."""
    for source in sources:
        folder = Path(source).parent
        if "://" in source or not folder.is_dir():
            continue
        patterns = [(folder, "*_MTL.txt"), (folder, "*_MTL.xml"), (folder, "*_metadata.xml")]
        patterns += [(parent, "MTD_MSI*.xml") for parent in [folder, *folder.parents][:5]]
        for place, pattern in patterns:
            for path in sorted(place.glob(pattern)):
                return read_product(path)
    return None


def read_product(path: str | Path) -> Product:
    """Read an MTL (text or XML), MTD_MSI or Planet metadata file.

    Raises:
        ImageError: not such a file, or one without gains.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ImageError(f"the product's metadata {str(path)!r} cannot be read: {error}.") from None
    try:
        product = _read_text(text, str(path)) if not text.lstrip().startswith("<") else _read_xml(text, str(path))
    except (ET.ParseError, ValueError, KeyError, AttributeError) as error:
        raise ImageError(f"{str(path)!r} is damaged, or no metadata of a known product: {error}.") from None
    if not product.gains:
        raise ImageError(
            f"{str(path)!r} has no gains to reflectance. Known: Landsat MTL, Sentinel-2 MTD_MSI, Planet XML."
        )
    return product


def _read_text(text: str, path: str) -> Product:
    """MTL: GROUP = NAME, KEY = value, END_GROUP = NAME."""
    groups: dict[str, dict[str, str]] = {}
    stack: list[str] = []
    for line in text.splitlines():
        key, _, value = (part.strip().strip('"') for part in line.partition("="))
        if key == "GROUP":
            stack.append(value)
        elif key == "END_GROUP" and stack:
            stack.pop()
        elif key and value:
            groups.setdefault(stack[-1] if stack else "", {})[key] = value
    return _landsat(groups, path)


def _read_xml(text: str, path: str) -> Product:
    root = ET.fromstring(text)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    if root.find(".//REFLECTANCE_MULT_BAND_4") is not None:
        groups = {group.tag: {item.tag: (item.text or "").strip() for item in group} for group in root.iter()}
        return _landsat(groups, path)
    if root.find(".//bandSpecificMetadata") is not None:
        pairs = (
            (b.findtext("bandNumber"), b.findtext("reflectanceCoefficient")) for b in root.iter("bandSpecificMetadata")
        )
        gains = {f"B{number}": (float(gain), 0.0) for number, gain in pairs if number and gain}
        return Product(path=path, spacecraft="planet", gains=gains)
    return _sentinel(root, path)


def _landsat(groups: dict[str, dict[str, str]], path: str) -> Product:
    flat = {key: value for group in groups.values() for key, value in group.items()}
    surface = groups.get("LEVEL2_SURFACE_REFLECTANCE_PARAMETERS", {})
    rescaling = surface or flat
    # Top-of-atmosphere gains are for an overhead sun (USGS, Landsat 8 Data Users Handbook, section 5.2).
    sun = 1.0 if surface else math.sin(math.radians(float(flat.get("SUN_ELEVATION", 90.0))))
    gains = {}
    for key, value in rescaling.items():
        if found := re.fullmatch(r"REFLECTANCE_MULT_BAND_(\d+)", key):
            offset = float(rescaling[f"REFLECTANCE_ADD_BAND_{found[1]}"])
            gains[f"B{found[1]}"] = (float(value) / sun, offset / sun)
    return Product(path=path, spacecraft=flat["SPACECRAFT_ID"], gains=gains)


def _sentinel(root: ET.Element, path: str) -> Product:
    quantification = root.find(".//BOA_QUANTIFICATION_VALUE")
    if quantification is None:
        quantification = root.find(".//QUANTIFICATION_VALUE")
    if quantification is None:
        raise ValueError("no quantification value in it")
    quantum = float(quantification.text or "")
    added = {
        e.get("band_id"): float(e.text or 0) for tag in ("RADIO_ADD_OFFSET", "BOA_ADD_OFFSET") for e in root.iter(tag)
    }
    names = [f"B{n}" for n in range(1, 9)] + ["B8A", "B9", "B10", "B11", "B12"]
    gains = {name: (1 / quantum, added.get(str(n), 0.0) / quantum) for n, name in enumerate(names)}
    return Product(path=path, spacecraft=root.findtext(".//SPACECRAFT_NAME") or "sentinel-2", gains=gains)


def make_scaling(scene: Scene, chosen: Chosen, *, scale: str = "auto", product: Product | None = None) -> Scaling:
    """How the chosen bands of a scene become [0, 1].

    Args:
        scene: read in whole, shrunk, where percentiles are needed.
        chosen: its bands.
        scale: "auto" (8-bit as it is; physical where the calibration is known; else percentile), "none", "physical"
            (reflectance 0 to 0.3 below 700 nm, 0 to 0.6 above), "percentile" (2 to 98, per band, of the whole scene),
            or "LOW:HIGH" in the file's numbers.
        product: the product's metadata.

    Raises:
        InputError: a scale that is none of these, or that this scene cannot have.
        ImageError: percentiles of a scene without valid pixels.
    """
    dtypes = {scene.bands[place].dtype for place in chosen.places}
    if scale == "auto" and dtypes == {"uint8"}:
        scale = "none"
    if scale == "none":
        if dtypes != {"uint8"}:
            raise InputError(
                f"scale 'none' is for 8-bit scenes; this one holds {', '.join(sorted(dtypes))}. Valid: auto, "
                "physical, percentile, LOW:HIGH."
            )
        count = len(chosen.places)
        return Scaling(kind="none", gains=(1 / 255,) * count, offsets=(0.0,) * count, notes=("8-bit, as it is",))
    if scale in ("auto", "physical"):
        calibration = [_calibration(scene, chosen, n, product) for n in range(len(chosen.places))]
        missing = [name for name, found in zip(chosen.names, calibration, strict=True) if found is None]
        if not missing:
            return _physical(chosen, [found for found in calibration if found is not None])
        if scale == "physical":
            raise InputError(
                f"no calibration to reflectance is known for band {', '.join(missing)} of this {chosen.sensor} scene. "
                "Fix: put the product's metadata file (MTL, MTD_MSI…xml) beside it, or --scale percentile or LOW:HIGH."
            )
    if scale in ("auto", "percentile"):
        return _percentile(scene, chosen)
    found = re.fullmatch(r"(-?\d+(?:\.\d*)?):(-?\d+(?:\.\d*)?)", scale)
    if not found or float(found[1]) >= float(found[2]):
        raise InputError(f"scale {scale!r}: give auto, none, physical, percentile, or LOW:HIGH such as 0:4095.")
    low, high = float(found[1]), float(found[2])
    return _between(
        [low] * len(chosen.places), [high] * len(chosen.places), kind="range", notes=[f"{low:g} to {high:g}"]
    )


def _calibration(scene: Scene, chosen: Chosen, n: int, product: Product | None) -> tuple[float, float, str] | None:
    """Gain and offset to reflectance of channel `n`, and where they come from."""
    band = scene.bands[chosen.places[n]]
    if product is not None and chosen.names[n] in product.gains:
        return *product.gains[chosen.names[n]], Path(product.path).name
    if (band.scale, band.offset) != (1.0, 0.0):
        return band.scale, band.offset, "the raster's scale and offset"
    if chosen.sensor == "sentinel-2" and band.dtype in ("uint16", "int16"):
        return 1e-4, 0.0, "Sentinel-2's 10,000 per unit of reflectance (no metadata file: offset 0 taken for granted)"
    return None


def _physical(chosen: Chosen, calibration: Sequence[tuple[float, float, str]]) -> Scaling:
    whites = [_VISIBLE if nm is None or nm < 700 else _INFRARED for nm in chosen.nm]
    return Scaling(
        kind="physical",
        gains=tuple(gain / white for (gain, _, _), white in zip(calibration, whites, strict=True)),
        offsets=tuple(offset / white for (_, offset, _), white in zip(calibration, whites, strict=True)),
        notes=(
            f"reflectance by {'; '.join(dict.fromkeys(origin for _, _, origin in calibration))}",
            f"white at {', '.join(f'{white:g}' for white in whites)}",
        ),
    )


def _percentile(scene: Scene, chosen: Chosen) -> Scaling:
    lows, highs = [], []
    factor = min(1.0, _STATISTICS_SIDE / max(scene.size))
    size = (max(1, round(scene.size[0] * factor)), max(1, round(scene.size[1] * factor)))
    for place, name in zip(chosen.places, chosen.names, strict=True):
        array, valid = scene.read((0, 0, *scene.size), bands=[place], out=size)
        numbers = array[0][valid]
        if not len(numbers):
            raise ImageError(
                f"band {name} of {scene.sources[0]!r} has no valid pixel: all are nodata (declared: "
                f"{scene.bands[place].nodata}), transparent or NaN. If the nodata value is wrong, give --nodata."
            )
        low, high = (float(value) for value in np.percentile(numbers, _PERCENTILES))
        lows.append(low)
        highs.append(high if high > low else low + 1.0)
    notes = [_zeros(scene, chosen, size)] if all(scene.bands[place].nodata is None for place in chosen.places) else []
    spans = ", ".join(f"{n} {low:g}–{high:g}" for n, low, high in zip(chosen.names, lows, highs, strict=True))
    notes = [f"2nd to 98th percentile of the whole scene: {spans}", *filter(None, notes)]
    return _between(lows, highs, kind="percentile", notes=notes)


def _zeros(scene: Scene, chosen: Chosen, size: tuple[int, int]) -> str:
    """A warning, where much of a scene that declares no nodata is exactly 0; "" where it is not."""
    array, valid = scene.read((0, 0, *scene.size), bands=chosen.places, out=size)
    share = float((valid & (array == 0).all(0)).mean())
    return f"{share:.0%} of it is exactly 0, and no nodata is declared: if nothing is there, --nodata 0" * (
        share > 0.05
    )


def _between(lows: Sequence[float], highs: Sequence[float], *, kind: str, notes: Sequence[str]) -> Scaling:
    pairs = list(zip(lows, highs, strict=True))
    return Scaling(
        kind=kind,
        gains=tuple(1 / (high - low) for low, high in pairs),
        offsets=tuple(-low / (high - low) for low, high in pairs),
        notes=tuple(notes),
    )
