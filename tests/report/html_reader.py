"""`HTMLReader`, which takes apart the pages of the tests, and a text that tries to break out."""

from html.parser import HTMLParser

HOSTILE = '<script>alert("&")</script>\' --> </style> \x1b[2J'
VOID = {"meta", "link", "input", "br", "hr", "img"}


class HTMLReader(HTMLParser):
    """Checks that tags nest and keeps every element with the text inside it."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[int] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {[self.elements[i] for i in self.open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"attribute given twice: {tag} {attrs}"
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.elements[self.open.pop()][0] == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        for i in self.open:
            self.texts[i] += data

    def having(self, name: str, value: str | None = None) -> list[tuple[str, dict, str]]:
        return [
            (tag, attrs, text)
            for (tag, attrs), text in zip(self.elements, self.texts, strict=True)
            if name in attrs and value in (None, attrs[name])
        ]

    def tags(self, name: str) -> list[str]:
        pairs = zip(self.elements, self.texts, strict=True)
        return [text for (tag, _), text in pairs if tag == name]
