"""Describe a text in a request, and compare the texts of two requests: local files count by content, not by name."""

import os
from pathlib import Path

from a3cli.settings import TextSettings
from a3cli.text.documents import hash_text_file, name_in
from a3cli.text.sources import check_exists, local_files
from a3cli.work.files import Json


def describe_text(settings: TextSettings) -> Json:
    """Return the settings as requests record them: a local data set without its folder."""
    described = settings.model_dump()
    path = Path(settings.dataset)
    if path.exists():
        described["dataset"] = Path(os.path.abspath(path)).name  # noqa: PTH100, resolve would follow links
    return described


def as_compared(text: Json, files: Json) -> Json:
    """Return described settings in the form in which two requests are compared.

    A local data set counts as the `files` read from it, whatever its name; options for rows count only if there were
    rows.
    """
    rows = not files or any(not name.endswith(".txt") for name in files)
    field = text["text_field"] or (None if text["chat"] else "text")
    how = {"text_field": field, "chat": text["chat"]} if rows else {"text_field": None, "chat": False}
    return {**text, **how, "dataset": None if files else text["dataset"]}


def files_now(settings: TextSettings, files: Json, *, whole: bool) -> Json:
    """Return the hash of each local file that reading the same text again would open; none for a set on the Hub.

    `files` were opened when it was read before, all of the data set if `whole`; only as many are hashed. They are
    returned if the same content would be read, perhaps of files with other names. Raises A3Error if the data set is not
    there.
    """
    check_exists(settings)
    path = Path(settings.dataset)
    if not path.exists():
        return {}
    found = local_files(path)
    count = len(found) if whole else max(1, len(files))
    now = {name_in(path, file): hash_text_file(file) for file in found[:count]}
    return files if contents(now) == contents(files) else now


def contents(files: Json) -> list[tuple[str, str]]:
    """Return the suffix and the hash of each file, in reading order."""
    return [(Path(name).suffix, digest) for name, digest in files.items()]
