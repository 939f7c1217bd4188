"""Pages as their readers see them."""

from __future__ import annotations

import time
from html import escape

import pytest

from d2llm.core.types import Section
from d2llm.data.html_pages import html_page


def text_of(markup: str) -> str:
    return "\n\n".join(section.text for section in html_page(markup)[1])


class TestHead:
    @pytest.mark.parametrize(
        "head",
        [
            '<title>Stars</title><meta name="description" content="Of the\n\nsky\n---\n">',
            "<title>\n  Stars\n\n</title><script>var hidden = '<p>'</script><style>p {}</style>",
            '<meta name="keywords" content="a: b\n---"><title>Stars</title><link rel="x">',
        ],
    )
    def test_never_becomes_text(self, head):
        page = f"<html><head>{head}</head><body><p>Before.</p><hr><p>After.</p></body></html>"
        assert html_page(page) == ("Stars", [Section("Before.\n\nAfter.")])

    def test_a_rule_and_fields_are_text(self):
        assert text_of("<p>---</p><p>title: x</p><p>---</p><p>kept</p>") == "---\n\ntitle: x\n\n---\n\nkept"

    def test_the_title_of_a_drawing_is_not_the_page_s(self):
        assert html_page("<svg><title>Sun</title></svg><p>x")[0] == ""


class TestHeadings:
    @pytest.mark.parametrize(
        ("title", "headings", "path"),
        [
            ("Node", ["Node", "Timers#"], ("Timers#",)),
            ("Timers | Node.js v18", ["Node.js v18", "Timers", "setTimeout()"], ("setTimeout()",)),
            ("shutil — High-level — Python 3", ["shutil — High-level", "Files"], ("Files",)),
            ("Other", ["Guide", "Start"], ("Guide", "Start")),
            ("", ["Guide"], ("Guide",)),
        ],
    )
    def test_the_title_is_not_repeated(self, title, headings, path):
        page = "".join(f"<h{level}>{name}</h{level}>" for level, name in enumerate(headings, 1))
        assert html_page(f"<title>{title}</title>{page}<p>text") == (title, [Section("text", path)])

    @pytest.mark.parametrize(
        "sign",
        [
            '<a class="headerlink" href="#x" title="Permalink">¶</a>',
            '<span><a class="mark" href="#timers" id="timers">#</a></span>',
            '<a href="#x" class="hash-link" aria-label="Direct link">\u200b</a>',
            '<a aria-hidden="true" class="anchor" href="#x"><svg></svg></a>',
            '<a class="doc-anchor" href="#x">§</a>',
            '<a class="headerlink" href="#x">\uf0c1</a>',
            '<a href="#x"><img alt="Link icon" src="l.svg"></a>',
            '<button title="Copy">⎘</button>',
            "¶",
        ],
    )
    def test_permanent_links_are_no_text(self, sign):
        assert html_page(f"<h1>Timers{sign}</h1><p>text")[1] == [Section("text", ("Timers",))]
        assert html_page("<h1>C#</h1><p>text")[1][0].headings == ("C#",)

    def test_a_heading_with_nothing_below_it_is_text(self):
        page = "<h1>Deck</h1><h2>Thanks</h2><h2>More</h2><h3>Links</h3><h1>End</h1>"
        assert [(section.text, section.headings) for section in html_page(page)[1]] == [
            ("Thanks", ("Deck", "Thanks")),
            ("Links", ("Deck", "More", "Links")),
            ("End", ("End",)),
        ]

    def test_what_a_manual_defines_is_a_section(self):
        page = (
            '<h1>shutil</h1><p>Intro.</p><dl class="py function"><dt class="sig" id="a">'
            '<span class="sig-prename">shutil.</span><span class="sig-name">copy</span>(<em>src</em>, <em>dst</em>)'
            '<a class="headerlink" href="#a">¶</a></dt><dd><p>Copies.</p></dd></dl><p>After.</p>'
        )
        assert html_page(page)[1] == [
            Section("Intro.", ("shutil",)),
            Section("shutil.copy(src, dst)\nCopies.", ("shutil", "shutil.copy()")),
            Section("After.", ("shutil",)),
        ]


