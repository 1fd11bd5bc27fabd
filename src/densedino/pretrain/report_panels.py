"""Owns what the report of a run shows: verdicts, and charts in panels, made of the run's data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from densedino.pretrain.charts import Chart, Series
from densedino.pretrain.diagnosis import Verdict, gram_verdict, health

if TYPE_CHECKING:
    from collections.abc import Sequence

    from densedino.pretrain.run_data import RunData

__all__ = ["Panel", "panels", "verdicts"]

_NAMES = {
    "dino": "DINO",
    "ibot": "iBOT",
    "koleo": "KoLeo",
    "gram": "Gram",
    "lr": "learning rate",
    "last layer lr": "learning rate of prototypes",
    "dino head": "DINO head",
    "ibot head": "iBOT head",
}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Charts that belong together."""

    title: str
    text: str
    charts: Sequence[Chart]


def verdicts(run: RunData) -> list[Verdict]:
    """What the run's meters say: about learning, about patches, about trouble."""
    anchored = any(series.label == "gram" and series.values[-1] for series in run.logged("losses"))
    drift = run.drifts.from_reference[-1] if run.drifts else 0.0
    found = [health(run.looks), gram_verdict(run.looks, structure_drift=drift, anchored=anchored)]
    skipped = sum(1 for line in run.metrics if line.get("finite") == 0)
    trouble = [
        _count(
            skipped,
            "logged step was not finite and changed nothing",
            "logged steps were not finite and changed nothing",
        ),
        _count(
            len(run.quarantine), "file could not be read and was replaced", "files could not be read and were replaced"
        ),
        _count(sum(1 for look in run.looks if look.failed), "look failed", "looks failed"),
    ]
    text = "; ".join(filter(None, trouble))
    found.append(
        Verdict(level="watch" if text else "good", sentence=f"{text or 'No step was skipped, no file was unreadable'}.")
    )
    return found


def panels(run: RunData) -> list[Panel]:
    """All charts, in the order of what a reader asks; what was never measured is left out."""

    def looked(
        title: str, note: str, labels: dict[str, str], *, floor: float | None = None, marked: bool = False
    ) -> Chart:
        return _chart(run, title, note, run.measured(labels), floor=floor, marked=marked, dots=True)

    def each(prefix: str, title: str, note: str = "", *, floor: float | None = None, log: bool = False) -> list[Chart]:
        named = ((series, title.format(_spelt(series.label))) for series in run.logged(prefix))
        return [
            _chart(run, name, note, [replace(series, label="")], floor=floor, log=log)
            for series, name in (
                (series, name if name.startswith("iBOT") else name[:1].upper() + name[1:]) for series, name in named
            )
        ]

    drift = [Series(label="", steps=run.drifts.steps, values=run.drifts.from_reference)] if run.drifts else []
    learn = [
        looked("k-NN accuracy", "higher is better", {"knn": "weighted", "knn_majority": "plain"}),
        looked("Segmentation mIoU", "higher is better", {"miou": ""}, marked=True),
        looked("Effective rank", "low: features collapse", {"effective_rank": ""}, floor=0),
        looked("Feature deviation", "0: collapsed, 1: all directions alike", {"feature_std": ""}, floor=0),
    ]
    patches = [
        _chart(run, "Drift", "patch structure lost since the best look", drift, floor=0, marked=True, dots=True),
        looked("Coherence", "of neighbours; falls if patches degrade", {"coherence": ""}, marked=True),
        looked("Near and far patches", "mean cosine", {"near_cosine": "near", "far_cosine": "far"}, marked=True),
        looked("CLS and patches", "mean cosine; rises in long training", {"cls_patch_cosine": ""}, marked=True),
    ]
    losses = sorted(each("losses", "{} loss"), key=lambda chart: chart.title != "Total loss")
    losses += each("prototype_entropy", "Prototype entropy, {}", "of 1; near 0: few prototypes are used")
    steps = each("grad_norms", "Gradient norm, {}", "before clipping", log=True) + each("values", "{}", floor=0)
    steps += each("images_per_second", "Images per second", floor=0)
    found = [
        Panel(title="Does it learn?", text="The teacher, measured on the same images at every look.", charts=learn),
        Panel(title="Do patches hold?", text="The upright line marks the look where they were best.", charts=patches),
        Panel(title="Losses", text="Mean and range of the logged steps.", charts=losses),
        Panel(title="Steps", text="Gradients, schedules and speed.", charts=steps),
    ]
    kept = [replace(panel, charts=[c for c in panel.charts if any(s.values for s in c.series)]) for panel in found]
    return [panel for panel in kept if panel.charts]


def _chart(
    run: RunData,
    title: str,
    note: str,
    series: Sequence[Series],
    *,
    floor: float | None = None,
    log: bool = False,
    marked: bool = False,
    dots: bool = False,
) -> Chart:
    return Chart(
        title=title,
        note=note,
        series=series,
        span=(0.0, float(max(run.stages[-1][2], run.step))),
        stages=[float(start) for _, start, _ in run.stages[1:]],
        marked=run.drifts.reference if marked and run.drifts else None,
        floor=floor,
        log=log,
        dots=dots,
    )


def _count(n: int, one: str, many: str) -> str:
    return f"{n:,} {one if n == 1 else many}" if n else ""


def _spelt(label: str) -> str:
    return _NAMES.get(label) or " ".join(_NAMES.get(word, word) for word in label.split())
