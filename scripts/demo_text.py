"""Standard-library source as text: the demo model's text for training, calibration and evaluation.

No text is shipped: it is read from the Python that runs this script. The calibration and
evaluation lists are fixed, disjoint, and name modules that are single files in Python 3.10 to 3.13.
The evaluation modules are never trained on.

    python scripts/demo_text.py OUT      writes OUT/calibration.txt and OUT/evaluation.txt
"""

import sys
import sysconfig
from pathlib import Path

CALIBRATION = (
    "ast.py",
    "bdb.py",
    "dataclasses.py",
    "doctest.py",
    "enum.py",
    "ftplib.py",
    "imaplib.py",
    "inspect.py",
    "locale.py",
    "logging/__init__.py",
    "optparse.py",
    "pickle.py",
    "platform.py",
    "smtplib.py",
    "ssl.py",
    "statistics.py",
    "subprocess.py",
    "threading.py",
    "traceback.py",
    "typing.py",
)
EVALUATION = (
    "argparse.py",
    "calendar.py",
    "configparser.py",
    "difflib.py",
    "fractions.py",
    "heapq.py",
    "ipaddress.py",
    "mailbox.py",
    "queue.py",
    "shelve.py",
    "tarfile.py",
    "textwrap.py",
)
# Tables, test suites and third-party code, which are not typical Python text.
NOT_TRAINED_ON = ("test", "tests", "encodings", "pydoc_data", "site-packages", "lib2to3")


def stdlib() -> Path:
    """Return the folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def read_modules(names: tuple[str, ...]) -> str:
    """Return the source of the named modules, concatenated in this order."""
    missing = [name for name in names if not (stdlib() / name).is_file()]
    if missing:
        sys.exit(
            f"demo text: {stdlib()} has no {', '.join(missing)}; install the complete standard library of this Python"
        )
    return "\n".join((stdlib() / name).read_text("utf-8") for name in names)


def training_modules() -> list[Path]:
    """Return every module that may be used for training, in a fixed order."""
    held_out = {stdlib() / name for name in EVALUATION}
    return [
        path
        for path in sorted(stdlib().rglob("*.py"))
        if path not in held_out and not set(path.relative_to(stdlib()).parts) & set(NOT_TRAINED_ON)
    ]


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "calibration.txt").write_text(read_modules(CALIBRATION), "utf-8")
    (out / "evaluation.txt").write_text(read_modules(EVALUATION), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