class TestFrame:
    @pytest.mark.parametrize(
        "chrome",
        [
            "<nav><a href=a>Home</a> <a href=b>Guide</a></nav>",
            '<div id="column2"><ul><li><a href=a>Assert</a><li><a href=b>Buffer</a></ul></div>',
            '<div role="navigation"><a href=a>next</a> | <a href=b>previous</a> |</div>',
            '<div role="search"><form><input type="text"><input type="submit" value="Go"></form></div>',
            '<div class="cookie-banner">We use cookies. <button>Accept</button></div>',
            '<div id="onetrust-consent-sdk"><p>Your privacy</p></div>',
            '<a href="#main">Skip to main content</a>',
            "<button>Copy</button><button aria-label='Copy to clipboard'></button>",
            "<p></p><noscript>Please enable JavaScript to search.</noscript>",
            '<span class="linenos">1</span>',
        ],
    )
    def test_is_left_out(self, chrome):
        assert text_of(f"{chrome}<main><p>The text.</p></main>") == "The text."

    @pytest.mark.parametrize(
        "content",
        [
            "<nav><p>A long text about navigation at sea, with <a href=x>one link</a>.</p></nav>",
            '<div class="toc"><p>The contents of this jar, and <a href=x>more</a>.</p></div>',
            '<div id="menu"><h2>Menu</h2><p>Soup 5 euros</p><p>Fish 12 euros</p></div>',
            "<footer>Written by Ann</footer>",
            '<ul><li><a href="a.html">Chapter one</a><li><a href="b.html">Chapter two</a></ul>',
            "<noscript><p>The whole text.</p></noscript>",
            '<div role="tabpanel" hidden>npm install</div>',
            '<section class="cookie-notice">' + "How cookies are baked. " * 200 + "</section>",
            "<button>Order now</button>",
        ],
    )
    def test_no_text_is_lost_to_a_name(self, content):
        words = "".join(html_page(content)[1][0].text.split())
        for word in ("navigation", "jar", "Soup", "Ann", "Chapter", "whole", "npm", "baked", "Order"):
            assert (word in words) == (word in content)

    def test_a_page_of_nothing_else_is_kept(self):
        assert text_of("<nav><a href=a>Home</a></nav>") == "Home"


