"""The tokens of a filter: only kinds that the filter language allows, and no more than can be parsed safely."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sqlglot import Token, TokenError, Tokenizer, TokenType

from d2llm.core.errors import FilterError
from d2llm.store.schema import FILTER_WORDS

MAX_LENGTH = 50_000
"""Maximum characters of a filter: enough for a thousand long ids, and parsed within a second."""

MAX_DEPTH = 16
"""Maximum nesting of parentheses, plus the consecutive NOTs before the innermost.

sqlglot parses them recursively; LanceDB accepted 40 and refused 60.
"""

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


def read_tokens(text: str) -> list[Token]:
    """The tokens of a filter, all of allowed kinds; words that are not keywords become quoted identifiers."""
    if len(text) > MAX_LENGTH:
        raise FilterError(f"a filter has at most {MAX_LENGTH} characters, this one has {len(text)}; split it")
    try:
        text.encode()
        tokens = Tokenizer().tokenize(text)
    except UnicodeEncodeError as error:
        raise located(text, error.start, error.end, "half of a surrogate pair is not valid text; remove it") from None
    except TokenError:
        raise FilterError(f"filter {short(text)}: a quote is opened but not closed") from None
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
        raise FilterError(f"filter {short(text)}: a filter has no comments; leave out -- and /* */")
    if kind in _SIGNS:
        if kind is TokenType.DASH and (following is None or following.token_type is not TokenType.NUMBER):
            raise located(text, start, end, "a minus sign is allowed only before a number")
        if kind is not TokenType.IDENTIFIER:
            return token
    elif token.text.upper() in FILTER_WORDS:
        return token
    elif not _WORD.fullmatch(token.text):
        raise located(text, start, end, "this character is not allowed in a filter; put text in single quotes")
    if following is not None and following.token_type is TokenType.L_PAREN:
        raise located(text, start, end, "a filter has no functions; compare a field with a value")
    return Token(TokenType.IDENTIFIER, token.text, token.line, token.col, token.start, token.end)


def _check_depth(text: str, tokens: Sequence[Token]) -> None:
    parentheses = nots = 0
    for token in tokens:
        parentheses += (token.token_type is TokenType.L_PAREN) - (token.token_type is TokenType.R_PAREN)
        nots = nots + 1 if token.token_type is TokenType.NOT else 0
        if parentheses + nots > MAX_DEPTH:
            problem = f"more than {MAX_DEPTH} nested parentheses and NOTs; use fewer"
            raise located(text, token.start, token.end + 1, problem)


def short(text: str) -> str:
    """A piece of a filter for a message: quoted, with invisible characters escaped, and shortened."""
    text = repr(text)
    return text if len(text) <= 80 else f"{text[:77]}..."


def located(text: str, start: int, end: int, problem: str) -> FilterError:
    """An error about the piece ``text[start:end]``."""
    return FilterError(f"filter, character {start + 1}, {short(text[start:end])}: {problem}")
