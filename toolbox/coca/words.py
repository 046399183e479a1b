"""Words of a text, as the checks of a record need them: tokens, content stems, the script, similarity. No torch."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from difflib import SequenceMatcher
from functools import lru_cache

_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
"""Thai, kana and Han: written without spaces, so that each character counts as a word."""
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:['\u2019][^\W\d_]+)?")
_TOKEN = re.compile(r"\w+|[^\w\s]")

_STOP_WORDS = """
a about above after again all also am an and any are as at be because been before being both but by can could did do
does doing down each else ever few for from further get give had has have having he her here hers him his how i if in
into is it its just let like make many may me might more most much must my need no nor not now of off on once one only
or other our out over own please provide same say she should so some such tell than that the their them then there
these they this those through to too under until up us use very want was way ways we were what when where which while
who whom whose why will with would write you your yours
"""
_STOP = frozenset(_STOP_WORDS.split())
_SUFFIXES = (
    "izations", "ization", "ations", "ation", "nesses", "ness", "ments", "ment", "ically", "ingly", "edly", "ings",
    "ing", "ously", "ious", "ous", "ities", "ity", "able", "ible", "ives", "ive", "ers", "ies", "ied", "ion", "ions",
    "er", "est", "ed", "es", "ly", "al", "s", "e", "y",
)  # fmt: skip
_LONGEST_FIRST = tuple(sorted(_SUFFIXES, key=len, reverse=True))


def words(text: str) -> list[str]:
    """Lowered words in order."""
    return _WORD.findall(text.lower())


def token_count(text: str) -> int:
    """Words and marks: roughly what a tokenizer makes of plain English."""
    return len(_TOKEN.findall(text))


@lru_cache(maxsize=1 << 14)
def stem(word: str) -> str:
    """The word without its common English endings, at least three letters of it."""
    word = word.split("'")[0].split("\u2019")[0]
    for suffix in _LONGEST_FIRST:
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            return word[: -len(suffix)]
    return word


def content(text: str) -> list[str]:
    """Stems of the words that carry meaning, in order."""
    return [stem(word) for word in words(text) if word not in _STOP and (len(word) > 2 or not word.isascii())]


def overlap(part: str, whole: str) -> float:
    """The share of ``part``'s content words, counted as often as they occur, that ``whole`` has too; 0 of nothing."""
    mine, theirs = Counter(content(part)), Counter(content(whole))
    total = sum(mine.values())
    return sum((mine & theirs).values()) / total if total else 0.0


def covered(prompt: str, think: str) -> tuple[int, float]:
    """How many of the prompt's distinct content stems the think has, and their share; (0, 1.0) of a prompt without."""
    wanted = set(content(prompt))
    if not wanted:
        return 0, 1.0
    found = wanted & set(content(think))
    return len(found), len(found) / len(wanted)


def similarity(a: str, b: str) -> float:
    """2·M / T over characters (difflib), after case and blanks are made equal; 1 for equal texts."""
    one, two = (" ".join(text.lower().split()) for text in (a, b))
    if one == two:
        return 1.0
    return SequenceMatcher(None, one, two, autojunk=False).ratio()


@lru_cache(maxsize=1 << 14)
def _script(character: str) -> str:
    name = unicodedata.name(character, "").partition(" ")[0]
    return {"CJK": "HAN", "HIRAGANA": "KANA", "KATAKANA": "KANA", "FULLWIDTH": "LATIN"}.get(name, name)


def script(text: str) -> str | None:
    """The script of most letters (``LATIN``, ``CYRILLIC``, ``HAN``, ...); None where there is no letter.

    Japanese is KANA wherever it has a kana beside its Han characters.
    """
    counts = Counter(_script(one) for one in text[:4000] if one.isalpha())
    if not counts:
        return None
    if counts.get("KANA") and counts["KANA"] + counts.get("HAN", 0) > sum(counts.values()) / 2:
        return "KANA"
    return counts.most_common(1)[0][0]


SCRIPTS = {
    "en": "LATIN", "de": "LATIN", "fr": "LATIN", "es": "LATIN", "it": "LATIN", "pt": "LATIN", "nl": "LATIN",
    "pl": "LATIN", "tr": "LATIN", "vi": "LATIN", "id": "LATIN", "ru": "CYRILLIC", "uk": "CYRILLIC", "bg": "CYRILLIC",
    "el": "GREEK", "he": "HEBREW", "ar": "ARABIC", "fa": "ARABIC", "hi": "DEVANAGARI", "th": "THAI", "zh": "HAN",
    "ja": "KANA", "ko": "HANGUL",
}  # fmt: skip
"""Scripts by language code, for ``--think-lang``: a script can be read off a text, a language cannot."""
