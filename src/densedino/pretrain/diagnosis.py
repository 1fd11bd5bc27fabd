"""Owns what the meters say in plain words: is it learning, did it collapse, does it need Gram anchoring.

The rules are few and fixed, with their limits here, and in docs/watch.md for the user.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from densedino.pretrain.look_files import LookRecord

__all__ = ["Verdict", "best_dense_look", "gram_verdict", "health"]

Level = Literal["good", "unknown", "watch", "bad"]

ENOUGH = 5
"""Looks before anything is said about a trend, two of them after the best."""
DENSE_FALL = 0.05
"""Share of the best mIoU that must be lost for a fall."""
CLS_FALL = 0.02
"""k-NN accuracy that may be lost meanwhile: if more is, the whole model gets worse and not its patches alone."""
COHERENCE_FALL = 0.15
"""Without masks: the share of coherence that must be lost. Where faults were put into patches of two trained models,
mIoU had then lost 6 to 8 % (benchmarks/patch_meters.py)."""
COLLAPSED_STD = 0.1
"""Feature deviation of a collapse, if it was twice as much before: a fresh network starts near 0."""
COLLAPSED_RANK = 0.05
"""Share of the possible effective rank."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A finding, as a level and a sentence."""

    level: Level
    sentence: str
    reference: int | None = None
    """Step of the look that patches are compared with: where they were best."""


def best_dense_look(looks: Sequence[LookRecord]) -> LookRecord | None:
    """The look at which patches were best: by mIoU if a segmentation probe was there, else by coherence.

    Coherence says nothing of a network that has hardly learnt, as pixels are coherent too: without mIoU the first tenth
    of the steps does not count.
    """
    seen = [look for look in looks if not look.failed]
    if any("miou" in look.measures for look in seen):
        return max((look for look in seen if "miou" in look.measures), key=lambda look: look.measures["miou"])
    learnt = [look for look in seen if look.step >= seen[-1].step / 10 and "coherence" in look.measures]
    return max(learnt, key=lambda look: look.measures["coherence"]) if learnt else None


def gram_verdict(looks: Sequence[LookRecord], *, structure_drift: float, anchored: bool = False) -> Verdict:
    """Whether patches degrade while the rest learns, which Gram anchoring is for (DINOv3 §4).

    Args:
        looks: by step.
        structure_drift: `similarity_drift(...).structure` of the last look from the best one.
        anchored: whether a Gram loss is at work in the present stage.
    """
    seen = [look for look in looks if not look.failed]
    best = best_dense_look(seen)
    if best is None:
        return Verdict(level="unknown", sentence="Too early to say whether patches degrade: nothing was measured yet.")
    after = [look for look in seen if look.step > best.step]
    if len(seen) < ENOUGH:
        text = f"Too early to say whether patches degrade: {len(seen)} of {ENOUGH} looks."
        return Verdict(level="unknown", sentence=text, reference=best.step)
    if len(after) < 2:
        text = f"Patches are at their best now (step {best.step:,}): no need for Gram anchoring so far."
        return Verdict(level="good", sentence=text, reference=best.step)
    if "miou" in best.measures:
        return _by_masks(best, after, structure_drift, anchored)
    return _without_masks(best, after, structure_drift, anchored)


def _recent(looks: Sequence[LookRecord], name: str) -> float:
    values = [look.measures[name] for look in looks[-2:] if name in look.measures]
    return sum(values) / len(values) if values else math.nan


def _by_masks(best: LookRecord, after: Sequence[LookRecord], drift: float, anchored: bool) -> Verdict:
    before, now = best.measures["miou"], _recent(after, "miou")
    change = _recent(after, "knn") - best.measures.get("knn", math.nan)  # NaN compares as no fall
    what = f"since step {best.step:,} mIoU went from {before:.3f} to {now:.3f}"
    what += f", k-NN by {change:+.3f}" if math.isfinite(change) else ""
    what += f", and {drift:.0%} of the patch-similarity structure was lost"
    if now >= before * (1 - DENSE_FALL):
        text = "Gram anchoring holds the patches" if anchored else "Patches hold: no need for Gram anchoring"
        return Verdict(level="good", sentence=f"{text}; {what}.", reference=best.step)
    if change < -CLS_FALL:
        text = f"The whole model gets worse, not its patches alone; {what}. Gram anchoring is not the remedy: look at"
        return Verdict(level="bad", sentence=f"{text} losses, learning rate and collapse first.", reference=best.step)
    if anchored:
        text = f"Patches degrade in spite of Gram anchoring; {what}. Raise its weight, or anchor to step {best.step:,}."
        return Verdict(level="bad", sentence=text, reference=best.step)
    text = f"Patches degrade: {what}. Gram anchoring is needed; take the teacher of about step {best.step:,} for it."
    return Verdict(level="bad", sentence=text, reference=best.step)


def _without_masks(best: LookRecord, after: Sequence[LookRecord], drift: float, anchored: bool) -> Verdict:
    before, now = best.measures["coherence"], _recent(after, "coherence")
    what = f"since step {best.step:,} the coherence of patches went from {before:.3f} to {now:.3f}, and {drift:.0%} of "
    what += "the patch-similarity structure was lost"
    if now < before * (1 - COHERENCE_FALL):
        text = "in spite of Gram anchoring" if anchored else "Gram anchoring may be needed"
        text = (
            f"Patches seem to degrade, {text}: {what}. A folder with masks (monitor.segmentation) would make it sure."
        )
        return Verdict(level="watch", sentence=text, reference=best.step)
    text = f"No sign that patches degrade; {what}. (Without masks this is a weak judgement.)"
    return Verdict(level="good", sentence=text, reference=best.step)


def health(looks: Sequence[LookRecord]) -> Verdict:
    """Whether features collapsed, and whether they got better since the first look."""
    seen = [look for look in looks if not look.failed]
    if not seen:
        return Verdict(level="unknown", sentence="No look at the features was taken yet.")
    first, last = seen[0].measures, seen[-1].measures
    std, rank, limit = (last[name] for name in ("feature_std", "effective_rank", "effective_rank_limit"))
    facts = f"feature deviation {std:.2f} of 1, effective rank {rank:.1f} of at most {limit:.0f}"
    spread = max(look.measures["feature_std"] for look in seen) > 2 * COLLAPSED_STD
    if spread and (std < COLLAPSED_STD or rank < 1 + COLLAPSED_RANK * limit):
        text = f"Features collapse: {facts}. Lower the learning rate, or raise the KoLeo weight."
        return Verdict(level="bad", sentence=text)
    if not spread:
        text = f"Features have not spread yet, as it is in the beginning: {facts}."
        return Verdict(level="unknown" if len(seen) < ENOUGH else "watch", sentence=text)
    probes = [
        f"{label} from {first[name]:.3f} to {last[name]:.3f}"
        for name, label in (("knn", "k-NN"), ("miou", "mIoU"))
        if name in first and name in last
    ]
    if len(seen) > 1 and probes:
        better = any(last[name] > first[name] for name in ("knn", "miou") if name in first and name in last)
        text = "It learns" if better else "It has not got better yet"
        return Verdict(level="good" if better else "watch", sentence=f"{text}: {', '.join(probes)}; {facts}.")
    return Verdict(level="good", sentence=f"No sign of collapse: {facts}.")
