"""The Jinja sandbox of priming texts, which come from users, files and the Hub.

A template is checked when it is made: it may write, branch, loop, set variables, and call the filters and methods listed here.
While it runs, everything whose cost grows with its input is paid for in advance, from a budget that lasts about a second: the
compiled template holds filters of ours around loops, comparisons, slices and keys, and Jinja lets us in at calls, operators, filters, tests
and outputs. So whatever a template and a row hold, rendering ends soon and needs little memory.
"""

import datetime
import functools
import json
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sized, ValuesView
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.filters import do_round
from jinja2.meta import find_undeclared_variables
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer


__all__ = ["compile_template", "render_template", "template_variables"]

_MAX_LENGTH = 1_000_000  # characters of one rendered text: more is a mistake or an attack
_MAX_TEMPLATE = 50_000  # characters of a template that holds more than text
_WORK = 5_000_000  # characters that one rendering may go through
_STEP = 20  # a value, an operation, or a node in a loop costs as much as so many characters
_MAX_NUMBER = 10**15
_SCALARS = (str, int, float, datetime.date, datetime.time, datetime.timedelta, type(None))
_NODES = (
    *(
        nodes.Template,
        nodes.Output,
        nodes.TemplateData,
        nodes.If,
        nodes.For,
        nodes.Assign,
        nodes.With,
    ),
    *(nodes.Const, nodes.Name, nodes.NSRef, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, nodes.Keyword),
    *(nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Call, nodes.Filter, nodes.Test, nodes.CondExpr),
    *(nodes.BinExpr, nodes.UnaryExpr, nodes.Compare, nodes.Operand, nodes.Concat),
)
_FUNCTIONS = frozenset(["namespace", "range"])
# fmt: off
_METHODS = frozenset([
    "capitalize", "count", "endswith", "find", "get", "isdigit", "items", "join", "keys", "lower", "lstrip", "removeprefix",
    "removesuffix", "replace", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper", "values",
])
_LIST_FILTERS = frozenset([
    "dictsort", "items", "join", "list", "map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr",
    "sort", "unique",
])
_TEXT_FILTERS = frozenset([
    "abs", "capitalize", "float", "int", "lower", "replace", "round", "string", "title", "tojson", "trim",
    "truncate", "upper", "wordcount",
])
# These look at no more than a value's length or type
_FREE_FILTERS = frozenset(["count", "d", "default", "first", "last", "length"])
_FREE_TESTS = frozenset([
    "boolean", "defined", "false", "float", "integer", "iterable", "mapping", "none", "number", "sequence",
    "string", "true", "undefined",
])
# fmt: on
_FILTERS = _LIST_FILTERS | _TEXT_FILTERS | _FREE_FILTERS
_TESTS = frozenset(jinja2.Environment().tests) - {"callable", "escaped", "filter", "sameas", "test"}
_BUDGET = " budget"  # with a space, no template can name these
_WEIGH, _LOOP = " weigh", " loop"


class _Budget:
    """What one rendering may still do."""

    def __init__(self) -> None:
        self.left = _WORK

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise SecurityError(
                "it does more work than a priming text needs; use fewer and shorter loops, or prepare the text in a column of the data"
            )

    def go_through(self, value: Any) -> None:
        """Pay for reading all of a value; one that is shared by many others counts as often as it would be written."""
        waiting = [value]
        while waiting:
            item = waiting.pop()
            self.spend(_STEP)
            if isinstance(item, str):
                self.spend(len(item))
            elif isinstance(item, int):
                self.spend(item.bit_length() // 8)
            elif isinstance(item, range):
                self.spend(_STEP * len(item))
            elif isinstance(item, dict):
                waiting += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple):
                waiting += item
            elif not isinstance(item, (*_SCALARS, jinja2.Undefined)):
                raise SecurityError(f"it uses a {type(item).__name__} as a value")


def _budget(context: Context) -> _Budget:
    return context[_BUDGET]


@jinja2.pass_context
def _finalize(context: Context, value: Any) -> Any:
    if value is None:
        raise ValueError(
            "a value that it writes is None, with which data sets fill missing values; filter such rows out, or write {{ column or '' }}"
        )
    _budget(context).go_through(value)
    return value


