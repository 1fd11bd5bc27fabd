"""Owns what a run leaves: the teacher's backbone as one file that `densedino.load` takes, with its card."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

import densedino
from densedino.checkpoint import atomic_path
from densedino.distributed import rank
from densedino.errors import InputError
from densedino.models.catalog import MODELS
from densedino.pretrain.parallel import whole
from densedino.weights.card import WeightsCard
from densedino.weights.catalog import WEIGHTS
from densedino.weights.convert import write_weights
from densedino.weights.identity import CARD_KEY
from densedino.weights.loading import read_weights

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn

    from densedino.pretrain.settings import RunConfig

__all__ = ["OWN_LICENCE", "check_starts", "is_loadable", "origin_of", "outcome_card", "write_outcome"]

OWN_LICENCE = "its trainer's to choose"
"""Of weights that began as random numbers."""


def is_loadable(config: RunConfig) -> bool:
    """Whether `densedino.load` knows the architecture: it tells it by the table, not by what a file says."""
    return MODELS.get(config.spec.name) == config.spec


def origin_of(start: str) -> WeightsCard | None:
    """The card of the weights that `StageConfig.start` names; None if it names none."""
    if start in ("random", "previous"):
        return None
    named = start in MODELS or start in WEIGHTS
    return read_weights(start if named else None, weights=None if named else start)[1]


def check_starts(config: RunConfig) -> None:
    """See that all weights which the stages want are there and of the run's model, before anything is trained.

    Raises:
        InputError: weights of another architecture than the run's, also of a Gram teacher.
        WeightsError: they cannot be had; see `load_weights`.
    """
    grams = [stage.losses.gram.checkpoint for stage in config.stages if stage.losses.gram is not None]
    for start in [*(stage.start for stage in config.stages), *filter(None, grams)]:
        card = origin_of(start)
        if card is not None and card.model != config.spec.name:
            raise InputError(
                f"{card.source} holds a {card.model}, but the run trains a {config.spec.name}. Set"
                f" model={card.model!r}, or start from weights of the model."
            )


def write_outcome(
    backbone: nn.Module,
    path: Path,
    *,
    config: RunConfig,
    pictures: Sequence[tuple[str, int]],
    origin: WeightsCard | None,
) -> Path:
    """Write a backbone with its card. Every process calls it, as parameters may be sharded; process 0 writes.

    Args:
        backbone: the EMA teacher's.
        path: of the .safetensors file; what is there is replaced. Of an architecture that is not in the table, the
            file holds the state dict as it is: `torch` and `safetensors` read it, `densedino.load` does not.
        config: of the run.
        pictures: name and number of pictures of each source.
        origin: card of the weights that the run started from; None if from random numbers.
    """
    state = {name: whole(value).detach() for name, value in backbone.state_dict().items()}
    if rank() == 0:
        card = outcome_card(config, pictures=pictures, origin=origin)
        if is_loadable(config):
            write_weights(state, path, card=card)
        else:
            with atomic_path(path) as scratch:
                save_file({k: v.cpu().contiguous() for k, v in state.items()}, scratch, metadata=_metadata(card))
    return path


def _metadata(card: WeightsCard) -> dict[str, str]:
    return {CARD_KEY: json.dumps(card.to_dict(), ensure_ascii=False, sort_keys=True)}


def outcome_card(config: RunConfig, *, pictures: Sequence[tuple[str, int]], origin: WeightsCard | None) -> WeightsCard:
    """What is known about the weights that a run ends with."""
    crops = config.stages[-1].resolutions[0].crops
    data = ", ".join(f"{name} ({count:,} pictures)" for name, count in pictures)
    stages = ", ".join(f"{stage.name} ({stage.steps:,} steps of {stage.batch_size})" for stage in config.stages)
    seen = sum(stage.steps * stage.batch_size for stage in config.stages)
    notes = [f"trained by densedino {densedino.__version__}: {stages}; {seen:,} pictures seen; seed {config.seed}"]
    licence: dict[str, Any] = {"licence": OWN_LICENCE, "licence_url": ""}
    if origin is not None:
        notes.append(f"started from {origin.name}, {origin.source}, SHA-256 {origin.sha256}")
        licence = {"licence": origin.licence, "licence_url": origin.licence_url}
        data += f"; before that, {origin.data}" if not origin.untrained else ""
    return WeightsCard(
        name=config.spec.name,
        model=config.spec.name,
        source="densedino pretrain",
        sha256="",
        mean=crops.mean,
        std=crops.std,
        in_chans=config.in_chans,
        data=data,
        dialect="densedino",
        untrained=False,
        notes=tuple(notes),
        **licence,
    )
