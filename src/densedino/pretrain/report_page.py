"""Owns the report's page: HTML and CSS in one file, light and dark, from phone to wide screen, that loads nothing."""

from __future__ import annotations

import base64
import io
import json
import time
from html import escape
from typing import TYPE_CHECKING

import torch
from PIL import Image

from densedino.features.colours import heat_colours
from densedino.pretrain.charts import short_number, svg

if TYPE_CHECKING:
    from collections.abc import Sequence

    from densedino.pretrain.diagnosis import Verdict
    from densedino.pretrain.report_panels import Panel
    from densedino.pretrain.run_data import Drifts, Film, RunData

__all__ = ["render_page"]

_SIGNS = {"good": "✓", "unknown": "…", "watch": "!", "bad": "✕"}

_CSS = """
:root{color-scheme:light dark;--ground:#fbfbfa;--card:#fff;--ink:#1c1e21;--faint:#6b7177;--grid:#e6e8ea;--edge:#e6e8ea;
--c0:#0072b2;--c1:#c2500a;--c2:#00845f;--c3:#a8508a;--c4:#8a6d00;--c5:#5b6770;--bad:#b00020}
@media(prefers-color-scheme:dark){:root{--ground:#141618;--card:#1b1e21;--ink:#e8eaec;--faint:#9aa1a8;--grid:#2b2f33;
--edge:#2b2f33;--c0:#5ab4ec;--c1:#f2935c;--c2:#3fc79a;--c3:#dd94c2;--c4:#d6b64a;--c5:#aab4bd;--bad:#ff7a80}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;
font-variant-numeric:tabular-nums}
main{max-width:1480px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:24px;line-height:1.25;margin:0 0 4px;font-weight:650;overflow-wrap:anywhere}
h2{font-size:17px;margin:40px 0 2px;font-weight:650}
h3{font-size:13.5px;margin:0;font-weight:600}
p{margin:0}.faint,.note{color:var(--faint)}.note{font-size:12.5px;line-height:1.4}
.stages{display:flex;gap:3px;margin:16px 0 0;font-size:12.5px;color:var(--faint)}
.stages div{min-width:0}.stages span{display:block;white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.bar{height:6px;border-radius:3px;background:var(--grid);overflow:hidden;margin-bottom:4px}
.bar i{display:block;height:100%;background:var(--c0)}
.facts{display:flex;flex-wrap:wrap;gap:6px 34px;margin:20px 0 4px}
.facts b{display:block;font-size:20px;font-weight:600;line-height:1.3}.facts span{font-size:12.5px;color:var(--faint)}
.verdicts{list-style:none;margin:22px 0 0;padding:0;display:grid;gap:10px}
.verdicts li{display:flex;gap:11px;align-items:baseline;max-width:110ch}
.sign{flex:none;width:21px;height:21px;line-height:21px;border-radius:50%;text-align:center;font-size:13px;font-weight:700;
color:var(--card);background:var(--faint)}
.good .sign{background:var(--c2)}.watch .sign{background:var(--c1)}.bad .sign{background:var(--bad)}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,265px),1fr));gap:14px;margin-top:14px}
.card{background:var(--card);border:1px solid var(--edge);border-radius:8px;padding:12px 12px 6px}
svg{display:block;width:100%;height:auto;margin-top:6px;overflow:visible}
.l{fill:none;stroke:currentColor;stroke-linejoin:round}.a{fill:currentColor;opacity:.16}.d{fill:currentColor}
.t{fill:currentColor;font-size:10.5px}.b{font-weight:600}
.ink{color:var(--ink)}svg .faint{color:var(--faint)}.grid .card .grid{color:var(--grid)}svg .grid{color:var(--grid)}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}.c4{color:var(--c4)}.c5{color:var(--c5)}
.scroll{overflow-x:auto;margin-top:14px;padding-bottom:6px}
.film{display:grid;gap:5px;font-size:12px;color:var(--faint)}
.film img{display:block;width:100%;aspect-ratio:1;border-radius:3px}
.map{display:flex;flex-wrap:wrap;gap:22px;align-items:center;margin-top:14px}
.map img{width:220px;height:220px;image-rendering:pixelated;border-radius:3px}.map p{max-width:46ch}
table{border-collapse:collapse;margin-top:10px;font-size:13.5px}td{padding:3px 18px 3px 0;vertical-align:top;
overflow-wrap:anywhere}
details{margin-top:12px}summary{cursor:pointer}
pre{overflow-x:auto;font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;background:var(--card);
border:1px solid var(--edge);border-radius:8px;padding:14px}
@media print{main{max-width:none}.card{break-inside:avoid}}
"""


def render_page(run: RunData, found: Sequence[Verdict], shown: Sequence[Panel]) -> str:
    """The whole page as text."""
    name = escape(run.folder.resolve().name)
    signs = "".join(
        f'<li class="{v.level}"><span class="sign" aria-label="{v.level}">{_SIGNS[v.level]}</span>'
        f"<span>{escape(v.sentence)}</span></li>"
        for v in found
    )
    parts = [
        f"<h1>{name}</h1>{_summary(run)}{_stages(run)}{_facts(run)}",
        f'<ul class="verdicts">{signs}</ul>',
    ]
    for i, panel in enumerate(shown):
        parts.append(_panel(panel))
        if i == 0 and run.film is not None:
            parts.append(_film(run.film))
        if panel.title.startswith("Do patches") and run.drifts is not None:
            parts.append(_drift_map(run.drifts))
    parts += [_trouble(run), _configuration(run)]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{name}: step {run.step:,}</title><style>{_CSS}</style><main>{''.join(parts)}</main></html>\n"
    )


