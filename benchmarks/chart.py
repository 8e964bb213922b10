"""The results as a picture: horizontal bars of ratios around 1.0, as plain SVG without a library.

Bars start at 1.0 on a logarithmic axis: to the right Basin is faster, to the left the peer is. Only the same-work
ratios are drawn, because a picture cannot carry the reservation that raw peers do less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

from benchmarks.peers import LIBRARIES
from benchmarks.results import Results

COLOURS: Final = {
    "rocksdict": "#c2571a",
    "lmdb": "#2a7f62",
    "plyvel": "#7a5195",
    "sqlite": "#1f6fb2",
    "diskcache": "#8a8a8a",
}
FONTS: Final = "DejaVu Sans, Helvetica, Arial, sans-serif"
WIDTH: Final = 900
LABEL_WIDTH: Final = 200
PLOT_WIDTH: Final = WIDTH - LABEL_WIDTH - 60  # room at the right for the figure of the longest bar
BAR_HEIGHT: Final = 9
GROUP_GAP: Final = 12
HEADER_HEIGHT: Final = 84
FOOTER_HEIGHT: Final = 46
RATIO_LIMITS: Final = (0.05, 30.0)
TICKS: Final = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)


@dataclass(frozen=True, slots=True)
class Bar:
    """One ratio of one peer."""

    peer: str
    ratio: float


def draw(results: Results) -> str:
    """The whole picture as an SVG document."""
    groups = _groups(results)
    plot_height = sum(len(bars) * BAR_HEIGHT + GROUP_GAP for _, bars in groups)
    height = HEADER_HEIGHT + plot_height + FOOTER_HEIGHT
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{FONTS}" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        *_header(results),
        *_axis(plot_height),
    ]
    top = HEADER_HEIGHT + GROUP_GAP / 2
    for job, bars in groups:
        parts.extend(_group(job, bars, top))
        top += len(bars) * BAR_HEIGHT + GROUP_GAP
    parts.extend(_footer(results, height))
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def position(ratio: float) -> float:
    """The horizontal place of a ratio; ratios beyond the axis are drawn at its end."""
    low, high = (math.log(limit) for limit in RATIO_LIMITS)
    share = (math.log(min(max(ratio, RATIO_LIMITS[0]), RATIO_LIMITS[1])) - low) / (high - low)
    return LABEL_WIDTH + share * PLOT_WIDTH


def _groups(results: Results) -> list[tuple[str, list[Bar]]]:
    groups = []
    for job in results.jobs():
        found = [(peer, results.ratio(job, peer, "work")) for peer in LIBRARIES]
        bars = [Bar(peer, ratio) for peer, ratio in found if ratio is not None]
        if bars:
            groups.append((job, bars))
    return groups


def _header(results: Results) -> list[str]:
    title = "Basin against its peers, each with the same work: hash, compression, encryption"
    parts = [
        _text(16, 26, title, size=16, weight="bold"),
        _text(
            16,
            46,
            "How many times as fast Basin is (medians). Right of 1: Basin is faster. Logarithmic.",
            fill="#555555",
        ),
    ]
    x = LABEL_WIDTH
    for peer in LIBRARIES:
        if any(sample.engine == peer for sample in results.samples):
            parts.append(f'<rect x="{x}" y="57" width="11" height="11" fill="{COLOURS[peer]}"/>')
            parts.append(_text(x + 16, 67, peer))
            x += 110
    return parts


def _axis(plot_height: float) -> list[str]:
    parts = []
    for tick in TICKS:
        x = position(tick)
        colour, width = ("#222222", 1.5) if tick == 1.0 else ("#dddddd", 1)
        parts.append(
            f'<line x1="{x:.1f}" y1="{HEADER_HEIGHT}" x2="{x:.1f}" y2="{HEADER_HEIGHT + plot_height}" '
            f'stroke="{colour}" stroke-width="{width}"/>'
        )
        parts.append(_text(x, HEADER_HEIGHT - 4, f"{tick:g}x", anchor="middle", size=10, fill="#555555"))
    return parts


def _group(job: str, bars: list[Bar], top: float) -> list[str]:
    middle = top + len(bars) * BAR_HEIGHT / 2
    parts = [_text(LABEL_WIDTH - 10, middle + 4, job, anchor="end")]
    for number, bar in enumerate(bars):
        y = top + number * BAR_HEIGHT
        left, right = sorted((position(1.0), position(bar.ratio)))
        parts.append(
            f'<rect x="{left:.1f}" y="{y:.1f}" width="{max(right - left, 0.5):.1f}" height="{BAR_HEIGHT - 1.5}" '
            f'fill="{COLOURS[bar.peer]}"><title>{escape(f"{job}: {bar.ratio:.2f} x {bar.peer}")}</title></rect>'
        )
        beside, anchor = (right + 3, "start") if bar.ratio >= 1 else (left - 3, "end")
        parts.append(_text(beside, y + BAR_HEIGHT - 2, f"{bar.ratio:.2g}", anchor=anchor, size=8, fill="#333333"))
    return parts


def _footer(results: Results, height: float) -> list[str]:
    machine = results.machine
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['kernel']}, {machine['file_system']}"
    run = f"{results.started}, scale {results.scale}, {results.rounds} rounds, seed {results.seed}"
    return [
        _text(16, height - 24, where, size=10, fill="#555555"),
        _text(16, height - 10, run, size=10, fill="#555555"),
    ]


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    size: int = 12,
    weight: str = "normal",
    fill: str = "#111111",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
        f'fill="{fill}">{escape(text)}</text>'
    )
