"""Questions about one table and the SQL that answers them, made from a small grammar."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lora_hub_sdk.demo.training._rows import Item
from lora_hub_sdk.demo.training.sources import SourceCache


@dataclass(frozen=True)
class Table:
    """A table with two text columns (with values to ask for) and two numeric ones."""

    name: str
    text: dict[str, tuple[str, ...]]
    numbers: tuple[str, str]

    @property
    def schema(self) -> str:
        """The table as the prompt shows it."""
        return f"{self.name}({', '.join((*self.text, *self.numbers))})"


@dataclass(frozen=True)
class Query:
    """A question and its SQL."""

    question: str
    sql: str


_CITIES = ("Paris", "Rome", "Oslo", "Lima", "Cairo", "Boston", "Kyoto", "Madrid")
_COLOURS = ("red", "blue", "green", "black", "white", "yellow")
_PEOPLE = ("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo")

TABLES = (
    Table("books", {"title": ("Dune", "Emma", "Ulysses"), "author": _PEOPLE}, ("year", "pages")),
    Table("employees", {"name": _PEOPLE, "city": _CITIES}, ("salary", "age")),
    Table("cars", {"brand": ("Fiat", "Volvo", "Skoda", "Tesla"), "color": _COLOURS}, ("price", "year")),
    Table("hotels", {"name": ("Astoria", "Bellevue", "Central"), "city": _CITIES}, ("stars", "rooms")),
    Table("orders", {"customer": _PEOPLE, "city": _CITIES}, ("total", "quantity")),
    Table("players", {"name": _PEOPLE, "team": ("Lions", "Tigers", "Bears", "Wolves")}, ("goals", "age")),
    Table("flights", {"origin": _CITIES, "destination": _CITIES}, ("distance", "price")),
    Table("songs", {"title": ("Alive", "Blue", "Circles"), "artist": _PEOPLE}, ("length", "plays")),
)

_AGGREGATES = {
    "AVG": ("What is the average {0} of the {1}", "Give the mean {0} of the {1}"),
    "MAX": ("What is the highest {0} among the {1}", "Find the largest {0} of the {1}"),
    "MIN": ("What is the lowest {0} among the {1}", "Find the smallest {0} of the {1}"),
    "SUM": ("What is the total {0} of the {1}", "Add up the {0} of all {1}"),
}
_COMPARISONS = {">": ("above", "greater than", "over"), "<": ("below", "less than", "under")}


@dataclass(frozen=True)
class Condition:
    """A WHERE clause in words and in SQL, both with their leading space; both empty for no condition."""

    words: str
    sql: str


def no_condition(table: Table, rng: random.Random) -> Condition:
    """Ask about every row."""
    return Condition("", "")


def text_condition(table: Table, rng: random.Random) -> Condition:
    """Ask about the rows with one text value."""
    column = rng.choice(list(table.text))
    value = rng.choice(table.text[column])
    words = rng.choice((f"with {column} {value}", f"where the {column} is {value}"))
    return Condition(f" {words}", f" WHERE {column} = '{value}'")


def number_condition(table: Table, rng: random.Random) -> Condition:
    """Ask about the rows above or below a number."""
    column = rng.choice(table.numbers)
    sign = rng.choice(list(_COMPARISONS))
    value = rng.randrange(2, 1000)
    return Condition(f" with {column} {rng.choice(_COMPARISONS[sign])} {value}", f" WHERE {column} {sign} {value}")


_CONDITIONS = (no_condition, text_condition, text_condition, number_condition, number_condition)


def count_query(table: Table, condition: Condition, rng: random.Random) -> Query:
    """Count rows."""
    question = rng.choice(("How many {0} are there{1}?", "Count the {0}{1}."))
    return Query(question.format(table.name, condition.words), f"SELECT COUNT(*) FROM {table.name}{condition.sql};")


def aggregate_query(table: Table, condition: Condition, rng: random.Random) -> Query:
    """Aggregate a numeric column."""
    function = rng.choice(list(_AGGREGATES))
    column = rng.choice(table.numbers)
    question = rng.choice(_AGGREGATES[function]).format(column, table.name)
    end = "?" if question.startswith("What") else "."
    return Query(question + condition.words + end, f"SELECT {function}({column}) FROM {table.name}{condition.sql};")


def select_query(table: Table, condition: Condition, rng: random.Random) -> Query:
    """List one column."""
    column = rng.choice((*table.text, *table.numbers))
    question = rng.choice(("Show the {0} of the {1}{2}.", "List the {0} of all {1}{2}."))
    sql = f"SELECT {column} FROM {table.name}{condition.sql};"
    return Query(question.format(column, table.name, condition.words), sql)


def top_query(table: Table, condition: Condition, rng: random.Random) -> Query:
    """List the rows at one end of an order."""
    shown = rng.choice(list(table.text))
    column = rng.choice(table.numbers)
    word, order = rng.choice((("highest", "DESC"), ("lowest", "ASC")))
    count = rng.randrange(2, 10)
    question = f"Show the {shown} of the {count} {table.name} with the {word} {column}."
    return Query(question, f"SELECT {shown} FROM {table.name} ORDER BY {column} {order} LIMIT {count};")


_QUERIES: tuple[Callable[[Table, Condition, random.Random], Query], ...] = (
    count_query,
    aggregate_query,
    select_query,
    top_query,
)


def sql_questions(rng: random.Random, cache: SourceCache) -> Iterator[Item]:
    """Yield a table (as context), a question about it and the query that answers it."""
    while True:
        table = rng.choice(TABLES)
        condition = rng.choice(_CONDITIONS)(table, rng)
        query = rng.choice(_QUERIES)(table, condition, rng)
        yield Item(query.question, query.sql, context=table.schema)
