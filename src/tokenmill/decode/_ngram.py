"""N-gram look-up: where did the end of this text stand before, and what came then?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


def longest_match(ids: Ids, *, length: int, longest: int = 16) -> tuple[Ids, int]:
    """Continue ``ids`` as the text went on after the longest earlier occurrence of its own end.

    Of equally long occurrences the most recent one counts. A match that runs into the end of the text goes on
    periodically, which is what repeating text does.

    Args:
        ids: (T,) committed tokens.
        length: tokens of continuation wanted.
        longest: matches are not followed further back than this many tokens.

    Returns:
        The continuation (``length`` tokens, or none) and the number of tokens that matched.
    """
    t = ids.shape[0]
    ends = np.flatnonzero(ids[:-1] == ids[-1])
    if ends.size == 0 or length < 1:
        return ids[:0], 0
    matched = 1
    while matched < min(longest, t - 1):
        further = ends[ends >= matched]
        further = further[ids[further - matched] == ids[t - 1 - matched]]
        if further.size == 0:
            break
        ends, matched = further, matched + 1
    end = int(ends[-1])
    period = t - 1 - end
    return ids[end + 1 + np.arange(length) % period], matched
