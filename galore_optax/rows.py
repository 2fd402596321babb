"""How to cut the rows of a large array into parts that are computed one after the other."""

import math


def parts(rows: int, needed: int, shares: int) -> int:
    """Returns into how many equal parts to cut rows, at least `needed` if possible.

    The number is at most four times `needed`. If devices, up to `shares` of them, split the rows
    evenly, each has an equal share of each part. `shares=16` serves 2, 4 and 8 devices, too.
    """
    common = math.gcd(rows, shares)
    fitting = [
        count
        for count in range(1, 4 * max(needed, 1) + 1)
        if rows % count == 0 and math.gcd(rows // count, shares) == common
    ]
    return next((count for count in fitting if count >= needed), fitting[-1])
