"""A page is one file: nothing is fetched, whatever it is told, and no name becomes markup."""

import re
from html.parser import HTMLParser

from raypkg.runs.document import Grid, document, paragraph, picture

EVIL = "<script src='https://evil.example/x.js'></script>\"|&"


class Reader(HTMLParser):
    """Collects tags with their attributes, and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def page():
    grid = Grid(EVIL, ["row", EVIL], [[EVIL, "1"], ["b", "2"]], frozenset({1}), EVIL)
    links = {EVIL: "../one/report.html", "b": f"{EVIL}/report.html"}
    return document(EVIL, [paragraph(EVIL), grid.html(links=links), picture(b"\x89PNG", EVIL)])


def fetched(text):
    """Return everything that a browser would load or follow."""
    links = [value for _, attributes in Reader(text).tags for name, value in attributes.items() if name in LOADING]
    return [link for link in links if not link.startswith("data:")] + re.findall(r"url\(|@import", text)


LOADING = ("src", "href", "srcset", "data", "action", "poster")


def test_a_page_is_one_file_of_texts_that_fits_a_narrow_window():
    text = page()
    assert fetched(text)[0] == "../one/report.html" and fetched(text)[1].startswith("%3Cscript%20src%3D")
    read = Reader(text)
    assert "script" not in {tag for tag, _ in read.tags}
    assert read.text.count(EVIL) == 7  # title twice, paragraph, the grid's title, a heading, a cell and the note
    assert dict(read.tags[[tag for tag, _ in read.tags].index("img")][1])["alt"] == EVIL
    assert 'name="viewport"' in text
    assert re.search(r"\.scroll \{ overflow-x: auto", text) and '<div class="scroll"><table>' in text
    assert "max-width: min(100%, 54rem)" in text and "@media (prefers-color-scheme: dark)" in text


def test_rows_that_stand_out_are_marked_and_cells_stay_cells():
    grid = Grid("", ["a|b", "two\nlines"], [["a", "1"], ["b", "2"]], frozenset({1}))
    assert grid.html().count('class="emphasis"') == 1
    first, *_, last = grid.markdown().splitlines()
    assert (first, last) == (r"| a\|b | two lines |", "| **b** | 2 |")


def test_markdown_passes_no_html_on():
    text = Grid("<i>", ["<b>"], [["<script>x</script>"]], note="a < b & c").markdown()
    assert text.count("&lt;") == 5 and "&amp;" in text and "<" not in text
