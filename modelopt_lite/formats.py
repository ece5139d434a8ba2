"""Metadata of other projects: ``sparse_attention_config`` in ``config.json``, as NVIDIA Model-Optimizer writes it.

Its form is a mapping of groups, one for each algorithm (https://github.com/NVIDIA/Model-Optimizer; TensorRT-LLM reads
it). Older forms have the same content in other places and under other names. A formula is recognised by its text; no
expression from a file is ever evaluated.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from pydantic import AliasChoices, Field, ValidationError

from .errors import ConfigError, UnsupportedError
from .methods import Calibration, Combined, SkipSoftmax, SparseAttentionMethod, SparseSoftmax
from .methods.calibrated import ExponentialFit
from .schema import ConfigModel, describe_errors

logger = logging.getLogger(__name__)

MODELOPT_KEY = "sparse_attention_config"
"""The key in ``config.json``."""

FORMULA = "a * exp(b * target_sparsity)"
_FORMULAS: dict[str, tuple[str, Callable[[float], float]]] = {
    FORMULA: ("a", float),
    "exp(log_a + b * target_sparsity)": ("log_a", math.exp),
    "log_a + b * target_sparsity": ("log_a", math.exp),  # of its logarithm, in files for diffusion models
}
"""For each known formula of the threshold's scale, the coefficient beside ``b``, and how ``a`` follows from it."""

_ALGORITHMS = {
    "skip_softmax": "skip_softmax",
    "softmax_skip": "skip_softmax",
    "flash_skip_softmax": "skip_softmax",
    "flash_softmax_skip": "skip_softmax",
    "triton_skip_softmax": "skip_softmax",
    "sparse_softmax": "sparse_softmax",
    "triton_sparse_softmax": "sparse_softmax",
}
_OF_SKIP_GROUPS = (
    "threshold_scale_factor",
    "target_sparsity",
    "target_sparse_ratio",
    "ignore",
    "disabled_layers",
    "initial_disabled_steps",
    "disabled_until_timestep",
)
_DEFAULT_TARGET = 0.5
"""What Model-Optimizer takes where a file has no target."""


class _Coefficients(ConfigModel):
    a: float | None = Field(default=None, gt=0)
    log_a: float | None = None
    b: float = Field(gt=0)


class _Scale(ConfigModel):
    formula: str | None = None
    coefficients: _Coefficients | None = None
    prefill: _Coefficients | None = None
    decode: dict[str, Any] | None = None  # looked at only where decode has a target


class _Targets(ConfigModel):
    prefill: float = Field(default=_DEFAULT_TARGET, gt=0, lt=1)
    decode: float = Field(default=_DEFAULT_TARGET, ge=0, lt=1)


class _Group(ConfigModel):
    algorithm: str = Field(validation_alias=AliasChoices("algorithm", "sparse_algo"))
    targets: list[str] | None = None
    ignore: list[str] = Field(default=[], validation_alias=AliasChoices("ignore", "disabled_layers"))


class _SkipGroup(_Group):
    threshold_scale_factor: _Scale
    target_sparsity: _Targets | float = Field(
        default=_DEFAULT_TARGET, validation_alias=AliasChoices("target_sparsity", "target_sparse_ratio")
    )
    initial_disabled_steps: int = 0
    disabled_until_timestep: float | None = None


class _NMGroup(_Group):
    sparsity_n: int
    sparsity_m: int
    dense_sink_tokens: int = 0
    dense_recent_tokens: int = 0


@dataclass(frozen=True)
class AttentionLayer:
    """An attention module of a model.

    Attributes:
        class_name: name of the model's own class.
        method: its method; None if it is dense.
    """

    class_name: str
    method: SparseAttentionMethod | None = None


Layers: TypeAlias = Mapping[str, AttentionLayer]
"""Attention modules by dotted name."""


def is_modelopt(content: Any) -> bool:
    """Whether something is Model-Optimizer's metadata, or a whole ``config.json`` that holds it."""
    if not isinstance(content, Mapping):
        return False
    if "sparse_cfg" in content or "method" in content:
        return False
    if MODELOPT_KEY in content:
        return is_modelopt(content[MODELOPT_KEY])
    return not {"config_groups", "sparse_algo", "threshold_scale_factor", "sparse_softmax"}.isdisjoint(content)


