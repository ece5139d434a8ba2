"""Names of sparsity methods: the built-in ones, those a program defines, and those of installed plug-ins."""

from __future__ import annotations

import functools
import importlib
import logging
from importlib.metadata import entry_points
from typing import Any, TypeVar, get_args

from .errors import ConfigError
from .schema import ConfigModel

MethodClass = TypeVar("MethodClass", bound=type[ConfigModel])

ENTRY_POINT_GROUP = "modelopt_lite.methods"

logger = logging.getLogger(__name__)
_methods: dict[str, type[Any]] = {}  # by every name; the canonical one comes first


def method_names(cls: type[ConfigModel]) -> tuple[str, ...]:
    """Return the names a method class answers to: the values of its ``method`` literal, canonical name first."""
    field = cls.model_fields.get("method")
    names = get_args(field.annotation) if field is not None else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{cls.__name__}.method must be annotated as Literal['name', ...] to be registered")
    return names


def register_sparse_method(cls: MethodClass) -> MethodClass:
    """Class decorator: make a method available to configurations under the names in its ``method`` literal.

    A class that is defined again in the same place, as in a notebook cell that is run twice, replaces the old one under
    all of its names.

    Args:
        cls: a subclass of :class:`~modelopt_lite.methods.base.SparseAttentionMethod` whose ``method`` field is
            annotated ``Literal["name"]``; further literal values are aliases.

    Returns:
        The class, unchanged.

    Raises:
        TypeError: if ``method`` is not such a literal.
        ValueError: if one of the names is taken by a class of another place.
    """
    names = method_names(cls)
    replaced: set[str] = set()
    for name in names:
        if name in _methods:
            taken_by = _methods[name]
            if (taken_by.__module__, taken_by.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(
                    f"sparse method {name!r} is already registered by {taken_by.__module__}.{taken_by.__qualname__}; "
                    f"{cls.__module__}.{cls.__qualname__} needs another name"
                )
            replaced.update(method_names(taken_by))
    for name in replaced:
        del _methods[name]
    _methods.update(dict.fromkeys(names, cls))
    return cls


@functools.cache
def _load_installed_methods() -> None:
    """Import the built-in methods and every installed plug-in, once; a broken plug-in is logged and skipped."""
    importlib.import_module("modelopt_lite.methods")
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry_point.load()
        except Exception as error:  # a plug-in may fail in any way; the other methods must still be usable
            logger.warning(
                "the plug-in %r (%s) of the entry-point group %s is not available: %r",
                entry_point.name,
                entry_point.value,
                ENTRY_POINT_GROUP,
                error,
            )


def list_sparse_methods() -> dict[str, type[Any]]:
    """Return every available method class by canonical name, sorted by name.

    Each is a subclass of :class:`~modelopt_lite.methods.base.SparseAttentionMethod`, on which the registry must not
    depend, because plans look methods up here.
    """
    _load_installed_methods()
    return {name: cls for name, cls in sorted(_methods.items()) if name == method_names(cls)[0]}


def get_sparse_method(name: str) -> type[Any]:
    """Return the method class registered under a name or alias, as :func:`list_sparse_methods` has them.

    Raises:
        ConfigError: if there is none; the message lists those installed.
    """
    _load_installed_methods()
    if not isinstance(name, str) or name not in _methods:
        raise ConfigError(f"{name!r} is not a registered sparse method; installed: {', '.join(list_sparse_methods())}")
    return _methods[name]
