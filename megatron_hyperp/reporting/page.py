"""The page: one HTML file that needs nothing else, and PNGs of its main panels beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from megatron_hyperp import __version__
from megatron_hyperp.reporting import figures, heatmaps, tables
from megatron_hyperp.reporting.figures import Panel
from megatron_hyperp.reporting.heatmaps import INDICATORS, Heat
from megatron_hyperp.reporting.runs import Run
from megatron_hyperp.reporting.tables import Html

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1360px; padding: 0 20px 48px; background: #fff; color: #1f2328;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 22px; margin: 24px 0 4px; }
h2 { font-size: 18px; margin: 40px 0 8px; padding-top: 12px; border-top: 1px solid #d8dce1; }
h3 { font-size: 15px; margin: 24px 0 0; }
p { margin: 4px 0 10px; max-width: 78ch; }
.quiet, h3 + p { color: #57606a; font-size: 13.5px; }
nav { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 10px 0; font-size: 14px; }
a { color: #0a58a6; }
.notes { background: #fff8e6; border-left: 4px solid #b8860b; padding: 8px 14px; margin: 12px 0; font-size: 14px; }
.notes ul { margin: 2px 0; padding-left: 18px; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 12px 20px; }
.heats { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); gap: 8px 16px; }
figure { margin: 0; }
img { display: block; max-width: 100%; height: auto; }
.panels img, .heats img { width: 100%; }
.panels img { max-width: 560px; }
.heats img { max-width: 340px; }
.lead { display: flex; flex-wrap: wrap; align-items: flex-end; gap: 0 24px; margin-bottom: 4px; }
.lead .line { flex: 0 1 440px; }
.lead .scale { flex: 0 1 330px; }
.scroll { overflow-x: auto; margin: 8px 0; border: 1px solid #d8dce1; border-radius: 4px; }
.long .scroll { max-height: 70vh; overflow-y: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px; text-align: left; border-bottom: 1px solid #eaecef; vertical-align: top;
  white-space: nowrap; overflow-wrap: normal; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { background: #f4f6f8; font-weight: 600; vertical-align: bottom; }
.numbers thead th { white-space: normal; min-width: 54px; }
.numbers th, .numbers td { padding: 4px 6px; }
.numbers th ~ th, .numbers td { text-align: right; }
.texts td { white-space: normal; min-width: 90px; max-width: 420px; overflow-wrap: anywhere; }
tbody th { font-weight: 500; background: #fff; position: sticky; left: 0; border-right: 1px solid #eaecef; }
.differs > * { background: #fff4cc; }
.chip { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 14px; margin: 8px 0; }
.bar { display: inline-block; height: 10px; background: #0072b2; min-width: 1px; vertical-align: middle; }
.operations td:last-child { min-width: 160px; text-align: left; }
.operations tbody th { white-space: normal; min-width: 160px; overflow-wrap: anywhere; }
summary { cursor: pointer; padding: 6px 0; color: #0a58a6; }
@media (max-width: 600px) {
  body { padding: 0 12px 32px; }
  h1 { font-size: 19px; }
  tbody th { min-width: 104px; max-width: 150px; white-space: normal; overflow-wrap: anywhere; }
  .texts td { min-width: 110px; }
  .settings tbody th { min-width: 140px; }
}
"""
# Nothing is loaded from anywhere, and no script runs, whatever a run folder holds.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write(runs: Sequence[Run], output: Path) -> list[Path]:
    """Write the page and, beside it under its name, PNGs of the panels and of the indicators by layer.

    Args:
        runs: to report side by side.
        output: HTML file.

    Returns:
        The files, the page first.
    """
    panels, gradients = figures.main_panels(runs), figures.gradient_panels(runs)
    output.parent.mkdir(parents=True, exist_ok=True)
    files = [output, output.with_suffix(".png")]
    figures.write_png(panels, files[1])
    indicated = [
        (key, [found for run in runs if (found := heatmaps.heat(run, key))]) for key in heatmaps.indicators(runs)
    ]
    if layered := [(_title(key), heats) for key, heats in indicated if heats]:
        files.append(output.with_name(f"{output.stem}-layers.png"))
        heatmaps.write_png(layered, files[-1])
    output.write_text(render(runs, panels, gradients, indicated), encoding="utf-8")
    return files


def render(
    runs: Sequence[Run],
    panels: Sequence[Panel],
    gradients: Sequence[Panel],
    indicated: Sequence[tuple[str, Sequence[Heat]]],
) -> str:
    """Return the page."""
    sections: list[tuple[str, str, str]] = [
        ("summary", "Summary", tables.summary(runs)),
        ("training", "Training", _panels(panels)),
        ("gradients", "Gradient norm by group", _panels(gradients)),
        ("stability", "Stability indicators", "".join(_stability(runs, indicated))),
        ("experts", "Expert load", "".join(_experts(runs))),
        ("alarms", "Alarms and events", _events(runs)),
        ("configuration", "Configuration", _configuration(runs)),
        ("profile", "Top operations of a profile", _profiles(runs)),
    ]
    shown = [(key, title, content) for key, title, content in sections if content]
    links = "".join(f"<a href='#{key}'>{title}</a>" for key, title, _ in shown)
    body = "".join(f"<section id='{key}'><h2>{title}</h2>{content}</section>" for key, title, content in shown)
    title = escape(", ".join(run.name for run in runs))
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>Report of {count}</h1><p class='quiet'>megatron-hyperp {__version__}</p>"
        f"<div class='legend'>{''.join(f'<span>{name}</span>' for name in tables.chips(runs))}</div>"
        f"<nav>{links}</nav>{_notes(runs)}{body}</main></body></html>\n"
    )


