"""What a word is: spellings of one word are equal, in many scripts, and a word finds the text that has it."""

from __future__ import annotations

import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2llm.data.same_text import comparable
from d2llm.ops.bm25_words import placed_terms, sentences, terms
from d2llm.ops.words import fold, placed_fold, runs, words
from d2llm.store.bm25 import WordIndex

FORMS = ("NFC", "NFD", "NFKC", "NFKD")

# For each script a sentence, and words of it.
TEXTS = {
    "Latin": ("Das Café in der Straße führt naïve Gäste.", ["café", "Straße", "naïve", "Gäste"]),
    "Latin, Polish": ("Wąż siedział na źdźble trawy w Łodzi.", ["wąż", "źdźble", "Łodzi"]),
    "Latin, Turkish": ("Diyarbakır ile İstanbul arası ılık.", ["Diyarbakır", "İstanbul", "ılık"]),
    "Latin, Vietnamese": ("Hướng dẫn sử dụng máy giặt ở nhà", ["hướng", "dụng", "giặt"]),
    "Greek": ("Η Ελλάδα είναι χώρα της Ευρώπης, λέει ο Οδυσσεύς.", ["Ελλάδα", "χώρα", "Ευρώπης", "Οδυσσεύς"]),
    "Cyrillic": ("Ёлка и йод стоят у за́мка.", ["ёлка", "йод", "замка"]),
    "Armenian": ("Հայաստանի մայրաքաղաքն է Երևանը։", ["Հայաստանի", "Երևանը"]),
    "Georgian": ("საქართველოს დედაქალაქია თბილისი.", ["საქართველოს", "თბილისი"]),
    "Hebrew": ("הַמֶּלֶךְ גָּר בִּירוּשָׁלַיִם", ["הַמֶּלֶךְ", "המלך", "בירושלים", "גר"]),
    "Arabic": ("يَدْرُسُ الطَّالِبُ في المَدْرَسَةِ", ["الطالب", "المدرسة", "المَدْرَسَةِ"]),
    "Persian": ("او کتاب‌های فارسی می‌خواند", ["کتاب‌های", "کتابهای", "فارسی", "میخواند"]),
    "Devanagari": ("हिन्दी भारत की राजभाषा है और ज़रूरी है।", ["हिन्दी", "भारत", "राजभाषा", "ज़रूरी"]),
    "Bengali": ("বাংলা ভাষা সুন্দর, হঠাৎ বৃষ্টি", ["বাংলা", "ভাষা", "হঠাৎ"]),
    "Gurmukhi": ("ਪੰਜਾਬੀ ਭਾਸ਼ਾ ਬੋਲੀ ਜਾਂਦੀ ਹੈ", ["ਪੰਜਾਬੀ", "ਭਾਸ਼ਾ"]),
    "Gujarati": ("ગુજરાતી ભાષા મીઠી છે", ["ગુજરાતી", "મીઠી"]),
    "Oriya": ("ଓଡ଼ିଆ ଭାଷା ପୁରୁଣା", ["ଓଡ଼ିଆ", "ଭାଷା"]),
    "Tamil": ("தமிழ் மொழி பழமையான மொழி", ["தமிழ்", "மொழி", "பழமையான"]),
    "Telugu": ("తెలుగు భాష మధురం", ["తెలుగు", "మధురం"]),
    "Kannada": ("ಕನ್ನಡ ಭಾಷೆ ಸುಂದರ", ["ಕನ್ನಡ", "ಭಾಷೆ"]),
    "Malayalam": ("മലയാളം സംസാരിക്കുന്നവർ കേരളത്തിൽ", ["മലയാളം", "സംസാരിക്കുന്നവർ", "കേരളത്തിൽ"]),
    "Sinhala": ("සිංහල භාෂාව ශ්‍රී ලංකාවේ", ["සිංහල", "භාෂාව", "ශ්‍රී"]),
    "Thai": ("เราดื่มน้ำเย็นทุกวันในกรุงเทพฯ", ["น้ำ", "เย็น", "ทุกวัน", "กรุงเทพ"]),
    "Lao": ("ພາສາລາວເປັນພາສາທາງການຂອງປະເທດລາວ", ["ພາສາ", "ປະເທດ", "ລາວ"]),
    "Khmer": ("ភាសាខ្មែរជាភាសាផ្លូវការរបស់ប្រទេសកម្ពុជា", ["ភាសា", "ខ្មែរ", "កម្ពុជា"]),
    "Burmese": ("မြန်မာဘာသာစကားကို မြန်မာနိုင်ငံတွင် ပြောသည်", ["မြန်မာ", "နိုင်ငံ", "စကား"]),
    "Tibetan": ("བོད་སྐད་ནི་བོད་མིའི་སྐད་ཡིག་ཡིན།", ["བོད", "སྐད"]),
    "Javanese": ("ꦧꦱꦗꦮꦲꦶꦏꦸꦧꦱ", ["ꦧꦱ", "ꦗꦮ"]),
    "Han": ("我们在北京的図書館里读書。", ["北京", "図書館", "读書"]),
    "Kana": ("ガソリンスタンドでコーヒーを飲む", ["ガソリン", "ｶﾞｿﾘﾝ", "コーヒー", "飲む"]),
    "Hangul": ("한국어 문법은 어렵다", ["한국어", "문법", "어렵다"]),
    "Ethiopic": ("አማርኛ የኢትዮጵያ ቋንቋ ነው።", ["አማርኛ", "ቋንቋ"]),
    "Cherokee": ("ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ", ["ᏣᎳᎩ", "ꮳꮃꭹ"]),
    "Thaana": ("ދިވެހި ބަސް", ["ދިވެހި", "ބަސް"]),
    "Mongolian": ("ᠮᠣᠩᠭᠣᠯ ᠬᠡᠯᠡ", ["ᠮᠣᠩᠭᠣᠯ"]),
    "compatibility": (
        "Ｄ２ＬＬＭ ﬁnds 25℃, 5㎏, ①, Ⅳ, x², Äﬄiction",
        ["d2llm", "finds", "25", "5kg", "1", "iv", "x2", "ﬁnds"],
    ),
    "digits": ("Zimmer ٣٤٥, कमरा ६७८, ห้อง ๙๐๑, 房间２３４", ["345", "678", "901", "234", "۳۴۵"]),
}
OTHERS = ["nothing that any of these has", "completely different", "0000"]


