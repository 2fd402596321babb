"""Pytree classes that `flax.serialization` stores, without an import of Flax.

Flax finds a class in a registry of its own. It is entered there when Flax is imported, before or
after this package.
"""

import dataclasses
import importlib.abc
import importlib.machinery
import sys
from typing import Any, TypeVar

import jax

_FLAX = "flax.serialization"
_T = TypeVar("_T")
REGISTERED: list[type] = []


def pytree(cls: type[_T]) -> type[_T]:
    """Makes a frozen dataclass a pytree class that `flax.serialization` can store.

    Fields with `metadata={"static": True}` are stored as text. `from_bytes` takes them from its
    target, and raises a ValueError if the stored ones differ.
    """
    REGISTERED.append(cls)
    if _FLAX in sys.modules:
        _register(sys.modules[_FLAX], cls)
    return jax.tree_util.register_dataclass(cls)


def _register(flax: Any, cls: type) -> None:
    fields = dataclasses.fields(cls)
    static = [f.name for f in fields if f.metadata.get("static")]
    data = [f.name for f in fields if f.name not in static]

    def described(x: Any) -> dict[str, str]:
        return {name: str(getattr(x, name)) for name in static}

    def to_state(x: Any) -> dict[str, Any]:
        stored = {name: flax.to_state_dict(getattr(x, name)) for name in data}
        return stored | {"static": described(x)}

    def from_state(x: Any, state: dict[str, Any]) -> Any:
        if not {*data, "static"} <= state.keys():
            raise ValueError(
                f"state: what is stored has {sorted(state)}, and a {cls.__name__} "
                f"{sorted([*data, 'static'])}; give a target like what was stored"
            )
        if state["static"] != described(x):
            raise ValueError(
                f"target: its {cls.__name__} has {described(x)}, and the stored one "
                f"{state['static']}; give a target made as the stored one was"
            )
        made = {name: flax.from_state_dict(getattr(x, name), state[name], name) for name in data}
        return dataclasses.replace(x, **made)

    flax.register_serialization_state(cls, to_state, from_state)


class WhenImported(importlib.abc.MetaPathFinder):
    """Registers the classes after the execution of `flax.serialization`."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        """Returns the module's spec, with a loader that registers the classes."""
        if fullname != _FLAX:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: Any) -> None:
            execute(module)
            for cls in REGISTERED:
                _register(module, cls)

        spec.loader.exec_module = execute_and_register
        return spec


if _FLAX not in sys.modules:
    sys.meta_path.insert(0, WhenImported())
