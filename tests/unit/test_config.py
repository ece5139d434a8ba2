"""Configurations: what is accepted, what is refused and how, where they can come from."""

import json
from typing import Literal

import pytest
import yaml

from modelopt_lite import SPARSE_SOFTMAX_DEFAULT, ConfigError, SparseSoftmax, SparsityConfig
from modelopt_lite.config import read_config_file

NAMES = [f"model.layers.{i}.self_attn" for i in range(4)]


def nm(**fields):
    return {"method": "sparse_softmax", **fields}


def entry(pattern="*attn*", **fields):
    return {"sparse_cfg": {pattern: nm(**fields)}}


BAD = {
    "not a mapping": (7, "the configuration: 7 is not allowed"),
    "a list": ([], "the configuration: [] is not allowed"),
    "empty": ({}, "sparse_cfg: missing"),
    "unknown top field": (
        {"sparse_cfg": {}, "sparsity": 1},
        "sparsity: 1 is not allowed; unknown field; allowed: sparse_cfg",
    ),
    "misspelt top field": ({"sparse_config": {}}, "sparse_config: {} is not allowed; unknown field"),
    "sparse_cfg type": ({"sparse_cfg": "2:4"}, "sparse_cfg: '2:4' is not allowed; must be a valid dictionary"),
    "sparse_cfg list": ({"sparse_cfg": [["*", {}]]}, "sparse_cfg: [['*', {}]] is not allowed"),
    "pattern type": ({"sparse_cfg": {5: nm()}}, "sparse_cfg.5"),
    "entry type": ({"sparse_cfg": {"*": "2:4"}}, "sparse_cfg.*: '2:4' is not allowed; must be a mapping"),
    "entry None": ({"sparse_cfg": {"*": None}}, "sparse_cfg.*: None is not allowed"),
    "no method": (
        {"sparse_cfg": {"*": {"sparsity_n": 2}}},
        "sparse_cfg.*: {'sparsity_n': 2} is not allowed; must have a method",
    ),
    "only enable": ({"sparse_cfg": {"*": {"enable": True}}}, "sparse_cfg.*: {'enable': True} is not allowed"),
    "enable as a number": ({"sparse_cfg": {"*": {"enable": 0}}}, "sparse_cfg.*"),
    "unknown method": (
        entry(method="2:4"),
        "sparse_cfg.*attn*.method: '2:4' is not allowed; must be one of those installed: combined, flash_prefill",
    ),
    "method type": (entry(method=["sparse_softmax"]), "sparse_cfg.*attn*.method: ['sparse_softmax'] is not allowed"),
    "method None": (entry(method=None), "sparse_cfg.*attn*.method: None is not allowed"),
    "unknown field": (
        entry(sparsity=2),
        "sparse_cfg.*attn*.sparsity: 2 is not allowed; unknown field; allowed: method",
    ),
    "field of another case": (entry(Sparsity_N=2), "sparse_cfg.*attn*.Sparsity_N: 2 is not allowed; unknown field"),
    "n > m": (entry(sparsity_n=5), "sparse_cfg.*attn*.sparsity_n: 5 is not allowed; must be at most sparsity_m = 4"),
    "n > m = 2": (
        entry(sparsity_n=3, sparsity_m=2),
        "sparse_cfg.*attn*.sparsity_n: 3 is not allowed; must be at most sparsity_m = 2",
    ),
    "n < 0": (
        entry(sparsity_n=-1),
        "sparse_cfg.*attn*.sparsity_n: -1 is not allowed; must be greater than or equal to 0",
    ),
    "n as text": (entry(sparsity_n="2"), "sparse_cfg.*attn*.sparsity_n: '2' is not allowed; must be a valid integer"),
    "n as float": (entry(sparsity_n=2.0), "sparse_cfg.*attn*.sparsity_n: 2.0 is not allowed"),
    "n as bool": (entry(sparsity_n=True), "sparse_cfg.*attn*.sparsity_n: True is not allowed"),
    "n None": (entry(sparsity_n=None), "sparse_cfg.*attn*.sparsity_n: None is not allowed"),
    "m = 5": (entry(sparsity_m=5), "sparse_cfg.*attn*.sparsity_m: 5 is not allowed; must be 2, 4, 8 or 16"),
    "m = 0": (entry(sparsity_m=0), "sparse_cfg.*attn*.sparsity_m: 0 is not allowed"),
    "m = 32": (entry(sparsity_m=32), "sparse_cfg.*attn*.sparsity_m: 32 is not allowed"),
    "m as float": (entry(sparsity_m=4.0), "sparse_cfg.*attn*.sparsity_m: 4.0 is not allowed; must be 2, 4, 8 or 16"),
    "m as text": (entry(sparsity_m="4"), "sparse_cfg.*attn*.sparsity_m: '4' is not allowed"),
    "sinks < 0": (
        entry(num_sink_tokens=-1),
        "sparse_cfg.*attn*.num_sink_tokens: -1 is not allowed; must be greater than",
    ),
    "sinks as text": (entry(num_sink_tokens="four"), "sparse_cfg.*attn*.num_sink_tokens: 'four' is not allowed"),
    "window < 0": (entry(dense_window_size=-64), "sparse_cfg.*attn*.dense_window_size: -64 is not allowed"),
    "window as float": (entry(dense_window_size=0.5), "sparse_cfg.*attn*.dense_window_size: 0.5 is not allowed"),
    "alias < 0": (entry(dense_recent_tokens=-1), "sparse_cfg.*attn*.dense_recent_tokens: -1 is not allowed"),
    "alias twice": (
        entry(num_sink_tokens=1, dense_sink_tokens=2),
        "sparse_cfg.*attn*.dense_sink_tokens: 2 is not allowed; num_sink_tokens is given too, and means the same",
    ),
    "backend": (
        entry(backend="cuda"),
        "sparse_cfg.*attn*.backend: 'cuda' is not allowed; must be 'auto', 'triton' or 'torch'",
    ),
    "enable as text": (entry(enable="no"), "sparse_cfg.*attn*.enable: 'no' is not allowed; must be a valid boolean"),
    "default": ({"sparse_cfg": {"default": nm(sparsity_m=3)}}, "sparse_cfg.default.sparsity_m: 3 is not allowed"),
}