def spellings(word: str) -> list[str]:
    """A word in every normal form, in capitals and small letters, and with soft hyphens and joiners in it."""
    cases = {word, word.upper(), word.lower(), word.title()}
    forms = {unicodedata.normalize(form, case) for case in cases for form in FORMS}
    return sorted({hidden.join(form) for form in forms for hidden in ("", "\u00ad", "\u2060")})


def scores(texts: list[str], query: str) -> list[float]:
    index = WordIndex.from_texts(texts)
    return index.scores(index.query(query)).tolist()


@pytest.mark.parametrize("script", TEXTS)
def test_a_word_finds_its_text_in_every_spelling(script):
    """With the same score in each, and no other text."""
    text, of_text = TEXTS[script]
    for form in FORMS:
        corpus = [unicodedata.normalize(form, text), *OTHERS]
        for word in of_text:
            expected = scores(corpus, word)
            assert expected[0] > 0, (word, terms(word), terms(text))
            assert not any(expected[1:])
            for spelling in spellings(word):
                assert scores(corpus, spelling) == expected, (word, spelling)


@pytest.mark.parametrize("script", TEXTS)
def test_a_text_has_the_same_terms_in_every_form(script):
    text, _ = TEXTS[script]
    assert all(terms(unicodedata.normalize(form, text)) == terms(text) for form in FORMS)
    assert terms("\u200d".join(unicodedata.normalize("NFD", text))) == terms(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("हिन्दी", ["हिन्दी"]),
        ("Straße STRASSE", ["strass", "strass"]),
        ("naïve résumés", ["naiv", "resum"]),
        ("İstanbul Iğdır ısı", ["istanbul", "igdir", "isi"]),
        ("Ελλάδα ΕΛΛΆΔΑ ΕΛΛΑΔΑ", ["ελλαδα"] * 3),
        ("σοφός ΣΟΦΟΣ", ["σοφοσ"] * 2),
        ("й и ё е їх", ["й", "и", "е", "е", "їх"]),
        ("مُدَرِّسَةٌ مدرســـة", ["مدرسه"] * 2),
        ("كتاب کتاب", ["كتاب"] * 2),
        ("שָׁלוֹם שלום", ["שלום"] * 2),
        ("می‌خواهم میخواهم", ["ميخواهم"] * 2),
        ("ന്‍ ൻ", ["ന്"] * 2),
        ("co\u00adop\u00aderate", ["cooper"]),
        ("zero\u200bwidth", ["zero", "width"]),
        ("Acme™ №5 № 5", ["acm", "no", "5", "no", "5"]),
        ("п'ять пʼять п’ять", ["п", "ять"] * 3),
        ("ﾊﾞｲｵ・テク", ["バ", "イ", "オ", "バイ", "イオ", "テ", "ク", "テク"]),
        ("น้ำแข็ง", ["น้ำ", "แข็ง", "ำแ", "แข็", "ข็ง"]),
        ("ภาษาไทย", ["ภาษา", "ไทย", "ภา", "าษ", "ษา", "าไ", "ไท", "ทย"]),
        ("ꦧꦱꦗꦮ", ["ꦧ", "ꦱ", "ꦗ", "ꦮ", "ꦧꦱ", "ꦱꦗ", "ꦗꦮ"]),
        ("བོད་སྐད།", ["བོད", "སྐད"]),
        ("①②", ["12"]),
        ("\u0301", []),
        ("ﷺ", ["صلي", "الله", "عليه", "وسلم"]),
    ],
)
def test_terms(text, expected):
    assert terms(text) == expected


