"""Which modules of a model do attention, and whether they can run on this package's attention.

Nothing is told by a name that a model's author chose: what counts is the code that a module's forward runs.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import logging
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any, cast

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from ..errors import UnsupportedError
from .module import original_class

logger = logging.getLogger(__name__)

ATTENTION_NAME = "modelopt_lite"
"""Under this name Transformers knows this package's attention and masks."""

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
# What some models hand to their attention function beside queries and keys, and what no layout can say.
UNSUPPORTED_ARGUMENTS = {
    "position_bias": "adds a position bias to its scores",
    "indices": "chooses its own keys",
    "block_indices": "chooses its own keys",
}
# Of the kinds of layers that Transformers' configs know, the one whose mask no layout can say.
UNSUPPORTED_LAYERS = ("chunked_attention",)
_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum", "@"})


def uses_interface(module: nn.Module) -> bool:
    """Whether a module's forward looks up its attention function in Transformers' interface."""
    return _uses_interface(_class(module))


def calls_sdpa(module: nn.Module) -> bool:
    """Whether a module's forward calls PyTorch's scaled_dot_product_attention, or a helper that calls it.

    Helpers are methods that the forward calls by name, of its class or, by ``super()``, of a base, and functions that
    any of these knows by one name.
    """
    return _calls_sdpa(_class(module))


def _class(module: nn.Module) -> Any:  # as mypy takes no class to be hashable
    return original_class(module)


def forward_globals(module: nn.Module) -> dict[str, Any]:
    """Return what the code of a module's forward knows by one name: the function that looks up its attention."""
    methods = _methods(_class(module))
    return next((x for x in methods if INTERFACE in _names(x.__code__)), methods[0]).__globals__


@functools.cache
def _uses_interface(cls: Any) -> bool:
    if issubclass(cls, PreTrainedModel):
        return False
    return any(INTERFACE in _names(function.__code__) for function in _methods(cls))


@functools.cache
def _calls_sdpa(cls: Any) -> bool:
    return any(_names_sdpa(function) for function in _code_of(cls))


@functools.cache
def _computes_attention(cls: Any) -> bool:
    """Whether a module's forward takes a softmax and multiplies matrices, as attention without a library does."""
    if issubclass(cls, nn.MultiheadAttention):
        return True
    names = set().union(*(_names(function.__code__) for function in _methods(cls)))
    return any("softmax" in name.lower() for name in names) and not _PRODUCTS.isdisjoint(names)


@functools.cache
def _methods(cls: Any) -> tuple[FunctionType, ...]:
    """Return a class's forward and the methods that it calls by name, and those that these call, and so on."""
    bases = [
        base for base in cls.__mro__ if base not in (nn.Module, object) and not base.__module__.startswith("torch.")
    ]
    found: list[FunctionType] = []
    todo = [_function(cls.forward)]
    while todo:
        function = todo.pop()
        if function in found:
            continue
        found.append(function)
        names = _names(function.__code__)
        # ``super()``, or a base that is named.
        calls_bases = "super" in names or any(base.__name__ in names for base in bases[1:])
        for name in names:
            methods = [vars(base)[name] for base in bases if name in vars(base)]
            todo += map(_function, methods if calls_bases else methods[:1])
    return tuple(found)


def _code_of(cls: Any) -> Iterator[FunctionType]:
    """Yield a class's methods, as :func:`_methods`, and the functions that these know by one name."""
    for function in _methods(cls):
        yield function
        yield from (_function(function.__globals__.get(name)) for name in _names(function.__code__))


def _names_sdpa(function: FunctionType) -> bool:
    names = _names(function.__code__)
    return "scaled_dot_product_attention" in names or any(
        function.__globals__.get(name) is scaled_dot_product_attention for name in names
    )


def _names(code: CodeType) -> set[str]:
    """Return the globals and attributes that a function's code names, functions inside of it included; @ as well."""
    names = set(code.co_names)
    if any(
        step.opname == "BINARY_MATRIX_MULTIPLY" or (step.opname == "BINARY_OP" and step.argrepr.startswith("@"))
        for step in dis.get_instructions(code)
    ):
        names.add("@")
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return names.union(*map(_names, inner))


def _function(found: Any) -> FunctionType:
    """Return the Python function that something is or decorates, one that does nothing if it is none."""
    if isinstance(found, staticmethod | classmethod):
        found = found.__func__
    # Only of functions, as other objects may make up the attributes they are asked for.
    function = inspect.unwrap(found) if isinstance(found, FunctionType) else None
    return function if isinstance(function, FunctionType) else cast(FunctionType, _nothing)