class TestContents:
    @pytest.mark.parametrize(
        ("markup", "text"),
        [
            ("<p>a<b>b</b>c <i>d</i></p>", "abc d"),
            ("<p>one<br>two<wbr>three</p>", "one\ntwothree"),
            ("<p>5&nbsp;bar &copy 2024 &ltx&gt; AT&T &#x41;", "5 bar © 2024 <x> AT&T A"),
            ("<p>10<sup>6</sup> m<sup>2</sup> x<sup>[1]</sup> 1<sup>st</sup> H<sub>2</sub>O", "10^6 m2 x[1] 1st H2O"),
            (
                "<svg><title>Sun</title><text>hot <tspan>star</tspan></text><desc>A star.</desc></svg>",
                "Sun hot star A star.",
            ),
            ("<p>a<svg><style>.b{}</style><text>label</text></svg>b", "a label b"),
            ("<math><mfrac><mi>a</mi><mrow><mi>b</mi><mo>+</mo><mn>1</mn></mrow></mfrac></math>", "a/(b+1)"),
            ("<math><msup><mi>x</mi><mn>2</mn></msup><mo>=</mo><msqrt><mn>4</mn></msqrt></math>", "x^2=√(4)"),
            ("<p><ruby>漢<rp>(</rp><rt>かん</rt><rp>)</rp>字<rt>じ</rt></ruby>です", "漢字(かんじ)です"),
            ("<p>中文\n句子 and\nwords", "中文句子 and words"),
            ("<dl><dt>term<dd>meaning<dt>other<dd>more</dl>", "term\nmeaning\n\nother\nmore"),
            ("<details><summary>Sum</summary>body</details>", "Sum\n\nbody"),
            ("<ul><li>a<ul><li>b</ul><li>c</ul>", "- a\n  - b\n- c"),
            ("<ol start=3><li>x<li value=7>y<li>z</ol>", "3. x\n7. y\n8. z"),
            ("<p>Use <code>a &lt; b</code>.</p><pre>\n  if x:\n\ty\n</pre>", "Use a < b.\n\n  if x:\n\ty"),
            ("<pre>a<br>b<span>c</span>\n\n  d</pre>", "a\nbc\n\n  d"),
            ("<textarea>one\ntwo</textarea><input value=three><input type=hidden value=no>", "one\ntwo\n\nthree"),
            ("<select><option>red<option>blue</select>", "red blue"),
            ("<img src=a alt='A fox'> runs", "A fox runs"),
            ("<iframe srcdoc='&lt;h1>In&lt;/h1>&lt;p>side'></iframe><p>out", "In\n\nside\n\nout"),
            ("<template><p>not shown</template><p>shown", "shown"),
            ("<div><template shadowrootmode=open><p>shadow</template></div>", "shadow"),
            ("<p hidden>no</p><p style='display: none'>no</p><p>yes", "yes"),
            ("<frameset><frame src=x><noframes><p>old</noframes></frameset>", "old"),
            ("<blockquote><p>Said.</p></blockquote>", "Said."),
            ("<p>one<p>two<div>three</p>four<b>five<p>six</b>seven", "one\n\ntwo\n\nthree\n\nfourfive\n\nsixseven"),
            ("<p>a<!-- never closed <p>but kept", "a never closed\n\nbut kept"),
            ("<p>x <![CDATA[a < b]]>", "x a < b"),
        ],
    )
    def test_text(self, markup, text):
        assert text_of(markup) == text

    def test_three_pages_are_read_within_one_another_and_no_fourth(self):
        page = ""
        for depth in reversed(range(5)):
            page = f"<p>depth {depth}</p>" + (f'<iframe srcdoc="{escape(page)}"></iframe>' if page else "")
        assert text_of(page) == "depth 0\n\ndepth 1\n\ndepth 2\n\ndepth 3"

    def test_tables(self):
        table = (
            "<table><caption>Prices</caption><tr><th>Item<th>Size<th>Price<tr><td rowspan=2>Tea<td>S<td>2"
            "<tr><td>L<td>3<tr><td colspan=2>Cake<td>4|5</table>"
        )
        assert text_of(table) == (
            "Prices\n\n| Item | Size | Price |\n| --- | --- | --- |\n| Tea | S | 2 |\n| Tea | L | 3 |\n"
            "| Cake | Cake | 4|5 |"
        )

    @pytest.mark.parametrize(
        ("columns", "repeated"), [("1000", 1_000), ("65000", 1_000), ("999999", 1), ("9" * 400, 1)]
    )
    def test_a_cell_has_at_most_so_many_columns(self, columns, repeated):
        first, second = text_of(f"<table><tr><td colspan={columns}>x<td>y<tr><td>1<td>2</table>").splitlines()
        assert (first.count("x"), first.count("y"), second.count("2")) == (repeated, 1, 1)

    def test_a_table_that_only_arranges_a_page_is_no_table(self):
        page = "<table><tr><td><h2>Left</h2><p>one</p></td><td><pre>a\n  b</pre></td></tr></table>"
        assert html_page(page)[1] == [Section("one\n\na\n  b", ("Left",))]
        assert text_of('<table role="presentation"><tr><td>x<td>y</table>') == "x\n\ny"

    def test_xhtml(self):
        page = (
            '<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml"><head><title/><script src="a.js"/></head>'
            '<body><p><a id="x"/>one</p><div/><p><![CDATA[a & <b>]]></p><br/><p>two</p></body></html>'
        )
        assert html_page(page) == ("", [Section("one\n\na & <b>\n\ntwo")])


class TestSize:
    @pytest.mark.parametrize(
        "markup",
        [
            "<div>" * 100_000 + "deep" + "</div>" * 100_000,
            "<ul><li>" * 50_000 + "deep",
            "<b>" * 20_000 + "deep",
            "<table><tr><td>" * 20_000 + "deep",
            "<blockquote>" * 50_000 + "deep",
            "<a href=x>" * 20_000 + "deep",
            "<p>" + "<" * 300_000 + " deep",
            "<!--" * 100_000 + "deep",
            "<svg>" * 50_000 + "<text>deep",
        ],
    )
    def test_deep_and_broken_nesting(self, markup):
        begin = time.process_time()
        assert "deep" in text_of(markup)
        assert time.process_time() - begin < 20

    def test_time_is_linear(self):
        unit = (
            "<div class=x><h2>Part</h2><p>Some <b>bold</b> words.<ul><li>a<li>b</ul><table><tr><td>1<td>2</table></div>"
        )

        def seconds(count: int) -> float:
            begin = time.process_time()
            assert len(html_page(unit * count)[1]) == count
            return time.process_time() - begin

        seconds(100)
        assert seconds(8_000) < 3 * (4 * seconds(2_000)) + 1

    def test_a_long_line(self):
        assert len(text_of("<p>" + "word " * 500_000).split()) == 500_000
