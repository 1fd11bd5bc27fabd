from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from densedino.engines.eager import EagerEngine

if TYPE_CHECKING:
    from densedino.engines.protocol import Engine


def test_engines_say_what_they_are(lively) -> None:
    engine: Engine = EagerEngine(lively("debug_vit"), device=torch.device("cpu"), precision="fp32")
    assert (engine.name, engine.precision, engine.device.type) == ("eager", "fp32", "cpu")
    assert engine.model.stride == 16
