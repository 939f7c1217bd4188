"""What of an HTML page is not its text: navigation, permanent links, "copy" buttons, line numbers, notices on cookies.

An element is left out for what it is (``nav``) or is called (``toc``) only if links are most of it, so that no text is
lost to a name.
"""

from __future__ import annotations

import re

from turbohtml import Element


def _words(names: str) -> frozenset[str]:
    return frozenset(names.split())


_SIGNS = re.compile(
    r"[\s¶#§◆⚓🔗∞↩\ufe0e\u200b\ufeff\ue000-\uf8ff]+|permalink|(direct )?link to this .*", flags=re.IGNORECASE
)
_ICONS = re.compile(r"link( icon)?|anchor|permalink", flags=re.IGNORECASE)
_COPY = re.compile(r"cop(y|ied)!?( (code|to clipboard|path|item path|link|snippet|page))*", flags=re.IGNORECASE)
_SKIP = re.compile(r"(skip|jump) (navigation|to (the )?(main )?(content|navigation|search)).*", flags=re.IGNORECASE)
_SOURCE = re.compile(r"\[?(view )?(source|docs)( code)?\]?", flags=re.IGNORECASE)
_COOKIES = re.compile(
    r"(cookie|consent|gdpr)s?[-_]?(banner|bar|notice|consent|popup|message|dialog|law|sdk|overlay|modal)"
    r"|onetrust|cookiebot|didomi|usercentrics|cc-window|truste",
    flags=re.IGNORECASE,
)
_LONGEST_COOKIE_NOTICE = 3_000  # characters; a longer text is about cookies
_SMALL = _words(
    "btn-clipboard clipboard copy-button copybtn copybutton header-anchor headerlink hash-link line-number "
    "line-numbers-rows linenodiv lineno linenos linenumber md-clipboard permalink skip-link skipnav sourcelink "
    "theme-edit-this-page viewcode-back viewcode-link"
)
"""Classes of what generators of documentation add to a page's text."""
_LONGEST_LABEL = 100  # characters of one of these; but line numbers may be many
_LINK_LISTS = _words(
    "breadcrumb breadcrumbs column2 gtoc menu mobile-nav nav nav-path navbar navigation pagination pagination-nav "
    "picker-header related rst-footer-buttons rst-versions sidebar sphinxsidebar table-of-contents "
    "theme-doc-toc-mobile toc"
)
"""Classes and ids of lists of links around a page's text."""
_BARS = frozenset({"bottomnav", "subnav", "topnav"})
_MANY_LINKS, _FEWER_LINKS = 0.8, 0.3  # fractions of the text: for those names, and for what says that it is navigation
_INLINE = frozenset({"a", "abbr", "b", "button", "em", "i", "span", "strong", "sup", "svg"})


def attribute(node: Element, name: str) -> str:
    """The value of an attribute; "" if there is none."""
    value = node.attrs.get(name) if name else None
    return value if isinstance(value, str) else ""


def is_drawing(node: Element) -> bool:
    """Whether an element is part of an SVG drawing."""
    return str(node.namespace) == "Namespace.SVG"


def is_hidden(node: Element) -> bool:
    """Whether a browser does not show an element, and a reader cannot open it as a tab."""
    attributes = node.attrs
    if not attributes:
        return False
    style = attribute(node, "style")
    hidden = "hidden" in attributes or (style and re.search(r"(display\s*:\s*none|visibility\s*:\s*hidden)", style))
    return bool(hidden) and attribute(node, "role") != "tabpanel" and attribute(node, "hidden") != "until-found"


def is_frame(node: Element) -> bool:
    """Whether an element surrounds or accompanies the text of a page, and is no part of it."""
    attributes, tag = node.attrs, node.tag
    if tag == "a":
        return _is_sign(node)
    if tag == "button":
        names = (node.text, attribute(node, "title"), attribute(node, "aria-label"))
        return any(re.fullmatch(_COPY, name.strip()) for name in names)
    if tag == "nav":
        return _fraction_of_links(node) >= _FEWER_LINKS
    if not attributes:
        return False
    role = attribute(node, "role")
    if role in ("navigation", "doc-toc", "search"):
        return _fraction_of_links(node) >= _FEWER_LINKS or (
            role == "search" and len(node.text.strip()) < _LONGEST_LABEL
        )
    if tag in _INLINE and attribute(node, "aria-hidden") == "true" and _is_ornament(node):
        return True
    names = [name.lower() for name in (*_classes(node), attribute(node, "id")) if name]
    if any(name in _SMALL for name in names):
        text = node.text.strip()
        return len(text) <= _LONGEST_LABEL or not re.search(r"[^\W\d]", text)
    if any(name in _BARS for name in names):
        return _fraction_of_links(node) >= _FEWER_LINKS
    if any(name in _LINK_LISTS for name in names) or ("contents" in names and ("local" in names or "topic" in names)):
        return _fraction_of_links(node) >= _MANY_LINKS
    return any(_COOKIES.search(name) for name in names) and len(node.text) < _LONGEST_COOKIE_NOTICE


def _is_sign(node: Element) -> bool:
    """Whether a link is one to the place where it stands, past the navigation, or to source code."""
    text = node.text.strip()
    if "#" in attribute(node, "href") or not text:
        if not text:
            pictures = node.find_all("img")
            return bool(pictures) and all(
                re.fullmatch(_ICONS, attribute(picture, "alt").strip()) for picture in pictures
            )
        return bool(re.fullmatch(_SIGNS, text) or re.fullmatch(_SKIP, text))
    is_source = any(name in ("src", "srclink", "viewcode-link", "viewcode-back") for name in _classes(node))
    return is_source and bool(re.fullmatch(_SOURCE, text))


def _is_ornament(node: Element) -> bool:
    """Whether an element that is not read aloud is a picture, or repeats a formula."""
    classes = _classes(node)
    return "katex-html" in classes or any("icon" in name for name in classes) or not re.search(r"\w", node.text)


def _classes(node: Element) -> list[str]:
    value = node.attrs.get("class")
    return value if isinstance(value, list) else (value or "").split()


def _fraction_of_links(node: Element) -> float:
    """The part of an element's text that is in links."""
    links = [node] if node.tag == "a" else node.find_all("a")
    length = len("".join(node.text.split()))
    return sum(len("".join(link.text.split())) for link in links) / length if length else 1.0
