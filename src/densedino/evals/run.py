"""Owns a whole evaluation: data, features, jobs in processes, results; it goes on where it was stopped."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from typing import Protocol as Interface

import torch

from densedino.errors import InputError
from densedino.evals.backbones import dense_layers, load_backbone, slug_of
from densedino.evals.datasets import few, limited, manifest
from densedino.evals.plan import Plan, plan_to_dict, resolved
from densedino.evals.protocol import Task, find_protocol
from densedino.evals.report import write_report
from densedino.evals.results import results_of
from densedino.evals.run_folder import RunFolder
from densedino.evals.tokens import Tokens, extract_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from densedino.evals.datasets import Dataset
    from densedino.evals.protocol import Protocol

__all__ = ["Job", "Narrator", "evaluate", "run_job"]

SUPERVISED = "end to end"
"""The head of networks that have no features."""

SUPERVISED_SEEDS = 3
"""At most, of those: each takes minutes where a head takes seconds."""


class Narrator(Interface):
    """Who is told how far a run is."""

    def say(self, text: str) -> None:
        """One line."""

    def begin(self, what: str, total: int) -> Callable[[int], None]:
        """Something long begins; the returned function is called with how many of `total` are done more."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One head with one seed on the features of one backbone."""

    plan: Plan
    data: Dataset
    model: str
    head: str
    seed: int

    @property
    def name(self) -> str:
        """For lines on the screen."""
        return f"{self.model} {self.head} seed {self.seed}"

    @property
    def path(self) -> Path:
        """Where its scores go."""
        folder = RunFolder(self.plan.output)
        return folder.scores_path(slug_of(self.model), self.head.replace(" ", "_"), self.seed)


def evaluate(plan: Plan, *, narrator: Narrator, workers: int | None = None) -> dict[str, Any]:
    """Run a plan, or the rest of it, and return what stands in its `results.json`.

    Args:
        plan: what to do; its `output` is made, or must hold the same plan.
        narrator: is told what happens.
        workers: processes that train heads; as many as PyTorch has threads if not given, and 0 for none. It changes
            no figure: every job runs on one thread.

    Raises:
        InputError: anything in the plan or the data that cannot be used; the message names the file.
    """
    plan = resolved(plan)
    with RunFolder(plan.output).alone():
        return _evaluate(plan, narrator, workers=torch.get_num_threads() if workers is None else workers)


def _evaluate(plan: Plan, narrator: Narrator, *, workers: int) -> dict[str, Any]:
    protocol = find_protocol(plan.protocol)
    folder = RunFolder(plan.output)
    data = limited(protocol.find(plan.data), plan.limit)
    check_split(data, plan, protocol)
    digest = folder.begin(plan_to_dict(plan), manifest(data))
    narrator.say(f"data       {data.layout}: {len(data.train):,} to learn from, {len(data.test):,} to judge on")
    _extract_all(plan, protocol, data, folder, narrator)
    jobs = [job for job in jobs_of(plan, protocol, data) if not job.path.is_file()]
    _run_all(jobs, narrator, workers=workers)
    done = {(job.model, job.head, job.seed): folder.load_scores(job.path) for job in jobs_of(plan, protocol, data)}
    named = {model: one["weights"]["name"] for model, one in folder.read("models.json").items() if "weights" in one}
    results = results_of(plan, protocol, data, done, manifest_sha256=digest, weights=named)
    folder.write("results.json", results)
    write_report(folder, results)
    narrator.say(f"report     {plan.output / 'report.html'}")
    return results


def check_split(data: Dataset, plan: Plan, protocol: Protocol) -> None:
    """Refuse data that cannot tell anything.

    Raises:
        InputError: an empty split, or one image in both.
    """
    if not data.test or (protocol.learns and not data.train):
        raise InputError(
            f"{str(plan.data)!r} has {len(data.train)} images to learn from, {len(data.test)} to judge on."
        )
    both = {sample.key for sample in data.train} & {sample.key for sample in data.test}
    if protocol.learns and both:
        raise InputError(f"{min(both)!r} is in both splits of {str(plan.data)!r}.")


def jobs_of(plan: Plan, protocol: Protocol, data: Dataset) -> Iterator[Job]:
    """All jobs of a resolved plan, networks first, as they take longest."""
    for model in sorted(plan.models, key=lambda model: model not in protocol.supervised):
        trained = model in protocol.supervised
        for head in (SUPERVISED,) if trained else protocol.heads(plan.settings):
            drawn = trained or head in protocol.random_heads or (protocol.learns and plan.share < 1)
            most = SUPERVISED_SEEDS if trained else plan.seeds
            for seed in range(min(plan.seeds, most) if drawn else 1):
                yield Job(plan=plan, data=data, model=model, head=head, seed=seed)


def _extract_all(plan: Plan, protocol: Protocol, data: Dataset, folder: RunFolder, narrator: Narrator) -> None:
    known: dict[str, Any] = folder.read("models.json") or {}
    for model in plan.models:
        if model in protocol.supervised:
            known[model] = {"trained": "end to end on the training images of this run"}
            continue
        dino = load_backbone(model, plan.view)
        known[model] = {
            "weights": dino.card.to_dict(),
            "transform": dino.transform.to_dict(),
            "precision": dino.precision,
            "engine": dino.engine.name,
            "stride": dino.model.stride,
            "dense_layers": list(dense_layers(model, plan.view)) or "last, after its norm",
            "parameters": sum(parameter.numel() for parameter in dino.model.parameters()),
            "fingerprint": dino.fingerprint,
        }
        folder.write("models.json", known)
        advance = narrator.begin(f"features of {model}", len(data.samples))
        store = plan.output / "features" / slug_of(model)
        extract_tokens(dino, data, output=store, layers=dense_layers(model, plan.view), advance=advance)
    folder.write("models.json", known)


def run_job(job: Job) -> float:
    """Do one job in this process and keep its scores; the seconds it took."""
    start = time.perf_counter()
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # so that figures do not depend on how many there are
    try:
        protocol = find_protocol(job.plan.protocol)
        trained = job.model in protocol.supervised
        store = job.plan.output / "features" / slug_of(job.model)
        task = Task(
            data=job.data,
            train=few(job.data.train, job.plan.share, seed=job.seed) if protocol.learns else job.data.train,
            tokens=None if trained else Tokens(store, layers=dense_layers(job.model, job.plan.view)),
            seed=job.seed,
            settings=job.plan.settings,
        )
        scores = protocol.supervised[job.model](task) if trained else protocol.evaluate(job.head, task)
        RunFolder(job.plan.output).save_scores(job.path, scores, lambda sums: protocol.figures(sums, task.settings))
    finally:
        torch.set_num_threads(before)
    return time.perf_counter() - start


def _end_with_parent() -> None:
    """End this worker when the run is gone, even by kill -9; an interrupt from the terminal is the run's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_all(jobs: list[Job], narrator: Narrator, *, workers: int) -> None:
    if not jobs:
        return
    advance = narrator.begin("heads and seeds", len(jobs))
    if workers < 2 or len(jobs) == 1:
        for job in jobs:
            narrator.say(f"done       {job.name}, {run_job(job):.0f} s")
            advance(1)
        return
    context = multiprocessing.get_context("spawn")  # neither Lance nor threads live through a fork
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_end_with_parent) as pool:
        futures = {pool.submit(run_job, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                narrator.say(f"done       {futures[future].name}, {math.ceil(future.result())} s")
                advance(1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
