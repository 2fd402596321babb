"""GaLore (arXiv:2403.03507) as optax transformations."""

from galore_optax.galore import GaLoreState, galore
from galore_optax.matrices import GaLoreDimensionNumbers, TuckerDimensionNumbers
from galore_optax.recipes import galore_adafactor, galore_adamw

__all__ = [
    "GaLoreDimensionNumbers",
    "GaLoreState",
    "TuckerDimensionNumbers",
    "galore",
    "galore_adafactor",
    "galore_adamw",
]