@pytest.mark.parametrize(("config", "message"), BAD.values(), ids=BAD.keys())
def test_bad_configs(config, message):
    with pytest.raises(ConfigError) as error:
        SparsityConfig.load(config)
    assert str(error.value).startswith(message)
    assert "pydantic" not in str(error.value)


def test_every_problem_gets_its_line():
    with pytest.raises(ConfigError) as error:
        SparsityConfig.load({"sparse_cfg": {"a": nm(sparsity_m=5, num_sink_tokens=-1), "b": nm(sparsity_n=9)}})
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "sparse_cfg.a.num_sink_tokens",
        "sparse_cfg.a.sparsity_m",
        "sparse_cfg.b.sparsity_n",
    ]


def test_default_preset():
    (pattern, method), *rest = SPARSE_SOFTMAX_DEFAULT.sparse_cfg.items()
    assert (pattern, rest) == ("*", [])
    assert method == SparseSoftmax(
        sparsity_n=2, sparsity_m=4, dense_window_size=64, num_sink_tokens=0, backend="auto", enable=True
    )


def test_aliases_of_model_optimizer():
    (method,) = SparsityConfig.load(
        entry(method="triton_sparse_softmax", dense_sink_tokens=4, dense_recent_tokens=128)
    ).sparse_cfg.values()
    assert method == SparseSoftmax(num_sink_tokens=4, dense_window_size=128)
    assert method.method == "sparse_softmax"


def test_configs_are_immutable():
    with pytest.raises(ValueError, match="frozen"):
        SPARSE_SOFTMAX_DEFAULT.sparse_cfg["*"].sparsity_n = 1


EXAMPLE = {
    "sparse_cfg": {
        "default": {"enable": False},
        "*attn*": nm(sparsity_n=1, sparsity_m=8, num_sink_tokens=4, dense_window_size=0, backend="torch", enable=False),
        "*.0.*": {"enable": False},
    }
}


def test_dump_and_reload():
    config = SparsityConfig.load(EXAMPLE)
    assert config.model_dump() == EXAMPLE
    assert SparsityConfig.load(config.model_dump()) == config
    assert SparsityConfig.model_validate_json(config.model_dump_json()) == config
    assert SparsityConfig.load(config) is config
    assert list(config.model_dump()["sparse_cfg"]) == list(EXAMPLE["sparse_cfg"])


def test_files(tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(EXAMPLE, sort_keys=False))
    (tmp_path / "b.json").write_text(json.dumps(EXAMPLE))
    toml = ["[sparse_cfg.default]", "enable = false", '[sparse_cfg."*attn*"]']
    toml += [f"{key} = {json.dumps(value)}" for key, value in EXAMPLE["sparse_cfg"]["*attn*"].items()]
    toml += ['[sparse_cfg."*.0.*"]', "enable = false"]
    (tmp_path / "c.toml").write_text("\n".join(toml))
    for name in ("a.yaml", "b.json", "c.toml"):
        assert SparsityConfig.load(tmp_path / name) == SparsityConfig.load(EXAMPLE)
        assert SparsityConfig.load(str(tmp_path / name)) == SparsityConfig.load(EXAMPLE)


