# SPDX-License-Identifier: Apache-2.0
"""What a browser would find in a page of HTML."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "img", "input", "br"}


class Page(HTMLParser):
    """A page read whole: its cells row by row, words, images; an assertion fails when a tag is not closed."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.words = ""
        self.scripts = ""
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.scripts += data
            return
        self.words += data
        if {"td", "th"} & set(self.open) and "small" not in self.open:
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        """The cells behind a name."""
        (found,) = [row[1:] for row in self.rows if row and row[0] == name]
        return found

    def headings(self) -> list[str]:
        return re.findall(r"<h2>(.*?)</h2>", self.source)

    def slices(self) -> dict[str, dict[str, list[str]]]:
        """What the script has been given."""
        (data,) = re.findall(r'<script type="application/json" id="slices">(.*?)</script>', self.source, re.DOTALL)
        return dict(json.loads(data))

    def check_alone(self) -> int:
        """Nothing from elsewhere, and every image whole; how many there are."""
        from PIL import Image

        assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[A-Za-z0-9+/=]*", "", self.source))
        for tag, attributes in self.tags:
            assert "href" not in attributes and (tag != "script" or "src" not in attributes)
            if tag == "img":
                assert attributes["alt"] and (attributes["src"] or "").startswith("data:image/")
        found = re.findall(r"data:image/(png|jpeg);base64,([A-Za-z0-9+/=]*)", self.source)
        assert len(found) == self.source.count("data:image")
        for kind, text in found:
            with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as image:
                image.load()
                assert image.format == kind.upper()
        return len(found)
