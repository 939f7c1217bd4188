"""reStructuredText as readers of the built pages see it."""

from __future__ import annotations

import sys

import pytest

from d2llm.core.types import Section
from d2llm.data.html_pages import html_page
from d2llm.data.rst import role_text, rst_as_html


def sections(text: str) -> list[Section]:
    return html_page(rst_as_html(text))[1]


def text_of(text: str) -> str:
    return "\n\n".join(section.text for section in sections(text))


def test_headings():
    text = "=====\nTitle\n=====\nintro\n\nPart\n----\na\n\nSub\n~~~\nb\n\nOther\n-----\n::\n\n  ----\n"
    assert sections(text) == [
        Section("intro", ("Title",)),
        Section("a", ("Title", "Part")),
        Section("b", ("Title", "Part", "Sub")),
        Section("----", ("Title", "Other")),
    ]


def test_a_heading_with_nothing_below_it_is_text():
    text = "Deck\n====\nThanks\n------\nMore\n------\nLinks\n~~~~~~\nEnd\n====\n"
    assert [(section.text, section.headings) for section in sections(text)] == [
        ("Thanks", ("Deck", "Thanks")),
        ("Links", ("Deck", "More", "Links")),
        ("End", ("End",)),
    ]


@pytest.mark.parametrize(
    ("rst", "text"),
    [
        (":func:`print` and :py:meth:`~list.append`", "print and append"),
        (":ref:`the guide <guide>`, :doc:`/other`, :term:`word`", "the guide, /other, word"),
        (":class:`!Foo` :pep:`8` :rfc:`2119#section-2` :pep:`the style <8>`", "Foo PEP 8 RFC 2119 the style"),
        (":math:`a_b` :code:`x <y>` :kbd:`Ctrl+C` :menuselection:`A --> B`", "a_b x <y> Ctrl+C A --> B"),
        (":unknown:role:`text <target>` `default`", "text default"),
        (".. _target:\n\nText with ``inline *code*``, *em*, **strong**.", "Text with inline *code*, em, strong."),
        (
            "A `link <http://x>`_, a `named`_ one, `anonymous`__.\n\n.. _named: http://y\n__ http://z",
            "A link, a named one, anonymous.",
        ),
        ("|version| is new.\n\n.. |version| replace:: 3.2", "3.2 is new."),
        ("|today| stays.", "|today| stays."),
        ("Seen [1]_.\n\n.. [1] The note.", "Seen [1].\n\n[1]\n\nThe note."),
        (".. a comment\n   of lines\n\ntext", "text"),
        (".. toctree::\n   :maxdepth: 2\n\n   a\n   b\n\ntext", "text"),
        (".. note::\n   Mind *this*.", "Note\n\nMind this."),
        (".. admonition:: My title\n\n   body", "My title\n\nbody"),
        (
            ".. code-block:: python\n   :linenos:\n   :emphasize-lines: 2\n\n   def f():\n       return 1",
            "def f():\n    return 1",
        ),
        ("Thus::\n\n    a\n      b", "Thus:\n\na\n  b"),
        (".. image:: a.png\n   :alt: A fox\n   :loading: lazy", "A fox"),
        (".. figure:: a.png\n   :alt: A fox\n\n   The caption.", "A fox\n\nThe caption."),
        (".. versionadded:: 3.2\n   The thing.", "Added in version 3.2: The thing."),
        (".. seealso:: :mod:`os`", "See also\n\nos"),
        (".. deprecated:: 3.9", "Deprecated since version 3.9"),
        (".. automodule:: os.path\n   :members:", "os.path"),
        (".. currentmodule:: x\n.. highlight:: c\n.. index:: a; b\n.. include:: /etc/passwd\n\ntext", "text"),
        (".. raw:: html\n\n   <b>bold</b> text\n\n.. raw:: latex\n\n   \\x", "bold text"),
        (".. math::\n   :label: eq\n\n   a = b", "a = b"),
        (".. tabs::\n\n   .. tab:: First\n\n      inside", "First\n\ninside"),
        (".. unknown:: Title here\n   :option: x\n\n   kept", "Title here\n\nkept"),
        (":orphan:\n\n:Author: Ann\n\ntext", "Author:\nAnn\n\ntext"),
        ("term\n   meaning\n\n* a\n\n  * b\n* c\n\n3. x\n#. y", "term\nmeaning\n\n- a\n  - b\n- c\n\n3. x\n4. y"),
        ("=== ===\na   b\n=== ===\n1   2\n=== ===", "| a | b |\n| --- | --- |\n| 1 | 2 |"),
        (
            ".. list-table::\n   :header-rows: 1\n   :widths: 1 1\n\n   * - a\n     - b\n   * - 1\n     - 2",
            "| a | b |\n| --- | --- |\n| 1 | 2 |",
        ),
        ("+---+\n| broken\n+---+", "+---+\n| broken\n+---+"),
        (">>> 1 + 1\n2", ">>> 1 + 1\n2"),
        ("H\\ :sub:`2`\\ O", "H2O"),
        ("`unclosed and *this", "`unclosed and *this"),
    ],
)
def test_text(rst, text):
    assert text_of(rst) == text


def test_what_is_defined_is_a_section():
    text = (
        "Files\n=====\n\n.. function:: shutil.copy(src, dst)\n              shutil.copy2(src)\n\n"
        "   Copies.\n\n   ::\n\n     x\n\n"
        ".. py:class:: Foo(x)\n\n   Things.\n\n   .. method:: bar() -> int\n\n      Bars.\n\n"
        ".. c:function:: int run(int a)\n\n   Runs.\n"
        "\nAfter.\n"
    )
    found = {section.headings: section.text for section in sections(text)}
    assert found["Files", "shutil.copy()"] == "shutil.copy(src, dst)\nshutil.copy2(src)\nCopies.\n\nx"
    assert found["Files", "Foo()"] == "Foo(x)\nThings."
    assert found["Files", "Foo()", "bar()"] == "bar() -> int\nBars."
    assert found["Files", "run()"] == "int run(int a)\nRuns."


def test_what_docutils_fails_on_is_kept():
    nested = "".join("  " * depth + "* a\n\n" for depth in range(sys.getrecursionlimit()))
    assert text_of(nested).count("a") == sys.getrecursionlimit()


def test_docutils_is_left_as_it_was():
    from docutils.parsers.rst import directives, roles

    before = (directives.directive, roles.role)
    rst_as_html(":unknown:`x`\n\n.. unknown::\n\n   y")
    assert (directives.directive, roles.role) == before


@pytest.mark.parametrize(
    ("name", "text", "shown"),
    [
        ("ref", "a <b>", "a"),
        ("func", "~a.b.c()", "c()"),
        ("pep", "8", "PEP 8"),
        ("code", "a <b>", "a <b>"),
        ("x", "<b>", "<b>"),
    ],
)
def test_roles(name, text, shown):
    assert role_text(name, text) == shown
