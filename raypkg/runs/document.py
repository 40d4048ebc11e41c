"""Tables and pages: for the terminal and other formats, as an HTML page that fetches nothing, and those of a run."""

import csv
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from io import StringIO
from itertools import zip_longest
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import quote

from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from raypkg.core.errors import printable, redacted

from .folder import RunFolder
from .report import utilisation

LONG = 30  # characters of a cell that is broken into lines
WIDE = ' class="wide"'
WIDEST = 1000  # columns of a terminal

STYLE = """
:root { color-scheme: light dark; --ink: #202124; --soft: #5f6368; --paper: #fff; --rule: #e8eaed; --link: #0b57d0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #9aa0a6; --paper: #202124; --rule: #3c4043; --link: #8ab4f8; }
  img { filter: brightness(.88); }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 72rem;
  margin: 2rem auto; padding: 0 1rem; }
a { color: var(--link); }
h1 { font-size: 1.2rem; line-height: 1.25; overflow-wrap: anywhere; font-weight: 600; color: var(--soft); }
h2 { font-size: 1.2rem; margin-top: 2.5rem; overflow-wrap: anywhere; }
p { max-width: 46rem; overflow-wrap: anywhere; }
p.finding { font-size: 1.5rem; line-height: 1.3; margin: .5rem 0 1.5rem; }
p.finding::first-letter { text-transform: uppercase; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem .3rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th { color: var(--soft); font-weight: 600; white-space: pre-line; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
td.wide { white-space: normal; overflow-wrap: anywhere; min-width: 10rem; }
tr.emphasis td { font-weight: 600; }
figure { margin: 1rem 0; }
img { display: block; max-width: min(100%, 54rem); height: auto; border-radius: 6px; }
.note { color: var(--soft); font-size: .85rem; }
@media (max-width: 600px) {
  body { margin: 1rem auto; }
  p.finding { font-size: 1.2rem; }
  td:first-child { max-width: 40vw; overflow: hidden; text-overflow: ellipsis; }
}
""".strip()


INDENT = 2 * "\N{NO-BREAK SPACE}"


def _count(samples: int) -> str:
    return f"{samples:,}" if samples < 10**8 else f"{samples / 1e6:,.0f} M"  # at most ten characters


COLUMNS: Sequence[tuple[str, str, Callable[[Any], str], Callable[[Sequence[Any]], Any]]] = (
    # Headings of two lines, so that the table fits 80 columns; figure, format, and the figure of the whole run.
    ("seconds", "seconds", "{:,.1f}".format, sum),
    ("worker\nseconds", "total_seconds", "{:,.1f}".format, sum),
    ("samples\nforward", "forward", _count, sum),
    ("samples\nbackward", "backward", _count, sum),
    ("MB\nsent", "sent", lambda size: f"{size / 1e6:,.1f}", sum),
    ("peak\nMiB", "memory", lambda size: f"{size / 2**20:,.0f}", max),
    ("GPU\nMiB", "device_memory", lambda size: f"{size / 2**20:,.0f}", max),
)
LATEX = {letter: f"\\{letter}" for letter in "%$&#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "−": "$-$",
    "τ": r"$\tau$", "ρ": r"$\rho$", "·": r"$\cdot$", "≤": r"$\le$", "≥": r"$\ge$", "×": r"$\times$",
    "\N{NO-BREAK SPACE}": "~",
}  # fmt: skip


class Terminal(Console):
    """A console that prints names and paths literally, without credentials and characters that control a terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Render a text, which may be the cell of a table."""
        return super().render_str(printable(redacted(text)), **options)


def terminal() -> Console:
    """Return the console of this process."""
    return Terminal(markup=False, emoji=False, highlight=False)


def print_wide(table: Table) -> None:
    """Print a table of any width: the terminal wraps its lines rather than cutting off figures."""
    console = terminal()
    needed = Measurement.get(console, console.options.update(max_width=WIDEST), table).maximum
    console.width = max(console.width, needed)
    console.print(table)


