"""Write results as a JUnit file, which CI systems display by test case."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from a3cli.work.files import replacing

Outcome = Literal["passed", "failed", "skipped"]
NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Case:
    """One test case: its subject, name, outcome and detail."""

    group: str
    name: str
    outcome: Outcome
    detail: str = ""


def write_junit(path: Path, suite: str, cases: Sequence[Case]) -> None:
    """Write one suite; characters that XML does not allow are replaced."""
    counts = {outcome: sum(case.outcome == outcome for case in cases) for outcome in ("failed", "skipped")}
    root = ElementTree.Element("testsuites")
    totals = {"tests": len(cases), "failures": counts["failed"], "errors": 0, "skipped": counts["skipped"]}
    attributes = {key: str(value) for key, value in totals.items()}
    element = ElementTree.SubElement(root, "testsuite", {"name": suite, **attributes})
    for case in cases:
        test = ElementTree.SubElement(element, "testcase", {"classname": clean(case.group), "name": clean(case.name)})
        if case.outcome == "passed":
            ElementTree.SubElement(test, "system-out").text = clean(case.detail)
        else:
            kind = "failure" if case.outcome == "failed" else "skipped"
            ElementTree.SubElement(test, kind, {"message": clean(case.detail)})
    ElementTree.indent(root)
    with replacing(path) as partial:
        ElementTree.ElementTree(root).write(partial, encoding="utf-8", xml_declaration=True)


def clean(text: str) -> str:
    return NOT_XML.sub("�", text)