BAD_FILES = {
    "missing.yaml": (None, "cannot be read: No such file or directory"),
    "config.txt": ("", "suffix '.txt' is not allowed; one of .yaml, .yml, .json, .toml"),
    "star.yaml": ("sparse_cfg:\n  *attn*: {}\n", "does not parse"),
    "list.yaml": ("- 1\n", "holds list; must hold a mapping"),
    "empty.yaml": ("", "holds NoneType; must hold a mapping"),
    "twice.yaml": ("sparse_cfg: {'a': {enable: false}, 'a': {enable: false}}", "the key 'a' stands twice"),
    "python.yaml": ("sparse_cfg: !!python/object/apply:os.getcwd []", "does not parse"),
    "broken.json": ("{", "does not parse"),
    "twice.json": ('{"a": 1, "a": 2}', "the key 'a' stands twice"),
    "broken.toml": ("a = ", "does not parse"),
    "binary.yaml": (b"\xff\xfe\x00", "does not parse"),
    "value.yaml": ("sparse_cfg: {'*': {method: sparse_softmax, sparsity_m: 5}}", "sparse_cfg.*.sparsity_m: 5 is not"),
}


@pytest.mark.parametrize(("name", "content", "message"), [(n, *c) for n, c in BAD_FILES.items()], ids=BAD_FILES.keys())
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as error:
        SparsityConfig.load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_is_not_a_file(tmp_path):
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config_file(folder)


def test_last_match_wins_and_nothing_is_merged():
    config = SparsityConfig.load(
        {
            "sparse_cfg": {
                "*": nm(num_sink_tokens=4),
                "default": nm(sparsity_n=1),
                "*.2.*": nm(sparsity_m=8),
                "*.3.*": {"enable": False},
            }
        }
    )
    methods = config.assign(NAMES)
    assert methods[NAMES[0]] == SparseSoftmax(num_sink_tokens=4)  # "default" comes first wherever it stands
    assert methods[NAMES[2]] == SparseSoftmax(sparsity_m=8)  # no sinks from "*"
    assert NAMES[3] not in methods


def test_default_covers_what_no_pattern_matches():
    methods = SparsityConfig.load({"sparse_cfg": {"default": nm(), "*.1.*": {"enable": False}}}).assign(NAMES)
    assert list(methods) == [NAMES[0], NAMES[2], NAMES[3]]
    assert SparsityConfig.load({"sparse_cfg": {"*.1.*": nm()}}).assign(NAMES) == {NAMES[1]: SparseSoftmax()}


@pytest.mark.parametrize("pattern", ["*.9.*", "self_attn", "*.SELF_ATTN", "model.layers.[56].*", ""])
def test_a_pattern_that_matches_nothing(pattern):
    with pytest.raises(ConfigError) as error:
        SparsityConfig.load({"sparse_cfg": {pattern: {"enable": False}}}).assign(NAMES)
    assert str(error.value).startswith(f"sparse_cfg.{pattern}: matches no attention module; there are {NAMES[0]}, ")


def test_json_schema_knows_every_method_and_field():
    schema = SparsityConfig.model_json_schema()
    fields = schema["$defs"]["SparseSoftmax"]["properties"]
    assert set(fields) == set(SparseSoftmax.model_fields)
    assert fields["sparsity_m"]["enum"] == [2, 4, 8, 16]
    assert all(field.get("description") for name, field in fields.items() if name != "method")
    assert Literal["sparse_softmax", "triton_sparse_softmax"].__args__ == tuple(fields["method"]["enum"])


SHORT_FORMS = {
    "object": (SparseSoftmax(sparsity_n=1), SparseSoftmax(sparsity_n=1)),
    "mapping": ({"method": "sparse_softmax", "sparsity_m": 8}, SparseSoftmax(sparsity_m=8)),
    "name": ("sparse_softmax", SparseSoftmax()),
    "alias": ("triton_sparse_softmax", SparseSoftmax()),
    "N:M": ("8:16", SparseSoftmax(sparsity_n=8, sparsity_m=16)),
}


@pytest.mark.parametrize(("source", "method"), SHORT_FORMS.values(), ids=SHORT_FORMS)
def test_short_forms_are_one_method_for_all(source, method):
    assert SparsityConfig.load(source) == SparsityConfig(sparse_cfg={"*": method})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("magic", "the configuration: 'magic' is not allowed; must be N:M such as '2:4', the path of a file"),
        ("no/such.yaml", "no/such.yaml: cannot be read"),
        (124, "the configuration: 124 is not allowed; must be a mapping or a name; YAML reads 2:4 without quotes as"),
        (7, "the configuration: 7 is not allowed; must be a mapping or a name"),
    ],
)
def test_bad_short_forms(source, message):
    with pytest.raises(ConfigError) as error:
        SparsityConfig.load(source)
    assert str(error.value).startswith(message)


def test_a_constructor_raises_what_a_file_raises():
    with pytest.raises(ConfigError, match=r"^SparseSoftmax\.sparsity_n: 5 is not allowed; must be at most") as error:
        SparseSoftmax(sparsity_n=5)
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(ConfigError, match=r"^SparsityConfig\.sparse_cfg\.a\.sparsity_n: 9"):
        SparsityConfig(sparse_cfg={"a": {"method": "sparse_softmax", "sparsity_n": 9}})
