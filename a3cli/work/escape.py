"""Names from files and folders, made safe to print: they may hold whatever a file system or a checkpoint allows."""

import re
import unicodedata

HARMLESS = {"\u200c", "\u200d"}  # joiners: some scripts need them, and they move nothing


def printable(text: str) -> str:
    """Control, direction and other invisible characters as escapes (`\\x1b`), all else as it is."""
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") and character not in HARMLESS:
        return character.encode("unicode_escape").decode("ascii")
    return character


def markdown(text: str) -> str:
    """Text for a line of Markdown: no character of it starts markup, HTML or a new line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", printable(text))


def code_span(text: str) -> str:
    """Text for between backticks in Markdown, in a table too: backticks become apostrophes, pipes are escaped."""
    return printable(text).replace("`", "'").replace("|", "\\|")
