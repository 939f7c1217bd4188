"""Markdown and its front matter, as readers of a site see them."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from pathlib import Path

import pytest

from d2llm.core.types import Section
from d2llm.data.documents import find_documents
from d2llm.data.file_contents import read_contents
from d2llm.data.html_pages import html_page
from d2llm.data.markdown import markdown_as_html, read_front_matter


def sections(text: str) -> list[Section]:
    return html_page(markdown_as_html(text))[1]


def text_of(text: str) -> str:
    return "\n\n".join(section.text for section in sections(text))


class TestHeadings:
    def test_what_looks_like_one_in_code_or_comments_is_none(self):
        text = (
            "intro\n\n```\n# no\n```\n<!-- # no\n\n# no -->\n\n~~~ sh\n# no\n~~~\n\n    # no\n\n"
            "- item\n  ```\n  # no\n  ```\n\n"
            "> ```\n> # no\n> ```\n\n# Title #\n\ntext\n\nSub *part*\n---\nmore\n"
            "### [Deep](x.md) `code`\nb\n## Two {#two}\nc"
        )
        found = sections(text)
        assert [section.headings for section in found] == [
            (),
            ("Title",),
            ("Title", "Sub part"),
            ("Title", "Sub part", "Deep code"),
            ("Title", "Two"),
        ]
        assert found[0].text.count("# no") == 5
        assert found[4].text == "c"

    @pytest.mark.parametrize(
        ("heading", "name"),
        [
            ("# The `max_size` of *a* __file__ ##", "The max_size of a file"),
            ("# my_function_name", "my_function_name"),
            ("# [The **guide**](guide.md)", "The guide"),
            ("# 1\\. Start", "1. Start"),
            ("## Timers[#](#timers)", "Timers"),
            ('## Timers [¶](#timers "Permanent link")', "Timers"),
            ("# C#", "C#"),
            ("## Use {: .note #use }", "Use"),
        ],
    )
    def test_are_plain_text(self, heading, name):
        assert sections(f"{heading}\n\ntext")[-1].headings[0] == name

    def test_a_rule_is_no_underline(self):
        assert sections("a\n\n---\n\nb\n\n| t |\n| --- |\n| x |\n\n---\n") == [
            Section("a\n\nb\n\n| t |\n| --- |\n| x |")
        ]


class TestText:
    @pytest.mark.parametrize(
        ("markdown", "text"),
        [
            (
                "A [link](http://x 'title') and ![a fox](f.png) and [ref][r].\n\n[r]: http://y",
                "A link and a fox and ref.",
            ),
            ("<https://x.org> and https://y.org", "https://x.org and https://y.org"),
            ("**bold** _it_ ~~out~~ `co*de`", "bold it out co*de"),
            ("line one\nline two  \nline three", "line one line two\nline three"),
            ("Note[^1] here.\n\n[^1]: The *note*.", "Note[1] here.\n\n1. The note."),
            (
                "See [[Page|the page]] and [[Other]], ![[Picture.png]] and [[1]](u).",
                "See the page and Other, Picture.png and [1].",
            ),
            ("{ref}`the guide <guide>`, {py:func}`~os.path.join` and `{x}` {y}", "the guide, join and {x} {y}"),
            ('{{< figure src="a.png" title="A fox" >}} {{% notice %}}mind{{% /notice %}}', "A fox mind"),
            ("{% highlight ruby %}\nputs 1\n{% endhighlight %} {{ name }}", "puts 1 {{ name }}"),
            ("> [!NOTE]\n> Careful.", "Note\nCareful."),
            ("> [!tip]- My title\n> text", "My title text"),
            ('!!! warning "Mind"\n    the *gap*', "Mind\n\nthe gap"),
            (":::tip My title\nbody **b**\n:::", "My title\n\nbody b"),
            ("::::{note}\n:class: x\nouter\n:::{tip}\ninner\n:::\n::::", "Note\n\nouter\n\nTip\n\ninner"),
            ("```{note} Mind *this*\n:class: x\n\ninner\n```", "Mind this\n\ninner"),
            ("```{code-block} python\n:linenos:\nx = 1\n```", "x = 1"),
            ("```{toctree}\na\nb\n```\nc", "c"),
            ("```{figure} a.png\n:alt: A fox\n\nThe caption.\n```", "A fox\n\nThe caption."),
            ("```{eval-rst}\n.. note:: See :func:`f`.\n```", "Note\n\nSee f."),
            ("```python title='a.py'\nif a < b:\n    x\n```", "if a < b:\n    x"),
            ("Term\n: meaning", "Term\nmeaning"),
            ("| a | b |\n|---|:-:|\n| `x\\|y` | 2 |", "| a | b |\n| --- | --- |\n| x|y | 2 |"),
            ("- a\n  1. b\n- [ ] c", "- a\n  1. b\n- [ ] c"),
            ("List<String> and <name> but <kbd>Ctrl</kbd>", "List<String> and <name> but Ctrl"),
            ("<Tabs><TabItem value='a'>in a tab</TabItem></Tabs> <Icon/>", "in a tab"),
            ("<details><summary>S</summary>\n\n**in**\n\n</details>", "S\n\nin"),
            ("costs $5 and $10, $x_1 + y_1$", "costs $5 and $10, x_1 + y_1"),
            ("a <!-- never closed\n\n# Head\n\nb", "a <!-- never closed\n\nb"),
            ("<!-- never closed\n\n# Head\n\nkept", "never closed # Head kept"),
        ],
    )
    def test_as_a_reader_sees_it(self, markdown, text):
        assert text_of(markdown) == text

    @pytest.mark.parametrize("mark", ["> ", "- ", "1. "])
    def test_deep_nesting_loses_nothing(self, mark):
        assert "deep" in text_of(mark * 3_000 + "deep")

    @pytest.mark.parametrize(
        "unit",
        [
            "[",
            "![",
            "*a ",
            "**a _b ",
            "`",
            "<",
            "&",
            "[a](",
            "{",
            "{%",
            "[[",
            "{a}`",
            "| a ",
            "\\",
            "$",
            "x ",
            "- a\n",
            "> a\n",
            "<!--",
            "#",
        ],
    )
    def test_time_is_linear(self, unit):
        def seconds(size: int) -> float:
            begin = time.process_time()
            markdown_as_html(unit * (size // len(unit)))
            return time.process_time() - begin

        seconds(100)
        assert seconds(16_000) < 3 * (4 * seconds(4_000)) + 1


_BOMB = "---\n" + "".join(f"c{n}: &c{n} [{', '.join([f'*c{n - 1}'] * 9) if n else 'x'}]\n" for n in range(30)) + "---\n"


class TestFrontMatter:
    @pytest.mark.parametrize(
        ("text", "title"),
        [
            ("---\ntitle: 'It''s here'\n---\n", "It's here"),
            ("---\ntitle: >\n  two\n  lines\n---\n", "two lines"),
            ("---\ntitle:\n  on the next line\n---\n", "on the next line"),
            ("---\n# a comment\ntitle: x # y\n---\n", "x"),
            ("---\ntitle: 1.10\n---\n", "1.10"),
            ("---\ntitle: No\n---\n", "No"),
            ("---\ntitle: Part: the first\n---\n", "Part: the first"),
            ('---\ntitle: "a \\"b\\" c"\n...\n', 'a "b" c'),
            ("+++\ntitle = 'T'\n+++\n", "T"),
            ('{"title": "J"}\n', "J"),
        ],
    )
    def test_titles(self, text, title):
        found = read_front_matter(text + "body")
        assert (found.title, (text + "body")[found.end :].strip()) == (title, "body")

    def test_fields(self):
        text = (
            "---\ntags: [a, b]\ndescription: |\n  one\n  two\ndate: 2024-05-01\n"
            "at: 2024-05-01T10:00:00+02:00\ndraft: true\n"
            "weight: 3\nratio: 1.5\nno: no\ntime: 12:30\nauthor: {name: Ann}\npeople:\n- name: A\n- name: B\n"
            "sidebar-position: 2\nempty:\nbig: 123456789012345678901\nbad: 2024-13-45\n---\n"
        )
        assert read_front_matter(text).fields == {
            "tags": "a, b",
            "description": "one\ntwo",
            "date": datetime(2024, 5, 1, tzinfo=timezone.utc),
            "at": datetime(2024, 5, 1, 8, tzinfo=timezone.utc),
            "draft": True,
            "weight": 3,
            "ratio": 1.5,
            "no": "no",
            "time": "12:30",
            "author_name": "Ann",
            "people_name": "A, B",
            "sidebar_position": 2,
            "big": "123456789012345678901",
            "bad": "2024-13-45",
        }

    @pytest.mark.parametrize(
        "text",
        [
            "---\nkept\n---\n",
            "---\n\nNote: x\n\n---\n",
            "---\nThis is very important: read it\n---\n",
            "---\na: !!python/object/apply:os.system [ls]\n---\n",
            "---\na: &a [*a]\n---\n",
            _BOMB,
            "---\na: " + "[" * 5_000 + "\n---\n",
            "---\n" + "".join(f"f{n}: 1\n" for n in range(200)) + "---\n",
            "---\na: " + "x" * 70_000 + "\n---\n",
            "+++\nnot toml\n+++\n",
            '{"a": 1} is text\n',
            "text\n---\na: b\n---\n",
            "---",
        ],
    )
    def test_what_is_none_stays_text(self, text):
        begin = time.process_time()
        assert read_front_matter(text).end == 0
        assert time.process_time() - begin < 5

    @pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
    def test_in_files(self, tmp_path: Path, ending):
        path = tmp_path / "a.md"
        path.write_bytes(
            ("\ufeff---\ntitle: T\ntags: x\npath: own\n---\n# Head\ntext\n").replace("\n", ending).encode()
        )
        (document,) = find_documents([path])
        assert (document.title, document.text) == ("T", "text")
        assert (document.metadata["tags"], document.metadata["own_path"], document.metadata["path"]) == (
            "x",
            "own",
            "a.md",
        )
        page = tmp_path / "a.html"
        page.write_text("---\ntitle: T\n---\n<p>x")
        assert read_contents(page).title == ""
        assert read_contents(page).sections == (Section("--- title: T ---\n\nx"),)
