#!/usr/bin/env python3
"""Draws how costs grow, for docs/performance.md: with items, workers, processes and sizes of messages.

    ./growth.py                        measure (some minutes, on a quiet machine) and write ../../docs/performance/*.svg and .tsv
    ./growth.py items=100000 workers   only these curves, up to this
    ./growth.py --from FIGURES         draw figures that `cargo bench --bench growth` printed before
    ./growth.py --to DIR               write there instead

It refuses to measure on a machine that is busy with other things (a load above half of a CPU), unless --busy is given. The pictures
need nothing but this file.
"""

import argparse
import collections
import html
import math
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Of Okabe and Ito; each line has dashes of its own, too.
INKS = [("#0072B2", ""), ("#D55E00", "7 3"), ("#009E73", "2 3")]
RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 70, 34, 34, 50
CURVES = {
    "items": ("What one item of a map takes, by the number of items", "items"),
    "workers": ("What a pool takes, by the number of its workers", "workers"),
    "processes": ("What it takes to start and join a process, by the number started at once", "processes"),
    "sizes": ("What a message to another process and a short answer take, by its size", "bytes"),
}


def measure(curves):
    command = ["cargo", "bench", "--quiet", "--bench", "growth", "--", *curves]
    return subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout


def points_of(text):
    """Curve -> series -> [(x, seconds)]."""
    points = collections.defaultdict(lambda: collections.defaultdict(list))
    for line in filter(None, text.splitlines()):
        curve, series, x, seconds = line.split("\t")
        if curve not in CURVES or float(x) <= 0 or not 0 < float(seconds) < 1e6:
            raise ValueError(f"no point of a curve: {line!r}")
        points[curve][series].append((float(x), float(seconds)))
    return points


def seconds_as_text(seconds):
    for unit, name in [(1, "s"), (1e-3, "ms"), (1e-6, "µs")]:
        if seconds >= unit * 0.9995:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e9:.3g} ns"


def x_as_text(x, unit):
    if unit == "bytes":
        for size, name in [(1 << 20, "MiB"), (1 << 10, "KiB")]:
            if x >= size:
                return f"{x / size:g} {name}"
        return f"{x:g} B"
    power = round(math.log10(x), 6)
    return f"10{str(int(power)).translate(RAISED)}" if x >= 1000 and power == int(power) else f"{x:g}"


def decades(low, high):
    return range(math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9) + 1)


def drawn(curve, series):
    """One picture, on logarithmic scales."""
    title, unit = CURVES[curve]
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    tens = decades(min(ys), max(ys))
    low, high = tens[0], max(tens[-1], tens[0] + 1)
    first, last = math.log10(min(xs)), max(math.log10(max(xs)), math.log10(min(xs)) + 1e-9)

    def place(x, y):
        across = LEFT + (math.log10(x) - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (math.log10(y) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
        f"<title>{html.escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="14">{html.escape(title)}</text>',
    ]
    for ten in range(low, high + 1):
        _, y = place(min(xs), 10.0**ten)
        out.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{seconds_as_text(10.0**ten)}</text>')
    ticks = sorted(set(xs))
    every = math.ceil(len(ticks) / 8)
    for x in ticks[::every]:
        across, _ = place(x, 10.0**low)
        out.append(f'<text x="{across:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{x_as_text(x, unit)}</text>')
    legend = LEFT
    for (name, points), (colour, dashes) in zip(series.items(), INKS):
        path = " ".join(f"{across:.1f},{y:.1f}" for across, y in (place(*point) for point in sorted(points)))
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dashes}"/>')
        for across, y in (place(*point) for point in points):
            out.append(f'<circle cx="{across:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        out.append(f'<path d="M{legend} {HEIGHT - 10}h26" stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dashes}"/>')
        out.append(f'<text x="{legend + 32}" y="{HEIGHT - 6}">{html.escape(name)}</text>')
        legend += 46 + 7 * len(name)
    return "\n".join([*out, "</svg>"]) + "\n"


def is_busy():
    return os.getloadavg()[0] > 0.5


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", nargs="*", metavar="CURVE[=MOST]")
    parser.add_argument("--from", dest="source", type=pathlib.Path)
    parser.add_argument("--to", dest="target", type=pathlib.Path, default=ROOT / "docs" / "performance")
    parser.add_argument("--busy", action="store_true")
    arguments = parser.parse_args()
    unknown = [curve for curve in arguments.curves if curve.split("=")[0] not in CURVES]
    if unknown:
        parser.error(f"there is no curve {', '.join(unknown)}, but {', '.join(CURVES)}")
    if arguments.source:
        text = arguments.source.read_text()
    elif is_busy() and not arguments.busy:
        sys.exit("this machine is busy: its figures would mean nothing (--busy measures nevertheless)")
    else:
        text = measure(arguments.curves)
    points = points_of(text)
    if not points:
        sys.exit("there are no figures")
    arguments.target.mkdir(parents=True, exist_ok=True)
    for curve, series in points.items():
        (arguments.target / f"{curve}.svg").write_text(drawn(curve, series))
    (arguments.target / "figures.tsv").write_text(text)
    print(f"{', '.join(points)}: written to {arguments.target}")


if __name__ == "__main__":
    main()