def _title(key: str) -> str:
    return INDICATORS.get(key, (key.replace("_", " "), ""))[0]


def _notes(runs: Sequence[Run]) -> str:
    lines = [f"<li>{tables.cell(run.name)}: {tables.cell(note)}</li>" for run in runs for note in run.notes]
    return f"<div class='notes'>Missing<ul>{''.join(lines)}</ul></div>" if lines else ""


def _picture(address: str, description: str) -> str:
    return f"<figure><img src='{address}' alt='{escape(description, quote=True)}'></figure>"


def _panels(panels: Sequence[Panel]) -> str:
    if not panels:
        return ""
    pictures = "".join(_picture(figures.to_svg(panel), f"{panel.title} over {panel.x}") for panel in panels)
    return f"<div class='panels'>{pictures}</div>"


def _stability(runs: Sequence[Run], indicated: Sequence[tuple[str, Sequence[Heat]]]) -> Iterator[str]:
    """Each indicator: over the model as lines, and by layer as heatmaps that share their colours."""
    if not indicated:
        return
    yield "<p>At the end of the runs, with the largest value on the way:</p>"
    yield tables.indicators_at_end(runs)
    yield (
        "<p class='quiet'>Below: lines show an indicator of the model, heatmaps its value in each layer (1 lowest)"
        " over the run's tokens. All heatmaps of an indicator have the same colours.</p>"
    )
    for key, heats in indicated:
        title, meaning = INDICATORS.get(key, (_title(key), ""))
        panel = figures.metric_panel(runs, key, f"{title}: model", log=True)
        line = "" if panel.empty else f"<div class='line'>{_picture(figures.to_svg(panel), title)}</div>"
        yield f"<h3>{escape(title)}</h3><p>{escape(meaning)}</p>"
        if not heats:
            yield f"<div class='lead'>{line}</div>"
            if any(key + heatmaps.PER_LAYER in row for run in runs for row in run.stability):
                yield "<p class='quiet'>0 in every layer of every run.</p>"
            continue
        scale = heatmaps.common_scale([heat.values for heat in heats])
        bar = _picture(heatmaps.colour_bar(scale, f"{title}: colours of the layers"), f"colours of {title}")
        yield f"<div class='lead'>{line}<div class='scale'>{bar}</div></div>"
        pictures = (
            _picture(heatmaps.to_png(heat, scale), f"{title}, layers over tokens: {heat.run}") for heat in heats
        )
        yield f"<div class='heats'>{''.join(pictures)}</div>"
        drawn = {heat.run for heat in heats}
        zero = [
            run.name
            for run in runs
            if run.name not in drawn and any(key + heatmaps.PER_LAYER in row for row in run.stability)
        ]
        if zero:
            yield f"<p class='quiet'>0 in every layer: {escape(', '.join(zero))}.</p>"


def _experts(runs: Sequence[Run]) -> Iterator[str]:
    """MaxVio over tokens, loads of the experts at the end, and over time in the least even layer."""
    ends = [(run, loads) for run in runs if (loads := heatmaps.load_at_end(run)) is not None]
    if not ends:
        return
    lines = [
        figures.metric_panel(runs, "max_vio", "MaxVio: largest of the layers"),
        figures.metric_panel(runs, "balance_loss", "Load-balancing loss"),
    ]
    yield _panels([panel for panel in lines if not panel.empty])
    over_time = [(run, found) for run in runs if (found := heatmaps.load_over_time(run))]
    scale = heatmaps.common_scale(
        [*(loads for _, loads in ends), *(heat.values for _, (_, heat) in over_time)], log=False
    )
    bar = _picture(heatmaps.colour_bar(scale, "load of an expert over the mean load"), "colours of the loads")
    yield f"<div class='lead'><div class='scale'>{bar}</div></div><div class='heats'>"
    for run, loads in ends:
        yield _picture(heatmaps.loads_to_png(loads, scale, f"at the end: {run.name}"), f"loads at the end: {run.name}")
    for run, (layer, heat) in over_time:
        title = f"layer {layer}: {run.name}"
        yield _picture(heatmaps.to_png(heat, scale, title), f"loads over time, least even layer {layer}: {run.name}")
    yield "</div><p class='quiet'>Over time: the layer that is least even at the end.</p>"


def _events(runs: Sequence[Run]) -> str:
    sounded, everything = tables.alarms(runs), tables.events(runs)
    if everything is None:
        return "<p>Nothing is on record: no alarm, no checkpoint, no resumption.</p>"
    count = sum(len(run.events) for run in runs)
    return (sounded or "<p>No alarm sounded.</p>") + _folded(f"All {count} events", everything)


def _configuration(runs: Sequence[Run]) -> str:
    differing, everything, count = tables.settings(runs)
    if everything is None:
        return "<p>No run has a readable config.yaml.</p>"
    known = sum(run.settings is not None for run in runs)
    if known == 1:
        said = "<p>Only one run tells its settings: there is nothing to compare.</p>"
    else:
        said = (
            f"<p>The runs differ in {count} setting{'s' * (count != 1)}:</p>" if differing else "<p>No difference.</p>"
        )
    return said + _boxed(differing) + _folded("All settings, as resolved", _boxed(everything))


def _boxed(content: Html | None) -> str:
    return f"<div class='settings'>{content}</div>" if content else ""


def _folded(title: str, content: str) -> str:
    return f"<details class='long'><summary>{escape(title)}</summary>{content}</details>"


def _profiles(runs: Sequence[Run]) -> str:
    parts = []
    for run, name in zip(runs, tables.chips(runs), strict=True):
        for rank, rows in run.profiles.items():
            parts.append(f"<h3>{name}, {escape(rank)}</h3><div class='operations'>{tables.operations(rows)}</div>")
    return "".join(parts)
