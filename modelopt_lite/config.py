"""Sparsity configurations: which attention modules get which method."""

from __future__ import annotations

import fnmatch
import functools
import json
import logging
import operator
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, cast

import yaml
from pydantic import (
    Field,
    GetJsonSchemaHandler,
    PlainValidator,
    SerializeAsAny,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema

from .errors import ConfigError
from .formats import from_modelopt, is_modelopt
from .methods import CalibratedMethod, Combined, SparseAttentionMethod, SparseSoftmax
from .methods.calibrated import Phase
from .registry import get_sparse_method, list_sparse_methods
from .schema import ConfigModel, describe_errors, field_errors

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_PATTERN = "default"

logger = logging.getLogger(__name__)


class Disabled(ConfigModel):
    """An entry that leaves the modules it matches as they are."""

    enable: Literal[False] = Field(description="always false")


def _validate_entry(value: object) -> SparseAttentionMethod | Disabled:
    if isinstance(value, SparseAttentionMethod | Disabled):
        return value
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError("Input should be a list of at least one method")
        return _validate_entry(value[0]) if len(value) == 1 else Combined.model_validate({"methods": value})
    if not isinstance(value, dict):
        raise ValueError("Input should be a mapping with 'method', a list of such, or {'enable': false}")
    if "method" not in value:
        if value.keys() == {"enable"} and value["enable"] is False:  # not 0, which equals False
            return Disabled(enable=False)
        raise ValueError(f"Input should have a method, {_one_of_the_methods()}, or be just {{'enable': false}}")
    name = value["method"]
    try:
        cls: type[SparseAttentionMethod] = get_sparse_method(name)
    except ConfigError:
        raise field_errors("entry", {"method": (name, f"Input should be {_one_of_the_methods()}")}) from None
    return cls.model_validate(value)


def _one_of_the_methods() -> str:
    return f"one of those installed: {', '.join(list_sparse_methods())}"


class _EntrySchema:
    """Describes an entry in JSON schema as one of the methods registered at that moment."""

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        methods = functools.reduce(operator.or_, list_sparse_methods().values())
        by_name = Annotated[methods, Field(discriminator="method")]  # type: ignore[valid-type]
        return handler(TypeAdapter(by_name | list[by_name] | Disabled).core_schema)


Entry: TypeAlias = Annotated[
    SerializeAsAny[SparseAttentionMethod] | Disabled, PlainValidator(_validate_entry), _EntrySchema
]


class SparsityConfig(ConfigModel):
    """Which attention modules of a model get which sparsity method.

    ``sparse_cfg`` maps patterns to entries. A pattern (``fnmatch``: ``*``, ``?``, ``[seq]``) is matched against the
    dotted names of the model's attention modules, case-sensitively. The entry ``"default"``, if any, is applied first;
    then the others in order, and the last that matches a module decides for it alone: nothing is merged. An
    entry is a method's configuration, a list of such that work together (see
    :class:`~modelopt_lite.methods.combined.Combined`), or ``{"enable": False}`` to leave modules as they are. Modules
    that nothing matches stay as they are.

    One method for all attention modules has short forms, which stand for ``{"sparse_cfg": {"*": method}}``: the method
    itself, as an object or as a mapping with ``"method"``; the name of a registered method, for its defaults; ``"2:4"``
    or another N:M, for :class:`~modelopt_lite.methods.SparseSoftmax` with these numbers.
    """

    sparse_cfg: dict[str, Entry] = Field(description="pattern of attention module names: the method they get")

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"sparse_cfg": {"*": named_method(value)}}
        if isinstance(value, int) and not isinstance(value, bool):
            raise ValueError(f"Input should be a mapping or a name{explain_sexagesimal(value)}")
        if isinstance(value, SparseAttentionMethod) or (isinstance(value, dict) and "method" in value):
            return {"sparse_cfg": {"*": value}}
        return value

    @classmethod
    def load(cls, source: ConfigSource) -> SparsityConfig:
        """Return a configuration from an object, a mapping, a name, or the path of a YAML, JSON or TOML file.

        Args:
            source: a :class:`SparsityConfig`, the same as a mapping, one of its short forms, or a path. A string is a
                path if it ends in ``.yaml``, ``.yml``, ``.json`` or ``.toml``. Also NVIDIA Model-Optimizer's metadata,
                or a ``config.json`` that holds it, see :func:`~modelopt_lite.formats.from_modelopt`.

        Raises:
            ConfigError: if the file or the configuration cannot be used; one line per problem.
        """
        if isinstance(source, cls):
            return source
        where = ""
        if isinstance(source, os.PathLike) or (isinstance(source, str) and names_a_file(source)):
            where = f"{os.fspath(source)}: "
            source = read_config_file(source)
        if is_modelopt(source):
            try:
                source = from_modelopt(cast("dict[str, Any]", source))
            except ConfigError as error:
                raise ConfigError(f"{where}{error}") from None
        try:
            return cls.model_validate(source)
        except ValidationError as error:
            raise ConfigError(describe_errors(error, where)) from None

    def assign(self, names: Iterable[str]) -> dict[str, SparseAttentionMethod]:
        """Return the method of each module by name; modules without one are left out.

        Args:
            names: dotted names of the model's attention modules.

        Raises:
            ConfigError: if a pattern matches none of them.
        """
        entries = {name: self.sparse_cfg[pattern] for name, pattern in self.deciding_patterns(names).items()}
        return {name: entry for name, entry in entries.items() if isinstance(entry, SparseAttentionMethod)}

    def deciding_patterns(self, names: Iterable[str]) -> dict[str, str]:
        """Return the pattern that decides for each module by name; modules without one are left out.

        Args, raises as :meth:`assign`.
        """
        names = list(names)
        chosen = dict.fromkeys(names, DEFAULT_PATTERN) if DEFAULT_PATTERN in self.sparse_cfg else {}
        for pattern in self.sparse_cfg:
            if pattern == DEFAULT_PATTERN:
                continue
            matched = match_names(names, pattern)
            if not matched:
                raise ConfigError(f"sparse_cfg.{pattern}: matches no attention module; there are {abbreviate(names)}")
            chosen.update(dict.fromkeys(matched, pattern))
        return chosen

    def with_target(
        self, target_sparsity: float | None = None, decode_target_sparsity: float | None = None
    ) -> SparsityConfig:
        """Return the configuration with another target in every calibrated method; nothing is measured again.

        Args:
            target_sparsity: share of the key blocks that is to be skipped in prefill, > 0 and < 1; None changes
                nothing.
            decode_target_sparsity: the same in decode steps.

        Raises:
            ConfigError: if no target is given, no method is calibrated in a phase whose target is given, or a target is
                out of its range.
        """
        if target_sparsity is None and decode_target_sparsity is None:
            raise ConfigError("target_sparsity: is missing; must have target_sparsity or decode_target_sparsity")
        entries: dict[str, Any] = dict(self.sparse_cfg)
        targets: dict[Phase, float | None] = {"prefill": target_sparsity, "decode": decode_target_sparsity}
        for phase, target in targets.items():
            if target is None:
                continue
            if not any(_is_calibrated(entry, phase) for entry in entries.values()):
                raise ConfigError(
                    f"sparse_cfg: has no method calibrated for {phase}; modelopt_lite.calibrate makes one"
                )
            entries = {pattern: _with_target(entry, target, phase) for pattern, entry in entries.items()}
        return SparsityConfig(sparse_cfg=entries)

    def save(self, path: str | os.PathLike[str], comment: str = "") -> None:
        """Write the configuration as YAML that :meth:`load` reads; fields that have their default are left out.

        Args:
            path: the file.
            comment: lines that come first, as comments.
        """
        head = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
        content = {"sparse_cfg": {pattern: _written(entry) for pattern, entry in self.sparse_cfg.items()}}
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
        Path(path).write_text(head + text, encoding="utf-8")


