"""The route that a path belongs to, by its template: what metrics and logs name, as paths hold what clients wrote."""

from __future__ import annotations

from collections.abc import Iterator
from re import Pattern

from fastapi import FastAPI
from starlette.routing import Mount, Route, compile_path
from starlette.types import Scope

UNMATCHED = "(none)"
"""Stands for the route of a request that has none."""


class RouteTable:
    """Templates of an application's routes, such as "/v1/passages/{id}"; they are read when the server starts.

    They are not taken from the request's scope, which has none when a middleware refused the request, and where the
    prefix of an included router is missing.
    """

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._table: list[tuple[str, Pattern[str]]] = []

    def prepare(self) -> None:
        """Read them; it takes a while, as FastAPI makes its schema for it, and keeps that."""
        self._table = [(template, compile_path(template)[0]) for template in _templates(self._app)]

    def find(self, scope: Scope) -> str:
        """The template of a request's route."""
        if not self._table:  # an application that was never started, as in a test
            self.prepare()
        for template, pattern in self._table:
            if pattern.match(scope["path"]):
                return template
        route = scope.get("route")  # in no schema, or with a parameter that has slashes
        return route.path_format if isinstance(route, Route) else UNMATCHED


def _templates(app: FastAPI) -> list[str]:
    """Those without parameters first: "/v1/passages/all" is not the passage "all"."""
    return sorted({*app.openapi()["paths"], *_plain_paths(app)}, key=lambda template: template.count("{"))


def _plain_paths(app: FastAPI) -> Iterator[str]:
    for route in app.routes:
        if isinstance(route, Mount):
            yield route.path + "/{path:path}"
        elif isinstance(route, Route):
            yield route.path
