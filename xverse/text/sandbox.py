"""UNTRUSTED TEMPLATE -> TEXT. Jinja with bounds: a template can waste a second, and nothing else.

Chat templates come with downloaded models. Jinja's immutable sandbox keeps them from Python's
insides; what is added here bounds time and memory. Values are measured where they are used, sizes
are computed before they are made, and loop turns, calls and characters are counted (`Spent`). For
that, the parsed template is changed: `~`, comparisons, slices and dictionary keys pass through
methods of `Bounded`.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import lru_cache, wraps
from typing import NoReturn, TypeVar, cast

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from xverse.text.bounds import (
    FILTER_LENGTHS,
    MAX_TEXT,
    METHOD_LENGTHS,
    check_arguments,
    check_product,
    check_writable,
    count_items,
    counting,
    listed,
    made,
    measure,
    small,
    spent,
)

Value = TypeVar("Value")

# fmt: off
FILTERS = (
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first",
    "float", "forceescape", "groupby", "indent", "int", "items", "join", "last", "length", "list",
    "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse", "round", "safe",
    "select", "selectattr", "sort", "string", "title", "tojson", "trim", "truncate", "unique",
    "upper", "wordcount",
)
TEXT_METHODS = frozenset({
    "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii",
    "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join",
    "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex",
    "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase",
    "title", "upper",
})
# fmt: on


class Bounded(ImmutableSandboxedEnvironment):
    """The environment that chat templates run in, with what Hugging Face's offers them."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=self.writable,
            extensions=[GenerationBlock, LoopControlExtension],
        )
        available = {**self.filters, "tojson": to_json}
        self.filters = {name: _counted(name, available[name]) for name in FILTERS}
        tests = cast("Mapping[str, Callable[..., object]]", self.tests)
        self.tests = {name: _counted(name, test) for name, test in tests.items()}
        self.globals = {
            "range": self.globals["range"],  # the sandbox's: at most 100,000 numbers
            "namespace": self.globals["namespace"],
            "dict": make_dict,
            "raise_exception": raise_exception,
            "strftime_now": lambda layout: datetime.now().strftime(layout),
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = Parser(self, source, name, filename).parse()
        changed = PassThrough().visit(tree)
        assert isinstance(changed, nodes.Template)
        return changed

    def tick(self) -> str:
        """One turn of a loop."""
        spent().step()
        return ""

    def bounded(self, value: Value) -> Value:
        """`value`, once it is known to be small enough to compare, hash or write."""
        measure(value)
        return value

    def sliced(self, value: Value) -> Value:
        """`value`, which a slice has made."""
        return made(value)

    def writable(self, value: object) -> object:
        """`value`, about to be written out."""
        check_writable(value)
        return value

    def concatenate(self, *values: object) -> str:
        """What `~` does."""
        return self.concat(str(self.writable(value)) for value in values)

    def concat(self, parts: Iterable[str]) -> str:
        """Join what a block, a macro or the whole template has written."""
        kept, length = [], 0
        for part in parts:
            kept.append(part)
            length += len(part)
            if length > MAX_TEXT:
                break
        spent().step(len(kept))
        spent().make(length)
        return "".join(kept)

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        """+ * ** % with the size of the result known beforehand."""
        spent().step()
        if operator == "%" and isinstance(left, str):
            raise SecurityError("formatting with % is not available")
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            spent().make(len(left) + len(right))
        elif operator == "+" and isinstance(left, list | tuple):
            count_items(len(left) + (len(right) if isinstance(right, list | tuple) else 0))
        elif operator == "*":
            check_product(left, right)
            check_product(right, left)
        elif operator == "**" and not (small(left, 1_000_000) and small(right, 64)):
            raise SecurityError("the power is too large")
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: object, argument: object) -> object:
        """obj[argument]; tuples nest without bound, and would be hashed here."""
        measure(argument)
        return super().getitem(obj, argument)

    def is_safe_attribute(self, obj: object, attr: str, value: object) -> bool:
        """Of a text, only the methods that make no more of it than it is."""
        if isinstance(obj, str) and attr not in TEXT_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: object) -> Callable[..., str] | None:
        """str.format is not available: widths in it would have to be bounded too."""
        return None

    def call(self, context: Context, obj: object, *args: object, **kwargs: object) -> object:
        """Call from a template, arguments and result bounded."""
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if owner is self:  # the methods above, which count by themselves
            return super().call(context, obj, *args, **kwargs)
        spent().step()
        args = tuple(listed(value) for value in args)
        check_arguments(args, kwargs, numbers=owner is not None)
        if isinstance(owner, str) and name in METHOD_LENGTHS:
            spent().make(METHOD_LENGTHS[name](owner, *args))
        return made(super().call(context, obj, *args, **kwargs))


class PassThrough(NodeTransformer):
    """Leads the operations that Jinja compiles to plain Python through methods of `Bounded`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """Count each turn."""
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_through("tick")))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """`~` makes texts."""
        self.generic_visit(node)
        return _through("concatenate", *node.nodes)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        """Comparing walks through all of both values."""
        self.generic_visit(node)
        node.expr = _through("bounded", node.expr)
        for operand in node.ops:
            operand.expr = _through("bounded", operand.expr)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        """A key is hashed."""
        self.generic_visit(node)
        node.key = _through("bounded", node.key)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        """A slice is a copy."""
        self.generic_visit(node)
        return _through("sliced", node) if isinstance(node.arg, nodes.Slice) else node


class GenerationBlock(Extension):
    """{% generation %} ... {% endgeneration %}: marks the answer for training; we write it only."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements inside, as they are."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: object) -> NoReturn:
    """What templates call to refuse a conversation."""
    raise TemplateError(f"{message}")


def make_dict(**items: object) -> dict[str, object]:
    """dict(a=1); from pairs it would hash keys of any depth."""
    return items


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as Hugging Face's templates have it: no HTML escapes, characters as they are."""
    if indent is not None and not small(indent, 8):
        raise SecurityError("the indent is too large")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _through(method: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), list(arguments), [], None, None)


def _counted(name: str, function: Callable[..., object]) -> Callable[..., object]:
    """A filter or test whose arguments and result are bounded."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # before it: the environment

    @wraps(function)
    def counted(*args: object, **kwargs: object) -> object:
        spent().step()
        args = (*args[:first], *(listed(value) for value in args[first:]))
        check_writable(args[first])
        check_arguments(args[first + 1 :], kwargs, numbers=True)
        if name in FILTER_LENGTHS:
            spent().make(FILTER_LENGTHS[name](*args[first:], **kwargs))
        return made(function(*args, **kwargs))

    return counted


ENVIRONMENT = Bounded()


@lru_cache(maxsize=16)
def compile_template(source: str) -> Template:
    """The template, ready to render; raises what Jinja raises for a bad one."""
    with counting():
        return ENVIRONMENT.from_string(source)


def render(source: str, variables: Mapping[str, object]) -> str:
    """The text that a template makes of `variables`.

    Raises SecurityError where it goes too far; what goes wrong in it may be any other exception.
    """
    template = compile_template(source)
    with counting():
        return template.render(variables)
