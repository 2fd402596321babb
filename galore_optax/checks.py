"""Checks of arguments; each raises a ValueError that names argument, value and what is accepted."""

import math
import numbers
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Those that `optax.inject_hyperparams` is not to make arrays of.
_STATIC = '"rank", "update_proj_gap", "projection_bits", "bits", "seed", '
_STATIC += '"leading", "tracking", "steps"'


def said(value: Any) -> str:
    """A value as a message shows it: shapes and dtypes of arrays, and no long text."""
    if isinstance(value, jax.Array | np.ndarray):
        return f"<array of shape {value.shape} and dtype {value.dtype}>"
    if not jax.tree_util.all_leaves([value]):  # a tree, which may have arrays
        value = jax.tree.map(lambda x: _Said(said(x)), value)
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:99]}…"


class _Said(str):
    """Text without quotes around it."""

    def __repr__(self):
        return str(self)


def reason(error: Exception) -> str:
    """An error's type and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def indexes(value: Any) -> bool:
    """Whether it is one integer, of Python, NumPy or any other library, and no boolean."""
    if isinstance(value, bool | np.bool_ | np.ndarray | type) or not hasattr(value, "__index__"):
        return False
    return not isinstance(value, jax.Array) or (
        value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.integer)
    )


def called(function: Callable[..., Any], name: str, *args: Any) -> Any:
    """What a user's function returns; the error names it if it does not take these arguments."""
    try:
        return function(*args)
    except TypeError as error:
        raise ValueError(
            f"{name}: its function cannot be called with that ({reason(error)})"
        ) from error


def static(value: Any, name: str) -> None:
    """Refuses an array where shapes or the program depend on the value."""
    if isinstance(value, jax.Array):
        raise ValueError(
            f"{name}={said(value)}, yet shapes or the program depend on it; under "
            "optax.inject_hyperparams name it in static_args=(...), as all of these that the "
            f"function takes: {_STATIC}; and functions that are no schedules, such as mask"
        )


def whole(value: Any, name: str, least: int = 1, below: int = 2**31) -> int:
    """An integer of at least `least` and less than `below`."""
    static(value, name)
    if not indexes(value) or operator.index(value) < least:
        raise ValueError(f"{name}={said(value)} must be an integer of at least {least}")
    if operator.index(value) >= below:
        raise ValueError(f"{name}={said(value)} is too large; give less than {below}")
    return operator.index(value)


def number(
    value: Any,
    name: str,
    least: float = -math.inf,
    below: float = math.inf,
    *,
    positive: bool = False,
    such_as: float,
) -> Any:
    """A real number of at least `least`, less than `below`, and finite in float32.

    An array without axes passes, as `optax.inject_hyperparams` makes it: its value is not known.
    """
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, jax.Array | np.ndarray):
        if value.ndim == 0 and not jnp.issubdtype(value.dtype, jnp.complexfloating):
            return value
        raise ValueError(f"{name}={said(value)} must be one real number, such as {such_as}")
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name}={said(value)} must be a number, such as {such_as}")
    # An integer may be too large for a float.
    given = float(max(-(2**200), min(value, 2**200)) if isinstance(value, int) else value)
    fits = least <= given < below and (given > 0 or not positive)
    if not (fits and abs(given) <= float(np.finfo(np.float32).max)):
        limits = [f"at least {least:g}"] * (least > -math.inf) + ["above 0"] * positive
        limits += [f"less than {below:g}"] * (below < math.inf)
        raise ValueError(f"{name}={said(value)}: give {', '.join(['a finite number', *limits])}")
    return given


def number_or_schedule(value: Any, name: str, least: float = -math.inf, *, such_as: float) -> Any:
    """A finite real number of at least `least`, or a function of the step to a number."""
    if not callable(value):
        return number(value, name, least, such_as=such_as)
    gives(value, name, (jax.ShapeDtypeStruct((), jnp.int32),), jax.ShapeDtypeStruct((), "f4"))
    return value


def schedule(value: Callable[[Any], Any], name: str, above: float) -> None:
    """A function from the step to a real number, checked at step 0."""
    try:
        made = value(np.int32(0))
        real = np.ndim(made) == 0 and jnp.isrealobj(made)
        known = not isinstance(made, jax.core.Tracer)  # as it is under jit
        fits = real and (not known or above < float(made))
    except Exception as error:
        raise ValueError(f"{name}: it cannot be called with step 0 ({reason(error)})") from error
    if not fits:
        raise ValueError(
            f"{name}: at step 0 it returns {said(made)}; it must return a number above {above:g}"
        )


def gives(
    made_by: Callable[..., Any], name: str, arguments: tuple[Any, ...], expected: Any
) -> None:
    """Checks that a user's function can be called, and returns an array of the expected shape."""
    of = ", ".join(str(getattr(x, "shape", x)) for x in arguments)
    try:
        made = jax.eval_shape(lambda *args: jnp.asarray(made_by(*args)), *arguments)
    except Exception as error:
        raise ValueError(
            f"{name}: it cannot be called with arguments of shapes {of} to return an array of "
            f"shape {expected.shape} ({reason(error)})"
        ) from error
    if made.shape != expected.shape or jnp.issubdtype(made.dtype, jnp.complexfloating):
        raise ValueError(
            f"{name}: from arguments of shapes {of} it returns {made.dtype} of shape {made.shape}; "
            f"it must return real numbers of shape {expected.shape}"
        )


def float_dtype(value: Any, name: str) -> None:
    """A dtype of floating-point numbers, or a name of one."""
    static(value, name)
    try:
        known = value is not None and not isinstance(value, np.generic | np.ndarray | jax.Array)
        fits = known and jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        fits = False
    if not fits:
        raise ValueError(f"{name}={said(value)} is not a float type; give one, such as jnp.float32")


def instance(value: Any, name: str, kind: type) -> None:
    """An object of a type."""
    if not isinstance(value, kind):
        raise ValueError(f"{name}={said(value)} is not of type {kind.__name__}")


def function(value: Any, name: str) -> None:
    """A function."""
    if not callable(value):
        raise ValueError(f"{name}={said(value)} is not a function")


def mask(value: Any, name: str) -> Any:
    """A tree of booleans, or a function that returns one, whose result is checked then."""

    def booleans(tree: Any) -> Any:
        for x in jax.tree.leaves(tree):
            if not isinstance(x, bool | np.bool_):
                raise ValueError(f"{name}: {said(x)} in it must be True or False")
        return tree

    if not callable(value):
        return booleans(value)
    return lambda params: booleans(called(value, name, params))


def choice(value: Any, name: str, accepted: tuple[Any, ...]) -> None:
    """One of a few accepted values, and of the same type."""
    static(value, name)
    if not any(type(value) is type(x) and value == x for x in accepted):
        raise ValueError(
            f"{name}={said(value)} is unknown; choose one of {', '.join(map(str, accepted))}"
        )