class Grid(NamedTuple):
    """A table of texts, for the terminal, Markdown, LaTeX, CSV and HTML."""

    title: str
    headings: Sequence[str]  # a line break in one is kept if the format has them
    rows: Sequence[Sequence[str]]
    emphasised: frozenset[int] = frozenset()  # positions of the rows in bold
    note: str = ""  # below the table
    totals: Sequence[str] = ()  # a last row

    def print(self) -> None:
        """Print the table on the terminal."""
        title = "; ".join(filter(None, [self.title, self.note]))
        table = Table(title=title or None, title_justify="left", box=SIMPLE, show_edge=False, pad_edge=False)
        table.show_footer = bool(self.totals)
        for place, (heading, total) in enumerate(zip_longest(self.headings, self.totals, fillvalue="")):
            table.add_column(heading, total, justify="right" if place else "left", vertical="bottom")
        for place, row in enumerate(self.rows):
            table.add_row(*row, style="bold" if place in self.emphasised else None)
        print_wide(table)

    def markdown(self) -> str:
        """Return the table as Markdown.

        >>> print(Grid("", ["row", "seconds"], [["x", "1"]]).markdown())
        | row | seconds |
        |---|---:|
        | x | 1 |
        """
        lines = [f"### {_one_line(self.title)}", ""] if self.title else []
        lines.append(_markdown_row(self.headings))
        lines.append("|" + "|".join(["---", *["---:"] * (len(self.headings) - 1)]) + "|")
        for place, row in enumerate(self._with_totals()):
            first = f"**{row[0]}**" if place in self.emphasised else row[0]
            lines.append(_markdown_row([first, *row[1:]]))
        if self.note:
            lines += ["", _one_line(self.note)]
        return "\n".join(lines)

    def latex(self) -> str:
        r"""Return the table for LaTeX's package booktabs, titled by a comment.

        >>> print(Grid("", ["row", "share"], [["a_b", "5 %"]]).latex())
        \begin{tabular}{lr}
        \toprule
        row & share \\
        \midrule
        a\_b & 5 \% \\
        \bottomrule
        \end{tabular}
        """
        body = []
        for place, row in enumerate(self._with_totals()):
            cells = [_latex(cell) for cell in row]
            if place in self.emphasised:
                cells = [f"\\textbf{{{cell}}}" for cell in cells]
            body.append(" & ".join(cells) + r" \\")
        head = " & ".join(map(_latex, self.headings)) + r" \\"
        lines = [f"% {' '.join(self.title.split())}"] if self.title else []
        lines += [rf"\begin{{tabular}}{{l{'r' * (len(self.headings) - 1)}}}", r"\toprule", head, r"\midrule"]
        return "\n".join([*lines, *body, r"\bottomrule", r"\end{tabular}"])

    def csv(self) -> str:
        """Return the table as CSV with the title in a first column, so that several tables stay apart."""
        text = StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["table", *(" ".join(heading.split()) for heading in self.headings)])
        rows.writerows([self.title, *row] for row in self._with_totals())
        return text.getvalue().rstrip("\n")

    def _with_totals(self) -> list[Sequence[str]]:
        return [*self.rows, self.totals] if self.totals else [*self.rows]

    def html(self, above: str = "", links: Mapping[str, str] = MappingProxyType({})) -> str:
        """Return the table as a part of a page, below its title and HTML ``above``; ``links`` are of first cells."""
        head = "".join(f"<th>{escape(heading)}</th>" for heading in self.headings)
        body = []
        for place, (first, *others) in enumerate(self._with_totals()):
            kind = ' class="emphasis"' if place in self.emphasised else ""
            name = link(first, links[first]) if first in links else escape(first)
            cells = "".join(f"<td{WIDE * (len(cell) > LONG)}>{escape(cell)}</td>" for cell in others)
            body.append(f"<tr{kind}><td>{name}</td>{cells}</tr>")
        rows = "\n".join(body)
        parts = [f"<h2>{escape(self.title)}</h2>"] if self.title else []
        parts += [above] if above else []
        parts.append(f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>')
        if self.note:
            parts.append(paragraph(self.note, "note"))
        return "\n".join(parts)


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_one_line(cell).replace("|", "\\|") for cell in cells) + " |"


def _latex(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in text.replace("\n", " "))


