r"""The filter language: SQL-like conditions on the fields of passages, which are checked and then written out again.

User input never reaches the database. It is split into tokens of a few allowed kinds, sqlglot parses them into a tree,
the tree is checked against the index's fields, and parameterised SQL for SQLite is generated from it:

    year >= 2020 AND (language = 'de' OR language IS NULL) AND title NOT LIKE '%draft%'

Comparisons (``= == != <> < <= > >=``) of a field with a value, ``[NOT] IN (...)``, ``[NOT] BETWEEN ... AND ...``,
``[NOT] LIKE`` (``%`` any text, ``_`` one character, ``\`` escapes one of them or itself),
``IS [NOT] NULL``, ``IS [NOT] TRUE`` and ``FALSE``, a boolean field alone, ``AND``, ``OR``, ``NOT`` and parentheses.
Text is in single quotes, with quotes inside it doubled. Times are text too, in ISO 8601.

Nulls are handled as in SQL: a comparison with an empty field is neither true nor false, and neither is its negation;
only passages for which the filter is true are returned.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from difflib import get_close_matches
from typing import cast

from sqlglot import Expr, ParseError, Parser, Token, TokenError, Tokenizer, TokenType, exp

from d2llm.core.errors import FilterError
from d2llm.store.schema import FILTER_WORDS, FieldType, MetadataSchema, microseconds_of, parse_timestamp

MAX_LENGTH = 50_000
"""Maximum characters of a filter: enough for a thousand long ids, and parsed within a second."""

MAX_DEPTH = 16
"""Maximum nesting of parentheses, plus the consecutive NOTs before the innermost.