@jinja2.pass_context
def _weigh(context: Context, value: Any) -> Any:
    _budget(context).go_through(value)
    return value


@jinja2.pass_context
def _loop(context: Context, value: Any, num_nodes: int) -> Any:
    if isinstance(value, Sized):
        _budget(context).spend(_STEP * len(value) * num_nodes)
    return value


def _whole(parts: Iterator[str]) -> str:
    """The parts as one text, which must not get too long."""
    text = ""
    for part in parts:
        text += part
        if len(text) > _MAX_LENGTH:
            raise SecurityError(f"it makes more than {_MAX_LENGTH} characters")
    return text


def _to_json(value: Any, indent: int | None = None) -> str:
    """As chat templates write it: not escaped for HTML."""
    if indent is not None and not 0 <= indent <= 8:
        raise SecurityError(f"`tojson` indents by {indent}; 0 to 8 are allowed")
    return _whole(json.JSONEncoder(ensure_ascii=False, indent=indent).iterencode(value))


def _round(value: Any, precision: int = 0, method: Any = "common") -> float:
    if not -20 <= precision <= 20:
        raise SecurityError(f"`round` has a precision of {precision}; -20 to 20 are allowed")
    return do_round(value, precision, method)


def _pay_for_call(budget: _Budget, name: str, value: Any, args: list[Any]) -> None:
    """What a filter, test or method does with its arguments: at the most once a character or element of the value."""
    budget.go_through(args)
    longest = max((len(argument) for argument in args if isinstance(argument, Sized)), default=0)
    if name == "replace" and args:
        text = str(value)
        times = text.count(str(args[0])) if longest else 0
    else:
        times = len(value) if isinstance(value, Sized) else 1
    budget.spend(times * (longest + (_STEP if name in _LIST_FILTERS else 0)))


