"""HTML of the reports: tables, text colored by recursion count, tabs, and whole pages.

Everything here is a pure function from values to text. A page makes no request to any host (its
content security policy forbids it), has no script, follows the light or dark scheme of the reader,
prints in the light one, and shows depth by underlines and numbers as well as by color.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from mor.report.charts import Series, bar_chart, line_chart, percent
from mor.report.palette import (
    DARK_INK,
    DEPTH_COLORS,
    LIGHT_INK,
    SERIES_COLORS,
    ColorPair,
    depth_color_index,
)

__all__ = ["ColoredText", "Section", "Series", "Table", "bar_chart", "line_chart", "page", "tabs"]

_NUMBER = re.compile(r"[-+\N{MINUS SIGN}<>~]?\d")
_MAX_TABS = 6
_BLANKS = ("", "-", "\N{EN DASH}", "\N{EM DASH}", "n/a")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of texts; columns that hold only numbers are set flush right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            assert len(row) == len(self.columns), (tuple(self.columns), tuple(row))

    def html(self) -> str:
        """The table with all texts escaped, in a frame that scrolls if it is too wide."""
        numeric = [i > 0 and self._is_numeric(i) for i in range(len(self.columns))]
        flush = [' class="number"' if n else "" for n in numeric]
        heads = "".join(
            f'<th scope="col"{flush[i]}>{escape(column)}</th>'
            for i, column in enumerate(self.columns)
        )
        body = "".join(f"<tr>{self._cells(row, flush)}</tr>" for row in self.rows)
        caption = f"<caption>{escape(self.caption)}</caption>" if self.caption else ""
        return (
            f'<div class="table"><table>{caption}<thead><tr>{heads}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )

    def _is_numeric(self, column: int) -> bool:
        cells = [row[column].strip() for row in self.rows]
        return any(map(_NUMBER.match, cells)) and all(
            cell in _BLANKS or _NUMBER.match(cell) for cell in cells
        )

    @staticmethod
    def _cells(row: Sequence[str], flush: Sequence[str]) -> str:
        cells = [f"<td{flush[i]}>{escape(cell)}</td>" for i, cell in enumerate(row)]
        if cells:
            cells[0] = f'<th scope="row">{escape(row[0])}</th>'
        return "".join(cells)


@dataclass(frozen=True, kw_only=True)
class ColoredText:
    """A text whose tokens are colored by their recursion counts."""

    pieces: Sequence[str]
    """The text of each token."""
    counts: Sequence[int]
    """The recursion count of each token, from 1 to `num_recursions`."""
    num_recursions: int
    prompt_tokens: int = 0
    """How many tokens at the beginning are the prompt. They are shown paler, up to a vertical bar,
    and are left out of the legend's shares if other tokens follow."""

    def __post_init__(self) -> None:
        assert len(self.pieces) == len(self.counts), (len(self.pieces), len(self.counts))
        assert 0 <= self.prompt_tokens <= len(self.pieces), self.prompt_tokens
        for count in self.counts:
            assert 1 <= count <= self.num_recursions, (count, self.num_recursions)

    def html(self) -> str:
        """A legend and the text, a span for each token; copying the text copies nothing else."""
        tokens = list(map(self._token, self.pieces, self.counts))
        prompt, rest = tokens[: self.prompt_tokens], tokens[self.prompt_tokens :]
        marked = f'<span class="prompt">{"".join(prompt)}</span>' if prompt else ""
        return (
            f'<div class="depth">{self._legend()}'
            f'<div class="tokens" translate="no">{marked}{"".join(rest)}</div></div>'
        )

    def _token(self, piece: str, count: int) -> str:
        color = depth_color_index(count, self.num_recursions)
        line = " newline" if "\n" in piece or "\r" in piece else ""
        # HTML would turn a carriage return into a line feed, and drops a null character.
        text = escape(piece).replace("\r", "&#13;").replace("\0", "\N{SYMBOL FOR NULL}")
        title = f"recursions: {count} of {self.num_recursions}"
        return f'<span class="d{color}{line}" data-n="{count}" title="{title}">{text}</span>'

    def _legend(self) -> str:
        counts = self.counts[self.prompt_tokens :] or self.counts
        items = ["<li><i>recursions per token</i></li>"]
        for n in range(1, self.num_recursions + 1):
            share = escape(percent(counts.count(n) / len(counts))) if counts else ""
            color = depth_color_index(n, self.num_recursions)
            items.append(f'<li><b class="d{color}">{n}</b> <i>{share}</i></li>')
        if counts:
            mean = f"{sum(counts) / len(counts):.2f} of {self.num_recursions}"
            items.append(f"<li>mean <i>{mean}</i></li>")
        if self.prompt_tokens:
            items.append('<li><span class="prompt"><b class="d0">prompt</b></span></li>')
        toggle = '<label><input type="checkbox"> show counts</label>'
        return f'<ul class="legend">{"".join(items)}<li>{toggle}</li></ul>'


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page."""

    heading: str
    body_html: str
    """HTML that `html()` of this module's classes or a chart has made; it is not escaped."""
    note: str = ""
    """A text below the body."""


