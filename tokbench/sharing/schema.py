"""What a record is, as JSON Schema for other people's tools: `python -m tokbench.sharing.schema docs/schema`."""

import json
import sys
from pathlib import Path
from typing import Any

from tokbench.records.files import write_whole
from tokbench.records.result import EvalResult, SpeedResult

RECORDS = {"result": EvalResult, "speed": SpeedResult}


def schema_of(record: type) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a record as `to_json` writes it."""
    from pydantic import TypeAdapter

    schema = TypeAdapter(record).json_schema()
    schema["properties"].pop("rows", None)  # of a record just measured; never in its file
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def text(record: type) -> str:
    """The schema as the file's text."""
    return json.dumps(schema_of(record), indent=1) + "\n"


if __name__ == "__main__":
    for name, record in RECORDS.items():
        write_whole(Path(sys.argv[1]) / f"{name}.json", text(record))
