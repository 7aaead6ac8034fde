"""Print the settings that the lines of a run choose on the validation split, for `tokenmill bench diffuse --methods`.

python benchmarks/diffuse_chosen.py MODEL [--block N] [--run FOLDER] [--compose CACHES]

Of each rule it is the setting with the fewest passes whose accuracy is within one point of one-token decoding.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tables import chosen, unmasked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--block", type=int)
    parser.add_argument("--run", type=Path, default=Path("runs/diffuse"))
    parser.add_argument("--compose", help="cache policies with commas: the chosen threshold and filters with each")
    options = parser.parse_args()
    text = (options.run / "results.jsonl").read_text(encoding="utf-8")
    found = unmasked([json.loads(line) for line in text.splitlines()], options.model, options.block)
    specs = [":".join(part for part in key if part) for key in chosen(found, 0.01).values()]
    if options.compose:
        timed = [spec for spec in specs if spec.startswith(("threshold", "learn2pd"))]
        specs = [f"{spec}:cache={cache}" for cache in options.compose.split(",") for spec in timed]
    print(",".join(specs))


if __name__ == "__main__":
    main()
