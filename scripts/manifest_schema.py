"""Write docs/a3_manifest.schema.json from the models in `a3cli/report/manifest.py`.

python scripts/manifest_schema.py
"""

import json
from pathlib import Path

from a3cli.report.manifest import SCHEMA_ID, schema

DOCS = Path(__file__).resolve().parents[1] / "docs"


def main() -> None:
    (DOCS / SCHEMA_ID).write_text(json.dumps(schema(), indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
