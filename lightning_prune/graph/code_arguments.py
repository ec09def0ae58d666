"""Which arguments of which call in a module's source are the sizes that an operator got."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, FunctionType

import torch
from torch import nn

import lightning_prune
from lightning_prune.graph.call_order import calls_by_line
from lightning_prune.model_state.code_sizes import SourceArgument, can_follow, definition, own_class

NESTED = ("<genexpr>", "<listcomp>", "<lambda>")
CALLS = ("reshape", "view", "expand", "split", "split_with_sizes")
_OURS = tuple(Path(lightning_prune.__file__).parent / room for room in ("graph", "model_state"))
_LIBRARY = tuple(f"{room}/" for room in (Path(torch.__file__).parent, *_OURS))


@dataclass(frozen=True, eq=False)
class SourceCall:
    """A call that a module's code made: in which method, in which function that it calls (or none), and where."""

    method: str
    function: str
    code: CodeType
    instruction: int
    caller: CodeType | None = None  # of the method, if the call is made in a function
    inner: CodeType | None = None  # of the comprehension or lambda in it that makes the call

    def places(self) -> dict[int | None, SourceArgument]:
        """Where the sizes that it passes stand, by position; None: it passes one that is no tuple."""
        found = {}
        for position, expression in _arguments(self.code, self.instruction, self.inner):
            line = expression.lineno - self.code.co_firstlineno
            text = ast.unparse(expression)
            passed = _passed(self.caller, self.function, self.code, text) if self.caller is not None else ""
            here = SourceArgument(self.method, self.function, line, expression.col_offset, text, passed)
            if here.text != "-1":
                found[position] = here
        return found

    def place(self, dim: int, rank: int) -> SourceArgument | None:
        """Where the size of one dimension of so many stands."""
        places = self.places()
        return places.get(dim, places.get(dim - rank, places.get(None) if rank == 1 else None))


