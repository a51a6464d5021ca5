"""Conditions of ensemble steps: `when: "score > 0.5 and parameters.mode == 'full'"`.

Pure. An expression in Python's syntax, of which a small safe part is known: comparisons, `and`, `or`, `not`,
arithmetic, `in`, indices, and the functions any, all, max, min, sum, mean, len, abs, has, tensor. Names are
tensors of the ensemble; `parameters` are the request's. A comparison of a tensor with several elements needs
any() or all(). `has(x)` tells whether a tensor is there; a condition on one that is not is false.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from enginehouse.errors import InvalidArgument
from enginehouse.types import DataType, ParameterValue, Tensor

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda left, right: _plain(left) in right,
    ast.NotIn: lambda left, right: _plain(left) not in right,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "any": lambda value: bool(np.any(value)),
    "all": lambda value: bool(np.all(value)),
    "max": np.max,
    "min": np.min,
    "sum": np.sum,
    "mean": np.mean,
    "len": np.size,
    "abs": np.abs,
}


class _Missing(Exception):
    """A tensor that the expression needs is not there."""


class Condition:
    """One expression, parsed once. `tensor_names` are those that it reads."""

    def __init__(self, text: str) -> None:
        """Raises InvalidArgument if it is not an expression of the known kind."""
        self.text = text
        try:
            self._root = ast.parse(text.strip(), mode="eval").body
        except SyntaxError as error:
            raise InvalidArgument(f"condition '{text}': {error.msg} at column {error.offset}") from error
        self.tensor_names = frozenset(self._names(self._root))

    def holds(self, tensors: Mapping[str, Tensor | None], parameters: Mapping[str, ParameterValue]) -> bool:
        """Raises InvalidArgument if the values don't fit the expression."""
        try:
            return _truth(_Evaluation(tensors, parameters).value(self._root))
        except _Missing:
            return False
        except (TypeError, ValueError, IndexError, ArithmeticError) as error:
            raise InvalidArgument(f"condition '{self.text}': {error}") from error

    def _names(self, node: ast.expr) -> set[str]:
        """Tensors below the node. Raises InvalidArgument for what is not known."""
        match node:
            case ast.Constant() | ast.Attribute(value=ast.Name(id="parameters")) | ast.Name(id="parameters"):
                return set()
            case ast.Name(id=name):
                return {name}
            case ast.Call(func=ast.Name(id="tensor" | "has"), args=[ast.Constant(value=str(name))], keywords=[]):
                return {name}
            case ast.Call(func=ast.Name(id=function), args=[argument], keywords=[]) if function in {*_FUNCTIONS, "has"}:
                return self._names(argument)
            case ast.BoolOp(values=parts) | ast.Tuple(elts=parts) | ast.List(elts=parts):
                return set().union(*map(self._names, parts))
            case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
                return self._names(operand)
            case ast.BinOp(left=left, op=operation, right=right) if type(operation) in _ARITHMETIC:
                return self._names(left) | self._names(right)
            case ast.Compare(left=left, ops=operations, comparators=others) if all(
                type(one) in _COMPARE for one in operations
            ):
                return self._names(left).union(*map(self._names, others))
            case ast.Subscript(value=value, slice=index):
                return self._names(value) | self._names(index)
        raise InvalidArgument(f"condition '{self.text}': '{ast.unparse(node)}' is nothing that a condition may use")


class _Evaluation:
    """Values of nodes that `Condition` has checked."""

    def __init__(self, tensors: Mapping[str, Tensor | None], parameters: Mapping[str, ParameterValue]) -> None:
        self._tensors = tensors
        self._parameters = parameters

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Attribute(attr=key):
                return self._parameters.get(key)
            case ast.Name(id="parameters"):
                return dict(self._parameters)
            case ast.Name(id=name):
                return self._tensor(name)
            case ast.Call(func=ast.Name(id=function), args=[argument]):
                return self._call(function, argument)
            case ast.BoolOp(op=ast.And(), values=parts):
                return all(_truth(self.value(part)) for part in parts)
            case ast.BoolOp(values=parts):
                return any(_truth(self.value(part)) for part in parts)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not _truth(self.value(operand))
            case ast.UnaryOp(operand=operand):
                return -self.value(operand)
            case ast.BinOp(left=left, op=operation, right=right):
                return _ARITHMETIC[type(operation)](self.value(left), self.value(right))
            case ast.Compare(left=left, ops=operations, comparators=others):
                return self._compare(left, operations, others)
            case ast.Subscript(value=value, slice=index):
                return self._item(self.value(value), self.value(index))
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                return tuple(self.value(part) for part in parts)
        raise AssertionError(f"bug: {ast.dump(node)} was let through")

    def _tensor(self, name: str) -> Any:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise _Missing(name)
        array = tensor.numpy()
        if tensor.datatype is DataType.BYTES:
            texts = [element.decode(errors="replace") for element in array.reshape(-1).tolist()]
            array = np.array(texts, dtype=object).reshape(tensor.shape)
        elif tensor.datatype is DataType.BF16:
            array = (array.astype(np.uint32) << 16).view(np.float32)
        return array

    def _call(self, function: str, argument: ast.expr) -> Any:
        if function in ("tensor", "has"):
            name = str(argument.value) if isinstance(argument, ast.Constant) else getattr(argument, "id", "")
            return self._tensor(name) if function == "tensor" else self._tensors.get(name) is not None
        return _FUNCTIONS[function](self.value(argument))

    def _compare(self, left: ast.expr, operations: list[ast.cmpop], others: list[ast.expr]) -> Any:
        result: Any = True
        before = self.value(left)
        for operation, other in zip(operations, others, strict=True):
            after = self.value(other)
            found = _COMPARE[type(operation)](before, after)
            result = found if result is True else np.logical_and(result, found)
            before = after
        return result

    @staticmethod
    def _item(value: Any, index: Any) -> Any:
        return value.get(index) if isinstance(value, dict) else value[index]


def _truth(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        if value.size > 1:
            raise ValueError(f"it compares {value.size} values: use any() or all()")
        return bool(value.size and value.reshape(-1)[0])
    return bool(value)


def _plain(value: Any) -> Any:
    """The one element of a tensor."""
    if isinstance(value, np.ndarray):
        if value.size != 1:
            raise ValueError(f"it looks for {value.size} values at once")
        return value.reshape(-1)[0].item() if value.dtype != object else value.reshape(-1)[0]
    return value
