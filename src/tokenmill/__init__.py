"""tokenmill: published methods about tokens, made to work, and one bench that says what each saves and costs.

Importing the package imports no torch; every name below is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .catalog import lazy

if TYPE_CHECKING:
    from . import bench as bench
    from . import budget as budget
    from . import corpora as corpora
    from . import decode as decode
    from . import errors as errors
    from . import hf as hf
    from . import laws as laws
    from . import models as models
    from .catalog import Card as Card
    from .catalog import Paper as Paper
    from .catalog import Reported as Reported
    from .catalog import card as card
    from .catalog import cards as cards
    from .catalog import method as method
    from .trace import Trace as Trace

__version__ = "0.1.0"

__getattr__, __dir__ = lazy(
    __name__,
    {
        "cards": "catalog",
        "card": "catalog",
        "method": "catalog",
        "Card": "catalog",
        "Paper": "catalog",
        "Reported": "catalog",
        "Trace": "trace",
    },
)
