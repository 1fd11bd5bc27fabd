"""Owns getting at the features of a scene that a verb needs: a store that is there, or one made on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from densedino.features.extractor import FeatureExtractor
    from densedino.features.scenes import SceneStore

__all__ = ["scene_store"]


def scene_store(
    scene: Path, *, folder: Path | None, model: str | None, weights: str | None, device: str, precision: str
) -> SceneStore:
    """The store of `scene`: itself, if it is a folder; else `folder` (<scene>_features here), completed if need be.

    Raises:
        DenseDinoError: as `extract_scene`, and as `SceneStore`.
    """
    from densedino.features.scenes import SceneStore

    if scene.is_dir():
        return SceneStore(scene)
    from densedino.cli.scene import SceneFlags, run_scene
    from densedino.features.extractor import load

    folder = folder or type(scene)(f"{scene.stem}_features")
    if folder.is_dir():
        standing = SceneStore(folder)
        if standing.complete and (model, weights) == (None, None) and _made_of(standing, scene):
            return standing

    def dino() -> FeatureExtractor:
        return load(model, weights=weights, device=device, precision=precision)

    run_scene(dino, (str(scene),), out=str(folder), flags=SceneFlags())
    return SceneStore(folder)


def _made_of(store: SceneStore, scene: Path) -> bool:
    """Whether the store is of this file, unchanged since, however it was cut."""
    status = scene.stat()
    first = store.metadata["scene"]["sources"][0]
    found = first.get("path"), first.get("bytes"), first.get("mtime_ns")
    return found == (str(scene.absolute()), status.st_size, status.st_mtime_ns)
