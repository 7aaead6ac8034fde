"""Print the settings that the lines of a run choose on the validation split, for `tokenmill bench diffuse --methods`.

python benchmarks/diffuse_chosen.py MODEL [--block N] [--run FOLDER]

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
    options = parser.parse_args()
    text = (options.run / "results.jsonl").read_text(encoding="utf-8")
    found = unmasked([json.loads(line) for line in text.splitlines()], options.model, options.block)
    print(",".join(":".join(part for part in key if part) for key in chosen(found, 0.01).values()))


if __name__ == "__main__":
    main()
