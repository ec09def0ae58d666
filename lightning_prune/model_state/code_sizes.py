"""Sizes written in a module's Python code, and a class of equal code that reads them from an attribute instead.

``x.reshape(B, N, C)`` with ``C`` taken from the input's shape fails once ``x`` has fewer channels than that, and no
attribute can tell the code. `follow_` gives the module a class made of its own: the same functions, compiled from the
same source with that one argument replaced by ``self.sizes_in_code[...]``. Nothing else of the code changes. Every size
is known by a key that names the function, the place in it and the text that stands there, so that a file that holds
keys can say nothing that the source does not: it selects arguments of the installed code, and gives them numbers.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import itertools
import linecache
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from lightning_prune.errors import PruningError

SIZES = "sizes_in_code"
_ORIGINALS: dict[CodeType, CodeType] = {}  # of functions compiled here


@dataclass(frozen=True)
class SourceArgument:
    """An argument in the source: in which method, in which function that it calls (or none), where, and its text."""

    method: str
    function: str
    line: int  # counted from the first line of the function
    column: int
    text: str
    passed: str = ""  # the attribute that the method gives the function for it

    @property
    def key(self) -> str:
        """``forward+3:18 C // self.num_heads`` or ``forward>attend+1:8 C``."""
        called = f">{self.function}" if self.function else ""
        return f"{self.method}{called}+{self.line}:{self.column} {self.text}"

    @property
    def is_computed(self) -> bool:
        """Whether names stand there, and not numbers alone."""
        return any(character.isalpha() for character in self.text)

    @property
    def attribute(self) -> str | None:
        """The attribute of the module that stands there, and nothing else."""
        owner, _, name = self.text.partition(".")
        own = name if owner == "self" and name.isidentifier() and not self.function else None
        return self.passed or own

    @classmethod
    def read(cls, key: str) -> SourceArgument:
        """From its key."""
        where, _, text = key.partition(" ")
        names, _, position = where.rpartition("+")
        method, _, function = names.partition(">")
        line, _, column = position.partition(":")
        if not (line.isdecimal() and column.isdecimal()):
            raise PruningError(f"{key!r} names no place in the code")
        return cls(method, function, int(line), int(column), text)


def follow_(module: nn.Module, sizes: Mapping[str, int]) -> None:
    """Let the module's code read these sizes, {key: size}, beside those that it reads already.

    Raises:
        PruningError: the source is not there, or something else stands at one of the places.
    """
    known = {**vars(module).get(SIZES, {}), **sizes}
    module.__class__ = following(own_class(module), frozenset(known))
    vars(module)[SIZES] = known


def unfollow_(module: nn.Module) -> None:
    """Give the module its own class back."""
    if vars(module).pop(SIZES, None) is not None:
        module.__class__ = own_class(module)


def own_class(module: nn.Module) -> Any:
    """The class that the user gave it."""
    return getattr(type(module), "_own_class", type(module))


@functools.cache
def following(own: Any, keys: frozenset[str]) -> Any:
    """A class whose code reads the sizes of these keys from an attribute."""
    body: dict[str, Any] = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    body |= {"_own_class": own, "__reduce_ex__": _reduce, "__prepare_scriptable__": _refuse_script}
    places = sorted(map(SourceArgument.read, keys), key=lambda place: (place.method, place.function))
    for method, found in itertools.groupby(places, key=lambda place: place.method):
        body |= _rewritten(own, method, list(found))
    return type(own.__name__, (own,), body)


def can_follow(module: nn.Module) -> bool:
    """Whether a class can be made of its own: none that would be registered somewhere in place of the user's."""
    return not any("__init_subclass__" in vars(kind) for kind in own_class(module).__mro__[:-1])


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:  # noqa: ARG001
    own, state = own_class(module), vars(module)
    state = own.__getstate__(module) if hasattr(own, "__getstate__") else state
    return _made, (own, tuple(sorted(vars(module)[SIZES]))), state


def _made(own: Any, keys: tuple[str, ...]) -> Any:
    kind = following(own, frozenset(keys))
    return kind.__new__(kind)


def _refuse_script(module: nn.Module) -> nn.Module:
    raise PruningError(
        f"{type(module).__name__} cannot be scripted: sizes in its code were replaced when channels were removed "
        f"({', '.join(vars(module)[SIZES])}); use torch.export, torch.jit.trace or ONNX"
    )


@functools.cache
def _tree(filename: str) -> ast.Module | None:
    try:
        return ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:
        return None


def definition(code: CodeType) -> ast.FunctionDef | None:
    """The definition in the source; None where there is none that compiles to this code, or it is decorated."""
    found = _defined(_ORIGINALS.get(code, code))
    return found and found[0]


@functools.cache
def _defined(code: CodeType) -> tuple[ast.FunctionDef, str] | None:
    """The definition, and the name of the class around it."""
    tree = _tree(code.co_filename)
    for scope in ast.walk(tree) if tree else ():
        for node in ast.iter_child_nodes(scope):
            if isinstance(node, ast.FunctionDef) and (node.name, node.lineno) == (code.co_name, code.co_firstlineno):
                owner = scope.name if isinstance(scope, ast.ClassDef) else "_"
                return (node, owner) if _same(_compile(node, code, owner), code) else None
    return None


