"""Owns which bands of a scene become the model's channels: sensors, their bands, wavelengths and names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from densedino.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from densedino.geo.raster import RasterBand

__all__ = ["COMPOSITES", "SENSORS", "Chosen", "SensorBand", "choose_bands", "detect_sensor"]

_TOLERANCE = 60.0  # nm, between a wavelength asked for and the centre of the band that is taken for it


@dataclass(frozen=True)
class SensorBand:
    """A band of a sensor."""

    name: str
    """As the data's publisher writes it, without leading zeros."""
    common: str
    """What it shows: blue, red, nir …; "" where composites do not use it."""
    nm: float
    """Centre wavelength in nanometres."""


def _bands(text: str) -> tuple[SensorBand, ...]:
    items = (item.split(":") for item in text.split())
    return tuple(SensorBand(name, common, float(nm)) for name, common, nm in items)


_OLI = _bands(
    "B1:coastal:443 B2:blue:482 B3:green:561 B4:red:655 B5:nir:865 B6:swir1:1609 B7:swir2:2201 B8:pan:590 "
    "B9:cirrus:1373 B10:thermal:10895 B11::12005"
)
SENSORS: dict[str, tuple[SensorBand, ...]] = {
    "sentinel-2": _bands(
        "B1:coastal:443 B2:blue:490 B3:green:560 B4:red:665 B5:rededge1:705 B6:rededge2:740 B7:rededge3:783 B8:nir:842 "
        "B8A:nir2:865 B9:watervapour:945 B10:cirrus:1375 B11:swir1:1610 B12:swir2:2190"
    ),
    "landsat-7": _bands(
        "B1:blue:485 B2:green:560 B3:red:660 B4:nir:835 B5:swir1:1650 B6:thermal:11450 B7:swir2:2220 B8:pan:710"
    ),
    "landsat-8": _OLI,
    "landsat-9": _OLI,
    "naip": _bands("R:red:635 G:green:555 B:blue:465 N:nir:845"),
    "planet": _bands("B1:blue:485 B2:green:545 B3:red:630 B4:nir:820"),
    "planet-8": _bands(
        "B1:coastal:443 B2:blue:490 B3:green1:531 B4:green:565 B5:yellow:610 B6:red:665 B7:rededge1:705 B8:nir:865"
    ),
    "generic": (),
}
"""Bands in the order in which the publisher stacks them. Centre wavelengths are those that the agencies publish."""

_ORDERS: dict[tuple[str, int], tuple[int, ...]] = {
    ("sentinel-2", 12): (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12),  # Level-2A leaves out B10
    ("landsat-7", 6): (0, 1, 2, 3, 4, 6),  # the reflective bands
    ("landsat-8", 7): (0, 1, 2, 3, 4, 5, 6),  # Level-2
    ("landsat-9", 7): (0, 1, 2, 3, 4, 5, 6),
}
"""Stacks of fewer bands than the sensor has, by their number."""

COMPOSITES: dict[str, tuple[str, ...]] = {
    "true-colour": ("red", "green", "blue"),
    "false-colour": ("nir", "red", "green"),
    "agriculture": ("swir1", "nir", "blue"),
    "urban": ("swir2", "swir1", "red"),
    "swir": ("swir2", "nir", "red"),
}

_HINTS = (
    ("sentinel-2", r"(?:^|[_\W])(?:s2[abc]?|sentinel-?2[abc]?)(?=[_\W]|$)|(?:^|_)t\d\d[a-z]{3}_\d{8}t"),
    ("landsat-9", r"(?:^|[_\W])(?:l[cot]09|l9|landsat-?9)(?=[_\W]|$)"),
    ("landsat-8", r"(?:^|[_\W])(?:l[cot]08|l8|landsat-?8)(?=[_\W]|$)"),
    ("landsat-7", r"(?:^|[_\W])(?:le0?7|l7|lsat-?7|landsat-?7)(?=[_\W]|$)"),
    ("naip", r"(?:^|[_\W])naip(?=[_\W]|$)|^m_\d{7}_"),
    ("planet", r"planet|psscene|_3b_|_analyticms"),
)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Bands of a scene, in the order of the model's channels."""

    sensor: str
    places: tuple[int, ...]
    """Numbers among the scene's bands, from 0."""
    names: tuple[str, ...]
    """What each is called here: the sensor's name for it, or the file's."""
    nm: tuple[float | None, ...]
    """Centre wavelengths, where they are known."""
    why: str
    """How they were found, in words."""