def _parts(entry: SparseAttentionMethod | Disabled) -> tuple[SparseAttentionMethod | Disabled, ...]:
    return entry.methods if isinstance(entry, Combined) else (entry,)


def _is_calibrated(entry: SparseAttentionMethod | Disabled, phase: Phase) -> bool:
    return any(isinstance(part, CalibratedMethod) and part.fit(phase) is not None for part in _parts(entry))


def _with_target(
    entry: SparseAttentionMethod | Disabled, target: float, phase: Phase
) -> SparseAttentionMethod | Disabled:
    if isinstance(entry, Combined):
        return Combined(methods=tuple(_with_target(part, target, phase) for part in entry.methods))
    fit = entry.fit(phase) if isinstance(entry, CalibratedMethod) else None
    if fit is None:
        return entry
    assert isinstance(entry, CalibratedMethod)
    changed = entry.with_target(target, phase)
    if fit.lowest is not None and fit.highest is not None and not fit.lowest <= target <= fit.highest:
        logger.warning(
            "%s: the target %g lies outside of %.2f to %.2f, where its calibration of %s has points",
            entry.method,
            target,
            fit.lowest,
            fit.highest,
            phase,
        )
    return changed


def _written(entry: SparseAttentionMethod | Disabled) -> Any:
    """Return an entry as a file holds it."""
    if isinstance(entry, Combined):
        return [_written(part) for part in entry.methods]
    if isinstance(entry, Disabled):
        return entry.model_dump()
    return {"method": entry.method, **entry.model_dump(mode="json", exclude_defaults=True)}