def running_call(module: nn.Module) -> SourceCall | None:
    """The call that a module's own code is making; None if it is made elsewhere.

    The code of a method of its class counts, and that of a function that the method calls by its name.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARY):
        frame = frame.f_back
    if frame is None or not can_follow(module):
        return None
    inner, instruction = None, frame.f_lasti
    if frame.f_code.co_name in NESTED and sys.version_info >= (3, 11):  # before, no position tells where it stands
        inner, frame = frame.f_code, frame.f_back
        while frame is not None and inner not in frame.f_code.co_consts:
            frame = frame.f_back  # ``map``'s caller calls the lambda, or a function that was given it
        if frame is None:
            return None
    code, method, function = frame.f_code, frame.f_code, ""
    if not _is_method(module, code):
        if frame.f_back is None or not _is_method(module, method := frame.f_back.f_code):
            return None
        called = frame.f_back.f_globals.get(code.co_name)
        function = code.co_name
        if not isinstance(called, FunctionType) or called.__code__.co_firstlineno != code.co_firstlineno:
            return None
    return SourceCall(method.co_name, function, code, instruction, method if function else None, inner)


def _is_method(module: nn.Module, code: CodeType) -> bool:
    """Whether its class has a plain method of this code; not of a function that became one."""
    found = inspect.getattr_static(type(module), code.co_name, None)
    return isinstance(found, FunctionType) and found.__code__ is code and hasattr(own_class(module), code.co_name)


@functools.cache
def _passed(caller: CodeType, function: str, code: CodeType, name: str) -> str:
    """The attribute that a method gives a function for one of its parameters, which the function leaves as it is."""
    called, tree = definition(code), definition(caller)
    if called is None or tree is None or name not in (parameters := [one.arg for one in called.args.args]):
        return ""
    names = [node for node in ast.walk(called) if isinstance(node, ast.Name) and node.id == name]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == function]
    given = {ast.unparse(value) for call in calls for value in [_given(call, parameters.index(name), name)] if value}
    owner, _, attribute = given.pop().partition(".") if len(given) == 1 else ("", "", "")
    stored = any(isinstance(node.ctx, ast.Store) for node in names)
    return attribute if owner == "self" and attribute.isidentifier() and not stored else ""


def _given(call: ast.Call, position: int, name: str) -> ast.expr | None:
    named = next((one.value for one in call.keywords if one.arg == name), None)
    plain = not _starred(call.args) and position < len(call.args)
    return named or (call.args[position] if plain else None)


@functools.cache
def _arguments(code: CodeType, instruction: int, inner: CodeType | None) -> tuple[tuple[int | None, ast.expr], ...]:
    """The sizes that the call at this instruction passes, as (position, expression); negative: counted from the end.

    Of ``x.reshape(b, n, c)`` three; none of a call that is not one of `CALLS`, of ``reshape(*shape)`` neither.
    """
    call = _call_at(code, instruction, inner)
    if call is None or not isinstance(call.func, ast.Attribute) or call.func.attr not in CALLS:
        return ()
    values = list(call.args)
    if isinstance(call.func.value, ast.Name) and call.func.value.id == "torch":
        values = values[1:]  # torch.reshape(x, sizes)
    if not values:
        values = [one.value for one in call.keywords if one.arg in ("shape", "size", "split_size_or_sections")]
    if call.func.attr.startswith("split"):
        values = values[:1]  # then comes the dimension
    tree = definition(code)
    assert tree is not None
    return tuple(_sizes(values, tree))


def _sizes(values: list[ast.expr], function: ast.FunctionDef) -> list[tuple[int | None, ast.expr]]:
    if len(values) == 1:
        given = values[0].value if isinstance(values[0], ast.Starred) else values[0]
        one = _assigned(given, function)
        if isinstance(one, (ast.Tuple, ast.List)):
            return _sizes(one.elts, function) if len(one.elts) != 1 else [(0, one.elts[0])]
        if isinstance(one, ast.BinOp) and isinstance(one.op, ast.Add) and isinstance(one.right, (ast.Tuple, ast.List)):
            items = one.right.elts
            return [(k - len(items), item) for k, item in enumerate(items)] if not _starred(items) else []
        return [] if given is not values[0] else [(None, given)]
    if not _starred(values):
        return list(enumerate(values))
    starred = [k for k, value in enumerate(values) if isinstance(value, ast.Starred)]
    before: list[tuple[int | None, ast.expr]] = [(k, value) for k, value in enumerate(values) if k < starred[0]]
    return [*before, *((k - len(values), value) for k, value in enumerate(values) if k > starred[-1])]


def _starred(values: list[ast.expr]) -> bool:
    return any(isinstance(value, ast.Starred) for value in values)


def _assigned(value: ast.expr, function: ast.FunctionDef) -> ast.expr:
    """What a name was given, if it is given something once."""
    if not isinstance(value, ast.Name):
        return value
    stored = [
        node for node in ast.walk(function)
        if isinstance(node, ast.Name) and node.id == value.id and isinstance(node.ctx, ast.Store)
    ]  # fmt: skip
    given = [
        node.value for node in ast.walk(function)
        if isinstance(node, ast.Assign) and len(node.targets) == 1
        and isinstance(node.targets[0], ast.Name) and node.targets[0].id == value.id
    ]  # fmt: skip
    return given[0] if len(given) == len(stored) == 1 else value


def _call_at(code: CodeType, instruction: int, inner: CodeType | None) -> ast.Call | None:
    """The call in the source that this instruction, of the code or of one that stands in it, makes."""
    tree = definition(code)
    if tree is None:
        return None
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    if sys.version_info >= (3, 11):  # the closing bracket is the call's own; where it starts is told in two ways
        _, line, _, column = next(itertools.islice((inner or code).co_positions(), instruction // 2, None))
        found = [node for node in calls if (node.end_lineno, node.end_col_offset) == (line, column)]
    else:
        found = calls_by_line(code, tree, instruction)
        if len(found) > 1:
            found = [node for node in found if isinstance(node.func, ast.Attribute) and node.func.attr in CALLS]
    return found[0] if len(found) == 1 else None