def _same(first: CodeType, second: CodeType) -> bool:
    """Whether both do the same; a file may have been edited since it was imported."""
    one, other = (
        (code.co_code, code.co_names, code.co_varnames, [c for c in code.co_consts if not isinstance(c, CodeType)])
        for code in (first, second)
    )
    return one == other


class _Replaces(ast.NodeTransformer):
    """Puts the attribute in the places, and calls functions that became methods on ``self``."""

    def __init__(
        self, first_line: int, me: str, places: Collection[SourceArgument], functions: Collection[str]
    ) -> None:
        self.wanted = {(first_line + one.line, one.column, one.text): one.key for one in places}
        self.starts = {start[:2] for start in self.wanted}
        self.me, self.functions = me, functions
        self.done: set[str] = set()

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.expr) and (node.lineno, node.col_offset) in self.starts:
            key = self.wanted.get((node.lineno, node.col_offset, ast.unparse(node)))
            if key is not None:
                self.done.add(key)
                return _expression(f"{self.me}.{SIZES}[{key!r}]", node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in self.functions:
            node.func = _expression(f"{self.me}.{node.func.id}", node.func)
        return self.generic_visit(node)


def _expression(text: str, old: ast.expr) -> ast.expr:
    """A new expression in the place of an old one."""
    new = ast.parse(text, mode="eval").body
    for node in ast.walk(new):
        if isinstance(node, ast.expr):
            ast.copy_location(node, old)
    return new


def _rewritten(own: type[nn.Module], method: str, places: list[SourceArgument]) -> dict[str, FunctionType]:
    """The method, and the functions that it calls, with the sizes replaced."""
    original = inspect.getattr_static(own, method, None)
    if not isinstance(original, FunctionType):
        raise PruningError(f"{own.__qualname__} has no plain method {method!r}, whose code holds sizes")
    functions = {place.function for place in places} - {""}
    made = {}
    for name in functions:
        called = original.__globals__.get(name)
        if not isinstance(called, FunctionType) or hasattr(own, name):
            raise PruningError(f"{own.__qualname__}.{method} calls no plain function {name!r}, whose code holds sizes")
        inner = [place for place in places if place.function == name]
        made[name] = _compiled(called, inner, (), becomes_method=True)
    own_places = [place for place in places if not place.function]
    return {**made, method: _compiled(original, own_places, functions, becomes_method=False)}


def _compiled(
    original: FunctionType,
    places: list[SourceArgument],
    functions: Collection[str],
    *,
    becomes_method: bool,
) -> FunctionType:
    """The function compiled anew, with sizes replaced."""
    code, found = original.__code__, _defined(original.__code__)
    if found is None:
        raise PruningError(f"the source of {original.__qualname__}, whose code holds sizes, is not to be found")
    tree, owner = copy.deepcopy(found)
    arguments = tree.args.posonlyargs or tree.args.args
    me = "self" if becomes_method else arguments[0].arg
    replaces = _Replaces(code.co_firstlineno, me, places, functions)
    tree.body = [replaces.visit(statement) for statement in tree.body]
    if missing := sorted({place.key for place in places} - replaces.done):
        raise PruningError(
            f"the code of {original.__qualname__} is not that of the pruned model: there is no {', '.join(missing)}"
        )
    if becomes_method:
        arguments.insert(0, ast.copy_location(ast.arg("self"), tree))
    new = _compile(tree, code, owner)
    cells = dict(zip(code.co_freevars, original.__closure__ or (), strict=True))
    closure = tuple(cells[name] for name in new.co_freevars)
    made = FunctionType(new, original.__globals__, original.__name__, original.__defaults__, closure)
    made.__kwdefaults__ = original.__kwdefaults__
    _ORIGINALS[new] = code
    functools.update_wrapper(made, original, updated=())
    return made


def _compile(tree: ast.FunctionDef, code: CodeType, owner: str) -> CodeType:
    """The code of a definition in the place of another.

    In a class, for names like ``__x``, with the same free names, and below the imports of its file, whose names Python
    compiles in another way.
    """
    free = ", ".join(sorted(set(code.co_freevars) - {"__class__"}))
    around = ast.parse(f"def around({free}):\n class {owner}: pass")
    around.body[0].body[0].body = [tree]  # type: ignore[attr-defined]
    around.body[:0] = _imports(code.co_filename)
    return _nested(compile(around, code.co_filename, "exec", dont_inherit=True), code)


@functools.cache
def _imports(filename: str) -> list[ast.stmt]:
    """Those at the top of a file, also under conditions."""
    found: list[ast.stmt] = []
    to_do: list[ast.AST] = [_tree(filename) or ast.Module([], [])]
    while to_do:
        for node in ast.iter_child_nodes(to_do.pop()):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                found.append(node)
            elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.expr)):
                to_do.append(node)
    return sorted(found, key=lambda node: node.lineno)


def _nested(code: CodeType, wanted: CodeType) -> CodeType:
    """The code of a function among those that another code holds."""
    held = [item for item in code.co_consts if isinstance(item, CodeType)]
    same = [item for item in held if (item.co_name, item.co_firstlineno) == (wanted.co_name, wanted.co_firstlineno)]
    return same[0] if same else next(filter(None, (_nested(item, wanted) for item in held)))
