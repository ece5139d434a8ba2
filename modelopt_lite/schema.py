"""The base of every configuration class, and how its errors are put to a person."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pydantic import AliasChoices, BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from .errors import ConfigError

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)  # which has no public name


class _ConfigMeta(ModelMetaclass):
    """Makes a constructor raise what a file raises."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except ValidationError as error:
            raise ConfigError(describe_errors(error, f"{cls.__name__}.")) from None


class ConfigModel(BaseModel, metaclass=_ConfigMeta):
    """An immutable configuration that refuses unknown fields, and values of another type instead of converting.

    Its constructor raises :class:`~modelopt_lite.errors.ConfigError`, with one line per problem.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        errors: dict[str, tuple[object, str]] = {}
        known: set[object] = set()
        for name, field in cls.model_fields.items():
            names = field.validation_alias.choices if isinstance(field.validation_alias, AliasChoices) else [name]
            given = [str(choice) for choice in names if choice in value]
            errors.update(
                {other: (value[other], f"{given[0]} is given too, and means the same") for other in given[1:]}
            )
            known.update(names)
        allowed = f"unknown field; allowed: {', '.join(cls.model_fields)}"
        errors.update({str(key): (value[key], allowed) for key in value if key not in known})
        if errors:
            raise field_errors(cls.__name__, errors)
        return value


def field_errors(title: str, errors: dict[str, tuple[object, str]]) -> ValidationError:
    """Make a validation error from messages by field: ``{field: (value, what is allowed)}``."""
    return ValidationError.from_exception_data(
        title,
        [
            InitErrorDetails(
                type=PydanticCustomError("not_allowed", "{message}", {"message": message}), loc=(field,), input=value
            )
            for field, (value, message) in errors.items()
        ],
    )


def describe_errors(error: ValidationError, prefix: str = "") -> str:
    """Put a validation error in one line per problem: ``path.in.the.config: value is not allowed; what is``."""
    lines = []
    for details in error.errors(include_url=False):
        path = ".".join(str(part) for part in details["loc"] if part != "[key]") or "the configuration"
        if details["type"] == "missing":
            lines.append(f"{prefix}{path}: missing; the field is required")
            continue
        allowed = re.sub(r"^(Value error, )?Input should ", "must ", details["msg"])
        lines.append(f"{prefix}{path}: {_abbreviate(details['input'])} is not allowed; {allowed}")
    return "\n".join(lines)


def _abbreviate(value: object) -> str:
    """Return a value as Python writes it; of a long one, such as a whole mapping, the beginning."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]} ... ({type(value).__name__})"
