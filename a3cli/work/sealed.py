"""Sealed JSON files, which hold a hash of their own content: manifests, and records of unfinished work."""

import importlib.metadata
import logging
import platform
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from a3cli import __version__
from a3cli.errors import A3Error
from a3cli.work.files import Json, hash_json, read_json, write_json

log = logging.getLogger(__name__)


def write_manifest(path: Path, value: Json) -> Json:
    """Write a stage's manifest with a hash of its own content; return what was written."""
    sealed = {**value, "sha256": hash_json(value)}
    write_json(path, sealed)
    return sealed


def read_manifest(path: Path, remedy: str) -> Json:
    """Return a manifest. Raises A3Error if it is missing, malformed or altered."""
    return unaltered(read_json(path, remedy), path, remedy)


def unaltered(sealed: Json, path: Path, remedy: str) -> Json:
    """Return a manifest without its hash. Raises A3Error if the hash does not match the content."""
    if hash_json({key: value for key, value in sealed.items() if key != "sha256"}) != sealed.get("sha256"):
        raise A3Error(f"{path} was altered after it was written; {remedy}")
    return sealed


def read_if_request_matches(path: Path, request: Json, comparable: Callable[[Json], Json] = dict) -> Json | None:
    """Return a manifest written by the same request, or None if there is none or it is damaged.

    `comparable` returns the part of a request that decides whether two are the same.
    """
    found = read_undamaged(path)
    if found is None and path.exists():
        log.warning("%s has changed since it was written; it is computed again", path)
    return found if found and comparable(found["request"]) == comparable(request) else None


def read_undamaged(path: Path) -> Json | None:
    """Return a manifest, or None if it is missing, malformed or altered."""
    with suppress(A3Error):
        return read_manifest(path, "")
    return None


def check_request(recorded: Json, request: Json, *, holder: str, nested: str, otherwise: str) -> None:
    """Raise A3Error if finished work was recorded for another request.

    The error starts with `holder`, names the entries that differ, those of the `nested` settings one by one, and offers
    `otherwise` beside --overwrite.
    """
    if recorded != request:
        differing = differences(recorded, request, nested)
        raise A3Error(f"{holder} (differs in {differing}); use --overwrite or {otherwise}")


def differences(old: Json, new: Json, settings: str) -> str:
    """Return the names of differing entries of two requests; those of nested `settings` are listed one by one."""
    one, other = ({**request, **request[settings], settings: None} for request in (old, new))
    return name_differences(one, other)


def name_differences(one: Json, other: Json) -> str:
    """Return the differing keys, with those of nested objects: `seed, source (model.safetensors)`; empty if none."""
    names = []
    for key in sorted(one.keys() | other.keys()):
        old, new = one.get(key), other.get(key)
        if isinstance(old, dict) and isinstance(new, dict) and old != new:
            inner = sorted(set(_differing_leaves(old, new)))
            names.append(f"{key} ({', '.join(inner[:3])}{', …' if len(inner) > 3 else ''})")
        elif old != new:
            names.append(key)
    return ", ".join(names)


def _differing_leaves(one: Json, other: Json) -> Iterator[str]:
    for key in one.keys() | other.keys():
        old, new = one.get(key), other.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differing_leaves(old, new)
        elif old != new:
            yield str(key)


def versions() -> Json:
    """Return the versions to record in a manifest."""
    packages = ("torch", "transformers", "safetensors", "tokenizers")
    return {
        "a3cli": __version__,
        "python": platform.python_version(),
        **{name: installed_version(name) for name in packages},
    }


installed_version = cache(importlib.metadata.version)  # it reads a file at each call