ConfigSource: TypeAlias = "SparsityConfig | SparseAttentionMethod | dict[str, Any] | str | os.PathLike[str]"
"""What :meth:`SparsityConfig.load` takes."""


def names_a_file(source: str) -> bool:
    """Whether a string is the path of a configuration file rather than a method's name."""
    return Path(source).suffix.lower() in _READERS or os.sep in source


def named_method(name: str) -> SparseAttentionMethod:
    """Return the method that a name stands for: ``"2:4"`` and other N:M, or a registered one with its defaults.

    Raises:
        ValueError: if it stands for none; pydantic turns that into its own error.
    """
    if re.fullmatch(r"\d+:\d+", name):
        n, m = map(int, name.split(":"))
        return SparseSoftmax.model_validate({"sparsity_n": n, "sparsity_m": m})
    try:
        cls: type[SparseAttentionMethod] = get_sparse_method(name)
    except ConfigError:
        raise ValueError(
            f"Input should be N:M such as '2:4', the path of a file ({', '.join(_READERS)}), or {_one_of_the_methods()}"
        ) from None
    return cls.model_validate({"method": name})


def explain_sexagesimal(value: object) -> str:
    """Say what an integer was in a YAML file, if it may have been N:M: YAML 1.1 reads 2:4 as 2 * 60 + 4 = 124."""
    if not isinstance(value, int) or value < 60:
        return ""
    n, m = divmod(value, 60)
    return f'; YAML reads {n}:{m} without quotes as {value} (base 60): write "{n}:{m}"'


def match_names(names: Iterable[str], pattern: str) -> list[str]:
    """Return the dotted names that a pattern matches, in their order."""
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def abbreviate(names: Iterable[str]) -> str:
    """List names for an error message, leaving out the middle of a long list."""
    names = list(names)
    return ", ".join(names if len(names) <= 4 else [*names[:2], "...", names[-1]]) or "none"


def read_config_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a mapping from a YAML (``.yaml``, ``.yml``), JSON (``.json``) or TOML (``.toml``) file.

    Raises:
        ConfigError: if the file is missing, of another kind, does not parse, names a key twice, or holds no mapping.
    """
    path = Path(path)
    try:
        read = _READERS[path.suffix.lower()]
    except KeyError:
        raise ConfigError(f"{path}: suffix {path.suffix!r} is not allowed; one of {', '.join(_READERS)}") from None
    try:
        content = read(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # tomllib's and json's errors are ValueErrors
        raise ConfigError(f"{path}: does not parse: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds {type(content).__name__}; must hold a mapping")
    return content


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML that refuses a mapping with the same key twice, where YAML's loader would drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        _refuse_repeated(keys)
        return super().construct_mapping(node, deep=deep)


def _read_yaml(text: str) -> Any:
    loader = _UniqueKeyLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_repeated([key for key, _ in pairs])
    return dict(pairs)


def _refuse_repeated(keys: list[Any]) -> None:
    repeated = [key for i, key in enumerate(keys) if key in keys[:i]]
    if repeated:
        raise ValueError(f"the key {repeated[0]!r} stands twice in one mapping")


_READERS = {
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
    ".json": lambda text: json.loads(text, object_pairs_hook=_unique_pairs),
    ".toml": tomllib.loads,
}

SPARSE_SOFTMAX_DEFAULT = SparsityConfig(sparse_cfg={"*": SparseSoftmax()})
"""2:4 sparse softmax in every attention layer: dense window of 64 tokens, no sink tokens."""