def _nothing() -> None:
    pass


def pretrained_models(model: nn.Module) -> dict[str, PreTrainedModel]:
    """Return the outermost Transformers models inside a model, or itself, by dotted name."""
    found: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and _outer(name, found) is None:
            found[name] = module
    return found


def _outer(name: str, models: Iterable[str]) -> str | None:
    """Return the name of the one of ``models`` that a module is inside of."""
    return next((outer for outer in models if outer in ("", name) or name.startswith(f"{outer}.")), None)


def _owners(model: nn.Module) -> dict[str, PreTrainedModel | None]:
    """Return the innermost Transformers model that each module is inside of, by the module's dotted name."""
    owners: dict[str, PreTrainedModel | None] = {}
    for name, module in model.named_modules():
        outer = owners.get(name.rpartition(".")[0]) if name else None
        owners[name] = module if isinstance(module, PreTrainedModel) else outer
    return owners


def attention_modules(model: nn.Module, chosen: Collection[str] = ()) -> dict[str, nn.Module]:
    """Return a model's attention modules that can be made sparse, by dotted name.

    Args:
        model: any model.
        chosen: names of modules that are such although nothing shows it.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if uses_interface(module) or calls_sdpa(module) or name in chosen
    }


def unreachable_modules(model: nn.Module, reachable: Collection[str]) -> dict[str, nn.Module]:
    """Return the modules inside Transformers models that compute attention where nothing can take it over.

    Those are ``torch.nn.MultiheadAttention`` and modules that take a softmax of products themselves.

    Args:
        model: any model.
        reachable: names of its :func:`attention_modules`.
    """
    owners = _owners(model)
    named = {
        name: module
        for name, module in model.named_modules()
        if owners[name] is not None
        and not isinstance(module, PreTrainedModel)
        and name not in reachable
        and _computes_attention(_class(module))
    }
    inner = [*reachable, *named]
    return {name: x for name, x in named.items() if not any(other.startswith(f"{name}.") for other in inner)}


def check_modules(
    model: nn.Module, modules: dict[str, nn.Module], matched: Mapping[str, object], chosen: Collection[str]
) -> None:
    """Check that the attention layers that patterns match can run on this package's attention.

    Modules that no pattern matched keep their own attention and are not looked at.

    Args:
        model: the model.
        modules: its attention modules that can be made sparse.
        matched: names of modules, of these or unreachable ones, and the entry that each is matched by.
        chosen: names of those that the user pointed out.

    Raises:
        UnsupportedError: naming the layer and the reason.
    """
    owners = _owners(model)
    everything = dict(model.named_modules())
    switched = {id(owners[name]) for name in matched if name in modules and uses_interface(modules[name])}
    reached = {id(entry) for name, entry in matched.items() if name in modules}
    for name, entry in matched.items():
        module, owner = everything[name], owners[name]
        if name in modules:
            reason = _unsupported(module, owner, name in chosen, id(owner) in switched)
        else:
            reason = None if id(entry) in reached else _OUT_OF_REACH
        if reason:
            raise UnsupportedError(f"{name} ({original_class(module).__name__}): {reason}")
    left = [f"{name} ({original_class(everything[name]).__name__})" for name in matched if name not in modules]
    if left:
        logger.warning("%s: stays dense, although a pattern matches it, as it %s", ", ".join(left), _OUT_OF_REACH)


_OUT_OF_REACH = (
    "does not go through Transformers' attention interface, nor calls scaled_dot_product_attention where that can be "
    "intercepted, but computes attention itself"
)


def check_found(model: nn.Module, modules: Collection[str]) -> None:
    """Check that a model has attention modules at all.

    Raises:
        UnsupportedError: if not, with what to do.
    """
    if not modules:
        raise UnsupportedError(
            f"{type(model).__name__} has no attention module: none of its modules is a Transformers attention layer or "
            "calls scaled_dot_product_attention itself; if something inside one does, say which with attention="
        )


def _unsupported(module: nn.Module, owner: PreTrainedModel | None, is_chosen: bool, is_switched: bool) -> str | None:
    """Return why a module cannot run on this package's attention, None if it can.

    Args:
        module: the module.
        owner: the innermost Transformers model that it is inside of.
        is_chosen: whether the user pointed it out.
        is_switched: whether that model has modules that go through the interface and are to be sparse.
    """
    if isinstance(module, nn.MultiheadAttention):
        return "its call of scaled_dot_product_attention is out of reach"
    if not uses_interface(module):
        if owner is None or not (is_switched or owner.config._attn_implementation not in ("sdpa", ATTENTION_NAME)):
            return None
        if is_chosen and not calls_sdpa(module):
            return "does not go through Transformers' attention interface, as the rest of its model does"
        return "calls scaled_dot_product_attention itself, which is supported if the whole model does so with 'sdpa'"
    if owner is None:
        return "is a Transformers attention layer outside of a PreTrainedModel, which is not supported"
    methods = _methods(_class(module))
    constants: set[Any] = set()
    for constant in (constant for method in methods for constant in method.__code__.co_consts):
        constants.update(constant if isinstance(constant, tuple) else [constant])
    for argument, what in UNSUPPORTED_ARGUMENTS.items():
        if argument in constants:
            return f"{what} ({argument}), which is not supported"
    if _makes_a_mask(_class(module)):
        return "makes an attention mask of its own, which is not supported"
    kind = _layer_kind(module)
    return f"{kind} is not supported" if kind in UNSUPPORTED_LAYERS else _divided_head(module)


def _divided_head(module: nn.Module) -> str | None:
    """Return what is wrong if tensor parallelism divides a module's heads of keys unevenly, None if it does not."""
    config = getattr(module, "config", None)
    heads = getattr(config, "num_key_value_heads", None)
    dim = getattr(module, "head_dim", None) or getattr(config, "head_dim", None)
    if not isinstance(heads, int) or not isinstance(dim, int):
        return None
    for owner, weight in [(part, weight) for part in module.modules() for weight in part.parameters(recurse=False)]:
        if not isinstance(weight, DTensor) or weight.shape[0] != heads * dim:
            continue
        # Some versions of Transformers give the mesh no names, but all mark the modules that they divide.
        names = weight.device_mesh.mesh_dim_names or (("tp",) if getattr(owner, "_is_hooked", False) else ())
        for name, size, placement in zip(names, weight.device_mesh.shape, weight.placements, strict=False):
            if name == "tp" and placement.is_shard(0) and heads % size:
                return (
                    f"its {heads} heads of keys and values cannot be divided among {size} processes of tensor "
                    "parallelism; use a tp_size that divides them, or context parallelism"
                )
    return None


