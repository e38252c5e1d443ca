"""Self-contained HTML pages: no scripts, no external links, light and dark colour schemes.

Plain text is `str`, escaped HTML is `Markup`. Text is escaped by `escape` only, here and in
`molcli.report.charts`, where it becomes Markup.
"""

import html
import re
from collections.abc import Iterable, Sequence
from typing import NewType

from molcli.console import printable

# And parts of surrogate pairs, which UTF-8 cannot hold, and what reverses the text that follows.
# Other marks of direction stay: languages that are written from right to left need them.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202d\u202e\ud800-\udfff]")

Markup = NewType("Markup", str)
"""HTML that is safe to embed."""

# Series colours c0 to c5, in both schemes: Okabe and Ito's palette for colour-blind readers.
_STYLE = """
:root{color-scheme:light dark;--ground:#fff;--ink:#1b1f24;--soft:#667079;--rule:#d8dde2;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#cc79a7;--c4:#b08900;--c5:#56707f}
@media(prefers-color-scheme:dark){:root{--ground:#14171a;--ink:#e4e8eb;--soft:#98a2ab;
--rule:#343b42;--c0:#56b4e9;--c1:#ff8d4d;--c2:#2fc79b;--c3:#e59cc4;--c4:#e6c547;--c5:#9fb4c0}}
body{margin:2rem auto;max-width:62rem;padding:0 1rem;background:var(--ground);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem}h2{font-size:1.15rem;margin-top:2.2rem}
p,td,th,h1,h2,figcaption,svg text{unicode-bidi:isolate}
p,figcaption{max-width:46rem}figcaption,.soft{color:var(--soft)}
figure{margin:1rem 0;overflow-x:auto}svg{width:100%;height:auto;max-width:52rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .7rem;text-align:right;border-bottom:1px solid var(--rule);vertical-align:top}
th{color:var(--soft);font-weight:600}th:first-child,td:first-child{text-align:left}
table.prose td{text-align:left;white-space:pre-wrap;overflow-wrap:anywhere}
table.prose th{text-align:left}
svg text{fill:var(--ink);font:12px system-ui,sans-serif}svg .axis{stroke:var(--rule)}
svg .label{fill:var(--soft)}
""".strip()


def escape(text: str) -> str:
    """Return the text as HTML that shows it; control characters become escapes such as `\\x1b`."""
    return html.escape(_CONTROL.sub(lambda found: printable(found[0]), text))


def page(title: str, parts: Iterable[Markup]) -> str:
    """Build the whole document, to be saved as UTF-8."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def heading(text: str) -> Markup:
    """Build the heading of a section."""
    return Markup(f"<h2>{escape(text)}</h2>")


def paragraph(text: str) -> Markup:
    """Build a paragraph of plain text."""
    return Markup(f"<p>{escape(text)}</p>")


def figure(drawing: Markup, caption: str) -> Markup:
    """Build a figure from a chart of `molcli.report.charts` and its caption."""
    return Markup(f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>")


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, prose: bool = False) -> Markup:
    """Build a table whose first column is text and whose other columns are numbers.

    Args:
        header: Names of the columns.
        rows: Cells; each row is as long as the header.
        prose: All columns are text, and line breaks are kept.
    """
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    kind = ' class="prose"' if prose else ""
    return Markup(
        f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )
