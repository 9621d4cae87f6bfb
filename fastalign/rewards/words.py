"""diversity and readability: rewards counted from the words of the response."""

from __future__ import annotations

import re

from fastalign.rewards.base import PerTextReward

_TOKEN = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"[.!?]+(?=[\s\"'”’)\]]|$)|\n\s*\n")
_VOWEL_GROUP = re.compile(r"[aeiouyà-öø-ÿ]+")
# made, whole · walked, called · makes, clothes, rules; but not table, wanted, handled, boxes, churches, tables
_SILENT_ENDING = re.compile(
    r"(?:[^aeiouyl]e|[aeiouyl]le|[^aeiouytdl]ed|[aeiouyl]led|[^aeiouysxzcghl]es|[^cs]hes|[aeiouyl]les)$"
)


class Diversity(PerTextReward):
    """Product over n = 2, 3, 4 of (distinct n-grams) / (n-grams + 1) of the response, in [0, 1).

    Distinct-n is Li et al. 2016 (arXiv 1510.03055), the product over n = 2..4 Su et al. 2022 (arXiv 2202.06417), the
    + 1 MAP's (arXiv 2410.19198): it gives texts too short to repeat themselves low scores, and texts of fewer than four
    tokens, including empty ones, 0. Tokens are lower-cased words and single punctuation marks.
    """

    def __init__(self, name: str = "diversity", *, cache_size: int = 65536):
        super().__init__(name, cache_size=cache_size)

    def value(self, response: str) -> float:
        tokens = _TOKEN.findall(response.lower())
        product = 1.0
        for n in (2, 3, 4):
            ngrams = list(zip(*(tokens[offset:] for offset in range(n)), strict=False))
            product *= len(set(ngrams)) / (len(ngrams) + 1)
        return product


class Readability(PerTextReward):
    """Flesch reading ease of the response / 100, clipped to [0, 1]: 0 very hard, 0.6-0.7 plain English, 1 very easy.

    206.835 - 1.015 words/sentences - 84.6 syllables/words (Flesch 1948, A new readability yardstick). Syllables are
    counted by `syllables`; text after the last full stop counts as a sentence. A response with no word scores 0.
    """

    def __init__(self, name: str = "readability", *, cache_size: int = 65536):
        super().__init__(name, cache_size=cache_size)

    def value(self, response: str) -> float:
        sentences = [words for part in _SENTENCE_END.split(response) if (words := _WORD.findall(part))]
        count = sum(len(words) for words in sentences)
        if count == 0:
            return 0.0
        syllable_count = sum(syllables(word) for words in sentences for word in words)
        ease = 206.835 - 1.015 * count / len(sentences) - 84.6 * syllable_count / count
        return min(max(ease / 100.0, 0.0), 1.0)


def syllables(word: str) -> int:
    """Syllables of an English word by rule: groups of vowels, less silent endings (-e, -ed, -es), at least 1."""
    word = word.lower().replace("’", "").replace("'", "")
    count = len(_VOWEL_GROUP.findall(word))
    if _SILENT_ENDING.search(word):
        count -= 1
    return max(count, 1)