def tabs(name: str, panels: Sequence[tuple[str, str]]) -> str:
    """At most six panels of which one is shown at a time, chosen by its label; on paper all are.

    Without a script: the style sheet shows the panel whose radio button is checked.

    Args:
        name: of the group of radio buttons, unique on the page.
        panels: labels and HTML, which is not escaped.
    """
    assert 0 < len(panels) <= _MAX_TABS, len(panels)
    labels = "".join(
        f'<label><input type="radio" name="{escape(name)}"{"" if i else " checked"}>'
        f" {escape(label)}</label>"
        for i, (label, _) in enumerate(panels)
    )
    bodies = "".join(f"<div>{body}</div>" for _, body in panels)
    return f'<div class="tabs">{labels}{bodies}</div>'


def page(title: str, subtitle: str, sections: Sequence[Section], footer: str) -> str:
    """A whole HTML document; all texts but the sections' bodies are escaped."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_scheme()}{_STYLE}</style></head>\n<body><main>"
        f'<header><h1>{escape(title)}</h1><p class="subtitle">{escape(subtitle)}</p></header>\n'
        + "\n".join(map(_section, sections))
        + f"\n<footer>{escape(footer)}</footer></main></body></html>\n"
    )


def _section(section: Section) -> str:
    note = f'<p class="note">{escape(section.note)}</p>' if section.note else ""
    body = f'<div class="body">{section.body_html}</div>'
    return f"<section><h2>{escape(section.heading)}</h2>{body}{note}</section>"


def _scheme() -> str:
    """CSS: variables of both color schemes, a class for each depth color, rules for tabs."""

    def variables(ink: str, rest: str, dark: bool) -> str:
        def pick(color: ColorPair) -> str:
            return color.dark if dark else color.light

        depths = "".join(f"--d{i}:{pick(c)};" for i, c in enumerate(DEPTH_COLORS))
        lines = "".join(f"--series-{i}:{pick(c)};" for i, c in enumerate(SERIES_COLORS))
        return f":root{{--ink:{ink};{rest}{depths}{lines}}}"

    light = variables(LIGHT_INK, "--paper:#fdfdfb;--soft:#5b606b;--rule:#dcdde0;", False)
    dark = variables(DARK_INK, "--paper:#15171b;--soft:#a3a9b5;--rule:#33373f;", True)
    last = len(DEPTH_COLORS) - 1
    # The deeper a token, the thicker its underline.
    classes = "".join(
        f".d{i}{{--shade:var(--d{i});border-bottom-width:{3 * i / last:.2g}px}}"
        for i in range(last + 1)
    )
    # Browsers without :has() show all panels.
    shown = ",".join(
        f".tabs:has(label:nth-of-type({i}) :checked)>div:nth-of-type({i})"
        for i in range(1, _MAX_TABS + 1)
    )
    screen = f"@media screen{{.tabs>div{{display:none}}{shown}{{display:block}}}}"
    chosen = f"@supports selector(:has(*)){{{screen}}}"
    return f"{light}@media screen and (prefers-color-scheme:dark){{{dark}}}{classes}{chosen}"


_STYLE = """
:root{color-scheme:light dark}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:52rem;margin:0 auto;padding:3.5rem 1.5rem 3rem}
h1{font-size:2rem;line-height:1.2;font-weight:650;letter-spacing:-.018em;margin:0;
text-wrap:balance}
.subtitle{font-size:1.1rem;color:var(--soft);margin:.5rem 0 0;text-wrap:pretty}
section{margin-top:3rem;padding-top:1.5rem;border-top:1px solid var(--rule)}
h2{font-size:1.25rem;line-height:1.3;font-weight:650;letter-spacing:-.01em;margin:0 0 1.1rem}
.body{overflow-x:auto}
.body>*+*{margin-top:1.75rem}
.note{font-size:.9rem;color:var(--soft);margin:1rem 0 0;max-width:44rem;text-wrap:pretty}
footer{margin-top:3.5rem;padding-top:1rem;border-top:1px solid var(--rule);font-size:.85rem;
color:var(--soft);white-space:pre-line;overflow-wrap:anywhere}
svg.chart{display:block;width:100%;min-width:34rem;height:auto;font-variant-numeric:tabular-nums}
.table{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding:0 0 .6rem}
th,td{padding:.42rem .6rem;text-align:left;vertical-align:top;font-weight:400;
border-bottom:1px solid var(--rule)}
thead th{font-weight:600;font-size:.82rem;color:var(--soft);vertical-align:bottom;
border-bottom:1.5px solid var(--ink)}
th:first-child,td:first-child{padding-left:0}
th:last-child,td:last-child{padding-right:0}
tbody tr:last-child>*{border-bottom:0}
.number{text-align:right;width:9rem}
td.number{white-space:nowrap}
tbody tr:hover>*{background:color-mix(in srgb,var(--ink) 5%,transparent)}
.legend{display:flex;flex-wrap:wrap;gap:.4rem 1.25rem;align-items:center;list-style:none;
padding:0;margin:0 0 .9rem;font-size:.9rem}
.legend i{font-style:normal;color:var(--soft);font-variant-numeric:tabular-nums}
.legend b{font-weight:400;padding:.05em .5em 0;border-radius:3px 3px 0 0}
.legend .prompt::after{margin-left:0}
.legend li:last-child{margin-left:auto}
.legend label{color:var(--soft);cursor:pointer;user-select:none}
.legend input{accent-color:var(--series-0);margin:0 .15em 0 0;vertical-align:-.08em}
.tokens{font:.875rem/1.75 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;
white-space:pre-wrap;overflow-wrap:anywhere;tab-size:4;border:1px solid var(--rule);
border-radius:6px;padding:.9rem 1.1rem}
.tokens span[data-n],.legend b{background:var(--shade);border-bottom-style:solid;
border-bottom-color:color-mix(in srgb,var(--shade) 55%,var(--ink))}
.tokens span[data-n]{box-shadow:inset -1px 0 0 var(--paper);-webkit-box-decoration-break:clone;
box-decoration-break:clone}
.tokens span[data-n]:hover{outline:1.5px solid var(--ink)}
.newline::before{content:"\\21b5";font-size:.8em;opacity:.6}
.tokens .prompt span[data-n],.legend .prompt b{color:var(--soft);
background:color-mix(in srgb,var(--shade) 40%,var(--paper))}
.tabs>label{display:inline-block;color:var(--soft);cursor:pointer;
margin:0 1.1rem .9rem 0;font-size:.9rem}
.tabs>label:has(:checked){color:var(--ink)}
.tabs input{accent-color:var(--series-0);margin:0 .25em 0 0;vertical-align:-.08em}
.prompt::after{content:"";border-left:2px solid var(--ink);margin:0 2px}
.depth:has(:checked) span[data-n]:not(.newline)::after,
.depth:has(:checked) .newline::before{font-size:.65em;line-height:0;vertical-align:super;
opacity:.8;padding:0 .15em}
.depth:has(:checked) span[data-n]:not(.newline)::after{content:attr(data-n)}
.depth:has(:checked) .newline::before{content:attr(data-n)"\\21b5"}
@media (max-width:40rem){main{padding:2rem 1rem}h1{font-size:1.6rem}
.legend li:last-child{margin-left:0}.tokens{padding:.7rem .8rem;font-size:.8rem}
.number{width:auto}}
@media print{:root{color-scheme:light;--paper:#fff}
main{max-width:none;padding:0}body{font-size:11pt}
section{margin-top:2rem}h2{break-after:avoid}svg.chart,tr,.tokens{break-inside:avoid}
.legend label{display:none}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
"""
