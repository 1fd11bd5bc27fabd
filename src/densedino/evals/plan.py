"""Owns the plan of an evaluation: what is asked, resolved and checked before anything runs."""

from __future__ import annotations

import runpy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from densedino.config import from_dict, to_dict
from densedino.errors import InputError
from densedino.evals.backbones import View, baselines_of
from densedino.evals.protocol import find_protocol

__all__ = ["Plan", "plan_from_dict", "plan_to_dict", "read_plan", "resolved"]

_USUAL: Any = "usual"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One protocol, one data set, any number of backbones."""

    protocol: str
    """See `evals.protocol.PROTOCOLS`."""
    data: Path
    models: tuple[str, ...] = ("vitt16",)
    """See `evals.backbones.load_backbone`."""
    baselines: bool = False
    """Whether what `baselines_of` says is added to the models."""
    output: Path = Path("eval")
    seeds: int = 5
    """Seeds 0 to this − 1, for what depends on them."""
    limit: int | None = None
    """At most that many images of each split."""
    share: float = 1.0
    """Of the training images, that are learned from: 0.01, 0.05, 0.1 for low-shot."""
    resize: int | tuple[int, int] | str | None = _USUAL
    """See `View`; "usual" for the protocol's own."""
    view: View = field(default_factory=View)
    settings: Any = None
    """Of the protocol's class; its defaults if not given."""


def resolved(plan: Plan) -> Plan:
    """The plan with every default filled in.

    Raises:
        InputError: an unknown protocol, no model or seed, settings of another protocol.
    """
    protocol = find_protocol(plan.protocol)
    settings = protocol.settings() if plan.settings is None else plan.settings
    if not isinstance(settings, protocol.settings):
        raise InputError(
            f"settings of {type(settings).__name__} for protocol {plan.protocol!r}, which has "
            f"{protocol.settings.__module__}.{protocol.settings.__name__}."
        )
    if not plan.models or plan.seeds < 1:
        raise InputError(f"{len(plan.models)} models and {plan.seeds} seeds: at least one of each is needed.")
    if len(set(plan.models)) < len(plan.models):
        raise InputError(f"models {', '.join(plan.models)}: one is named twice.")
    extra = baselines_of(plan.models, supervised=tuple(protocol.supervised)) if plan.baselines else ()
    resize = protocol.resize if plan.resize == _USUAL else plan.resize
    if isinstance(resize, str):
        raise InputError(f"resize is {resize!r}; give None, a number of pixels, (height, width), or 'usual'.")
    return replace(
        plan,
        models=(*plan.models, *extra),
        baselines=False,
        resize=resize,
        view=replace(plan.view, resize=resize),
        settings=settings,
    )


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """A resolved plan for JSON."""
    return {**to_dict(replace(plan, settings=None)), "settings": to_dict(plan.settings)}


def plan_from_dict(data: dict[str, Any]) -> Plan:
    """Inverse of `plan_to_dict`.

    Raises:
        InputError: what no plan has.
    """
    bare = from_dict(Plan, {key: value for key, value in data.items() if key != "settings"})
    return replace(bare, settings=from_dict(find_protocol(bare.protocol).settings, data["settings"]))


def read_plan(path: Path) -> Plan:
    """The plan that a Python file gives: its `plan`, or what its function `plan()` returns. The file is run.

    Raises:
        InputError: no such file, or no plan in it.
    """
    if not path.is_file():
        raise InputError(f"no file {str(path)!r}.")
    found = runpy.run_path(str(path)).get("plan")
    plan = found() if callable(found) else found
    if not isinstance(plan, Plan):
        raise InputError(
            f"{str(path)!r} has no plan. It should say: from densedino.evals.plan import Plan; "
            "plan = Plan(protocol='knn', data=Path('imagenette'), models=('vitt16',), output=Path('RUN'))"
        )
    return plan