@functools.cache
def _makes_a_mask(cls: Any) -> bool:
    """Whether a module computes the mask that it hands to its attention function, instead of passing one on."""
    for function in _methods(cls):
        if INTERFACE not in _names(function.__code__):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, SyntaxError):
            continue  # without a source; a mask that cannot be used is refused in the call
        nodes = list(ast.walk(tree))
        assigned: dict[str, list[ast.expr]] = {}
        for node in nodes:
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and node.value is not None:
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name):
                        assigned.setdefault(target.id, []).append(node.value)
        functions = {name for name, values in assigned.items() if any(map(_looks_up, values))}
        calls = [
            n for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in functions
        ]
        if any(_is_computed(mask, assigned) for call in calls for mask in _mask_of(call)):
            return True
    return False


def _looks_up(value: ast.expr) -> bool:
    return any(isinstance(node, ast.Name) and node.id == INTERFACE for node in ast.walk(value))


def _mask_of(call: ast.Call) -> list[ast.expr]:
    named = [keyword.value for keyword in call.keywords if keyword.arg == "attention_mask"]
    return named or call.args[4:5]


def _is_computed(mask: ast.expr, assigned: dict[str, list[ast.expr]]) -> bool:
    """Whether an expression is more than the choice of something that was there before."""
    values = assigned.get(mask.id, []) if isinstance(mask, ast.Name) else [mask]
    for node in (node for value in values for node in ast.walk(value)):
        if isinstance(node, ast.BinOp | ast.Subscript):
            return True
        # A mapping's ``get`` chooses.
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Attribute) and node.func.attr == "get"):
            return True
    return False


def _layer_kind(module: nn.Module) -> str | None:
    for attribute in ("layer_type", "attention_type"):
        kind = getattr(module, attribute, None)
        if isinstance(kind, str):
            return kind
    kinds, index = getattr(getattr(module, "config", None), "layer_types", None), getattr(module, "layer_idx", None)
    return kinds[index] if kinds and isinstance(index, int) and index < len(kinds) else None