def _summary(run: RunData) -> str:
    model = run.config.get("model", "")
    model = model.get("name", "") if isinstance(model, dict) else model
    words = [str(model), f"stage {run.stage}" if len(run.stages) > 1 else "", time.strftime("written %Y-%m-%d %H:%M")]
    return f'<p class="faint">{escape(" · ".join(filter(None, words)))}</p>'


def _stages(run: RunData) -> str:
    cells = []
    for name, start, stop in run.stages:
        share = min(max((run.step - start) / max(stop - start, 1), 0.0), 1.0)
        cells.append(
            f'<div style="flex:{max(stop - start, 1)} 1 60px"><div class="bar"><i style="width:{share:.1%}"></i></div>'
            f"<span>{escape(name)} · {stop - start:,} steps</span></div>"
        )
    return f'<div class="stages">{"".join(cells)}</div>'


def _facts(run: RunData) -> str:
    total = run.stages[-1][2]
    facts = [(f"{run.step:,} of {total:,}", "steps")]
    if run.total("images"):
        facts.append((short_number(run.total("images")), "images seen"))
    rates = [line["images_per_second"] for line in run.metrics[-50:] if "images_per_second" in line]
    if rates:
        facts.append((short_number(sorted(rates)[len(rates) // 2]), "images per second"))
    last = run.looks[-1].measures if run.looks else {}
    labels = (("knn", "k-NN accuracy"), ("miou", "mIoU"), ("effective_rank", "effective rank"))
    facts += [(short_number(last[key], exact=True), label) for key, label in labels if key in last]
    cells = "".join(f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for value, label in facts)
    return f'<div class="facts">{cells}</div>'


def _panel(panel: Panel) -> str:
    notes = [f'<p class="note">{escape(c.note)}</p>' if c.note else "" for c in panel.charts]
    cards = "".join(
        f'<div class="card"><h3>{escape(c.title)}</h3>{note}{svg(c)}</div>'
        for c, note in zip(panel.charts, notes, strict=True)
    )
    text = f'<p class="faint">{escape(panel.text)}</p>' if panel.text else ""
    return f'<h2>{escape(panel.title)}</h2>{text}<div class="grid">{cards}</div>'


def _film(film: Film) -> str:
    columns = 1 + len(film.steps)
    heads = "".join(f"<span>{label}</span>" for label in ["image", *(f"step {step:,}" for step in film.steps)])
    cells = ""
    for name, photo, frames in zip(film.names, film.photos, film.frames, strict=True):
        cells += _picture(photo, f"{name}, the image", webp=True)
        for step, frame in zip(film.steps, frames, strict=True):
            cells += _picture(frame, f"{name}, PCA at step {step}", webp=True)
    return (
        '<h2>What patches look like</h2><p class="faint">Each image’s first three principal components as colours, '
        "turned so that they agree from look to look: like colours are like features.</p>"
        f'<div class="scroll"><div class="film" style="grid-template-columns:repeat({columns},minmax(84px,150px))">'
        f"{heads}{cells}</div></div>"
    )


def _drift_map(drifts: Drifts) -> str:
    top = max(float(drifts.matrix.max()), 1e-9)
    colours = (heat_colours((drifts.matrix / top).float()) * 255).round().to(torch.uint8)
    image = _picture(Image.fromarray(colours.numpy()), "drift between every two looks")
    return (
        f'<div class="map">{image}<p class="note">Every look against every other, from step {drifts.steps[0]:,} (top '
        f"left) to {drifts.steps[-1]:,} (bottom right): the share of patch-similarity structure in which they differ, "
        f"from 0 (dark) to {short_number(top)} (pale). In a dark block patches kept their relations.</p></div>"
    )


def _picture(image: Image.Image, alt: str, *, webp: bool = False) -> str:
    buffer = io.BytesIO()
    if webp:
        image.resize((168, 168), Image.Resampling.BICUBIC).save(buffer, format="WEBP", quality=85, method=1)
    else:
        image.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/{"webp" if webp else "png"};base64,{data}">'


def _trouble(run: RunData) -> str:
    rows = [(f"step {int(line['step']):,}", "not finite; skipped") for line in run.metrics if line.get("finite") == 0.0]
    rows += [(f"look at step {look.step:,}", look.failed) for look in run.looks if look.failed]
    rows += [(str(entry.get("name", "?")), str(entry.get("reason", ""))) for entry in run.quarantine]
    if not rows:
        return ""
    cells = "".join(f"<tr><td>{escape(what)}<td>{escape(why)}" for what, why in rows[:200])
    more = f'<p class="faint">and {len(rows) - 200:,} more</p>' if len(rows) > 200 else ""
    return f"<h2>Trouble</h2><table>{cells}</table>{more}"


def _configuration(run: RunData) -> str:
    if not run.config:
        return ""
    text = escape(json.dumps(run.config, indent=2, ensure_ascii=False))
    return f"<h2>Configuration</h2><details><summary>All settings of the run</summary><pre>{text}</pre></details>"