def from_modelopt(content: Mapping[str, Any], layers: Layers | None = None) -> dict[str, Any]:
    """Translate Model-Optimizer's metadata into a configuration of this package.

    Groups become methods: ``sparse_softmax`` with its N:M, sinks and window; ``skip_softmax`` with its calibration and
    targets for prefill and decode. In layers that are N:M too decode is dense, so that coefficients for decode are left
    out there, with a warning.

    Args:
        content: the metadata, or a whole ``config.json`` that holds it; in the present form or an older one.
        layers: the attention modules of the model. With them, ``targets`` and ``ignore`` say which layers a group is
            for, and the result has a pattern for each layer. Without them, all groups must have the same ``targets``,
            and these stand for all attention modules.

    Returns:
        A mapping that :class:`~modelopt_lite.config.SparsityConfig` takes.

    Raises:
        ConfigError: if the metadata says something that is not known or cannot be done here; names the place.
    """
    content = content.get(MODELOPT_KEY, content)
    methods: dict[str, tuple[_Group, SparseAttentionMethod]] = {}
    for path, mapping in _groups(content).items():
        group = _read_group(path, mapping)
        methods[path] = group, _method_of(path, group)
    if not methods:
        raise ConfigError(f"{MODELOPT_KEY}: holds no group with an algorithm")
    chosen = _by_pattern(methods) if layers is None else _by_layer(methods, layers)
    return {"sparse_cfg": {name: _entry(parts) for name, parts in chosen.items()}}


