"""Owns `report.html` and its plot: what a run found, on one page that loads nothing."""

from __future__ import annotations

import json
from html import escape
from typing import TYPE_CHECKING, Any

from densedino.checkpoint import atomic_path

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from densedino.evals.run_folder import RunFolder

__all__ = ["draw_plot", "render", "write_report"]

_CSS = """
:root{color-scheme:light dark;--ground:#fbfbfa;--ink:#1c1e21;--faint:#6b7177;--line:#e2e5e8;--mark:#0072b2}
@media(prefers-color-scheme:dark){:root{--ground:#141618;--ink:#e8eaec;--faint:#9aa1a8;--line:#2f3438;--mark:#5ab4ec}}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;
font-variant-numeric:tabular-nums}
main{max-width:1080px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:24px;margin:0 0 2px}h2{font-size:17px;margin:34px 0 8px}p{margin:4px 0}.faint{color:var(--faint)}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:13.5px}
th,td{padding:5px 16px 5px 0;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th:first-child,td:first-child,th:nth-child(2),td:nth-child(2){text-align:left}th{font-weight:600;color:var(--faint)}
pre{overflow-x:auto;font:12.5px/1.5 ui-monospace,Menlo,Consolas,monospace;border:1px solid var(--line);
border-radius:8px;padding:12px}svg{width:100%;height:auto}
"""
_SVG_CSS = ".t{font:13px system-ui,sans-serif;fill:currentColor}.f{opacity:.6}.g{stroke:currentColor;opacity:.15}"


def write_report(folder: RunFolder, results: Mapping[str, Any]) -> None:
    """Write `plots/<headline>.svg` and `report.html` of a run."""
    plot = draw_plot(results)
    with atomic_path(folder.path / "plots" / f"{results['headline'].replace('@', '_at_')}.svg") as work:
        work.write_text(plot, encoding="utf-8")
    files = {name: folder.read(name) or {} for name in ("config.json", "environment.json", "models.json")}
    with atomic_path(folder.path / "report.html") as work:
        work.write_text(render(results, plot, files=files), encoding="utf-8")


def draw_plot(results: Mapping[str, Any]) -> str:
    """The headline metric of every row as SVG: the mean, its 95 % interval, and every seed."""
    name = results["headline"]
    rows = [(row, row["metrics"][name]) for row in results["rows"] if row["metrics"][name]["mean"] is not None]
    spread = [v for _, metric in rows for v in (*metric["values"], *metric["interval"]) if v is not None] or [0.0, 1.0]
    low, high = min(spread), max(spread)
    margin = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin
    left, width, line = 250, 800, 34
    height = line * len(rows) + 46

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - 70)

    parts = []
    for tick in _ticks(low, high):
        parts.append(f'<line class="g" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="8" y2="{height - 34}"/>')
        parts.append(f'<text class="t f" text-anchor="middle" x="{x(tick):.1f}" y="{height - 18}">{tick:g}</text>')
    for i, (row, metric) in enumerate(rows):
        y = 8 + line * (i + 0.5)
        parts.append(f'<text class="t" x="0" y="{y + 4:.1f}">{escape(row["model"])} · {escape(row["head"])}</text>')
        if None not in metric["interval"]:
            a, b = (x(value) for value in metric["interval"])
            parts.append(f'<line x1="{a:.1f}" x2="{b:.1f}" y1="{y}" y2="{y}" stroke="#0072b2" stroke-width="3"/>')
        for value in metric["values"]:
            if value is not None:
                parts.append(f'<circle cx="{x(value):.1f}" cy="{y}" r="2.6" fill="currentColor" opacity=".45"/>')
        parts.append(f'<circle cx="{x(metric["mean"]):.1f}" cy="{y}" r="5.5" fill="#0072b2"/>')
        parts.append(f'<text class="t" x="{width - 62}" y="{y + 4:.1f}">{metric["mean"]:.2f}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(name)} of every row"><style>{_SVG_CSS}</style>{"".join(parts)}</svg>\n'
    )


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers between."""
    step = 10.0 ** (len(str(int(max(high - low, 1)))) - 1)
    while (high - low) / step < 4:
        step = {1: 0.5, 5: 0.4, 2: 0.5}.get(int(str(f"{step:e}")[0]), 0.5) * step
    first = int(low // step) + 1
    return [round(i * step, 10) for i in range(first, int(high // step) + 1)]


def render(results: Mapping[str, Any], plot: str, *, files: Mapping[str, Any]) -> str:
    """The page as text."""
    data = results["data"]
    share = "" if results["share"] == 1 else f", {results['share']:.0%} of them"
    facts = f"{data['layout']}: {data['train']:,} images to learn from{share}, {data['test']:,} to judge on"
    details = "".join(
        f"<h2>{escape(name)}</h2><pre>{escape(json.dumps(content, indent=2, ensure_ascii=False))}</pre>"
        for name, content in files.items()
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width,initial-scale=1"><title>{escape(results["protocol"])}</title><style>{_CSS}</style>'
        f"<main><h1>{escape(results['protocol'])}</h1><p class=faint>{escape(facts)}</p>"
        f"<p class=faint>{escape(results['rule'])}</p>"
        f"<h2>{escape(results['headline'])}</h2>{plot}"
        "<p class=faint>Large dots: mean over seeds. Small dots: seeds. Bars: 95 % of a bootstrap over images and "
        f"seeds.</p><h2>All metrics</h2><div class=scroll>{_table(results['rows'])}</div>"
        "<p class=faint>Mean ± standard deviation over seeds. Difference to the first model: with the 95 % interval of "
        f"a paired bootstrap; it holds 0 where the data do not tell the two apart.</p>{details}</main></html>\n"
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(rows[0]["metrics"])
    last = ["published", "difference to the first"]
    heads = "".join(f"<th>{escape(name)}" for name in ["model", "head", "seeds", *names, *last])
    lines = []
    for row in rows:
        cells = [escape(row["model"]), escape(row["head"]), str(row["seeds"])]
        cells += [_cell(row["metrics"].get(name), row["seeds"]) for name in names]
        known = row.get("published")
        cells.append(escape(f"{known['metric']} {known['value']:g}") if known else "–")
        cells.append(_gap(row.get("against_first")))
        lines.append("<tr>" + "".join(f"<td>{cell}" for cell in cells))
    return f"<table><tr>{heads}{''.join(lines)}</table>"


def _cell(metric: Mapping[str, Any] | None, seeds: int) -> str:
    if metric is None or metric["mean"] is None:
        return "–"
    return f"{metric['mean']:.2f} ± {metric['std']:.2f}" if seeds > 1 else f"{metric['mean']:.2f}"


def _gap(against: Mapping[str, Any] | None) -> str:
    if against is None or None in against["interval"]:
        return "–"
    low, high = against["interval"]
    return f"{against['difference']:+.2f} [{low:+.2f}, {high:+.2f}]"
