"""GaLore (arXiv:2403.03507) as optax transformations."""

from galore_optax.galore import GaLoreState, galore
from galore_optax.layerwise.unstacked import unstacked
from galore_optax.projection.dimension_numbers import GaLoreDimensionNumbers, TuckerDimensionNumbers
from galore_optax.projection.schedule import AdaptiveRefresh
from galore_optax.quantization.array import QuantizedArray
from galore_optax.quantization.state import quantize_state
from galore_optax.quantization.weights import apply_updates, quantize_weights
from galore_optax.recipes import (
    adamw8bit,
    galore_adafactor,
    galore_adamw,
    galore_adamw8bit,
    gradnorm_lorp_adamw,
    q_galore_adamw8bit,
)

__all__ = [
    "AdaptiveRefresh",
    "GaLoreDimensionNumbers",
    "GaLoreState",
    "QuantizedArray",
    "TuckerDimensionNumbers",
    "adamw8bit",
    "apply_updates",
    "galore",
    "galore_adafactor",
    "galore_adamw",
    "galore_adamw8bit",
    "gradnorm_lorp_adamw",
    "q_galore_adamw8bit",
    "quantize_state",
    "quantize_weights",
    "unstacked",
]
