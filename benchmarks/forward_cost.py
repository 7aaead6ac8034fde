"""Milliseconds of a forward by new positions, packed and stock: the cost that planned trees are chosen by.

python benchmarks/forward_cost.py
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import tokenmill as tm
from tokenmill.bench.environment import environment

RESULTS = Path(__file__).parent / "results" / "profile.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    args = parser.parse_args()
    for dtype in args.dtypes.split(","):
        for packed in (False, True):
            model, _ = tm.models.load(args.model, dtype=dtype, packed=packed)
            measured = tm.models.profile(model, repeats=15, refresh=True)
            line = {
                "schema": 1,
                "task": "profile",
                "model": args.model,
                "weights": f"{dtype}, {'packed' if packed else 'stock'}",
                "positions": measured.positions,
                "ms": measured.ms,
                "status": "ok",
                "cmd": "python benchmarks/forward_cost.py " + " ".join(sys.argv[1:]),
                "env": environment(),
            }
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(line["weights"], [round(ms, 1) for ms in measured.ms], flush=True)


if __name__ == "__main__":
    main()
