"""A report in words and as a picture, alone or beside another."""

import math
from typing import Any

from absl import logging

from memjax.training import report as training_report

GIB = 2**30
LEAST = 0.01  # of the whole, to be drawn by itself


def text(report: Any) -> str:
    """The report as text.

    Args:
      report: of `report.analyse`.
    """
    return "\n".join([*_head(report), "", *_memory(report), "", *_time(report)]) + "\n"


def _head(report: Any) -> list[str]:
    tools = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    return [
        f"{report.kind} step of {report.title}",
        f"{report.topology}: {report.devices} devices, mesh {_mesh(report.mesh)};"
        f" {report.rows} rows, {report.tokens:,} tokens a step; {tools}",
    ]


def _memory(report: Any) -> list[str]:
    held = report.memory
    lines = ["HBM of a device                 GiB"]
    for name, size in held.items():
        if name not in ("total", "capacity"):
            lines.append(f"  {name:<28} {size / GIB:8.3f}")
    verdict = "fits" if report.fits else "DOES NOT FIT"
    lines.append(
        f"  {'total':<28} {held['total'] / GIB:8.3f} of {held['capacity'] / GIB:.0f}: {verdict}"
    )
    return lines


def _time(report: Any) -> list[str]:
    seconds, use = report.seconds, report.utilisation
    a_token = report.cycles * report.devices / report.tokens
    lines = [
        f"step: {_duration(seconds['step'])} predicted"
        f" ({report.tokens / seconds['step']:,.0f} tokens/s), of which"
        f" {_duration(seconds['compute'])} compute and {_duration(seconds['collectives'])}"
        " collectives that nothing runs beside",
        f"  bound by {report.bound}",
        f"  MFU {use['model']:.1%}; operations of the compiled step {use['hardware']:.1%} of the"
        f" peak; at the peaks it would take {_duration(seconds['floor'])}",
        f"  {report.cycles:,} cycles ({a_token:,.0f} for each token"
        f" of a device), {report.guessed:.0%} of them in branches, taken where their"
        " condition holds, and in loops of unknown length",
        "",
        *_parts("part of the model", report.parts, report),
        "",
        *_parts("operation", report.operations[:12], report),
    ]
    if report.schedules:
        lines += ["", "Pallas kernels           cycles a call  rows x grid / cores    use of units"]
        for one in report.schedules:
            used = ", ".join(f"{unit} {share:.0%}" for unit, share in one.use.items() if share)
            grid = "x".join(map(str, one.grid))
            same = [other.name for other in report.schedules].count(one.name) > 1
            sizes = " of " + "x".join(map(str, one.results[0])) if same and one.results else ""
            cycles = f"{one.cycles:,}  {one.rows} x {grid} / {one.cores}"
            lines.append(f"  {one.name}{sizes}: {cycles}  {used}")
    if report.unmeasured:
        lines += ["", f"counted as 0 cycles, without a schedule: {', '.join(report.unmeasured)}"]
    lines += [
        "",
        "collectives              part                 count  devices        MiB      time",
    ]
    for one in report.traffic:
        kind = one.kind + (" (async)" if one.asynchronous else "")
        lines.append(
            f"  {kind:<22} {one.part:<20} {one.count:>5} {one.group:>8} {one.bytes / 2**20:>10.2f}"
            f" {_duration(one.seconds):>9}"
        )
    if not report.traffic:
        lines.append("  none")
    return lines


def _parts(title: str, parts: Any, report: Any) -> list[str]:
    heads = f"{'time':>9} {'share':>6} {'at peaks':>9}  {'bound':<8} {'GFLOP':>8} {'HBM MiB':>8}"
    lines = [f"{title:<32} {heads}"]
    for part in parts:
        if not part.cycles and not part.flops:
            continue
        lines.append(
            f"  {part.label:<30} {_duration(part.seconds):>9}"
            f" {part.seconds / report.seconds['step']:>6.1%} {_duration(part.floor):>9} "
            f" {part.bound:<8} {part.flops / 1e9:>8,.1f} {part.bytes / 2**20:>8,.1f}"
        )
    return lines


def _duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.2f} ms"
    return f"{seconds * 1e6:.1f} us"