@dataclass(frozen=True, kw_only=True)
class _Named:
    """A band of the scene with all that it may be called."""

    place: int
    name: str
    common: str
    nm: float | None

    def __str__(self) -> str:
        extra = [part for part in (self.common, f"{self.nm:g} nm" if self.nm else "") if part]
        return f"{self.place + 1}={self.name}" + (f" ({', '.join(extra)})" if extra else "")


def detect_sensor(bands: Sequence[RasterBand], *, hint: str = "") -> str:
    """Tell the sensor by `hint` (a spacecraft's name in the metadata), file names and names of bands, or "generic"."""
    names = [hint, *dict.fromkeys(PurePath(band.source).stem for band in bands)]
    for sensor, pattern in _HINTS:
        if any(re.search(pattern, name.lower().replace(" ", "-").replace("landsat_", "landsat-")) for name in names):
            count = sum(band.colour != "alpha" for band in bands)
            return "planet-8" if sensor == "planet" and count == 8 else sensor
    return "sentinel-2" if "B8A" in {_code(band.description) for band in bands} else "generic"


def choose_bands(
    bands: Sequence[RasterBand], *, want: str = "auto", sensor: str = "auto", channels: int = 3, hint: str = ""
) -> Chosen:
    """Bands for a model of `channels` channels.

    Args:
        bands: of the scene.
        want: "auto" (red, green and blue for 3 channels, else all bands), "all", a composite ("false-colour"), or one
            item per channel with commas between: a name ("B4", "red"), a wavelength in nm ("665"), or a number of the
            scene's bands, from 1.
        sensor: one of `SENSORS`, or "auto" to tell by the names of files and bands.
        channels: of the model.
        hint: the spacecraft's name in the product's metadata.

    Raises:
        UnknownNameError: no such sensor, composite or band.
        InputError: as many bands as channels cannot be found.
    """
    if sensor not in ("auto", *SENSORS):
        raise UnknownNameError("sensor", sensor, ["auto", *SENSORS])
    known = sensor if sensor != "auto" else detect_sensor(bands, hint=hint)
    named = _name_all(bands, known)
    if want == "auto":
        found, why = _automatic(named, bands, channels)
    elif want == "all":
        found, why = named, "all bands, in order"
    else:
        items = COMPOSITES.get(want) or tuple(part.strip() for part in want.split(","))
        if len(items) == 1 and not _is_item(items[0], named):
            raise UnknownNameError("composite or band", want, [*COMPOSITES, *(one.name for one in named)])
        found, why = [_find(item, named, known) for item in items], f"{want}, as asked"
    if len(found) != channels and not (len(found) == 1 and channels == 3):
        raise InputError(
            f"{len(found)} bands ({', '.join(map(str, found))}) for a model of {channels} channels. "
            f"Fix: name {channels} with --bands, or adapt the model (densedino.adapters.channels)."
        )
    return Chosen(
        sensor=known,
        places=tuple(one.place for one in found),
        names=tuple(one.name for one in found),
        nm=tuple(one.nm for one in found),
        why=why,
    )


def _code(text: str) -> str:
    """A publisher's band number in a name, as "B4" or "B8A"; "" if there is none."""
    found = re.search(r"(?:^|[_\W])(?:SR_B|ST_B|B|Band)[ _]?0*(\d{1,2}A?)(?=[_\W]|$)", text, re.IGNORECASE)
    return f"B{found[1].upper()}" if found else ""


