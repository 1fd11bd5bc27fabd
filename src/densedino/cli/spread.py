"""Owns the options that say who does the work: this process, or the workers of a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from densedino.errors import InputError

if TYPE_CHECKING:
    from densedino.features.spread import RayRunner

__all__ = ["SpreadFlags"]


@dataclass(frozen=True, kw_only=True)
class SpreadFlags:
    """Of work that several processes or machines share. Under torchrun each rank does its share, without any option."""

    runner: Literal["local", "ray"] = "local"
    """local, or ray: the same work by the workers of a Ray cluster"""
    ray_address: str | None = None
    """of a running cluster: auto, ray://head:10001; one is started on this machine if not given"""
    workers: int | None = None
    """of Ray, at most; as many as there are cores, or GPUs, if not given"""

    def ray(self) -> RayRunner | None:
        """None for this process.

        Raises:
            InputError: options that do not go together.
        """
        from densedino.features.spread import RayRunner

        if self.runner == "local":
            if self.ray_address is not None or self.workers is not None:
                raise InputError("--ray-address and --workers are for --runner ray; add that, or leave them out.")
            return None
        if self.workers is not None and self.workers < 1:
            raise InputError(f"--workers {self.workers}: give at least 1.")
        return RayRunner(address=self.ray_address, workers=self.workers)
