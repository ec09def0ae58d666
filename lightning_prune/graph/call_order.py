"""Which call in the source an instruction makes, where Python tells its line but not its column: before 3.11.

The calls of one statement are compiled in the order in which they are made, so the n-th instruction is the n-th call.
"""

from __future__ import annotations

import ast
import dis
from collections.abc import Iterator
from types import CodeType

_CALLS = ("CALL_FUNCTION", "CALL_FUNCTION_KW", "CALL_FUNCTION_EX", "CALL_METHOD")
# Some of their calls are in other code, or are made in another order than they are written.
_OTHERWISE = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Dict, ast.Assert)


def calls_by_line(code: CodeType, tree: ast.FunctionDef, instruction: int) -> list[ast.Call]:
    """The call of a function's definition; where the order does not tell, all that are on the line."""
    line, lines = 0, {}
    starts = dict(dis.findlinestarts(code))
    for each in dis.get_instructions(code):
        line = starts.get(each.offset, line)
        if each.opname in _CALLS:
            lines[each.offset] = line
    if instruction not in lines:
        return []  # an operator
    line = lines[instruction]
    statement = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and _holds(node, line)][-1]  # innermost
    if not hasattr(statement, "body") and not any(isinstance(node, _OTHERWISE) for node in ast.walk(statement)):
        made = [offset for offset, line in lines.items() if _holds(statement, line)]
        written = list(_in_order(statement))
        if len(made) == len(written):
            return [written[made.index(instruction)]]
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _holds(node, line)]


def _holds(node: ast.stmt | ast.Call, line: int) -> bool:
    return node.lineno <= line <= (node.end_lineno or node.lineno)


def _in_order(node: ast.AST) -> Iterator[ast.Call]:
    """A call comes after those in its arguments; what is assigned before what it is assigned to."""
    parts = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.Assign):
        parts = [node.value, *node.targets]
    elif isinstance(node, ast.AnnAssign):
        parts = [node.value, node.target] if node.value else []
    for part in parts:
        yield from _in_order(part)
    if isinstance(node, ast.Call):
        yield node
