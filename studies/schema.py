"""Write what vit.ViTConfig says about its flags into results.schema.json: make schema, after a change of a flag."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

import vit
from edgebench import flags

PATH = ROOT / "results.schema.json"


def with_flags(schema: dict) -> dict:
    """The schema of the results with the flags as they are now; a deployed file has those of its run."""
    config = schema["properties"]["what"]["properties"]["config"]
    config["properties"] = flags.json_schema(vit.ViTConfig)
    for name, value in vit.RECIPES["modern"].items():
        config["properties"][name]["modern"] = value
    return schema


def main() -> None:
    schema = with_flags(json.loads(PATH.read_text()))
    PATH.write_text(json.dumps(schema, indent=2) + "\n")


if __name__ == "__main__":
    main()
