"""Words, figures and plots in; one HTML document out that needs nothing else, print-ready."""

from collections.abc import Collection, Iterable, Sequence
from html import escape

_STYLE = """
:root { color-scheme: light; --ink: #1d2733; --soft: #5b6673; --line: #dfe4ea; }
body { font: .94rem/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: var(--ink);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; print-color-adjust: exact; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .2rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .4rem; }
p { margin: .4rem 0; overflow-wrap: anywhere; }
code { font-size: .9em; overflow-wrap: anywhere; }
.soft, th, summary, .tiles span { color: var(--soft); }
.pass { --mark: #1a7f4b; --ground: #e9f6ef; }
.fail { --mark: #b3261e; --ground: #fdeceb; }
.warn { --mark: #d9822b; --ground: #fdf4e7; }
b[class] { color: var(--mark); }
.banner { border-left: .4rem solid var(--mark); border-radius: 4px; background: var(--ground);
  padding: .6rem 1rem; margin: .8rem 0; }
.tiles, .pictures { display: grid; gap: .5rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(7.6rem, 1fr)); }
.tiles div { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .6rem; }
.tiles b { display: block; font-size: 1.15rem; white-space: nowrap; }
.tiles span, figcaption { display: block; font-size: .8rem; line-height: 1.4; }
.pictures { gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); }
figure { margin: 0; }
img { width: 100%; border-radius: 4px; }
.wide { overflow-x: auto; margin: .5rem 0; }
svg { max-width: 100%; min-width: 36rem; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-size: .86rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; vertical-align: top; padding: .22rem .45rem;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; vertical-align: bottom; }
td { white-space: nowrap; }
.words { text-align: left; white-space: normal; }
th:first-child, td:first-child { padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
section, tr, figure { break-inside: avoid; }
@media print { :root { font-size: 12px; } body { margin: 0; max-width: none; padding: 0; } }
"""


class Markup(str):
    """Finished HTML: any other text is escaped before it is put into a document."""


def fill(template: str, /, *values: object, **named: object) -> Markup:
    """Put values into the braces of a template, escaped unless they are Markup or numbers."""
    safe = {name: _escape(value) for name, value in named.items()}
    return Markup(template.format(*map(_escape, values), **safe))


def to_document(title: str, *parts: str) -> str:
    """Make the whole document of sections and other parts, as `to_section` takes them."""
    return fill(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<title>{}</title>\n<style>{}</style>\n</head>\n<body>\n{}\n</body>\n</html>\n",
        title,
        Markup(_STYLE),
        _join(parts),
    )


def to_section(title: str, *parts: str) -> Markup:
    """Set parts below a heading: Markup as it is, other text as a paragraph, "" not at all."""
    return fill("<section><h2>{}</h2>\n{}\n</section>", title, _join(parts))


def to_note(text: str) -> Markup:
    """Set a paragraph in the color of what is beside the point."""
    return fill('<p class="soft">{}</p>', text)


def to_table(
    head: Sequence[str], rows: Iterable[Sequence[object]], words: Collection[int] = (0,)
) -> Markup:
    """Lay out a table; the columns `words` are set left and may wrap, the others are numbers."""
    marks = [' class="words"' if column in words else "" for column in range(len(head))]
    lines = []
    for tag, row in (("th", head), *(("td", row) for row in rows)):
        cells = zip(marks, row, strict=True)
        line = "".join(f"<{tag}{mark}>{_escape(cell)}</{tag}>" for mark, cell in cells)
        lines.append(f"<tr>{line}</tr>")
    return fill('<div class="wide"><table>{}</table></div>', Markup("\n".join(lines)))


def _join(parts: Iterable[str]) -> Markup:
    shown = (
        part if isinstance(part, Markup) else fill("<p>{}</p>", part) for part in parts if part
    )
    return Markup("\n".join(shown))


def _escape(value: object) -> object:
    return value if isinstance(value, Markup | int | float) else escape(str(value))