def _groups(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the groups by their path in the file, in the present form."""
    rest = {name: x for name, x in content.items() if name != "producer"}
    found: dict[str, dict[str, Any]] = {}
    for name, group in _mapping("config_groups", rest.pop("config_groups", {})).items():
        path = f"config_groups.{name}"
        found[path] = dict(_mapping(path, group))
    if "sparse_softmax" in rest:
        found["sparse_softmax"] = {"algorithm": "sparse_softmax"} | _mapping(
            "sparse_softmax", rest.pop("sparse_softmax")
        )
    shared = {name: rest.pop(name) for name in _OF_SKIP_GROUPS if name in rest}
    algorithm = rest.pop("sparse_algo", None)
    if rest:
        name, value = next(iter(rest.items()))
        raise ConfigError(f"{MODELOPT_KEY}.{name}: {value!r} is not allowed; unknown field")
    skipping = [group for group in found.values() if _algorithm_of(group) == "skip_softmax"]
    for group in skipping:
        group.update({name: x for name, x in shared.items() if name not in group})
    if not skipping and (shared or algorithm is not None):
        found["sparse_algo"] = {"sparse_algo": algorithm or "skip_softmax", **shared}
    return found


def _mapping(path: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{MODELOPT_KEY}.{path}: {value!r} is not allowed; must be a mapping")
    return value


def _algorithm_of(group: Mapping[str, Any]) -> str | None:
    name = group.get("algorithm", group.get("sparse_algo"))
    return _ALGORITHMS.get(name) if isinstance(name, str) else None


def _read_group(path: str, mapping: dict[str, Any]) -> _Group:
    where = f"{MODELOPT_KEY}.{path}."
    kinds: dict[str | None, type[_Group]] = {"skip_softmax": _SkipGroup, "sparse_softmax": _NMGroup}
    kind = kinds.get(_algorithm_of(mapping))
    if kind is None:
        name = mapping.get("algorithm", mapping.get("sparse_algo"))
        raise ConfigError(f"{where}algorithm: {name!r} is not allowed; must be one of {', '.join(_ALGORITHMS)}")
    try:
        return kind.model_validate(mapping)
    except ValidationError as error:
        raise ConfigError(describe_errors(error, where)) from None


def _method_of(path: str, group: _Group) -> SparseAttentionMethod:
    where = f"{MODELOPT_KEY}.{path}"
    try:
        if isinstance(group, _SkipGroup):
            return _skip_softmax(where, group)
        assert isinstance(group, _NMGroup)
        return SparseSoftmax.model_validate(
            {
                "sparsity_n": group.sparsity_n,
                "sparsity_m": group.sparsity_m,
                "num_sink_tokens": group.dense_sink_tokens,
                "dense_window_size": group.dense_recent_tokens,
            }
        )
    except ValidationError as error:
        raise ConfigError(describe_errors(error, f"{where}.")) from None


def _skip_softmax(where: str, group: _SkipGroup) -> SkipSoftmax:
    for name in ("initial_disabled_steps", "disabled_until_timestep"):
        if value := getattr(group, name):
            raise ConfigError(
                f"{where}.{name}: {value!r} is not allowed; the steps of a diffusion model are not known here"
            )
    scale = group.threshold_scale_factor
    where_scale = f"{where}.threshold_scale_factor"
    found = scale.prefill or scale.coefficients
    if found is None:
        raise ConfigError(f"{where_scale}.prefill: missing; prefill is never dense here, so it is required")
    target = group.target_sparsity
    prefill, decode = (target.prefill, target.decode) if isinstance(target, _Targets) else (target, target)
    content: dict[str, Any] = {"target_sparsity": prefill}
    phase = "prefill" if scale.prefill else "coefficients"
    fits = {"prefill": _fit(f"{where_scale}.{phase}", scale.formula, found)}
    if scale.decode and decode > 0:
        content["decode_target_sparsity"] = decode
        try:
            coefficients = _Coefficients.model_validate(scale.decode)
        except ValidationError as error:
            raise ConfigError(describe_errors(error, f"{where_scale}.decode.")) from None
        fits["decode"] = _fit(f"{where_scale}.decode", scale.formula, coefficients)
    return SkipSoftmax.model_validate(content | {"calibration": Calibration(**fits)})


def _fit(where: str, formula: str | None, found: _Coefficients) -> ExponentialFit:
    """Read the coefficients of one phase."""
    if formula is None:
        formula = FORMULA if found.log_a is None else "exp(log_a + b * target_sparsity)"
    if formula not in _FORMULAS:
        known, scale = " or ".join(map(repr, _FORMULAS)), where.rpartition(".")[0]
        raise ConfigError(f"{scale}.formula: {formula!r} is not allowed; must be {known}: it is never evaluated")
    name, a_of = _FORMULAS[formula]
    value = getattr(found, name)
    if value is None:
        raise ConfigError(f"{where}: {name} is missing; {formula!r} needs it")
    return ExponentialFit(form="exponential", a=a_of(value), b=found.b)


_Methods: TypeAlias = dict[str, tuple[_Group, SparseAttentionMethod]]


def _by_pattern(methods: _Methods) -> dict[str, list[SparseAttentionMethod]]:
    (first, (one, _)), *others = methods.items()
    for path, (group, _) in others:
        if set(group.targets or ()) != set(one.targets or ()):
            raise ConfigError(
                f"{MODELOPT_KEY}.{path}.targets: {group.targets} is not allowed; must be those of {first} "
                f"({one.targets}), as layers are chosen by name here; from_pretrained knows the model's classes"
            )
    chosen = {"*": [method for _, method in methods.values()]}
    for name in dict.fromkeys(name for group, _ in methods.values() for name in group.ignore):
        chosen[name] = [method for group, method in methods.values() if name not in group.ignore]
    return chosen


def _by_layer(methods: _Methods, layers: Layers) -> dict[str, list[SparseAttentionMethod]]:
    for path, (group, _) in methods.items():
        missing = [name for name in group.ignore if name not in layers]
        if missing:
            raise ConfigError(f"{MODELOPT_KEY}.{path}.ignore: {missing[0]!r} is not an attention module of the model")
        classes = {layer.class_name for layer in layers.values()}
        unknown = [name for name in group.targets or () if name not in classes]
        if unknown:
            raise ConfigError(
                f"{MODELOPT_KEY}.{path}.targets: {unknown[0]!r} is not the class of an attention module; "
                f"the model has {', '.join(sorted(classes))}"
            )
    return {
        name: [
            method
            for group, method in methods.values()
            if name not in group.ignore and (not group.targets or layer.class_name in group.targets)
        ]
        for name, layer in layers.items()
    }


def _entry(parts: list[SparseAttentionMethod]) -> dict[str, Any] | list[dict[str, Any]]:
    if len(parts) > 1:
        parts = [_dense_in_decode(part) if isinstance(part, SkipSoftmax) else part for part in parts]
    found = [part.model_dump(mode="json") for part in parts]
    return {"enable": False} if not found else found[0] if len(found) == 1 else found


def _dense_in_decode(method: SkipSoftmax) -> SkipSoftmax:
    """Leave out what a method that works together with N:M would skip in decode, which is dense with N:M."""
    if method.calibration is None or method.calibration.decode is None:
        return method
    logger.warning("%s: skip_softmax is left out in decode, which is dense in layers that are N:M", MODELOPT_KEY)
    calibration = Calibration(prefill=method.calibration.prefill)
    return method.model_copy(update={"calibration": calibration, "decode_target_sparsity": None})


def to_modelopt(layers: Layers, version: str) -> dict[str, Any]:
    """Translate the methods of a model's layers into Model-Optimizer's metadata.

    Args:
        layers: the attention modules of the model.
        version: of this package.

    Raises:
        UnsupportedError: if the format cannot say what a layer does; names the layer and the reason.
    """
    skip: dict[str, SkipSoftmax] = {}
    n_of_m: dict[str, SparseSoftmax] = {}
    for name, layer in layers.items():
        for method in layer.method.methods if isinstance(layer.method, Combined) else (layer.method,):
            if isinstance(method, SkipSoftmax):
                skip[name] = method
            elif isinstance(method, SparseSoftmax):
                n_of_m[name] = method
            elif method is not None:
                raise UnsupportedError(
                    f"{name}: {method.method} cannot be exported; Model-Optimizer's format knows sparse_softmax and "
                    "skip_softmax"
                )
    groups = []
    if skip:
        groups.append(_write_skip(skip, layers))
    if n_of_m:
        groups.append(_write_n_of_m(n_of_m, layers))
    if not groups:
        raise UnsupportedError("the model has no layer that is sparse and switched on; there is nothing to export")
    return {
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "producer": {"name": "modelopt_lite", "version": version},
    }


def _write_skip(methods: Mapping[str, SkipSoftmax], layers: Layers) -> dict[str, Any]:
    first = next(iter(methods))
    for name, method in methods.items():
        fits = [] if method.calibration is None else [fit for _, fit in method.calibration if fit is not None]
        if method.fit() is None or not all(isinstance(fit, ExponentialFit) for fit in fits):
            raise UnsupportedError(
                f"{name}: skip_softmax cannot be exported without a calibration of the form {FORMULA!r}; "
                'make one with modelopt_lite.calibrate(..., form="exponential")'
            )
        plain = SkipSoftmax(
            target_sparsity=method.target_sparsity,
            decode_target_sparsity=method.decode_target_sparsity,
            calibration=method.calibration,
        )
        _refuse_changed(name, method, plain, "has another value than the default, which the format cannot say")
        _refuse_changed(name, method, methods[first], f"is not that of {first}; the format has one for all layers")
    method = methods[first]
    coefficients, sparsities = {}, {}
    for phase, knob in method.knobs().items():
        fit = method.fit(phase)
        if isinstance(fit, ExponentialFit):
            coefficients[phase] = {"a": fit.a, "b": fit.b}
            sparsities[phase] = getattr(method, knob.target)
    targets = sorted({layers[name].class_name for name in methods})
    ignore = [name for name, layer in layers.items() if layer.class_name in targets and name not in methods]
    return {
        "algorithm": "skip_softmax",
        "targets": targets,
        **({"ignore": ignore} if ignore else {}),
        "threshold_scale_factor": {"formula": FORMULA, **coefficients},
        "target_sparsity": sparsities,
    }


def _write_n_of_m(methods: Mapping[str, SparseSoftmax], layers: Layers) -> dict[str, Any]:
    first = next(iter(methods))
    for name, method in methods.items():
        _refuse_changed(name, method, methods[first], f"is not that of {first}; the format has one N:M for all layers")
    targets = sorted({layers[name].class_name for name in methods})
    for name, layer in layers.items():
        if layer.class_name in targets and name not in methods:
            raise UnsupportedError(
                f"{name}: is not sparse_softmax as {first} is, which cannot be exported; readers of the format make "
                f"all layers of the class {layer.class_name} N:M sparse"
            )
    method = methods[first]
    return {
        "algorithm": "sparse_softmax",
        "targets": targets,
        "sparsity_n": method.sparsity_n,
        "sparsity_m": method.sparsity_m,
        "dense_sink_tokens": method.num_sink_tokens,
        "dense_recent_tokens": method.dense_window_size,
    }


def _refuse_changed(layer: str, method: SparseAttentionMethod, other: SparseAttentionMethod, reason: str) -> None:
    """Refuse a layer whose method differs from another in anything but how and whether it runs."""
    found, expected = method.identity(), other.identity()
    for field, value in found.items():
        if value != expected[field]:
            raise UnsupportedError(f"{layer}: {method.method}.{field}: {value!r} cannot be exported; it {reason}")
