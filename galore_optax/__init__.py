"""GaLore (arXiv:2403.03507) as optax transformations."""

from galore_optax.adaptive_refresh import AdaptiveRefresh
from galore_optax.galore import GaLoreState, galore
from galore_optax.matrices import GaLoreDimensionNumbers, TuckerDimensionNumbers
from galore_optax.quantize_state import quantize_state
from galore_optax.quantized import QuantizedArray
from galore_optax.recipes import galore_adafactor, galore_adamw

__all__ = [
    "AdaptiveRefresh",
    "GaLoreDimensionNumbers",
    "GaLoreState",
    "QuantizedArray",
    "TuckerDimensionNumbers",
    "galore",
    "galore_adafactor",
    "galore_adamw",
    "quantize_state",
]