def test_a_dictionary_word_is_found_within_a_longer_one():
    """ICU takes the name of a language for one word; a query may be a part of it."""
    assert terms("ភាសាខ្មែរ")[0] == "ភាសាខ្មែរ"
    assert scores(["ភាសាខ្មែរ", "ភាសា"], "ខ្មែរ")[0] > 0


def test_invisible_spaces_of_khmer_may_be_missing():
    """Texts have them between words, queries mostly not."""
    text = "កំណត់​ទទឹង​ជួរ​ឈរ ឬ​ជ្រើស"
    corpus = [text, "អនុគមន៍​ហេរញវត្ថុ"]
    own, other = scores(corpus, "ទទឹងជួរឈរ")
    assert own > 0
    assert other == 0


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
def test_folding_settles(text):
    """It changes nothing the second time, and canonically equal texts are equal; places are those of the text."""
    folded = fold(text)
    assert fold(folded) == folded
    assert all(fold(unicodedata.normalize(form, text)) == folded for form in ("NFC", "NFD"))
    if not {*text} & {*"\u2116\u2120\u2122"}:  # signs that stand beside a word
        assert all(fold(unicodedata.normalize(form, text)) == folded for form in ("NFKC", "NFKD"))
    parts, spans = placed_fold(text)
    assert parts == folded
    assert len(spans) == len(folded)
    assert spans == sorted(spans)
    assert all(0 <= start < end <= len(text) for start, end in spans)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_words_are_parts_of_the_text(text):
    """In order, apart from each other but for what one character gives; their terms are those of the text."""
    spans = words(text)
    assert all(one[0] <= other[0] and one[1] <= other[1] for one, other in pairwise(spans))
    assert [term for _, term in placed_terms(text)] == terms(text)
    assert all(run.words and all(start < end for start, end in run.words) for run in runs(fold(text)))


def test_places_of_words_in_the_text_as_it_is_written():
    text = "Der Stra\u00dfenﬁlm im Cafe\u0301 und 図書館, हिन्दी"
    assert [text[start:end] for start, end in words(text)] == [
        *("Der", "Stra\u00dfenﬁlm", "im", "Cafe\u0301", "und", "図", "書", "館", "हिन्दी")
    ]
    assert [text[start:end] for (start, end), term in placed_terms(text) if term == "図書"] == ["図書"]


def test_comparable_texts():
    assert comparable("Café, STRASSE!") == comparable("cafe\u0301 straße") == "cafe strasse"
    assert comparable("图书馆 ok") == "图书馆 ok"


@pytest.mark.parametrize(
    ("text", "number"),
    [("यह एक है। यह दो है।", 2), ("هل هذا صحيح؟ نعم۔", 2), ("ជំរាបសួរ។ លាហើយ។", 2), ("你好！ﾀﾞﾒ｡はい", 3)],
)
def test_sentences_end_at_the_full_stops_of_their_scripts(text, number):
    assert len(sentences(text)) == number