def _one_line(text: str) -> str:
    return escape(" ".join(text.split()), quote=False)  # Markdown passes HTML on


def paragraph(text: str, kind: str = "") -> str:
    """Return a text, a ``finding`` or a ``note`` perhaps, as a part of a page."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def link(text: str, to: str) -> str:
    """Return a link to a file by its path from the page."""
    return f'<a href="{escape(quote(to))}">{escape(text)}</a>'


def picture(png: bytes, alternative: str) -> str:
    """Return a picture, embedded with its alternative text, as a part of a page."""
    data = b64encode(png).decode()
    return f'<figure><img src="data:image/png;base64,{data}" alt="{escape(alternative)}"></figure>'


def document(title: str, parts: Iterable[str]) -> str:
    """Return a page of parts, which are already HTML."""
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


# Results of a finished run


def show_run(folder: RunFolder, console: Console) -> None:
    """Print a finished run's results below a row for the costs of each phase and the totals."""
    summary = folder.summary or {}
    cost_grid(folder.name, summary["phases"]).print()
    for line in findings(summary):
        console.print(line)
    for grid in tables(summary):
        grid.print()
    console.print(folder.storage.root, style="dim", soft_wrap=True)


def cost_grid(title: str, phases: Sequence[Mapping[str, Any]]) -> Grid:
    """Return the costs of a finished run's phases and of their parts, and the totals in the last row."""
    headings = ["phase"]
    names = []
    for phase in phases:
        name, _, part = phase["phase"].partition(": ")
        names.append(f"{INDENT}{part}" if part else name)
    columns = [names]
    totals = ["all"]
    for heading, key, form, total in COLUMNS:
        values = [phase.get(key, 0) for phase in phases] or [0]
        if key == "device_memory" and not any(values):
            continue
        headings.append(heading)
        columns.append([form(value) for value in values])
        totals.append(form(total(values)))
    rows = [*zip(*columns, strict=False)]
    return Grid(title, headings, rows, totals=totals)


def findings(summary: Mapping[str, Any]) -> list[str]:
    """Return a finished run's results in plain lines, the main one first: test, findings of its methods, time."""
    phases = summary["phases"]
    samples, coreset = summary["samples"], summary["coreset"]
    chosen = f"all {samples:,} samples"
    if coreset is not None:
        chosen = f"{coreset:,} of {samples:,} samples ({coreset / samples:.1%})"
    lines = []
    if "test_accuracy" in summary:
        full = summary["full_training_backward"]
        backward = sum(phase["backward"] for phase in phases)
        accuracy, loss = summary["test_accuracy"], summary["test_loss"]
        tested = f"test accuracy {accuracy:.2%} (loss {loss:.3f})"
        if "test_perplexity" in summary:
            first = f"first answered token right {accuracy:.2%}"
            tested = f"test perplexity {summary['test_perplexity']:.2f} (loss {loss:.3f} per answered token, {first})"
        if "test_metric" in summary:
            tested += f", metric {summary['test_metric']:.4g}"
        lines.append(f"{tested}, trained on {chosen}")
        lines.append(f"{backward:,} samples backward, {100 * backward / full:.1f} % of full training ({full:,})")
    elif coreset is not None:
        lines.append(f"selected {chosen}: coreset.parquet; train on it with `effray train --coreset`")
    waited = sum(phase.get("waited", 0) for phase in phases)  # missing in runs of earlier versions
    lines += summary.get("findings", [])
    compute = f"compute {summary['seconds']:.1f} s ({waited:.1f} s waiting for data)"
    trained = [phase for phase in phases if phase["backward"]]
    if seconds := sum(phase.get("seconds", 0) for phase in trained):
        compute += f", {sum(phase['backward'] for phase in trained) / seconds:,.0f} samples/s in training"
    if share := utilisation(trained):
        compute += f", MFU {share:.1%}"
    return [*lines, f"{compute}; wall time {summary['elapsed']:.1f} s including start-up and I/O"]


def tables(summary: Mapping[str, Any]) -> list[Grid]:
    """Return the tables of a finished run's own, such as an audit's worst samples."""
    return [Grid(**table) for table in summary.get("tables", ())]
