"""An HTML page in; what it says, what it is made of and what it refers to, out."""

from collections import Counter
from html.parser import HTMLParser

VOID = {"meta", "br", "img", "link", "hr", "input"}
REFERENCES = {"src", "href", "xlink:href", "data", "action", "srcset", "poster"}


class Page(HTMLParser):
    """A page whose elements are all closed; else it cannot be made."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.tags: Counter[str] = Counter()
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag not in VOID:
            self.open.append(tag)
        self.references += [value or "" for name, value in attributes if name in REFERENCES]
        self.ids += [value or "" for name, value in attributes if name == "id"]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def check_whole(self) -> None:
        """Nothing comes from outside, runs, or has another's id."""
        assert self.tags.keys().isdisjoint({"script", "link", "iframe", "object"})
        ids = {f"#{each}" for each in self.ids}
        assert len(ids) == len(self.ids)
        assert all(r in ids or r.startswith("data:image/jpeg;base64,") for r in self.references)
