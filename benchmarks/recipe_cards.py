"""What the recipes of networks took and reached, from the cards they wrote, as lines of results.

python benchmarks/recipe_cards.py [FOLDER ...]     # of runs; the shipped network is always read

A card holds the command, the time, the threads, and the measurement on held-out texts that ends the recipe. A run whose
card was read before is not read again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from _lines import RESULTS, Lines

SHIPPED = Path(__file__).resolve().parents[1] / "src" / "tokenmill" / "assets" / "all-minilm-l6-v2-hypernetwork"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="where recipes wrote to")
    known = RESULTS / "recipe-cards.jsonl"
    seen = [json.loads(line)["card"] for line in known.read_text("utf-8").splitlines()] if known.is_file() else []
    for folder in [SHIPPED, *parser.parse_args().folders]:
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        if card in seen:
            continue
        method = "learn-your-tokens" if "held_out_bits_per_byte" in card else "dynamic-tokenization"
        lines = Lines("recipe-cards", method)
        lines.about["cmd"] = card["command"]
        lines.keep("card", card=card)


if __name__ == "__main__":
    main()
