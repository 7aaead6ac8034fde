"""How long a context can a model use? Here a function that forgets all but the last 2,000 characters of its prompt.

python examples/probe.py
"""

from __future__ import annotations

import re

from tokenmill.probe import NeedleThreading, effective_context
from tokenmill.probe.needle_threading import aggregate, run


def forgetful(prompt: str) -> str:
    """Looks up the asked key in the end of the prompt, and knows nothing of what came before."""
    asked = re.findall(r'Key: "([^"]+)"', prompt)[-1]
    found = re.search(rf'"{asked}": "([^"]+)"', prompt[-2000:])
    return found[1] if found else "I do not know."


suite = NeedleThreading(tasks=("single",), contexts=(800, 1600, 3200, 6400), repeats=5, fresh=True)
answers = run(forgetful, None, suite.suite())
for cell in aggregate(answers):
    print(f"{cell.context:>6,} characters: {cell.accuracy:.2f}  ({cell.low:.2f} to {cell.high:.2f}, n = {cell.n})")
print(f"effective context: {effective_context(answers):,.0f} characters at the worst depth")
