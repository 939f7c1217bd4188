"""Answering a request from a middleware, before it reaches its route."""

from __future__ import annotations

from dataclasses import replace

from starlette.types import Receive, Scope, Send

from d2llm.server.errors import Problem, problem_response
from d2llm.server.facts import current_facts


async def answer_problem(scope: Scope, receive: Receive, send: Send, problem: Problem) -> None:
    """Send ``problem`` in the shape of the path's interface, with the request's id."""
    response = problem_response(scope["path"], replace(problem, request_id=current_facts().request_id))
    await response(scope, receive, send)
