"""Escape names from files and folders for printing: a file system or a checkpoint may allow any character."""

import re
import unicodedata

HARMLESS = {"\u200c", "\u200d"}  # joiners, which some scripts need


def printable(text: str) -> str:
    """Return `text` with control, direction and other invisible characters as escapes (`\\x1b`)."""
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") and character not in HARMLESS:
        return character.encode("unicode_escape").decode("ascii")
    return character


def markdown(text: str) -> str:
    """Return `text` for a line of Markdown: no character of it starts markup, HTML or a new line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", printable(text))


def code_span(text: str) -> str:
    """Return `text` for a Markdown code span, also in a table: backticks become apostrophes, pipes are escaped."""
    return printable(text).replace("`", "'").replace("|", "\\|")
