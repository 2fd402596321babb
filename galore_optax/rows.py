"""How to cut the rows of a large array into parts that are computed one after the other."""

import math


def parts(rows: int, needed: int, shares: int) -> int:
    """Returns into how many equal parts to cut rows, so that each device has a share of each part.

    That is the least number from `needed` to four times `needed` that divides the rows, or else the
    largest below. A part has the same greatest common divisor with `shares`, the number of devices
    that the rows may be split over, as all rows have. 16 serves 2, 4 and 8, too.
    """
    common = math.gcd(rows, shares)
    fitting = [
        count
        for count in range(1, 4 * max(needed, 1) + 1)
        if rows % count == 0 and math.gcd(rows // count, shares) == common
    ]
    return next((count for count in fitting if count >= needed), fitting[-1])
