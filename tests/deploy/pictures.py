#!/usr/bin/env python3
"""Draws what the dashboards show of three nodes under load into docs/pictures: pictures.py [SECONDS]

Grafana is not among the tools of the tests, so this draws the panels as SVG, with the answers of a real Prometheus to
their queries, and has Chromium take the picture. It needs what check.py needs, and runs for SECONDS (150) of load.
"""

import html
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import check
import monitoring

PICTURES = check.ROOT / "docs/pictures"
STEP_SECONDS = 2
CELL_WIDTH, CELL_HEIGHT, GAP = 58, 30, 6
PALETTE = ["#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#5794f2", "#b877d9", "#37872d", "#fade2a", "#c4162a",
           "#96d98d", "#ffee52", "#705da0", "#ffa6b0", "#3274d9"]
LEGENDS_MAX = 6
STYLE = """
body { margin: 0; background: #111217; color: #ccccdc; font: 12px sans-serif }
.panel { position: absolute; background: #181b1f; border: 1px solid #2c3235; border-radius: 2px; box-sizing: border-box; overflow: hidden }
.title { padding: 4px 8px; font-weight: 600; white-space: nowrap }
.row { position: absolute; font-size: 15px; font-weight: 600; padding: 4px }
.stat { font-size: 30px; font-weight: 600; text-align: center; padding-top: 14px }
table { border-collapse: collapse; margin: 4px 8px } td, th { text-align: left; padding: 5px 22px 5px 0; border-bottom: 1px solid #2c3235 }
th { color: #8ab8ff } text { fill: #9fa7b3; font-size: 10px } .legend { padding: 0 8px; font-size: 10px; line-height: 14px }
.legend span { margin-right: 10px; white-space: nowrap } .legend b { display: inline-block; width: 12px; height: 3px; margin: 0 4px 3px 0 }
"""


def shown(value, unit):
    """A value as Grafana writes it."""
    if value is None or math.isnan(value):
        return "–"
    if unit == "s" and value < 1:
        return f"{value * 1e3:.3g} ms" if value >= 1e-3 or value == 0 else f"{value * 1e6:.3g} µs"
    if unit in ("bytes", "Bps"):
        power = 0
        while abs(value) >= 1024 and power < 4:
            value, power = value / 1024, power + 1
        return f"{value:.3g} {['B', 'KiB', 'MiB', 'GiB', 'TiB'][power]}{'/s' if unit == 'Bps' else ''}"
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    suffix = {"s": " s", "mps": "/s", "ops": "/s", "pps": "/s", "cps": "/s", "d": " days"}.get(unit, "")
    if abs(value) >= 1000:
        return f"{value / 1000:.3g} K{suffix}"
    return f"{value:.3g}{suffix}"


def legend_of(template, labels):
    if not template:
        return ", ".join(f"{name}={value}" for name, value in labels.items() if name != "__name__")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), template)