def _name_all(bands: Sequence[RasterBand], sensor: str) -> list[_Named]:
    """The scene's bands without alpha, each with the sensor's name for it."""
    table = {band.name: band for band in SENSORS[sensor]}
    by_common = {band.common: band for band in SENSORS[sensor] if band.common}
    kept = [(place, band) for place, band in enumerate(bands) if band.colour != "alpha"]
    single = len({band.source for _, band in kept}) == len(kept) > 1  # a file per band: the file's name names it
    labels = [band.description or (PurePath(band.source).stem if single else "") for _, band in kept]
    codes = [_code(label) or label for label in labels]
    if not any(code in table or code.lower() in by_common for code in codes):
        order = _ORDERS.get((sensor, len(kept)), range(len(SENSORS[sensor])))
        if len(order) == len(kept):  # an unnamed stack in the publisher's order
            codes = [SENSORS[sensor][n].name for n in order]
    out = []
    for (place, band), code, label in zip(kept, codes, labels, strict=True):
        match = table.get(code) or by_common.get(code.lower())
        common = match.common if match else (code.lower() or band.colour)
        nm = match.nm if match else band.wavelength
        out.append(_Named(place=place, name=match.name if match else label or str(place + 1), common=common, nm=nm))
    return out


def _automatic(named: list[_Named], bands: Sequence[RasterBand], channels: int) -> tuple[list[_Named], str]:
    if channels != 3:
        return named, "all bands, in order"
    colours = {bands[one.place].colour: one for one in reversed(named)}
    commons = {one.common: one for one in reversed(named)}
    for table, why in ((commons, "by name"), (colours, "by the file's colour interpretation")):
        if all(colour in table for colour in COMPOSITES["true-colour"]):
            return [table[colour] for colour in COMPOSITES["true-colour"]], f"red, green, blue {why}"
    if len(named) in (1, 3):
        return named, "the only bands, in order" if len(named) == 3 else "one band, repeated"
    raise InputError(
        f"the scene has {len(named)} bands and nothing says which are red, green and blue: "
        f"{', '.join(map(str, named[:16]))}{', …' if len(named) > 16 else ''}. Fix: --bands 3,2,1 (numbers, names or "
        f"wavelengths in nm), or --sensor ({', '.join(SENSORS)})."
    )


def _is_item(item: str, named: list[_Named]) -> bool:
    return bool(re.fullmatch(r"\d+(\.\d+)?(nm)?", item)) or any(item.lower() in _called(one) for one in named)


def _called(one: _Named) -> set[str]:
    names = {one.name.lower(), one.common.lower()} - {""}
    code = _code(one.name)
    return names | ({code.lower(), re.sub(r"(\d)", r"0\1", code.lower(), count=1)} if code else set())


def _find(item: str, named: list[_Named], sensor: str) -> _Named:
    """The band that an item of `--bands` means."""
    for one in named:
        if item.lower() in _called(one):
            return one
    number = re.fullmatch(r"(\d+(?:\.\d+)?)(nm)?", item)
    if number and not number[2] and item.isdigit() and int(item) < 300:
        for one in named:
            if one.place + 1 == int(item):
                return one
    elif number:
        nm = float(number[1])
        near = min((one for one in named if one.nm), key=lambda one: abs((one.nm or 0) - nm), default=None)
        if near is not None and abs((near.nm or 0) - nm) <= _TOLERANCE:
            return near
    raise InputError(
        f"no band {item!r} among those of this {sensor} scene: {', '.join(map(str, named[:16]))}"
        f"{', …' if len(named) > 16 else ''}. Valid: those names and numbers, or a wavelength in nm up to "
        f"{_TOLERANCE:g} away; another --sensor names them otherwise."
    )
