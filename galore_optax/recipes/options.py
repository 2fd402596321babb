"""What recipes share: AdamW with all its options, and signatures that show what they pass on."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import optax
from jax.typing import DTypeLike

from galore_optax import checks
from galore_optax.quantization.state import cast_state, quantize_state

Mask = optax.Params | Callable[[optax.Params], optax.Params]


def with_options_of(
    *functions: Callable[..., Any], without: tuple[str, ...] = ()
) -> Callable[[Any], Any]:
    """Puts functions' keyword options into the signature of a recipe that takes `**options`.

    `help` shows them then, and `optax.inject_hyperparams` finds them.
    """
    options = {k: p for f in functions for k, p in inspect.signature(f).parameters.items()}

    def decorate(recipe: Any) -> Any:
        signature = inspect.signature(recipe)
        own = {k: p for k, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}
        known = {*own, *without}
        others = [p for k, p in options.items() if p.kind is p.KEYWORD_ONLY and k not in known]
        recipe.__signature__ = signature.replace(parameters=[*own.values(), *others])
        return recipe

    return decorate


def renamed(function: Any, name: str, **constants: Any) -> Any:
    """A recipe with other defaults, and a name and documentation of its own."""
    made = functools.partial(function, **constants)
    said = ", ".join(f"{key}={value!r}" for key, value in constants.items())
    made.__doc__ = f"`{function.__name__}` with {said}; see there."
    made.__name__ = name  # pyrefly: ignore
    return made


def checked(
    learning_rate: Any, b1: Any, b2: Any, eps: Any, weight_decay: Any, mask: Mask | None
) -> tuple[Any, Any, Any, Any, Any, Mask | None]:
    """The arguments that AdamW's relatives share; ValueError names one that has no meaning."""
    return (
        checks.number_or_schedule(learning_rate, "learning_rate", such_as=0.01),
        checks.number(b1, "b1", least=0, below=1, such_as=0.9),
        checks.number(b2, "b2", least=0, below=1, such_as=0.999),
        checks.number(eps, "eps", least=0, such_as=1e-8),
        checks.number_or_schedule(weight_decay, "weight_decay", least=0, such_as=0.1),
        None if mask is None else checks.mask(mask, "mask"),
    )


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    nesterov: bool = False,
    bits: int | None = None,
    state_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`optax.adamw`, its arguments checked, with moments in `bits` or a `state_dtype`."""
    learning_rate, b1, b2, eps, weight_decay, mask = checked(
        learning_rate, b1, b2, eps, weight_decay, mask
    )
    eps_root = checks.number(eps_root, "eps_root", least=0, such_as=0.0)
    checks.choice(nesterov, "nesterov", (False, True))
    for name, dtype in {"mu_dtype": mu_dtype, "state_dtype": state_dtype}.items():
        if dtype is not None:
            checks.float_dtype(dtype, name)
        if dtype is not None and bits is not None:
            raise ValueError(
                f"{name}={checks.said(dtype)} with bits={bits}: moments in {bits} bits are "
                "computed in "
                "float32; leave one of them out"
            )
    made = optax.adamw(
        learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov=nesterov
    )
    if bits is not None:
        return quantize_state(made, bits)
    return made if state_dtype is None else cast_state(made, state_dtype)
