"""Characters of the fonts Symbol and Wingdings, which documents store as places in those fonts, in Unicode."""

from __future__ import annotations

from typing import Any

from d2llm.data.office_archives import attribute

_PRIVATE = 0xF000  # where Word puts the characters of such fonts
_SYMBOL = dict(
    zip(
        (*range(0x20, 0x7F), *range(0xA1, 0xF0), *range(0xF1, 0xFF)),
        " !∀#∃%&∍()∗+,−./0123456789:;<=>?≅ΑΒΧΔΕΦΓΗΙϑΚΛΜΝΟΠΘΡΣΤΥςΩΞΨΖ[∴]⊥_‾αβχδεφγηιϕκλμνοπθρστυϖωξψζ{|}∼"
        "ϒ′≤⁄∞ƒ♣♦♥♠↔←↑→↓°±″≥×∝∂•÷≠≡≈…⏐⎯↵ℵℑℜ℘⊗⊕∅∩∪⊃⊇⊄⊂⊆∈∉∠∇®©™∏√⋅¬∧∨⇔⇐⇑⇒⇓◊〈®©™∑⎛⎜⎝⎡⎢⎣⎧⎨⎩⎪"
        "〉∫⌠⎮⌡⎞⎟⎠⎤⎥⎦⎫⎬⎭",
        strict=True,
    )
)
_WINGDINGS = {
    0x21: "✏", 0x22: "✂", 0x28: "☎", 0x2A: "✉", 0x4A: "☺", 0x4C: "☹", 0x6C: "●", 0x6E: "■", 0x6F: "□", 0x71: "❑",
    0x76: "❖", 0x9F: "•", 0xA7: "▪", 0xA8: "◻", 0xD8: "➢", 0xDF: "←", 0xE0: "→", 0xE1: "↑", 0xE2: "↓", 0xE8: "➔",
    0xF0: "⇨", 0xFB: "✗", 0xFC: "✓", 0xFD: "☒", 0xFE: "☑",
}  # fmt: skip
_FONTS = {"symbol": _SYMBOL, "wingdings": _WINGDINGS}


def symbol(font: str, place: str) -> str:
    """The character at a place, in hexadecimal digits, of a font; U+FFFD if it is not known."""
    try:
        code = int(place, 16)
    except ValueError:
        return "\N{REPLACEMENT CHARACTER}"
    known = _FONTS.get(font.casefold())
    if known is None:
        return "\N{REPLACEMENT CHARACTER}" if 0xE000 <= code < 0xF900 or code > 0x10FFFF else chr(code)
    return known.get(code & 0xFF, "\N{REPLACEMENT CHARACTER}")


def with_symbols(text: str, run: Any) -> str:
    """The text of a run whose characters may be places in such a font."""
    if not any(_PRIVATE <= ord(character) < _PRIVATE + 256 for character in text):
        return text
    fonts = run.find("{*}rPr/{*}rFonts")
    font = attribute(fonts, "ascii") or attribute(fonts, "hAnsi") if fonts is not None else ""
    known = _FONTS.get(font.casefold(), _SYMBOL)
    return "".join(
        known.get(ord(c) - _PRIVATE, "\N{REPLACEMENT CHARACTER}") if _PRIVATE <= ord(c) < _PRIVATE + 256 else c
        for c in text
    )
