"""Owns watching a run while it trains: TensorBoard, looks at the teacher, and the report, none of which disturbs it.

It draws no random numbers and changes no weights, so a run with and without it is the same run. What goes wrong here is
announced and recorded, and the run goes on.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densedino.distributed import rank
from densedino.errors import require
from densedino.pretrain.diagnosis import best_dense_look
from densedino.pretrain.look_files import LookRecord, read_looks, read_patches, write_fixed, write_look
from densedino.pretrain.looks import Look, Observer
from densedino.pretrain.meters import similarity_drift
from densedino.pretrain.run_data import flat_numbers
from densedino.pretrain.training_report import write_report

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from densedino.pretrain.settings import RunConfig
    from densedino.pretrain.sources import Source

__all__ = ["Monitor"]

REPORT_SECONDS = 60.0
"""Between reports, at least; and twenty times what one took to write."""
LOOKS = 20
"""Of a run, where their number is not given."""


class Monitor:
    """Watches one run. Every process has one and calls it alike; process 0 writes.

    Args:
        run: the run's folder.
        config: of the run.
        sources: the training images.
        step: optimizer steps already taken, where a run goes on.
        announce: is told, in a sentence, what went wrong.

    Raises:
        InputError: a probe's folder has no usable layout; before any training, as it should be.
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        config: RunConfig,
        *,
        sources: Sequence[Source],
        step: int = 0,
        announce: Callable[[str], None] = print,
    ) -> None:
        self.run, self.announce = Path(run), announce
        self.total_steps = sum(stage.steps for stage in config.stages)
        self.every = config.monitor.look_every or max(1, -(-self.total_steps // LOOKS))
        crops = config.stages[0].resolutions[0].crops
        self.rgb = crops.rgb
        sizes = next((look.sizes for look in reversed(read_looks(self.run)) if look.sizes), None)
        self.observer = Observer(
            config.monitor,
            sources=sources,
            mean=crops.mean,
            std=crops.std,
            max_value=config.data.max_value,
            stride=config.spec.stride,
            sizes=sizes,
        )
        watched = config.monitor.tensorboard and rank() == 0
        self._writer = _tensorboard(self.run / "tensorboard", step) if watched else None
        self._reported, self._report_took = time.monotonic(), 0.0

    def is_due(self, step: int) -> bool:
        """Whether to look once `step` optimizer steps were taken: before the first, at intervals, after the last."""
        return step % self.every == 0 or step == self.total_steps

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take note of numbers (nested mappings are fine) that were logged after `step` steps."""
        self._to_tensorboard(step, dict(flat_numbers(metrics)))
        if time.monotonic() - self._reported > max(REPORT_SECONDS, 20 * self._report_took):
            self.report()

    def look(self, step: int, backbone: nn.Module, *, stage: str) -> LookRecord:
        """Look at `backbone`, the teacher's, after `step` steps, and write what is seen; also the report.

        Returns:
            What was written: with measures, or with the reason why there are none.
        """
        start = time.monotonic()
        try:
            look = self.observer.look(backbone)
            measures = look.measures | self._drifts(step, stage, look)
            record = LookRecord(
                step=step,
                stage=stage,
                seconds=time.monotonic() - start,
                measures=measures,
                names=look.names,
                grid=tuple(look.patches.shape[1:3]),
                sizes=self.observer.sizes,
            )
            if rank() == 0:
                write_fixed(self.run, self.observer.fixed(), rgb=self.rgb)
                write_look(self.run, record, patches=look.patches)
        except Exception as error:  # whatever it is, it is no reason to lose the run
            record = LookRecord(step=step, stage=stage, failed=f"{type(error).__name__}: {error}")
            self._try(lambda: write_look(self.run, record))
            if rank() == 0:
                self.announce(f"the look at step {step:,} failed: {record.failed}")
        self._to_tensorboard(step, {f"look/{name}": value for name, value in record.measures.items()})
        self.report()
        return record

    def report(self) -> None:
        """Write `report.html` and `report.png` of what there is."""
        start = time.monotonic()
        self._try(lambda: write_report(self.run))
        self._reported = time.monotonic()
        self._report_took = self._reported - start

    def close(self) -> None:
        """Write the last report, and end TensorBoard's file."""
        self.report()
        if self._writer is not None:
            self._writer.close()

    def _drifts(self, step: int, stage: str, look: Look) -> dict[str, float]:
        """How far patches are from those of the stage's first look, and of the best look before this one."""
        earlier = [
            record
            for record in read_looks(self.run)
            if not record.failed
            and record.step < step
            and (record.names, record.grid) == (look.names, tuple(look.patches.shape[1:3]))
        ]
        first = next((record for record in earlier if record.stage == stage), None)
        found: dict[str, float] = {}
        for name, reference in (("stage_start", first), ("best", best_dense_look(earlier))):
            if reference is not None:
                then = read_patches(self.run, reference.step).flatten(1, 2)
                drift = similarity_drift(look.patches.flatten(1, 2), then)
                found |= {f"drift_from_{name}": drift.structure, f"gram_distance_from_{name}": drift.distance}
        return found

    def _to_tensorboard(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._writer is not None:
            for name, value in numbers.items():
                if name != "step":
                    self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def _try(self, write: Callable[[], object]) -> None:
        if rank() != 0:
            return
        try:
            write()
        except Exception as error:  # a full disk, say; the run's own files complain for themselves
            self.announce(f"the report could not be written: {type(error).__name__}: {error}")


def _tensorboard(folder: Path, step: int) -> Any:
    """A writer that hides what an earlier process wrote of later steps; None if tensorboard is not installed."""
    try:
        require("tensorboard", extra="train", purpose="writing TensorBoard files")
    except ImportError:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