class Page:
    def __init__(self, prometheus, begin, end, nodes):
        self.prometheus, self.begin, self.end = prometheus, begin, end
        # Ports are not worth showing.
        self.names = {node.http: f"midge-{number}" for number, node in enumerate(nodes, 1)}

    def series(self, panel):
        found = []
        for target in panel["targets"]:
            expression = self.filled(target["expr"])
            answer = self.prometheus.get("query_range", query=expression, start=self.begin, end=self.end, step=STEP_SECONDS)
            for one in answer["result"]:
                labels = self.renamed(one["metric"])
                points = {float(at): float(value) for at, value in one["values"]}
                found.append((legend_of(target["legendFormat"], labels), labels, points))
        return found

    def filled(self, expression):
        for variable, value in (("$__rate_interval", "10s"), ("$instance", ".*"), ("$job", "midge")):
            expression = expression.replace(variable, value)
        return expression

    def renamed(self, labels):
        return {name: self.names.get(value, value) for name, value in labels.items()}

    def write(self, dashboard):
        parts, bottom = [], 0
        for panel in dashboard["panels"]:
            grid = panel["gridPos"]
            x, y = grid["x"] * CELL_WIDTH, grid["y"] * CELL_HEIGHT
            width, height = grid["w"] * CELL_WIDTH - GAP, grid["h"] * CELL_HEIGHT - GAP
            bottom = max(bottom, y + height)
            title = html.escape(panel["title"])
            box = f"left:{x}px;top:{y}px;width:{width}px;height:{height}px"
            if panel["type"] == "row":
                parts.append(f'<div class="row" style="{box}">{title}</div>')
                continue
            draw = {"stat": self.stat, "timeseries": self.graph, "heatmap": self.heatmap, "table": self.table}[panel["type"]]
            parts.append(f'<div class="panel" style="{box}"><div class="title">{title}</div>{draw(panel, width, height - 24)}</div>')
        return f"<!doctype html><meta charset=utf-8><style>{STYLE}</style>{''.join(parts)}", bottom + GAP

    def stat(self, panel, _width, _height):
        defaults = panel["fieldConfig"]["defaults"]
        series = self.series(panel)
        value = list(series[0][2].values())[-1] if series else None
        color = "#73bf69"
        for step in defaults.get("thresholds", {}).get("steps", []):
            if value is not None and step["value"] is not None and value >= step["value"]:
                color = {"yellow": "#f2cc0c", "red": "#f2495c"}.get(step["color"], color)
        return f'<div class="stat" style="color:{color}">{shown(value, defaults["unit"])}</div>'

    def table(self, panel, _width, _height):
        renames = panel["transformations"][1]["options"]["renameByName"]
        rows, columns = {}, []
        for target in panel["targets"]:
            for one in self.prometheus.query(self.filled(target["expr"])):
                labels = self.renamed(one["metric"])
                row = rows.setdefault(labels.pop("instance"), {})
                labels.pop("__name__", None)
                name = renames.get(f"Value #{target['refId']}")
                value = float(one["value"][1])
                text = shown(value, "bytes") if name and "bytes" in name else f"{value:.4g}"
                row |= labels | ({name: text} if name else {})
                columns += [column for column in row if column not in columns]
        head = "".join(f"<th>{html.escape(column)}" for column in ["instance", *columns])
        body = "".join(f"<tr><td>{name}" + "".join(f"<td>{html.escape(row.get(column, ''))}" for column in columns)
                       for name, row in sorted(rows.items()))
        return f"<table><tr>{head}{body}</table>"

    def frame(self, width, height, legend_lines):
        left, top, right = 56, 10, width - 10
        return left, top, right, height - 18 - 14 * legend_lines

    def x(self, at, left, right):
        return left + (at - self.begin) / (self.end - self.begin) * (right - left)

    def times(self, left, right, bottom):
        for part in range(6):
            at = self.begin + (self.end - self.begin) * part / 5
            x = self.x(at, left, right)
            anchor = "end" if part == 5 else "middle"
            yield f'<text x="{x:.0f}" y="{bottom + 13}" text-anchor="{anchor}">{time.strftime("%H:%M:%S", time.gmtime(at))}</text>'

    def graph(self, panel, width, height):
        defaults = panel["fieldConfig"]["defaults"]
        unit, is_stacked = defaults["unit"], "stacking" in defaults["custom"]
        series = [one for one in self.series(panel) if one[2]]
        legend = "".join(
            f'<span><b style="background:{PALETTE[number % len(PALETTE)]}"></b>{html.escape(name)}</span>'
            for number, (name, _, _) in enumerate(series[:LEGENDS_MAX]))
        if len(series) > LEGENDS_MAX:
            legend += f"<span>and {len(series) - LEGENDS_MAX} more</span>"
        left, top, right, bottom = self.frame(width, height, 2)
        curves, floor = [], {}
        for _, _, points in series:
            points = {at: value for at, value in points.items() if not math.isnan(value)}
            upper = {at: value + floor.get(at, 0) for at, value in points.items()} if is_stacked else points
            curves.append((upper, {at: floor.get(at, 0) for at in points} if is_stacked else None))
            floor = floor | upper
        highest = defaults.get("max", max((max(upper.values(), default=0) for upper, _ in curves), default=0) or 1)
        scale = (bottom - top) / (highest * (1 if "max" in defaults else 1.05))
        lines = []
        for part in range(5):
            value = highest * part / 4
            y = bottom - value * scale
            lines.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#2c3235"/>'
                         f'<text x="{left - 4}" y="{y + 3:.1f}" text-anchor="end">{shown(value, unit)}</text>')
        for number, (upper, lower) in enumerate(curves):
            color = PALETTE[number % len(PALETTE)]
            line = " ".join(f"{self.x(at, left, right):.1f},{bottom - value * scale:.1f}" for at, value in upper.items())
            if lower is not None:
                back = " ".join(f"{self.x(at, left, right):.1f},{bottom - lower[at] * scale:.1f}" for at in reversed(upper))
                lines.append(f'<polygon points="{line} {back}" fill="{color}" fill-opacity="0.35"/>')
            lines.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.3"/>')
        if not series:
            lines.append(f'<text x="{width / 2}" y="{height / 2}" text-anchor="middle">no data</text>')
        lines.extend(self.times(left, right, bottom))
        return f'<svg width="{width}" height="{bottom + 18}">{"".join(lines)}</svg><div class="legend">{legend}</div>'

    def heatmap(self, panel, width, height):
        series = sorted(self.series(panel), key=lambda one: float(one[1]["le"]))
        left, top, right, bottom = self.frame(width, height, 0)
        cells, below, rows = [], {}, []
        for _, labels, points in series:
            rows.append((labels["le"], {at: value - below.get(at, 0) for at, value in points.items()}))
            below = points
        highest = max((value for _, points in rows for value in points.values()), default=0) or 1
        row_height = (bottom - top) / max(len(rows), 1)
        cell_width = (right - left) * STEP_SECONDS / (self.end - self.begin) + 0.5
        for number, (bound, points) in enumerate(rows):
            y = bottom - (number + 1) * row_height
            if number % 2 == 0:
                name = "+Inf" if bound == "+Inf" else shown(float(bound), "s")
                cells.append(f'<text x="{left - 4}" y="{y + row_height:.1f}" text-anchor="end">{name}</text>')
            for at, value in points.items():
                if value > 0:
                    strength = 0.15 + 0.85 * (value / highest) ** 0.5
                    cells.append(f'<rect x="{self.x(at, left, right):.1f}" y="{y:.1f}" width="{cell_width:.1f}" '
                                 f'height="{row_height - 0.5:.1f}" fill="#ff780a" fill-opacity="{strength:.2f}"/>')
        cells.extend(self.times(left, right, bottom))
        return f'<svg width="{width}" height="{height}">{"".join(cells)}</svg>'


def photograph(page, height, file, folder):
    source = folder / f"{file.stem}.html"
    source.write_text(page)
    subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder / 'chromium'}",
         f"--window-size={24 * CELL_WIDTH},{height}", f"--screenshot={file}", source.as_uri()],
        check=True, capture_output=True, timeout=120)


def main():
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 150
    PICTURES.mkdir(exist_ok=True)
    with (monitoring.monitored_cluster(check.TOOLS, os.environ["MIDGE_TEST_PROGRAM"]) as (prometheus, nodes, load),
          tempfile.TemporaryDirectory() as folder):
        begin = time.time()
        for part in range(5):
            time.sleep(seconds / 5)
            # More clients all the time.
            load.add(nodes, part)
        page = Page(prometheus, begin, time.time(), nodes)
        for name, dashboard in check.dashboards().items():
            file = PICTURES / f"{pathlib.Path(name).stem}.png"
            photograph(*page.write(dashboard), file, pathlib.Path(folder))
            print(f"{file.relative_to(check.ROOT)}: {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
