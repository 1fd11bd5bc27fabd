"""Owns how what a search found is shown: as lines, as CSV, as a sheet of pictures."""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

from densedino.checkpoint import atomic_path
from densedino.errors import ImageError
from densedino.features.pictures import Picture
from densedino.features.sheet import Row, draw_sheet, save_png
from densedino.images.decoding import read_image

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from densedino.features.scenes import SceneStore
    from densedino.features.search import Found

__all__ = ["draw_found", "lines_of", "read_photo", "write_csv", "write_geojson"]

Box = tuple[float, float, float, float]

_CELL = 224
_ACROSS = 5
_PAPER, _LINE, _GONE = (255, 255, 255), (255, 196, 0), (200, 200, 204)


def lines_of(found: Sequence[Found]) -> list[str]:
    """One line for each, under a heading, in columns."""
    rows = [("rank", "score", "x,y,w,h", "image")]
    for rank, one in enumerate(found, start=1):
        rows.append((str(rank), f"{one.score:.4f}", ",".join(f"{number:.0f}" for number in one.box), one.key))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return ["  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]) for row in rows]


def write_csv(found: Sequence[Found], path: Path) -> None:
    """Write rank, score, box (pixels of the source), patches and key, whole or not at all."""
    with atomic_path(path) as work, work.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["rank", "score", "x", "y", "width", "height", "patches", "key"])
        for rank, one in enumerate(found, start=1):
            writer.writerow([rank, f"{one.score:.6f}", *one.box, one.patches, one.key])


def write_geojson(found: Sequence[Found], store: SceneStore, path: Path) -> None:
    """Write the boxes found in a scene as polygons in its coordinates, whole or not at all.

    The member `crs` names the scene's coordinate system, as GDAL writes and QGIS reads it; a scene without one is in
    pixels, y down.
    """
    a, b, c, d, e, f = store.affine
    features = []
    for rank, one in enumerate(found, start=1):
        x, y, width, height = (side / store.stride for side in one.box)
        corners = [(x, y), (x, y + height), (x + width, y + height), (x + width, y), (x, y)]
        ring = [[a * col + b * row + c, d * col + e * row + f] for col, row in corners]
        facts = {"rank": rank, "score": round(one.score, 6), "patches": one.patches}
        features.append(
            {"type": "Feature", "properties": facts, "geometry": {"type": "Polygon", "coordinates": [ring]}}
        )
    collection: dict[str, Any] = {"type": "FeatureCollection", "name": "search", "features": features}
    if store.crs:
        collection["crs"] = {"type": "name", "properties": {"name": store.crs}}
    with atomic_path(path) as work:
        work.write_text(json.dumps(collection), encoding="utf-8")


def read_photo(path: str) -> Image.Image | None:
    """The picture as RGB of 8 bits; None if it is gone or no longer a picture."""
    try:
        pixels = read_image(path)
    except (ImageError, OSError):
        return None
    array = pixels.array.astype("float32") * (255 / pixels.max_value)
    return Image.fromarray(array.round().clip(0, 255).astype("uint8"))


def draw_found(
    found: Sequence[Found],
    path: Path,
    *,
    query: tuple[Image.Image | None, Box | None, str],
    heading: str,
    alarm: str = "",
    photo: Callable[[str], Image.Image | None] = read_photo,
) -> None:
    """Draw the query and what was found, best first, as one PNG; boxes are framed.

    Args:
        found: of a search.
        path: of the PNG.
        query: what was searched with: its picture, the box in it, and what it is called.
        heading: what stands on top.
        alarm: what must not be overlooked.
        photo: how a source is read.
    """
    image, box, title = query
    cells = [_cell(image, box)]
    titles = [f"query: {title}"]
    for rank, one in enumerate(found, start=1):
        cells.append(_cell(photo(one.source), one.box if one.patches else None))
        titles.append(f"{rank}: {one.score:.3f} {one.key.rpartition('/')[2]}")
    blank = (-len(cells)) % _ACROSS
    cells += [Image.new("RGB", (_CELL, _CELL), _PAPER)] * blank
    titles += [""] * blank
    rows = []
    for start in range(0, len(cells), _ACROSS):
        pictures = [Picture(image=cells[i], title=titles[i]) for i in range(start + 1, start + _ACROSS)]
        rows.append(Row(photo=cells[start], caption=(titles[start], ""), pictures=pictures))
    save_png(
        draw_sheet(rows, heading=heading, alarm=alarm), path, facts={"Comment": "; ".join(titles[: -blank or None])}
    )


def _cell(image: Image.Image | None, box: Box | None) -> Image.Image:
    """A picture within a square, the box framed."""
    cell = Image.new("RGB", (_CELL, _CELL), _GONE if image is None else _PAPER)
    if image is None:
        return cell
    scale = _CELL / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    corner = ((_CELL - size[0]) // 2, (_CELL - size[1]) // 2)
    cell.paste(image.resize(size, Image.Resampling.LANCZOS), corner)
    if box is not None:
        x, y, width, height = (side * scale for side in box)
        frame = [corner[0] + x, corner[1] + y, corner[0] + x + max(width, 2), corner[1] + y + max(height, 2)]
        draw = ImageDraw.Draw(cell)
        draw.rectangle(frame, outline=(0, 0, 0), width=4)
        draw.rectangle([frame[0] + 1, frame[1] + 1, frame[2] - 1, frame[3] - 1], outline=_LINE, width=2)
    return cell
