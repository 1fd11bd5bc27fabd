"""Owns `densedino doctor`: runs the checks, prints what they found and how to mend it. Exit status 1 if one failed."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 (tyro reads the annotations)
from typing import TYPE_CHECKING, Any

from densedino.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from densedino.features.machine import Speed
    from densedino.features.selftest import Check

__all__ = ["run"]

_STYLE = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}
_ESTIMATED = ("vits16", "vitb16", "vitl16")


def run(*, weights: str | None = None, image: Path | None = None, quick: bool = False, json: bool = False) -> int:
    """Check this installation: what is here, whether it computes the right numbers, how fast.

    The exit status is 1 if a check failed. With released weights and the image of which the right values were
    published: densedino doctor --weights dinov3_vits16_pretrain_lvd1689m-08c60483.pth --image 000000039769.jpg

    Args:
        weights: a checkpoint to check: a file, an https:// URL, a hub id.
        image: COCO's val2017/000000039769.jpg, to compare the features of --weights with published ones.
        quick: leave out the measurement of speed.
        json: print everything as one JSON object.
    """
    if image is not None and weights is None:
        raise InputError("--image is compared with what --weights gives; give both.")

    from densedino.features import selftest
    from densedino.features.machine import EXTRAS, environment, measure_speed

    facts = environment()
    checks = selftest.run_checks()
    if weights is not None:
        checks += selftest.check_released(weights, image)
    speed = None if quick else measure_speed()
    failed = any(check.status == "failed" for check in checks)
    if json:
        _print_json(
            {
                "environment": facts,
                "extras": {extra.name: extra.versions() for extra in EXTRAS},
                "checks": [check.to_dict() for check in checks],
                "speed": speed.to_dict() if speed else None,
                "healthy": not failed,
            }
        )
    else:
        _print_report(facts, checks, speed)
    return 1 if failed else 0


def _print_json(report: dict[str, Any]) -> None:
    import json

    print(json.dumps(report, indent=2))


def _print_report(facts: dict[str, str], checks: list[Check], speed: Speed | None) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)  # a pipe gets whole lines
    _section(console, "This machine", list(facts.items()))
    _print_extras(console)
    _print_checks(console, checks)
    if speed:
        _section(console, "Speed", _speed_rows(speed))
    failed = sum(check.status == "failed" for check in checks)
    if failed:
        console.print(f"[bold red]{failed} of {len(checks)} checks failed[/]; each says above how to mend it.")
    else:
        console.print(f"[green]Nothing failed[/] in {len(checks)} checks.")


def _section(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))  # Text: square brackets are no markup
    console.print(f"[bold]{title}[/]")
    console.print(table)
    console.print()


def _print_extras(console: Console) -> None:
    from densedino.features.machine import EXTRAS

    rows = []
    for extra in EXTRAS:
        versions = extra.versions()
        have = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        missing = [name for name, version in versions.items() if version is None]
        state = f"{extra.enables}: {have or 'not installed'}"
        rows.append((extra.name, state + (f"; for {', '.join(missing)}: {extra.command}" if missing else "")))
    _section(console, "Optional parts", rows)


def _print_checks(console: Console, checks: list[Check]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for check in checks:
        found = Text(check.found)
        if check.fix:
            found.append(f"\nFix: {check.fix}", style="bold")
        table.add_row(Text(check.status, style=_STYLE[check.status]), check.name, found)
    console.print("[bold]Checks[/]")
    console.print(table)
    console.print()


def _speed_rows(speed: Speed) -> list[tuple[str, str]]:
    from densedino.models.catalog import MODELS
    from densedino.models.counts import multiplications

    products = ", ".join(f"{rate:,.0f} GFLOP/s in {name}" for name, rate in speed.matmul_gflops.items())
    own = multiplications(MODELS[speed.model])
    others = ", ".join(
        f"{name} {speed.images_per_second * own / multiplications(MODELS[name]):,.1f}" for name in _ESTIMATED
    )
    busy = [("but", "other programs keep this machine busy; it is faster when idle")] if speed.busy else []
    return [
        ("matrix product", f"{products}, on {speed.device}"),
        (speed.model, f"{speed.images_per_second:,.1f} images/s at 224×224 in {speed.precision}, without decoding"),
        ("by arithmetic", f"at least about {others} images/s"),
        *busy,
    ]
