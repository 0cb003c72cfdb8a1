"""Items cut from what people wrote: reviews, Debian package descriptions and their translations, WordNet."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from lora_hub_sdk.demo.training._rows import Item, alternate
from lora_hub_sdk.demo.training.sources import SourceCache

SECTIONS = ("games", "science", "net", "sound", "graphics", "database", "mail", "electronics")
LANGUAGES = {
    "en": "English",
    "it": "Italian",
    "fr": "French",
    "de": "German",
    "es": "Spanish",
    "pl": "Polish",
    "pt_BR": "Portuguese",
}
# WordNet's lexicographer files, by number (see its manual page lexnames.5).
CATEGORIES = {5: "animal", 6: "artifact", 8: "body", 13: "food", 15: "place", 18: "person", 20: "plant"}

_MAX_SENTENCE_WORDS = 24
# A language shows after a few words; short prompts train faster.
_LANGUAGE_WORDS = range(5, 15)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s")


def review_sentences(rng: random.Random, cache: SourceCache) -> Iterator[Item]:
    """Yield review sentences of at most 24 words with "positive" or "negative", evenly."""
    groups: dict[bool, list[Item]] = {True: [], False: []}
    for sentence in cache.sentiment_sentences():
        if len(sentence.text.split()) <= _MAX_SENTENCE_WORDS:
            answer = "positive" if sentence.positive else "negative"
            groups[sentence.positive].append(Item(sentence.text, answer))
    return _shuffled(list(groups.values()), rng)


def package_sections(rng: random.Random, cache: SourceCache) -> Iterator[Item]:
    """Yield a package's synopsis and first sentence with its archive section, evenly over ``SECTIONS``."""
    section_of = {md5: section for md5, section in cache.package_sections() if section in SECTIONS}
    groups: dict[str, list[Item]] = {section: [] for section in SECTIONS}
    seen: set[str] = set()
    for description in cache.descriptions("en"):
        section = section_of.get(description.md5)
        first = first_sentence(description.body)
        # Packages built from one source share their text: keep one, or it leaks into the held-out rows.
        if section and first and first not in seen:
            seen.add(first)
            groups[section].append(Item(f"{description.synopsis}. {first}", section))
    return _shuffled(list(groups.values()), rng)


def italian_synopses(rng: random.Random, cache: SourceCache) -> Iterator[Item]:
    """Yield English package synopses of 3 to 12 words with their Italian translations."""
    english = {description.md5: description.synopsis for description in cache.descriptions("en")}
    pairs = [
        Item(english[description.md5], description.synopsis)
        for description in cache.descriptions("it")
        if 3 <= len(english.get(description.md5, "").split()) <= 12
        # An untranslated synopsis (mostly a name) teaches to copy.
        and english[description.md5].casefold() != description.synopsis.casefold()
    ]
    rng.shuffle(pairs)
    return iter(pairs)


def language_sentences(rng: random.Random, cache: SourceCache) -> Iterator[Item]:
    """Yield first sentences of package descriptions with the English name of their language, evenly."""
    groups = [
        [
            Item(sentence, name)
            for description in cache.descriptions(code)
            if len((sentence := first_sentence(description.body)).split()) in _LANGUAGE_WORDS
        ]
        for code, name in LANGUAGES.items()
    ]
    return _shuffled(groups, rng)


def noun_categories(rng: random.Random, cache: SourceCache) -> Iterator[Item]:
    """Yield WordNet nouns (as context) and their glosses with their category, evenly over ``CATEGORIES``."""
    groups: dict[int, list[Item]] = {number: [] for number in CATEGORIES}
    for noun in cache.nouns():
        if noun.category in groups and 3 <= len(noun.gloss.split()) <= _MAX_SENTENCE_WORDS:
            groups[noun.category].append(Item(noun.gloss, CATEGORIES[noun.category], context=noun.word))
    return _shuffled(list(groups.values()), rng)


def first_sentence(body: str) -> str:
    """Return the first sentence of a description's first paragraph, or "" if it is longer than 24 words.

    A paragraph ends at a line holding a lone dot; list lines, which start with a space, are never sentences.
    """
    paragraph = body.split("\n.", 1)[0]
    if "\n " in paragraph or paragraph.startswith(" "):
        return ""
    sentence = _SENTENCE_END.split(" ".join(paragraph.split()), maxsplit=1)[0]
    return sentence if len(sentence.split()) <= _MAX_SENTENCE_WORDS else ""


def _shuffled(groups: list[list[Item]], rng: random.Random) -> Iterator[Item]:
    for group in groups:
        rng.shuffle(group)
    return alternate(groups, rng)