def _paid(name: str, call: Callable, is_free: bool) -> Callable:
    @jinja2.pass_context
    def paid(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_free:
            _budget(context).go_through(value)
            _pay_for_call(_budget(context), name, value, [*args, *kwargs.values()])
        result = call(name, value, args, kwargs, context)
        return list(result) if isinstance(result, Iterator) else result

    return paid


class _Sandbox(ImmutableSandboxedEnvironment):
    """No Python internals, no changes to the row, and nothing that is not paid for."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

    def __init__(self) -> None:
        super().__init__(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=_finalize)
        original = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
        original.filters |= {"tojson": _to_json, "round": _round}
        self.filters = {name: _paid(name, original.call_filter, name in _FREE_FILTERS) for name in _FILTERS}
        self.tests = {name: _paid(name, original.call_test, name in _FREE_TESTS) for name in _TESTS}
        self.filters |= {_WEIGH: _weigh, _LOOP: _loop}
        self.globals = {name: value for name, value in self.globals.items() if name in _FUNCTIONS}

    def call_binop(self, context, operator, left, right):
        if operator == "**":
            raise SecurityError("the operator ** is not allowed")
        if all(isinstance(value, int | float) for value in (left, right)):
            if not all(abs(value) <= _MAX_NUMBER for value in (left, right)):
                raise SecurityError(f"the operator {operator} is allowed between numbers up to {_MAX_NUMBER} only")
        elif operator != "+":
            raise SecurityError(f"the operator {operator} is allowed between plain numbers only")
        _budget(context).go_through([left, right])
        return super().call_binop(context, operator, left, right)

    def call(self, context, function, /, *args, **kwargs):
        value = getattr(function, "__self__", None)
        if isinstance(value, str | list | dict):
            _budget(context).go_through(value)
        _pay_for_call(_budget(context), "", value, [*args, *kwargs.values()])
        result = super().call(context, function, *args, **kwargs)
        return list(result) if isinstance(result, KeysView | ValuesView | ItemsView) else result


class _Payments(NodeTransformer):
    """Puts our filters around what Jinja compiles to plain Python."""

    def _filter(self, node: Any, name: str, *args: nodes.Expr) -> nodes.Expr:
        return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        num_nodes = 1 + sum(1 for _ in node.find_all(nodes.Node))
        self.generic_visit(node)
        node.iter = self._filter(node.iter, _LOOP, nodes.Const(num_nodes))
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:  # noqa: N802
        self.generic_visit(node)
        node.expr = self._filter(node.expr, _WEIGH)
        for operand in node.ops:
            operand.expr = self._filter(operand.expr, _WEIGH)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = self._filter(node.node, _WEIGH)
        else:
            node.arg = self._filter(node.arg, _WEIGH)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Pair:  # noqa: N802
        self.generic_visit(node)
        node.key = self._filter(node.key, _WEIGH)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return self._filter(nodes.List(node.nodes, lineno=node.lineno), "join")


def _check_nodes(tree: nodes.Template) -> None:
    """Refuse what no priming text needs, with its line and what there is instead."""
    for node in tree.find_all(nodes.Node):
        what = ""
        if not isinstance(node, _NODES):
            what = f"`{type(node).__name__.lower()}` is not allowed; output, if, for, with and set (to a value) are"
        elif isinstance(node, nodes.For) and node.recursive:
            what = "recursive loops are not allowed"
        elif isinstance(node, nodes.Filter) and node.name not in _FILTERS:
            what = f"the filter {node.name!r} is not allowed; {', '.join(sorted(_FILTERS))} are"
        elif isinstance(node, nodes.Test) and node.name not in _TESTS:
            what = f"the test {node.name!r} is not allowed; {', '.join(sorted(_TESTS))} are"
        elif isinstance(node, nodes.Call):
            function = node.node
            known = isinstance(function, nodes.Name) and function.name in _FUNCTIONS
            if not known and not (isinstance(function, nodes.Getattr) and function.attr in _METHODS):
                what = (
                    f"a call of anything but the functions {', '.join(sorted(_FUNCTIONS))} and the methods "
                    f"{', '.join(sorted(_METHODS))} is not allowed"
                )
        if what:
            raise SecurityError(f"{what} (line {node.lineno})")


@functools.lru_cache(maxsize=64)
def compile_template(text: str) -> tuple[jinja2.Template, frozenset[str]]:
    """A template, and the names of its variables.

    Raises:
        jinja2.TemplateError: for what is not allowed (`SecurityError`), and for what is no template.
    """
    if len(text) > _MAX_TEMPLATE and ("{{" in text or "{%" in text):
        raise SecurityError(
            f"it has {len(text)} characters, and a template may have {_MAX_TEMPLATE}; put long texts into columns"
        )
    sandbox = _Sandbox()
    try:
        tree = sandbox.parse(text)
        _check_nodes(tree)
        variables = frozenset(find_undeclared_variables(tree)) - set(sandbox.globals)
        _Payments().visit(tree)
        tree.set_environment(sandbox)
        return sandbox.from_string(tree), variables
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # of the Python that it becomes
        raise SecurityError(
            f"it is nested too deeply, or holds too large a number ({type(error).__name__})"
        ) from error


def template_variables(text: str) -> frozenset[str]:
    return compile_template(text)[1]


def render_template(text: str, variables: Mapping[str, Any]) -> str:
    """What the template makes of the variables, which are not changed.

    Raises:
        jinja2.exceptions.SecurityError: where it takes too long, gets too long, or reaches for Python internals.
        Exception: whatever else goes wrong in it.
    """
    template, names = compile_template(text)
    used = {name: _plain(variables[name], name) for name in names if name in variables}
    return _whole(template.generate({**used, _BUDGET: _Budget()}))


def _plain(value: Any, name: str) -> Any:
    """A copy in which there are nothing but lists, dictionaries and scalars."""
    if isinstance(value, Mapping):
        return {_plain(key, name): _plain(item, name) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    if not isinstance(value, _SCALARS) or hasattr(value, "__html__"):
        raise TypeError(
            f"the column {name!r} holds a {type(value).__name__}, but a priming text can use texts, numbers, dates, lists and dictionaries "
            "only; convert the column"
        )
    return value
