# plot.py: loss curves of one or more runs, as an SVG. Needs Python 3 and nothing else.
#
#     python3 dev/plot/plot.py --out docs/run.svg runs/a/log.csv "other seed=runs/b/log.csv"
#
# Each run is [LABEL=]FILE, a log.csv or any CSV with the columns step, loss, val_loss (one of the
# losses may be missing): the loss is a line, the mean of each of up to 200 groups of neighbouring
# steps; the validation loss is a line with a circle at each point, and the last one's number stands
# in the legend. A file whose name has a = in it needs no label. --x tokens counts tokens instead of steps; --top
# and --first cut away the steep start.
import argparse
import csv
import math
import os
import sys
from html import escape

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 56, 24, 40, 44  # margins
POINTS = 200  # of a line
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"]  # Okabe, Ito 2008


def fail(message):
    sys.exit(f"plot.py: error: {message}")


def finite(text):
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def split_run(text):
    """[LABEL=]FILE -> label, file: the longest end of it that is there."""
    for at in [0] + [i + 1 for i, letter in enumerate(text) if letter == "="]:
        path = text[at:]
        if os.path.exists(path):
            return text[:at][:-1] or os.path.basename(os.path.dirname(os.path.abspath(path))), path
    fail(f"{text}: found no such file, expected [LABEL=]FILE")


def read_rows(path, names):
    """-> a list for each row: the numbers in these columns, None where a cell is empty."""
    rows = []
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            for row in reader:
                rows.append([])
                for name in names:
                    try:
                        rows[-1].append(finite(row[name]) if row.get(name) else None)
                    except ValueError:
                        fail(f"{path}, line {reader.line_num}: found {name} {row[name]!r}, "
                             "expected a finite number")
    except OSError as error:
        fail(f"{path}: cannot read it: {error.strerror}")
    except (ValueError, csv.Error) as error:
        fail(f"{path}: found no CSV: {error}")
    return rows


def read_run(text, x_name, first):
    """-> label, losses, validations: lists of (x, y)."""
    label, path = split_run(text)
    rows = [row for row in read_rows(path, ("step", x_name, "loss", "val_loss"))
            if row[0] is not None and row[1] is not None and row[2:] != [None, None]]
    if not rows:
        columns = "step" if x_name == "step" else f"step, {x_name}"
        fail(f"{path}: found no row with {columns} and loss or val_loss")
    shown = [row for row in rows if row[0] >= first]
    if not shown:
        fail(f"{path}: found no step from --first {first:g} on, the last is {rows[-1][0]:g}")
    return (label, *([(row[1], row[k]) for row in shown if row[k] is not None] for k in (2, 3)))


def thin(points):
    """The means of up to POINTS groups of neighbours."""
    size = math.ceil(len(points) / POINTS) or 1
    groups = [points[i:i + size] for i in range(0, len(points), size)]
    return [tuple(sum(p[k] for p in group) / len(group) for k in (0, 1)) for group in groups]


def ticks(low, high, count):
    """Some `count` round numbers from low to high."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def number(value):
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and size > 1e3):
            return f"{value / size:g}{unit}"
    return f"{value:.6g}"


class Frame:
    """Data to the picture's coordinates."""

    def __init__(self, points, top):
        self.x0, self.x1 = 0, max(1, *(x for x, _ in points))
        low, high = min(y for _, y in points), max(y for _, y in points)
        high = max(min(high, top), low) if top else high
        room = 0.04 * (high - low) or 0.5
        self.y0, self.y1 = low - room, high + room

    def at(self, x, y):
        px = LEFT + (x - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)
        py = HEIGHT - BOTTOM - (y - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)
        return f"{px:.1f}", f"{py:.1f}"


def axes(frame, x_name, title):
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    yield f'<text x="{LEFT}" y="22" font-size="15" font-weight="bold">{escape(title)}</text>'
    for y in ticks(frame.y0, frame.y1, 7):
        py = frame.at(0, y)[1]
        yield f'<path d="M{LEFT} {py}H{right}" stroke="#ddd"/>'
        yield f'<text x="{LEFT - 8}" y="{py}" dy="4" text-anchor="end">{number(y)}</text>'
    for x in ticks(frame.x0, frame.x1, 8):
        px = frame.at(x, frame.y0)[0]
        yield f'<path d="M{px} {bottom}v5" stroke="#555"/>'
        yield f'<text x="{px}" y="{bottom + 19}" text-anchor="middle">{number(x)}</text>'
    yield f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#555"/>'
    yield f'<text x="{right}" y="{HEIGHT - 6}" text-anchor="end">{x_name}</text>'


def curves(frame, losses, validations, color):
    for points, width, opacity in ((thin(losses), 1.2, 0.55), (validations, 1.8, 1)):
        if points:
            path = " ".join(",".join(frame.at(*p)) for p in points)
            yield (f'<polyline points="{path}" fill="none" stroke="{color}" '
                   f'stroke-width="{width}" opacity="{opacity}" clip-path="url(#frame)"/>')
    for p in validations:
        if p[1] <= frame.y1:
            x, y = frame.at(*p)
            yield f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>'


def legend(runs):
    for i, (label, losses, validations) in enumerate(runs):
        y, color = TOP + 10 + 18 * i, COLORS[i % len(COLORS)]
        x = WIDTH - RIGHT - 8
        kind = "loss" if not validations else "validation" if not losses else "loss, validation"
        if validations:
            kind += f" {validations[-1][1]:.3f}"
        yield f'<text x="{x - 34}" y="{y + 4}" text-anchor="end">{escape(label)}: {kind}</text>'
        yield f'<path d="M{x - 26} {y}h26" stroke="{color}" stroke-width="2"/>'
        if validations:
            yield f'<circle cx="{x - 13}" cy="{y}" r="3" fill="{color}"/>'


def main():
    parser = argparse.ArgumentParser(description="Loss curves of runs, as an SVG.")
    parser.add_argument("run", nargs="+", help="[LABEL=]log.csv")
    parser.add_argument("--out", required=True, help="the SVG")
    parser.add_argument("--title", default="Loss, nats per token")
    parser.add_argument("--x", choices=("step", "tokens"), default="step")
    parser.add_argument("--top", type=finite, default=0, help="losses above are cut off; 0: none")
    parser.add_argument("--first", type=finite, default=0, help="first step that is shown")
    args = parser.parse_args()
    runs = [read_run(text, args.x, args.first) for text in args.run]
    frame = Frame([p for _, losses, validations in runs for p in thin(losses) + validations],
                  args.top)
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
             f'width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12" '
             'fill="#222">',
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
             f'<clipPath id="frame"><rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" '
             f'height="{HEIGHT - TOP - BOTTOM}"/></clipPath>',
             *axes(frame, args.x, args.title)]
    for i, (_, losses, validations) in enumerate(runs):
        lines += curves(frame, losses, validations, COLORS[i % len(COLORS)])
    lines += [*legend(runs), "</svg>"]
    try:
        with open(args.out, "w") as file:
            file.write("\n".join(lines) + "\n")
    except OSError as error:
        fail(f"{args.out}: cannot write it: {error.strerror}")


if __name__ == "__main__":
    main()
