"""mdf_benchmarks.html: what is no Markup is escaped, wherever it is put."""

import pytest

from mdf_benchmarks.html import Markup, fill, to_document, to_note, to_section, to_table

from .pages import Page

EVIL = "<script>alert('&amp;')</script>"


@pytest.mark.parametrize(
    "document",
    [
        to_document(EVIL),
        to_document("", EVIL),
        to_document("", to_note(EVIL)),
        to_document("", to_section(EVIL)),
        to_document("", to_section("", EVIL)),
        to_document("", to_table([EVIL], [])),
        to_document("", to_table(["a"], [[EVIL]], words=())),
        to_document("", fill("<p>{} {name}</p>", 1, name=EVIL)),
        to_document("", fill('<p title="{}">{}</p>', f'"{EVIL}', EVIL)),
    ],
)
def test_text_stays_text_wherever_it_is_put(document: str) -> None:
    page = Page(document)
    assert EVIL in page.words or f"1 {EVIL}" in page.words
    page.check_whole()


def test_markup_stays_markup_and_numbers_take_a_format() -> None:
    assert fill("<p>{} {:.1f}</p>", Markup("<b>a</b>"), 1 / 3) == "<p><b>a</b> 0.3</p>"
    assert "<td><b>a</b></td>" in to_table(["a"], [[Markup("<b>a</b>")]], words=())


def test_paragraphs_are_made_of_text_and_empty_parts_are_left_out() -> None:
    section = to_section("a", "b", "", Markup("<hr>"))
    assert section == "<section><h2>a</h2>\n<p>b</p>\n<hr>\n</section>"


def test_words_are_set_left_and_a_row_of_another_length_is_refused() -> None:
    table = to_table(["name", "ms"], [["a", 1]])
    assert '<th class="words">name</th><th>ms</th>' in table
    assert '<td class="words">a</td><td>1</td>' in table
    with pytest.raises(ValueError, match="shorter"):
        to_table(["name", "ms"], [["a"]])
