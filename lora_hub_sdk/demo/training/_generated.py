"""Items that a program can make and check by itself: numbers, dates, contacts, queries, identifiers.

Every source here is endless and depends on its random generator alone.
"""

from __future__ import annotations

import datetime
import json
import random
from collections.abc import Iterator

from lora_hub_sdk.demo.training._rows import Item
from lora_hub_sdk.demo.training.sources import SourceCache

DATE_LOCALES = ("en_US", "fr", "de", "it", "es", "pt")
# Purely numeric orders (3/7/2021) are left out where the text alone does not tell the day from the month.
_DATE_STYLES = ("full", "long", "medium")
_FIRST_DAY = datetime.date(1950, 1, 1)
_DAYS = (datetime.date(2050, 1, 1) - _FIRST_DAY).days


def french_numbers(rng: random.Random, cache: SourceCache) -> Iterator[Item]:
    """Yield whole numbers below 10 000 in digits and in French words; shorter numbers are not crowded out."""
    while True:
        number = rng.randrange(10 ** rng.choice((2, 3, 3, 4, 4)))
        yield Item(str(number), french_words(number))


def french_words(number: int) -> str:
    """Return ``number`` in French words."""
    from num2words import num2words

    return str(num2words(number, lang="fr"))


def written_dates(rng: random.Random, cache: SourceCache) -> Iterator[Item]:
    """Yield dates from 1950 to 2049 as six languages write them, and their ISO 8601 form."""
    while True:
        day = _FIRST_DAY + datetime.timedelta(days=rng.randrange(_DAYS))
        yield date_item(day, style=rng.choice(_DATE_STYLES), locale=rng.choice(DATE_LOCALES))


def date_item(day: datetime.date, *, style: str, locale: str) -> Item:
    """Return ``day`` written in the CLDR ``style`` of ``locale``, to be answered in ISO 8601."""
    from babel.dates import format_date

    return Item(format_date(day, format=style, locale=locale), day.isoformat())


_CONTACT_SENTENCES = (
    "{name} works for {company} in {city} and can be reached at {email}.",
    "Write to {email} to get in touch with {name} of {company}, {city}.",
    "Our new partner in {city} is {name} ({email}) from {company}.",
    "I met {name} at the {company} office in {city}; the address is {email}.",
    "From {city}: {company} has hired {name}, e-mail {email}.",
    "Please add {email} to the list, that is {name}, {company}, based in {city}.",
)


def contacts(rng: random.Random, cache: SourceCache) -> Iterator[Item]:
    """Yield sentences about invented people, and the same facts as one line of JSON."""
    from faker import Faker

    fake = Faker("en_US")
    fake.seed_instance(rng.getrandbits(64))
    while True:
        first, last = fake.first_name(), fake.last_name()
        email = rng.choice((f"{first}.{last}", f"{first[0]}{last}", f"{last}{rng.randrange(100)}"))
        yield contact_item(
            rng.choice(_CONTACT_SENTENCES),
            name=f"{first} {last}",
            email=f"{email}@{fake.safe_domain_name()}".lower(),
            company=fake.company(),
            city=fake.city(),
        )


def contact_item(sentence: str, *, name: str, email: str, company: str, city: str) -> Item:
    """Fill ``sentence`` and answer with a JSON object of fixed keys in fixed order."""
    facts = {"name": name, "email": email, "company": company, "city": city}
    return Item(sentence.format(**facts), json.dumps(facts))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_VERBS = _words("get set load save parse build find send read write update delete create merge split check count sort")
_ADJECTIVES = _words("new old max min default local remote raw empty active next last total open hidden shared")
_NOUNS = _words(
    "user file order item page token cache key value name path row table index list event message "
    "session config image report error result window price date model buffer request response account "
    "invoice header"
)
_ACRONYMS = _words("HTTP JSON URL XML SQL API CSV HTML PDF ID")


def identifiers(rng: random.Random, cache: SourceCache) -> Iterator[Item]:
    """Yield names in five spellings, and the same names in snake_case; acronyms count as one word."""
    while True:
        words = [rng.choice(_VERBS), rng.choice(_ADJECTIVES), rng.choice(_NOUNS), rng.choice(_NOUNS)]
        if rng.random() < 0.4:
            words[rng.randrange(1, 4)] = rng.choice(_ACRONYMS)
        start = rng.randrange(2)
        yield Item(spell(words[start:], rng.choice(SPELLINGS)), "_".join(words[start:]).lower())


SPELLINGS = ("camel", "pascal", "kebab", "phrase", "dotted")


def spell(words: list[str], spelling: str) -> str:
    """Join ``words`` in one of ``SPELLINGS``; a word in capitals is an acronym and stays so where it can."""
    capital = [word if word.isupper() else word.capitalize() for word in words]
    match spelling:
        case "camel":
            return words[0].lower() + "".join(capital[1:])
        case "pascal":
            return "".join(capital)
        case "kebab":
            return "-".join(words).lower()
        case "phrase":
            return " ".join(capital[:1] + words[1:])
        case "dotted":
            return ".".join(words)
        case _:
            raise ValueError(f"unknown spelling {spelling!r}, expected one of {SPELLINGS}")
