"""Kinds of one thing, such as losses, by name: those that ship, and those that other packages add.

A class that subclasses such a thing with ``kind="name"`` is known by that name. What ships is imported when it is
first named. An installed package adds its own by an entry point in the group of the registry, whose name is the kind
and whose value is ``module:Class``::

    [project.entry-points."d2llm.losses"]
    my_loss = "my_package.my_loss:MyLoss"
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

from d2llm.core.names import suggestion

T = TypeVar("T")
Need = Literal[
    "judgements",
    "labels",
    "features",
    "live_teacher",
    "texts",
    "translations",
    "mask_token",
    "another_backbone",
    "several_teachers",
    "writer",
    "endpoint",
    "gpu",
]
"""What a user must bring for a method: the data sets' own judgements, a teacher's labels, the teacher's features beside
them, a teacher that is there (in training, or in a search), texts without labels, texts with translations, a model
with a token for masked text, ..., a model behind an API, a GPU."""
_PACKAGE = Path(__file__).parents[1]


def modules_in(folder: str) -> dict[str, str]:
    """The modules of a folder of this package by their names, which are the kinds of what is in them."""
    names = sorted(path.stem for path in (_PACKAGE / folder).glob("*.py") if not path.stem.startswith("_"))
    return {name: ".".join((_PACKAGE.name, *folder.split("/"), name)) for name in names}


class Registry(Generic[T]):
    """Classes by kind.

    Args:
        what: what they are, for errors: "loss".
        shipped: kind -> the module that has its class.
        group: the group of entry points of other packages.
    """

    def __init__(self, what: str, shipped: Mapping[str, str], group: str) -> None:
        self.what, self.group = what, group
        self._shipped = dict(shipped)
        self._classes: dict[str, type[T]] = {}
        self._plugins: dict[str, EntryPoint] | None = None

    def add(self, kind: str, cls: type[T]) -> None:
        """Make a class known by its kind; one of the same kind that is defined again takes its place.

        Raises:
            ValueError: a class of another module has this kind.
        """
        known = self._classes.get(kind)
        owner = self._shipped.get(kind) if known is None else known.__module__
        if owner is not None and owner != cls.__module__:
            raise ValueError(f"{cls.__name__}: there is a {self.what} '{kind}' in {owner}; give it another kind")
        self._classes[kind] = cls

    def find(self, kind: str) -> type[T]:
        """The class of a kind; its module is imported if it has not been.

        Raises:
            ValueError: there is none (the closest name is suggested), or a package that should have it does not.
        """
        if kind not in self._classes:
            if kind in self._shipped:
                import_module(self._shipped[kind])
            elif kind in self._entry_points:
                self._load(kind, self._entry_points[kind])
            else:
                raise ValueError(f"no {self.what} '{kind}'; {suggestion(kind, self.kinds, 'there are')}")
        return self._classes[kind]

    @property
    def shipped(self) -> list[str]:
        """The kinds that ship, in their order."""
        return [*self._shipped]

    @property
    def kinds(self) -> list[str]:
        """The names of all kinds: those that ship first, in their order."""
        return list(dict.fromkeys([*self._shipped, *sorted(self._entry_points), *self._classes]))

    @property
    def _entry_points(self) -> dict[str, EntryPoint]:
        if self._plugins is None:
            self._plugins = {entry_point.name: entry_point for entry_point in entry_points(group=self.group)}
        return self._plugins

    def _load(self, kind: str, plugin: EntryPoint) -> None:
        package = plugin.dist.name if plugin.dist is not None else plugin.value
        try:
            cls = plugin.load()
        except Exception as error:
            raise ValueError(f"the {self.what} '{kind}' of {package} cannot be imported: {error}") from error
        if self._classes.get(kind) is not cls:
            raise ValueError(
                f"{package} has the entry point {self.group}: {kind} = {plugin.value}, which is no {self.what} of kind "
                f"'{kind}'"
            )


class Registered:
    """The base of things of which there are several kinds: a subclass with ``kind="name"`` is found by that name.

    ``d2llm methods`` and docs/recipes.md show what a kind says of itself here.
    """

    kinds: ClassVar[Registry[Any]]
    """All kinds; a class variable of the base of each thing."""
    kind: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    """Who published it, and where."""
    needs: ClassVar[frozenset[Need]] = frozenset()
    costs: ClassVar[str] = ""
    """What it takes besides: time, memory, what a model must have."""
    measured: ClassVar[str] = "not measured"
    """What it brought: the figure, the sets, the number of seeds, and a Markdown link, from docs, to where that is."""

    def __init_subclass__(cls, *, kind: str = "", **options: Any) -> None:
        super().__init_subclass__(**options)
        if kind:
            cls.kind = kind
            cls.kinds.add(kind, cls)