def compare(reports: list[dict[str, Any]]) -> str:
    """Two reports side by side, with the ratio of the second to the first.

    Args:
      reports: two of what `report.json` holds.
    """
    first, second = reports
    rows: list[tuple[str, float, float, str]] = [
        ("step, ms", *(one["seconds"]["step"] * 1e3 for one in reports), "{:,.3f}"),
        ("compute, ms", *(one["seconds"]["compute"] * 1e3 for one in reports), "{:,.3f}"),
        ("collectives, ms", *(one["seconds"]["collectives"] * 1e3 for one in reports), "{:,.3f}"),
        ("tokens/s", *(one["tokens"] / one["seconds"]["step"] for one in reports), "{:,.0f}"),
        ("MFU, %", *(one["utilisation"]["model"] * 100 for one in reports), "{:.2f}"),
        ("operations, TFLOP a device", *(one["flops"] / 1e12 for one in reports), "{:,.4f}"),
        ("HBM traffic, GiB a device", *(one["bytes"] / GIB for one in reports), "{:,.3f}"),
    ]
    names = dict.fromkeys([*first["memory"], *second["memory"]])
    rows += [
        (f"{name}, GiB", *(one["memory"].get(name, 0) / GIB for one in reports), "{:,.3f}")
        for name in names
    ]
    parts = [
        {p["name"] + (", backward" if p["backward"] else ""): p["seconds"] for p in one["parts"]}
        for one in reports
    ]
    rows += [
        (f"{name}, ms", *(found.get(name, 0.0) * 1e3 for found in parts), "{:,.3f}")
        for name in dict.fromkeys([*parts[0], *parts[1]])
    ]
    width = max(len(row[0]) for row in rows)
    lines = [
        *(
            f"{place}: {one['kind']} step of {one['title']}; {one['topology']},"
            f" {_mesh(one['mesh'])}; {one['rows']:,} rows, {one['tokens']:,} tokens"
            for place, one in zip(("first", "second"), reports, strict=True)
        ),
        f"{'':<{width}}  {'first':>14}  {'second':>14}  ratio",
    ]
    for name, a, b, form in rows:
        ratio = f"{b / a:.3f}" if a else "-"
        lines.append(f"{name:<{width}}  {form.format(a):>14}  {form.format(b):>14}  {ratio}")
    return "\n".join(lines) + "\n"


def figure(report: Any, chip: Any, path: str) -> bool:
    """Draws the parts' times beside their floors, the roofline, and the memory of a device.

    Args:
      report: of `report.analyse`.
      chip: that it is of.
      path: of the PNG.

    Returns:
      Whether it was drawn: without matplotlib it is not, and a warning says how to get it.
    """
    figure_type = training_report.figure_class()
    if figure_type is None:
        logging.warning("%s", training_report.NO_PLOTS)
        return False
    drawing = figure_type(figsize=(15, 5), layout="constrained")
    times, roof, held = drawing.subplots(1, 3)
    seconds, mesh = report.seconds, _mesh(report.mesh)
    drawing.suptitle(
        f"{report.kind} step of {report.title}; {report.topology}, {mesh}\n"
        f"{_duration(seconds['step'])} predicted, MFU {report.utilisation['model']:.1%}"
    )
    parts = [part for part in report.parts if part.seconds >= LEAST * seconds["step"]]
    rest = seconds["compute"] - sum(part.seconds for part in parts)
    bars = [(_short(part), part.seconds, part.floor) for part in parts]
    bars += [("the rest", rest, 0.0), ("collectives alone", seconds["collectives"], 0.0)]
    names, predicted, floors = zip(*reversed(bars), strict=True)
    places = list(range(len(bars)))
    times.barh([p + 0.2 for p in places], [s * 1e3 for s in predicted], 0.4, label="predicted")
    times.barh([p - 0.2 for p in places], [s * 1e3 for s in floors], 0.4, label="at the peaks")
    times.set(yticks=places, yticklabels=names, xlabel="ms a step")
    times.legend(loc="lower right")
    _roofline(roof, parts, chip)
    _holdings(held, report.memory)
    drawing.savefig(path, dpi=120)
    return True


def _mesh(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one device"


def _holdings(axes: Any, sizes: dict[str, int]) -> None:
    """A bar for each kind of what a device holds; what is small together."""
    total, capacity = sizes["total"], sizes["capacity"]
    kinds = {n: s for n, s in sizes.items() if n not in ("total", "capacity")}
    large = {n: s for n, s in kinds.items() if s >= LEAST * total}
    if len(large) < len(kinds):
        large["the rest"] = sum(kinds.values()) - sum(large.values())
    bars = axes.barh(list(large)[::-1], [s / GIB for s in large.values()][::-1], color="tab:green")
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.margins(x=0.15)
    axes.set(xlabel="GiB", title=f"{total / GIB:.3g} of {capacity / GIB:.0f} GiB of HBM")


def _short(part: Any) -> str:
    return part.name + (" (bwd)" if part.backward else "")


def _roofline(axes: Any, parts: list[Any], chip: Any) -> None:
    """Operations a second against operations a byte, one point a part."""
    shown = [part for part in parts if part.flops and part.bytes and part.seconds]
    ridge = chip.flops / chip.hbm_bandwidth
    ratios = [part.flops / part.bytes for part in shown]
    low, high = min([ridge / 100, *ratios]) / 2, max([ridge * 10, *ratios]) * 2
    axes.plot(
        [low, ridge, high],
        [low * chip.hbm_bandwidth / 1e12, chip.flops / 1e12, chip.flops / 1e12],
        color="black",
        label="peaks of the chip",
    )
    for part, ratio in zip(shown, ratios, strict=True):
        axes.plot([ratio], [part.flops / part.seconds / 1e12], "o", label=_short(part))
    rates = [part.flops / part.seconds / 1e12 for part in shown]
    least = math.log10(min([chip.flops / 1e14, *rates]) / 2)
    axes.set(
        xscale="log",
        yscale="log",
        ylim=(10**least, chip.flops / 1e12 * 2),
        xlabel="operations of products a byte of HBM",
        ylabel="TFLOP/s of a device",
    )
    axes.legend(loc="lower right", fontsize=8)
