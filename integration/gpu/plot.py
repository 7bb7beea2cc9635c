#!/usr/bin/env python3
"""Draws the pauses in result files as an SVG: plot.py RESULTS.jsonl... >pause.svg

One pair of bars a workload: how long the program stood still under phos-runc, and with the driver's own checkpoint where
that was measured. Medians where a run has them; the last of several runs of a workload counts.
"""
import json
import sys
from xml.sax.saxutils import escape

pauses, device = {}, ""
for path in sys.argv[1:]:
    with open(path) as f:
        rows = [json.loads(line) for line in f]
    for r in rows:
        if r["metric"] == "pause_ms" and not (r["stat"] == "single" and r["system"] == "phos-runc" and r["note"]):
            pauses.setdefault(r["workload"], {})[r["system"]] = r["value"] / 1e3
            device = f"{r['device']}, driver {r['driver']}"

LEFT, WIDTH, BAR, GAP = 170, 560, 12, 10
longest = max(v for systems in pauses.values() for v in systems.values())
out, y = [], 46
for workload, systems in sorted(pauses.items(), key=lambda p: max(p[1].values())):
    out.append(f'<text x="{LEFT - 8}" y="{y + BAR}" text-anchor="end">{escape(workload)}</text>')
    for system, colour in (("phos-runc", "#1f6f43"), ("plain", "#b0b0b0")):
        if system in systems:
            width = max(1.0, systems[system] / longest * WIDTH)
            out.append(f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{colour}"/>')
            out.append(f'<text x="{LEFT + width + 5:.1f}" y="{y + BAR - 1}">{systems[system]:.2f} s</text>')
            y += BAR + 2
    y += GAP
print(f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 80}" height="{y}" font-family="sans-serif" font-size="11">')
print('<rect width="100%" height="100%" fill="white"/>')
print(f'<text x="{LEFT}" y="18" font-size="13">How long the program stands still: '
      '<tspan fill="#1f6f43">phos-runc</tspan> and <tspan fill="#808080">runc with the driver\'s own checkpoint</tspan></text>')
print(f'<text x="{LEFT}" y="34" fill="#606060">{escape(device)}; leave-running, images on tmpfs</text>')
print("\n".join(out))
print("</svg>")
