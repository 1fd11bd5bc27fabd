"""Owns `densedino eval`: options, what is said during a run, and the table at its end."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from densedino.cli.options import override, parse_resize
from densedino.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from densedino.evals.plan import Plan

__all__ = ["run"]

_LINE_EVERY = 10.0  # seconds


def run(
    what: Annotated[str, tyro.conf.Positional] = "",
    *,
    data: str | None = None,
    models: str = "vitt16",
    baselines: bool = False,
    out: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None,
    seeds: int = 5,
    limit: int | None = None,
    share: float = 1.0,
    resize: str = "usual",
    window: int | None = None,
    stride: int | None = None,
    layers: tuple[int, ...] = (),
    set: tuple[str, ...] = (),  # noqa: A002 (the option's name)
    device: str = "auto",
    precision: str = "auto",
    workers: int | None = None,
    reproduce: str | None = None,
    tolerance: float = 0.1,
) -> int:
    """Measure how good features are for a task, against baselines, with error bars; anyone can run it again.

    A probe on masks: densedino eval segmentation --data camvid/ --models vitt16,vits16:weights.pth --baselines -o RUN

    Classes by neighbours: densedino eval knn --data imagenette/ --models vitt16 --limit 300 -o RUN

    A plan in Python: densedino eval PLAN.py. The same again, compared: densedino eval --reproduce RUN

    Protocols: knn, linear, logistic, segmentation, depth, retrieval, copies, discovery, keypoints, homography and
    tracking. Run the same command again to go on after an interruption.

    Args:
        what: a protocol, or a Python file with a plan.
        data: the folder of the data set; see docs/evaluate.md for the layouts.
        models: backbones, with commas: vitt16, vits16:weights.pth, vits16:random, timm:NAME, hf:NAME, torchvision:NAME.
        baselines: add the untrained architecture, EfficientNet-Lite0 if installed, raw colours, and a U-Net.
        out: the folder of the run; eval-PROTOCOL if not given.
        seeds: how many, for what depends on them.
        limit: at most so many images of each split.
        share: of the training images that are learned from: 0.01, 0.05, 0.1.
        resize: usual (of the protocol), native, 512 (short side), or 512x768 (height x width).
        window: side of sliding windows, in pixels.
        stride: from one window to the next, in pixels; two thirds of the window if not given.
        layers: blocks whose patches are put side by side; the last one if not given.
        set: settings of the protocol: --set steps=500.
        device: auto, cpu, cuda, mps: of the backbones.
        precision: auto, fp32, bf16.
        workers: processes that train heads; changes no figure.
        reproduce: the folder of a run to do again, into RUN/reproduced or -o.
        tolerance: how far figures may be apart to count as reproduced, in the units of the metric.
    """
    if reproduce is not None:
        return _reproduce(Path(reproduce), data=data, out=out, tolerance=tolerance, workers=workers)
    from densedino.evals.run import evaluate

    if what.endswith(".py"):
        from densedino.evals.plan import read_plan

        plan = read_plan(Path(what))
    else:
        if not what or data is None:
            raise InputError("give a protocol and its data: densedino eval segmentation --data camvid/ -o RUN")
        plan = _plan(what, data, locals())
    _say_results(evaluate(plan, narrator=_Screen(), workers=workers), plan.output)
    return 0


def _plan(what: str, data: str, given: Mapping[str, Any]) -> Plan:
    from densedino.evals.backbones import View
    from densedino.evals.plan import Plan
    from densedino.evals.protocol import find_protocol

    view = View(
        window=given["window"],
        window_stride=given["stride"],
        layers=given["layers"],
        device=given["device"],
        precision=given["precision"],
    )
    return Plan(
        protocol=what,
        data=Path(data),
        models=tuple(name.strip() for name in given["models"].split(",") if name.strip()),
        baselines=given["baselines"],
        output=Path(given["out"] or f"eval-{what}"),
        seeds=given["seeds"],
        limit=given["limit"],
        share=given["share"],
        resize="usual" if given["resize"] == "usual" else parse_resize(given["resize"]),
        view=view,
        settings=override(find_protocol(what).settings(), given["set"]),
    )


def _reproduce(folder: Path, *, data: str | None, out: str | None, tolerance: float, workers: int | None) -> int:
    """Run a folder's plan again and say which numbers match: status 1 if any does not."""
    from dataclasses import replace

    from densedino.evals.plan import plan_from_dict
    from densedino.evals.results import compare
    from densedino.evals.run import evaluate
    from densedino.evals.run_folder import RunFolder, environment

    config, old = RunFolder(folder).read("config.json"), RunFolder(folder).read("results.json")
    if config is None or old is None:
        raise InputError(f"{str(folder)!r} holds no finished evaluation (config.json and results.json).")
    plan = plan_from_dict(config)
    plan = replace(plan, output=Path(out) if out else folder / "reproduced", data=Path(data) if data else plan.data)
    new = evaluate(plan, narrator=_Screen(), workers=workers)
    if old["data"]["manifest_sha256"] != new["data"]["manifest_sha256"]:
        print("The data are not the same: compare the two manifest.jsonl.")
    before, now = RunFolder(folder).read("environment.json"), environment()
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name]:
            print(f"{name}: {before[name]} there, {now[name]} here")
    found = compare(old, new, tolerance=tolerance)
    for line in found.differing:
        print(f"differs    {line}")
    print(
        f"{found.matched} of {found.matched + len(found.differing)} numbers match within {tolerance:g}; the largest "
        f"difference is {found.largest:.2g}. {plan.output / 'results.json'}"
    )
    return 1 if found.differing else 0


def _say_results(results: Mapping[str, Any], output: Path) -> None:
    name = results["headline"]
    print(f"\n{name}, mean ± standard deviation over seeds [95 % interval over images and seeds]")
    for row in results["rows"]:
        metric = row["metrics"][name]
        if metric["mean"] is None:
            print(f"  {row['model']:<24}{row['head']:<12}  –")
            continue
        low, high = metric["interval"]
        print(
            f"  {row['model']:<24}{row['head']:<12}{metric['mean']:8.2f} ± {metric['std']:.2f}  [{low:.2f}, {high:.2f}]"
            f"  {row['seeds']} {'seed' if row['seeds'] == 1 else 'seeds'}"
        )
        if known := row.get("published"):
            ours = row["metrics"][known["metric"]]["mean"]
            print(f"      {known['metric']}: {ours:.3f} here, {known['value']:g} published ({known['source']})")
    print(f"Report: {output / 'report.html'}; numbers: {output / 'results.json'}")


class _Screen:
    """Lines on stderr: what begins, and now and then how far it is."""

    def say(self, text: str) -> None:
        """One line."""
        print(text, file=sys.stderr, flush=True)

    def begin(self, what: str, total: int) -> Callable[[int], None]:
        """Say rate and remaining time every ten seconds."""
        start = said = time.perf_counter()
        done = 0

        def advance(count: int) -> None:
            nonlocal done, said
            done += count
            now = time.perf_counter()
            if done < total and now - said < _LINE_EVERY:
                return
            said = now
            rate = done / max(now - start, 1e-9)
            left = f", {(total - done) / max(rate, 1e-9):,.0f} s left" if done < total else ""
            self.say(f"progress   {what}: {done:,} of {total:,}, {rate:.2g} a second{left}")

        self.say(f"begin      {what}: {total:,}")
        return advance
