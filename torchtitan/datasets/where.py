"""A source's `where`: an expression over the fields of a record that says whether the record is one of the source's.

Comparisons (== != < <= > >= in, not in), and, or, not, parentheses; text in quotes, numbers, true, false, null, lists.
A name is a field, a.b a field of the object a, a["b c"] the same for names that are no word. A field that is missing is
null. Python's parser reads it, and only the nodes below are taken: nothing is ever called.
"""

from __future__ import annotations

import ast
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from numbers import Number
from typing import Any

from torchtitan.tools.errors import UserError

Value = Callable[[Mapping[str, Any]], Any]

ORDER: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
SIGNS = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
WORDS = {"true": True, "false": False, "null": None}
MISSING = object()
KINDS = {type(None): "null", bool: "true or false", str: "text", list: "a list", dict: "an object"}


class Where:
    """A parsed expression. fields: the names in it, as they are written ("meta.set"). UserError, which begins with
    `place`, if it cannot be parsed.

    It counts what it sees since the last `counts`: records, those that it leaves out, and those that lack a field.
    """

    def __init__(self, text: str, place: str) -> None:
        self.text, self._place = text.strip(), place
        self.fields: list[str] = []
        self._reset()
        try:
            tree = ast.parse(self.text.replace("\n", " "), mode="eval")
            self._value = self._read(tree.body)
        except SyntaxError as error:
            raise self._refusal(f"{error.msg} at character {error.offset or 1}") from error
        except (ValueError, RecursionError, MemoryError) as error:  # a null byte; thousands of parentheses
            raise self._refusal(f"it cannot be parsed ({type(error).__name__})") from error
        if not self.fields:
            raise self._refusal("it names no field of the records")

    def keeps(self, record: Mapping[str, Any]) -> bool:
        """Whether the record is one of the source's. ValueError if its values cannot be compared so."""
        self._records += 1
        self._lacking.update(name for name in self.fields if look_up(record, name) is None)
        try:
            kept = self._truth(self._value(record), self.text)
        except ValueError as error:
            raise ValueError(f"where = {self.text!r}: {error}") from error
        self._left_out += not kept
        return kept

    def counts(self) -> dict[str, Any]:
        """For the counts of a unit, since the last call: records, left_out by reason, and how many lack each field."""
        counts = {"records": self._records, "left_out": {"where": self._left_out}, "lacking": dict(self._lacking)}
        self._reset()
        return counts

    def _reset(self) -> None:
        self._records = self._left_out = 0
        self._lacking: Counter[str] = Counter()

    def _refusal(self, why: str) -> UserError:
        return UserError(
            f"{self._place}: where = {self.text!r} is not an expression over the fields of a record: {why}. Write "
            "comparisons (== != < <= > >= in, not in) joined by and, or, not, such as meta.source == 'books' and "
            "score >= 0.65."
        )

    def _read(self, node: ast.expr) -> Value:
        if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, (bool, int, float, str))):
            value = node.value
            return lambda record: value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
            number = node.operand.value
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                return lambda record: -number
        if isinstance(node, ast.Name) and node.id in WORDS:
            word = WORDS[node.id]
            return lambda record: word
        if name := _field(node):
            if name not in self.fields:
                self.fields.append(name)
            return lambda record: look_up(record, name)
        if isinstance(node, (ast.List, ast.Tuple)):
            items = [self._read(item) for item in node.elts]
            return lambda record: [item(record) for item in items]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            negated, spelled = self._read(node.operand), ast.unparse(node.operand)
            return lambda record: not self._truth(negated(record), spelled)
        if isinstance(node, ast.BoolOp):
            parts = [(self._read(part), ast.unparse(part)) for part in node.values]
            join = all if isinstance(node.op, ast.And) else any
            return lambda record: join(self._truth(part(record), spelled) for part, spelled in parts)
        if isinstance(node, ast.Compare) and not any(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
            values = [self._read(part) for part in (node.left, *node.comparators)]
            names = [ast.unparse(part) for part in (node.left, *node.comparators)]
            steps = list(zip(node.ops, values, values[1:], names, names[1:]))
            return lambda record: all(_compare(op, a(record), b(record), x, y) for op, a, b, x, y in steps)
        raise self._refusal(f"{ast.unparse(node)!r} is not allowed in it")

    def _truth(self, value: Any, spelled: str) -> bool:
        if isinstance(value, bool):
            return value
        raise ValueError(f"{spelled} is {kind(value)}, not true or false. Compare it, e.g. with == true or != null.")


def look_up(record: Mapping[str, Any], name: str, missing: Any = None) -> Any:
    """The field of a record, `missing` without it; "a.b" is the field of that name, or else b of the object a."""
    if name in record:
        return record[name]
    for end in (i for i, character in enumerate(name) if character == "."):
        inner = record.get(name[:end])
        if isinstance(inner, dict) and (value := look_up(inner, name[end + 1 :], MISSING)) is not MISSING:
            return value
    return missing


def kind(value: Any) -> str:
    """What a value of a record is, for comparing and for messages."""
    if isinstance(value, Number) and not isinstance(value, bool):
        return "a number"
    return KINDS.get(type(value), f"a {type(value).__name__}")


def _field(node: ast.expr) -> str:
    """The name of the field that a node is, "" if it is something else."""
    if isinstance(node, ast.Name):
        return node.id if node.id not in WORDS else ""
    if isinstance(node, ast.Attribute) and (outer := _field(node.value)):
        return f"{outer}.{node.attr}"
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
        return f"{outer}.{node.slice.value}" if (outer := _field(node.value)) else ""
    return ""


def _compare(op: ast.cmpop, a: Any, b: Any, a_name: str, b_name: str) -> bool:
    """a op b. ValueError if the two are not of one kind; null equals null alone and has no order."""
    if isinstance(op, (ast.In, ast.NotIn)):
        return _is_in(a, b, a_name, b_name) == isinstance(op, ast.In)
    sign = SIGNS[type(op)]
    if isinstance(op, (ast.Eq, ast.NotEq)) and (a is None or b is None):
        return (a is b) == isinstance(op, ast.Eq)
    if kind(a) != kind(b) or (type(op) in ORDER and kind(a) in ("null", "true or false", "a list", "an object")):
        null = next((name for name, value in ((a_name, a), (b_name, b)) if value is None), "")
        mend = f" Say what becomes of such records: {null} != null and ..., or {null} == null or ..." if null else ""
        raise ValueError(f"{a_name} is {kind(a)} and {b_name} is {kind(b)}: {sign} cannot compare them.{mend}")
    if isinstance(op, (ast.Eq, ast.NotEq)):
        return bool((a == b) == isinstance(op, ast.Eq))
    return bool(ORDER[type(op)](a, b))


def _is_in(a: Any, b: Any, a_name: str, b_name: str) -> bool:
    """Whether the list b has the item a, or the text b the part a."""
    if isinstance(a, str) and isinstance(b, str):
        return a in b
    if not isinstance(b, list):
        mend = f" Write {b_name} != null and ..." if b is None else ""
        raise ValueError(f"{b_name} is {kind(b)}: 'in' looks into lists and text.{mend}")
    if a is not None and b and all(kind(item) != kind(a) for item in b):
        raise ValueError(f"{a_name} is {kind(a)}, and {b_name} has none such, but {kind(b[0])}.")
    return any(kind(item) == kind(a) and item == a for item in b)
