"""densedino: DINOv3 as software you can install. Images in, correct dense features out.

Nothing heavy is imported until it is used: `import densedino` takes milliseconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from densedino.adapters.adapt import adapt
    from densedino.adapters.adapted import Adapter, load_adapter
    from densedino.features.extract import extract
    from densedino.features.extractor import FeatureExtractor
    from densedino.features.scenes import SceneStore
    from densedino.features.store import FeatureStore
    from densedino.features.tokens import Features
    from densedino.heads.catalog import list_heads
    from densedino.images.transforms import Transform
    from densedino.models.catalog import create_model, list_models
    from densedino.tasks.loading import load
    from densedino.weights.catalog import list_weights

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "densedino.adapters.adapted",
    "FeatureExtractor": "densedino.features.extractor",
    "FeatureStore": "densedino.features.store",
    "Features": "densedino.features.tokens",
    "SceneStore": "densedino.features.scenes",
    "Transform": "densedino.images.transforms",
    "adapt": "densedino.adapters.adapt",
    "create_model": "densedino.models.catalog",
    "extract": "densedino.features.extract",
    "list_heads": "densedino.heads.catalog",
    "list_models": "densedino.models.catalog",
    "list_weights": "densedino.weights.catalog",
    "load": "densedino.tasks.loading",
    "load_adapter": "densedino.adapters.adapted",
}

__all__ = [
    "Adapter",
    "FeatureExtractor",
    "FeatureStore",
    "Features",
    "SceneStore",
    "Transform",
    "adapt",
    "create_model",
    "extract",
    "list_heads",
    "list_models",
    "list_weights",
    "load",
    "load_adapter",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'densedino' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
