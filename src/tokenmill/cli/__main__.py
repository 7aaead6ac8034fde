"""``python -m tokenmill.cli``: the same as ``tokenmill``."""

from __future__ import annotations

import sys

from . import main

sys.exit(main())
