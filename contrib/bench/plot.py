"""Draws the results as an SVG: a row of panels for each kind of image, a panel for each measure, a bar for each
program.

The SVG has its own background for light and dark mode, so that it is readable on any page.
"""
import statistics
from html import escape

# measure -> title and unit of its panel; more is better, except for cpu
PANELS = {
    "cold": ("sequential, cold", "MiB/s"),
    "direct": ("direct 1 MiB QD4", "MiB/s"),
    "all": ("with holes", "MiB/s"),
    "r1": ("random 4 KiB QD1", "IOPS"),
    "r16": ("random 4 KiB QD16", "IOPS"),
    "cpu": ("CPU, less is better", "s/GiB"),
}
LEFT, PANEL, GAP, BAR, HEAD, ROW_GAP, MARGIN = 190, 118, 18, 17, 92, 30, 20
WIDTH = LEFT + len(PANELS) * (PANEL + GAP) + MARGIN

STYLE = """
  .page { fill: #ffffff; stroke: #d0d7de; } .ink { fill: #1f2328; } .soft { fill: #59636e; }
  .peer { fill: #9aa4af; } .new { fill: #0969da; } .limit { fill: none; stroke: #59636e; stroke-dasharray: 3 2; }
  .base { stroke: #d0d7de; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117; stroke: #3d444d; } .ink { fill: #f0f6fc; } .soft { fill: #9198a1; }
    .peer { fill: #656c76; } .new { fill: #4493f8; } .limit { stroke: #9198a1; } .base { stroke: #3d444d; }
  }
  text { font: 12px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
  .small { font-size: 10.5px; } .title { font-size: 16px; font-weight: 600; } .bold { font-weight: 600; }
"""


def draw(results):
    """Returns the SVG of the results of a run."""
    body, y = [], HEAD
    for kind, rows in results["values"].items():
        names = [n for n in rows if n != "raw file" or kind == "flat"]
        body.append(text(MARGIN, y, kind, "ink bold"))
        for i, measure in enumerate(PANELS):
            x = LEFT + i * (PANEL + GAP)
            body += panel(results, rows, names, measure, x, y + 10)
        for i, name in enumerate(names):
            style = "ink bold" if name in results["contenders"] else "ink" if name not in results["limits"] else "soft"
            body.append(text(LEFT - 10, y + 10 + i * BAR + 12, name, style + " small", "end"))
        y += 10 + len(names) * BAR + ROW_GAP
    head = [text(MARGIN, 30, "Reading a VMDK through FUSE", "title ink"), text(MARGIN, 49, subtitle(results), "soft small")]
    for i, (title, unit) in enumerate(PANELS.values()):
        x = LEFT + i * (PANEL + GAP)
        head += [text(x, HEAD - 18, title, "ink small bold"), text(x, HEAD - 4, unit, "soft small")]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" role="img"'
        f' aria-label="Bars of read speed, by image and program">\n<style>{STYLE}</style>\n'
        f'<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{y - 1}" rx="8"/>\n' + "\n".join(head + body) + "\n</svg>\n"
    )


def subtitle(results):
    return (
        f"{results['size'] / (1 << 30):g} GiB disk in memory, {results['processors']} processors, Linux {results['kernel']},"
        f" medians of {results['rounds']} round(s). Dashed: limits, which read the raw disk."
    )


def panel(results, rows, names, measure, x, y):
    """Yields the bars of one measure, scaled to the longest one."""
    medians = {n: statistics.median(rows[n][measure]) for n in names if rows[n].get(measure)}
    most = max(medians.values(), default=0) or 1
    yield f'<line class="base" x1="{x}" x2="{x}" y1="{y}" y2="{y + len(names) * BAR}"/>'
    for i, name in enumerate(names):
        if name not in medians:
            continue
        top, length = y + i * BAR + 2, max(1.0, medians[name] / most * (PANEL - 44))
        style = "new" if name in results["contenders"] else "limit" if name in results["limits"] else "peer"
        yield f'<rect class="{style}" x="{x + 0.5}" y="{top + 0.5}" width="{length:.1f}" height="{BAR - 5}"/>'
        yield text(x + length + 5, top + 10, number(medians[name]), "ink small")


def number(value):
    """Formats a value in about four characters: 0.31, 12, 628, 15.5k, 668k."""
    if value >= 99950:
        return f"{value / 1000:.0f}k"
    if value >= 10000:
        return f"{value / 1000:.1f}k"
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def text(x, y, words, style, anchor="start"):
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