sqlglot parses them recursively.
"""

MAX_COMPARISONS = 1_000
MAX_VALUES = 10_000
"""Maximum values of all IN lists together."""

MAX_PATTERN = 1_000
"""Maximum characters of a LIKE pattern."""

_PASSAGE_FIELDS: dict[str, FieldType] = {
    "id": "string",
    "title": "string",
    "document_id": "string",
    "position": "integer",
}

_SIGNS = {
    TokenType.EQ,
    TokenType.NEQ,
    TokenType.LT,
    TokenType.LTE,
    TokenType.GT,
    TokenType.GTE,
    TokenType.L_PAREN,
    TokenType.R_PAREN,
    TokenType.COMMA,
    TokenType.DASH,
    TokenType.NUMBER,
    TokenType.STRING,
    TokenType.IDENTIFIER,
}

_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?")
_PATTERN = re.compile(r"(?:[^\\]|\\[\\%_])*", re.DOTALL)

# Operator, its negation, and the operator for swapped operands.
_OPERATORS: dict[type[Expr], tuple[str, str, str]] = {
    exp.EQ: ("=", "<>", "="),
    exp.NEQ: ("<>", "=", "<>"),
    exp.LT: ("<", ">=", ">"),
    exp.LTE: ("<=", ">", ">="),
    exp.GT: (">", "<=", "<"),
    exp.GTE: (">=", "<", "<="),
}
_NEGATED = {operator: negated for operator, negated, _ in _OPERATORS.values()}

_HINTS: dict[FieldType, str] = {
    "string": "write text in single quotes, as 'text'",
    "integer": "write a whole number of 64 bits without quotes",
    "number": "write a number without quotes",
    "boolean": "write TRUE or FALSE",
    "timestamp": "write a time in single quotes, as '2024-05-31' or '2024-05-31T12:30:00Z'",
}


@dataclass(frozen=True, slots=True)
class Filter:
    """A checked filter: ``text`` as the user wrote it, ``sql`` with ``values`` of its parameters, and ``fields``."""

    text: str
    sql: str
    values: Mapping[str, str | int | float]
    fields: frozenset[str]


def parse_filter(text: str, schema: MetadataSchema) -> Filter:
    """Check a filter and translate it into SQL for SQLite.

    It may name the metadata fields of ``schema``, and ``id``, ``title``, ``document_id`` and ``position``.

    Raises:
        FilterError: the filter cannot be parsed, is too long or nested too deeply, names an unknown field, or compares
            a field with a value of another type.
    """
    writer = _Writer(text, {**_PASSAGE_FIELDS, **schema.fields})
    try:
        tree = _parse(text, _read_tokens(text))
        sql, depth = writer.condition(tree, negated=False)
    except RecursionError:  # the caller may have used up most of the stack
        depth = math.inf
        sql = ""
    if depth > 2 * MAX_DEPTH:
        raise FilterError(f"filter {_short(text)}: it is nested too deeply; use fewer parentheses")
    return Filter(text, sql, writer.values, frozenset(writer.used))


def _read_tokens(text: str) -> list[Token]:
    """The tokens of a filter, all of allowed kinds; words that are not keywords become quoted identifiers."""
    if len(text) > MAX_LENGTH:
        raise FilterError(f"a filter has at most {MAX_LENGTH} characters, this one has {len(text)}; split it")
    try:
        text.encode()
        tokens = Tokenizer().tokenize(text)
    except UnicodeEncodeError as error:
        raise _located(text, error.start, error.end, "half of a surrogate pair is not valid text; remove it") from None
    except TokenError:
        raise FilterError(f"filter {_short(text)}: a quote is opened but not closed") from None
    if not tokens:
        raise FilterError("the filter is empty; leave it out to find everything")
    checked = [
        _check_token(text, token, following) for token, following in zip(tokens, [*tokens[1:], None], strict=True)
    ]
    _check_depth(text, checked)
    return checked


def _check_token(text: str, token: Token, following: Token | None) -> Token:
    kind, start, end = token.token_type, token.start, token.end + 1
    if token.comments:
        raise FilterError(f"filter {_short(text)}: a filter has no comments; leave out -- and /* */")
    if kind in _SIGNS:
        if kind is TokenType.DASH and (following is None or following.token_type is not TokenType.NUMBER):
            raise _located(text, start, end, "a minus sign is allowed only before a number")
        if kind is not TokenType.IDENTIFIER:
            return token
    elif token.text.upper() in FILTER_WORDS:
        return token
    elif not _WORD.fullmatch(token.text):
        raise _located(text, start, end, "this character is not allowed in a filter; put text in single quotes")
    if following is not None and following.token_type is TokenType.L_PAREN:
        raise _located(text, start, end, "a filter has no functions; compare a field with a value")
    return Token(TokenType.IDENTIFIER, token.text, token.line, token.col, token.start, token.end)


def _check_depth(text: str, tokens: Sequence[Token]) -> None:
    num_parentheses = num_nots = 0
    for token in tokens:
        num_parentheses += (token.token_type is TokenType.L_PAREN) - (token.token_type is TokenType.R_PAREN)
        num_nots = num_nots + 1 if token.token_type is TokenType.NOT else 0
        if num_parentheses + num_nots > MAX_DEPTH:
            problem = f"more than {MAX_DEPTH} nested parentheses and NOTs; use fewer"
            raise _located(text, token.start, token.end + 1, problem)


def _parse(text: str, tokens: list[Token]) -> Expr:
    try:
        trees = Parser().parse_into(exp.Condition, tokens, text)
    except ParseError as error:
        where = error.errors[0] if error.errors else {}
        near = where.get("highlight") or text
        raise FilterError(
            f"filter, at {_short(near)}: this cannot be read; write conditions such as year >= 2020, "
            "joined by AND and OR, with text in single quotes"
        ) from None
    if len(trees) != 1 or trees[0] is None:
        raise FilterError(f"filter {_short(text)}: it must be a single condition")
    return trees[0]


class _Writer:
    """Writes the SQL of one filter and records the fields it uses."""

    def __init__(self, text: str, columns: Mapping[str, FieldType]) -> None:
        self.text = text
        self.columns = columns
        self.used: set[str] = set()
        self.values: dict[str, str | int | float] = {}
        self.num_comparisons = 0
        self.num_values = 0
        self.writers: dict[type[Expr], Callable[[Expr, bool], str]] = {
            exp.Column: self.truth,
            exp.In: self.membership,
            exp.Between: self.between,
            exp.Like: self.like,
            exp.Is: self.state,
            **dict.fromkeys(_OPERATORS, self.comparison),
        }

    def condition(self, node: Expr, negated: bool) -> tuple[str, int]:
        """SQL of a condition or of its negation, and its nesting depth.

        Negations are pushed down to the comparisons (De Morgan's laws hold for nulls too), so none is left outside.
        """
        if type(node) is exp.Paren:
            return self.condition(node.this, negated)
        if type(node) is exp.Not:
            return self.condition(node.this, not negated)
        if isinstance(node, (exp.And, exp.Or)):
            conditions = [self.condition(part, negated) for part in node.flatten()]
            return _join(conditions, "AND" if isinstance(node, exp.And) != negated else "OR")
        writer = self.writers.get(type(node))
        if writer is None:
            raise self.error(node, "this is not a condition; compare a field with a value, as in year >= 2020")
        self.num_comparisons += 1
        if self.num_comparisons > MAX_COMPARISONS:
            raise self.error(node, f"a filter has at most {MAX_COMPARISONS} comparisons; use IN (...) for many values")
        return writer(node, negated != bool(node.args.get("negate"))), 0

    def truth(self, node: Expr, negated: bool) -> str:
        """A boolean field alone."""
        return f"{self.field(node, node, 'boolean')} = {'FALSE' if negated else 'TRUE'}"

    def comparison(self, node: Expr, negated: bool) -> str:
        """A field and a value, on either side."""
        self.only(node, "this", "expression")
        left, right = node.this, node.expression
        operator, _, exchanged = _OPERATORS[type(node)]
        if type(left) is not exp.Column:
            left, right, operator = right, left, exchanged
        operator = _NEGATED[operator] if negated else operator
        column = self.field(node, left)
        if operator not in ("=", "<>") and self.kind(left) == "boolean":
            raise self.error(node, f"field '{left.name}' is boolean and has no order; use = or <>")
        return f"{column} {operator} {self.value(node, left.name, right)}"

    def membership(self, node: Expr, negated: bool) -> str:
        """A field in a list of values."""
        self.only(node, "this", "expressions")
        column, values = self.field(node, node.this), node.expressions
        if not values:
            raise self.error(node, "the list after IN is empty; give it a value")
        self.num_values += len(values)
        if self.num_values > MAX_VALUES:
            raise self.error(node, f"a filter has at most {MAX_VALUES} values in IN lists; split it")
        written = ", ".join(self.value(node, node.this.name, value) for value in values)
        return f"{column} {'NOT IN' if negated else 'IN'} ({written})"

    def between(self, node: Expr, negated: bool) -> str:
        """A field between two values, both included."""
        self.only(node, "this", "low", "high")
        column = self.field(node, node.this)
        if self.kind(node.this) == "boolean":
            raise self.error(node, f"field '{node.this.name}' is boolean and has no order; use = or <>")
        low, high = (self.value(node, node.this.name, node.args[end]) for end in ("low", "high"))
        return f"{column} {'NOT BETWEEN' if negated else 'BETWEEN'} {low} AND {high}"

    def like(self, node: Expr, negated: bool) -> str:
        """A text field that matches a pattern."""
        self.only(node, "this", "expression")
        column, pattern = self.field(node, node.this, "string"), node.expression
        written = self.value(node, node.this.name, pattern)
        if not _PATTERN.fullmatch(pattern.name):
            raise self.error(
                node, r"in a pattern a backslash is allowed only before %, _ or a backslash; write \\ for a backslash"
            )
        if len(pattern.name) > MAX_PATTERN:
            raise self.error(node, f"a pattern has at most {MAX_PATTERN} characters; shorten it")
        return f"{column} {'NOT LIKE' if negated else 'LIKE'} {written} ESCAPE '\\'"

    def state(self, node: Expr, negated: bool) -> str:
        """A field that is null, or a boolean field that is true or false."""
        self.only(node, "this", "expression")
        if type(node.expression) is exp.Null:
            return f"{self.field(node, node.this)} IS {'NOT ' if negated else ''}NULL"
        if type(node.expression) is not exp.Boolean:
            raise self.error(node, "after IS comes NULL, NOT NULL, TRUE or FALSE")
        column = self.field(node, node.this, "boolean")
        return f"{column} IS {'NOT ' if negated else ''}{'TRUE' if node.expression.this else 'FALSE'}"

    def only(self, node: Expr, *names: str) -> None:
        """Check that the node has no parts that its writer ignores."""
        if any(value for name, value in node.args.items() if name not in (*names, "negate")):
            raise self.error(node, "this form of a comparison is not part of a filter")

    def kind(self, column: Expr) -> FieldType:
        return self.columns[column.name]

    def field(self, node: Expr, column: object, expected: FieldType | None = None) -> str:
        """The quoted name of the field that ``column`` refers to."""
        if type(column) is not exp.Column or type(column.this) is not exp.Identifier:
            raise self.error(node, "one side must be the name of a field")
        self.only(column, "this")
        name = column.name
        if name not in self.columns:
            raise self.error(
                column,
                f"there is no field {_short(name)};{self.nearest(name)} the fields are "
                f"{', '.join(sorted(self.columns))}; put text in single quotes",
            )
        if expected is not None and self.columns[name] != expected:
            raise self.error(node, f"field '{name}' is {self.columns[name]}, but a {expected} is needed here")
        self.used.add(name)
        return f"`{name}`"

    def nearest(self, name: str) -> str:
        lower = {known.lower(): known for known in self.columns}
        matches = get_close_matches(name.lower()[:100], lower, n=1)
        return f" did you mean '{lower[matches[0]]}'?" if matches else ""

    def value(self, node: Expr, name: str, value: object) -> str:
        """SQL of a value that is compared with the field ``name``."""
        if type(value) is exp.Null:
            raise self.error(node, f"nothing equals NULL; write {name} IS NULL or {name} IS NOT NULL")
        if type(value) not in (exp.Literal, exp.Neg, exp.Boolean):
            raise self.error(
                node, f"{name} must be compared with one value: a number, TRUE, FALSE, or text in single quotes"
            )
        kind = self.columns[name]
        written = _write(kind, value, 32 if name == "position" else 64)
        if written is None:
            problem = f"field '{name}' is {kind}, and {self.piece(value)} does not fit; {_HINTS[kind]}"
            raise self.error(node, problem)
        mark = f"p{len(self.values)}"
        self.values[mark] = written
        return f":{mark}"

    def span(self, node: object) -> tuple[int, int]:
        nodes = node.walk() if isinstance(node, Expr) else ()
        spans = [cast("dict[str, int]", part.meta) for part in nodes if "start" in part.meta]
        if not spans:
            return 0, len(self.text)
        return min(one["start"] for one in spans), max(one["end"] for one in spans) + 1

    def piece(self, node: object) -> str:
        start, end = self.span(node)
        return _short(self.text[start:end])

    def error(self, node: Expr, problem: str) -> FilterError:
        return _located(self.text, *self.span(node), problem)


def _write(kind: FieldType, value: object, bits: int) -> str | int | float | None:
    """A value for a field of this type, as the table stores it; None if it does not fit."""
    if type(value) is exp.Boolean:
        return int(value.this) if kind == "boolean" else None
    negative = type(value) is exp.Neg
    literal = value.this if negative else value
    if type(literal) is not exp.Literal or kind == "boolean":
        return None
    text = str(literal.this)
    if literal.is_string:
        return None if negative else _write_text(kind, text)
    if not _NUMBER.fullmatch(text):
        return None
    return _write_number(kind, f"-{text}" if negative else text, bits)


def _write_text(kind: FieldType, text: str) -> str | int | None:
    if kind == "string":
        return text
    if kind == "timestamp":
        try:
            return microseconds_of(parse_timestamp(text))
        except ValueError:
            return None
    return None


def _write_number(kind: FieldType, text: str, bits: int) -> int | float | None:
    if kind == "number":
        value = float(text)
        return value if math.isfinite(value) else None
    if kind != "integer":
        return None
    try:
        exact = Decimal(text)
    except ArithmeticError:  # the exponent is out of range
        return None
    if exact.adjusted() > 19 or exact != exact.to_integral_value():
        return None
    integer = int(exact)
    limit = 2 ** (bits - 1)
    return integer if -limit <= integer < limit else None


def _join(conditions: Sequence[tuple[str, int]], word: str) -> tuple[str, int]:
    """Conditions joined by AND or OR as a balanced tree: SQLite's parser allows a depth of 1,000."""
    if len(conditions) == 1:
        return conditions[0]
    half = len(conditions) // 2
    (left, left_depth), (right, right_depth) = _join(conditions[:half], word), _join(conditions[half:], word)
    return f"({left} {word} {right})", max(left_depth, right_depth) + 1


def _short(text: str) -> str:
    """A piece of a filter for a message: quoted, with invisible characters escaped, and shortened."""
    text = repr(text)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _located(text: str, start: int, end: int, problem: str) -> FilterError:
    """An error about the piece ``text[start:end]``."""
    return FilterError(f"filter, character {start + 1}, {_short(text[start:end])}: {problem}")
