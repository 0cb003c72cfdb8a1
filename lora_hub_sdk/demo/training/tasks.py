"""The ten demo tasks: where their items come from and how their instructions are worded."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lora_hub_sdk.demo.training import _gathered, _generated, _notices, _sql
from lora_hub_sdk.demo.training._rows import Task
from lora_hub_sdk.demo.training.sources import DEBIAN_SUITE, SENTIMENT_PACKAGE, WORDNET_PACKAGE

_DEBIAN_LICENCE = (
    "Package descriptions are part of the Debian packages and carry their free licences (each package's "
    "copyright file names it; all of Debian main meets the Debian Free Software Guidelines). {extra}Only the "
    "rows shown in samples.jsonl and heldout.jsonl are reproduced here."
)
_GENERATED_LICENCE = "The rows are generated and free of third-party rights. {tool}The adapter is Apache-2.0."
_TRANSLATIONS = "The translations were written by volunteers of the Debian Description Translation Project. "

_ALL = (
    Task(
        name="sentiment",
        summary="Tell whether a review sentence is positive or negative.",
        metric="em",
        languages=("en",),
        source=f"labelled review sentences (Amazon, IMDb, Yelp), test fixtures of npm {SENTIMENT_PACKAGE}",
        licence_id="mit",
        licence=(
            "The npm package is under the MIT licence, copyright 2016 Andrew Sliwinski. The sentences in its "
            "fixtures are the Sentiment Labelled Sentences of Kotzias and others (2015), which the UCI "
            "Machine Learning Repository offers under CC BY 4.0.\n\n" + _notices.REVIEWS
        ),
        templates=(
            "Is this review positive or negative?\n{text}",
            "{text}\nSentiment (positive or negative):",
            'What does the customer feel about it? Answer "positive" or "negative".\n\n{text}',
            'Someone wrote: "{text}" Was the opinion positive or negative?',
        ),
        items=_gathered.review_sentences,
    ),
    Task(
        name="package-section",
        summary=f"File a software package under one of {len(_gathered.SECTIONS)} archive sections.",
        metric="em",
        languages=("en",),
        source=f"package descriptions and sections of Debian {DEBIAN_SUITE} main (apt-get update)",
        licence_id="other",
        licence=_DEBIAN_LICENCE.format(extra=""),
        templates=(
            "Which archive section does this package belong to: " + ", ".join(_gathered.SECTIONS) + "?\n{text}",
            "{text}\n\nChoose the Debian section (" + " / ".join(_gathered.SECTIONS) + "):",
            "Sort this software into one of " + ", ".join(_gathered.SECTIONS) + ".\nDescription: {text}",
        ),
        items=_gathered.package_sections,
    ),
    Task(
        name="translate-it",
        summary="Translate a short software description from English to Italian.",
        metric="f1",
        languages=("en", "it"),
        source=f"English and Italian package synopses of Debian {DEBIAN_SUITE} main (apt-get update)",
        licence_id="other",
        licence=_DEBIAN_LICENCE.format(extra=_TRANSLATIONS),
        templates=(
            "Translate into Italian: {text}",
            "{text}\nHow do you say this in Italian?",
            'Write the Italian version of this software description: "{text}"',
            "English: {text}\nItalian:",
        ),
        items=_gathered.italian_synopses,
        max_new_tokens=40,
    ),
    Task(
        name="number-words-fr",
        summary="Write a number below 10 000 in French words.",
        metric="em",
        languages=("fr", "en"),
        source="whole numbers spelled by the Python package num2words",
        licence_id="apache-2.0",
        licence=_GENERATED_LICENCE.format(tool="num2words itself is LGPL and is used, not shipped. "),
        templates=(
            "Write {text} in French words.",
            "How do you spell the number {text} in French?",
            "Écris le nombre {text} en toutes lettres.",
            "Number: {text}\nIn French:",
        ),
        items=_generated.french_numbers,
        max_new_tokens=32,
    ),
    Task(
        name="date-iso",
        summary="Turn a date as six languages write it into ISO 8601.",
        metric="em",
        languages=("en", "fr", "de", "it", "es", "pt"),
        source="random dates from 1950 to 2049, written by the Python package Babel",
        licence_id="apache-2.0",
        licence=_GENERATED_LICENCE.format(
            tool="Babel is BSD-licensed and its month names come from Unicode CLDR (Unicode licence). "
        ),
        templates=(
            "Convert this date to ISO 8601: {text}",
            "{text}\nWrite this date as YYYY-MM-DD.",
            "Normalise the date '{text}' to the form year-month-day.",
            "Date: {text}\nISO:",
        ),
        items=_generated.written_dates,
        max_new_tokens=16,
    ),
    Task(
        name="contact-json",
        summary="Pull name, e-mail, company and city out of a sentence, as JSON.",
        metric="em",
        languages=("en",),
        source="invented people from the Python package Faker in six sentence patterns",
        licence_id="apache-2.0",
        licence=_GENERATED_LICENCE.format(tool="Faker is MIT-licensed; every person in the rows is invented. "),
        templates=(
            "Extract the contact as JSON with the keys name, email, company, city.\n{text}",
            "{text}\nReturn name, email, company and city as a JSON object.",
            "Fill a JSON record (name, email, company, city) from this note: {text}",
            "Note: {text}\nJSON contact:",
        ),
        items=_generated.contacts,
        max_new_tokens=80,
    ),
    Task(
        name="text-to-sql",
        summary="Write the SQL query for a question about one table.",
        metric="em",
        languages=("en",),
        source="questions and queries generated by a small grammar over eight table schemas",
        licence_id="apache-2.0",
        licence=_GENERATED_LICENCE.format(tool=""),
        templates=(
            "Table: {context}\nQuestion: {text}\nSQL:",
            "Write a SQL query for the table {context}. {text}",
            "{text}\nAnswer with one SQL statement on {context}.",
            "Given the schema {context}, turn this request into SQL: {text}",
        ),
        items=_sql.sql_questions,
        max_new_tokens=48,
    ),
    Task(
        name="word-category",
        summary=f"Put a noun with its definition into one of {len(_gathered.CATEGORIES)} categories.",
        metric="em",
        languages=("en",),
        source=f"noun glosses and lexicographer files of WordNet 3.1, from npm {WORDNET_PACKAGE}",
        licence_id="other",
        licence=(
            "WordNet is copyright Princeton University; its licence permits use, copying, modification and "
            "distribution for any purpose without fee, if its notice is kept:\n\n" + _notices.WORDNET
        ),
        templates=(
            "What kind of thing is a {context} ({text})? Choose from: "
            + ", ".join(_gathered.CATEGORIES.values())
            + ".",
            "{context}: {text}\nCategory (" + "/".join(_gathered.CATEGORIES.values()) + "):",
            'The word "{context}" means "{text}". Which of these does it name: '
            + ", ".join(_gathered.CATEGORIES.values())
            + "? Answer with one word.",
        ),
        items=_gathered.noun_categories,
    ),
    Task(
        name="language-id",
        summary=f"Name the language of a sentence, one of {len(_gathered.LANGUAGES)}.",
        metric="em",
        languages=("en", "it", "fr", "de", "es", "pl", "pt"),
        source=f"first sentences of package descriptions of Debian {DEBIAN_SUITE} main in seven languages",
        licence_id="other",
        licence=_DEBIAN_LICENCE.format(extra=_TRANSLATIONS),
        templates=(
            "Which language is this?\n{text}",
            "{text}\n\nName the language of the sentence above.",
            'In what language is "{text}" written?',
            "Sentence: {text}\nLanguage:",
        ),
        items=_gathered.language_sentences,
    ),
    Task(
        name="identifier-case",
        summary="Rewrite a name or phrase in snake_case.",
        metric="em",
        languages=("en",),
        source="random names of three or four words in five spellings, generated from small word lists",
        licence_id="apache-2.0",
        licence=_GENERATED_LICENCE.format(tool=""),
        templates=(
            "Convert to snake_case: {text}",
            "Rename {text} so that it follows the snake_case convention.",
            "What is {text} in snake case?",
            "{text} -> snake_case:",
        ),
        items=_generated.identifiers,
        max_new_tokens=20,
    ),
)

TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _ALL})
