"""What a flow takes, read from its source; nothing is imported or run for it."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

BUILTINS: dict[str, Any] = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict}
TYPING: dict[str, Any] = {"List": list, "Dict": dict, "Optional": Optional, "Union": Union}


@dataclass(frozen=True)
class Parameter:
    """One parameter: its annotation as it is written, and as a type (Any where that cannot be known)."""

    name: str
    annotation: str = ""
    type: Any = Any
    required: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {self.annotation}" if self.annotation else self.name


@dataclass(frozen=True)
class Signature:
    """What the function of a flow takes, and whether Prefect looks at the types."""

    parameters: dict[str, Parameter] = field(default_factory=dict)
    keywords: str | None = None
    """The name of its **keywords."""
    validated: bool = True


def source_of(entrypoint: str, directory: Path, path: Sequence[str]) -> tuple[Path, str] | None:
    """Return the file and the name of a flow given as file.py:flow or package.module:flow; None if it is not found.

    Modules are looked for in the directory and in the entries of `path`: importing would run their code.
    """
    place, _, name = entrypoint.rpartition(":")
    if place.endswith(".py") or os.sep in place:
        return Path(place).expanduser().absolute(), name
    parts = place.split(".")
    for entry in (directory, *map(Path, filter(None, path))):
        package = entry.joinpath(*parts)
        for file in (package / "__init__.py", package.with_name(f"{parts[-1]}.py")):
            if file.is_file():
                return file, name
        if entry.joinpath(parts[0]).is_dir() or entry.joinpath(f"{parts[0]}.py").is_file():
            return None  # Python looks no further
    return None


def read_signature(file: Path, name: str) -> Signature | None:
    """Return what the flow takes; None where that takes more than reading its function."""
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (OSError, SyntaxError, ValueError):
        return None
    bound = list(_bindings(tree))
    if bound.count(name) != 1:  # not here, or made into something else later on
        return None
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
            if len(node.decorator_list) != 1:  # another decorator may have changed what it takes
                return None
            return _signature(node, node.decorator_list[0], {*BUILTINS} - {*bound})
    return None


def _bindings(tree: ast.Module) -> Iterator[str]:
    """Yield every name that the module itself binds, as often as it does."""
    inner: list[ast.AST] = list(tree.body)
    while inner:
        node = inner.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        inner.extend(ast.iter_child_nodes(node))


def _signature(
    node: ast.FunctionDef | ast.AsyncFunctionDef, decorator: ast.expr, builtins: set[str]
) -> Signature | None:
    call = decorator if isinstance(decorator, ast.Call) else None
    target = call.func if call else decorator
    if (getattr(target, "attr", None) or getattr(target, "id", None)) != "flow":
        return None
    options = {keyword.arg: keyword.value for keyword in call.keywords} if call else {}
    validate = options.get("validate_parameters", ast.Constant(True))
    validated = None not in options and isinstance(validate, ast.Constant) and validate.value is True
    taken, known = node.args, []
    positional = [*taken.posonlyargs, *taken.args]
    first_default = len(positional) - len(taken.defaults)
    known += [(argument, number < first_default) for number, argument in enumerate(positional)]
    known += [(a, default is None) for a, default in zip(taken.kwonlyargs, taken.kw_defaults, strict=True)]
    parameters = {a.arg: _parameter(a, required, builtins) for a, required in known}
    for various in filter(None, (taken.vararg, taken.kwarg)):
        parameters[various.arg] = Parameter(various.arg)
    return Signature(parameters, taken.kwarg.arg if taken.kwarg else None, validated)


def _parameter(argument: ast.arg, required: bool, builtins: set[str]) -> Parameter:
    annotation = argument.annotation
    if annotation is None:
        return Parameter(argument.arg, required=required)
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        with suppress(SyntaxError):
            annotation = ast.parse(annotation.value, mode="eval").body
    return Parameter(argument.arg, ast.unparse(annotation), _type(annotation, builtins), required)


def _type(node: ast.expr, builtins: set[str]) -> Any:
    """Build the type of a plain annotation; Any for every other."""
    if isinstance(node, ast.Constant) and node.value is None:
        return None
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        with suppress(SyntaxError):
            return _type(ast.parse(node.value, mode="eval").body, builtins)
        return Any
    if isinstance(node, ast.Name):
        return BUILTINS[node.id] if node.id in builtins else {"List": list, "Dict": dict}.get(node.id, Any)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return Union[_type(node.left, builtins), _type(node.right, builtins)]  # noqa: UP007 - made of values
    if isinstance(node, ast.Subscript):
        return _generic(node, builtins)
    return Any


def _generic(node: ast.Subscript, builtins: set[str]) -> Any:
    name = getattr(node.value, "attr", None) or getattr(node.value, "id", None)
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    types = tuple(_type(part, builtins) for part in inner)
    made = TYPING.get(str(name)) or (BUILTINS[name] if name in ("list", "dict") and name in builtins else None)
    wanted = {list: 1, dict: 2, Optional: 1}.get(made, len(types))
    if made is None or len(types) != wanted:
        return Any
    return made[types if wanted > 1 or made is Union else types[0]]
