"""Made-up adapters for the registry benchmark: their vectors, and two ways to write them into SQL."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine, insert, select, update

from lora_hub_sdk.registry.adapter_config import AdapterConfig
from lora_hub_sdk.registry.admission import Admitted
from lora_hub_sdk.registry.index import Vector
from lora_hub_sdk.registry.queries import ENCODER as ACTIVE
from lora_hub_sdk.registry.queries import VERSION
from lora_hub_sdk.registry.records import (
    EncoderRecord,
    Registration,
    Representation,
    adapter_row,
    embedding_row,
    revision_row,
    sample_rows,
    tag_rows,
)
from lora_hub_sdk.registry.source import Pulled
from lora_hub_sdk.registry.tables import Base, EncoderRow, EventRow, MetaRow, NamespaceRow

Matrix = NDArray[np.float32]

DIMENSION: Final = 384
ENCODER: Final = hashlib.sha256(b"an encoder that nobody has").hexdigest()
#: Half of the adapters are for each.
BASES: Final = ("bench/base-a", "bench/base-b")
_ENCODER_NAME: Final = "bench/encoder"
_SAMPLES: Final = 20
_CENTRES: Final = 300
#: Length of the noise around a centre of length 1: a prompt then has a cosine of about 0.6 to its own.
_NOISE: Final = 4 / 3
_PER_INSERT: Final = 1000


def clustered(count: int, *, samples: int, seed: int) -> Matrix:
    """(count, 384), each the mean of ``samples`` noisy points around one of 300 centres, brought to length 1.

    The mean of m points c + e, with Gaussian e, is distributed as c + e / sqrt(m): that is drawn. One sample makes a
    prompt, 20 an adapter.
    """
    centres = uniform(_CENTRES, seed=0)
    draw = np.random.default_rng((1, seed))
    noise = draw.standard_normal((count, DIMENSION), dtype=np.float32) * (_NOISE / (samples * DIMENSION) ** 0.5)
    return _units(centres[draw.integers(_CENTRES, size=count)] + noise)


def uniform(count: int, *, seed: int) -> Matrix:
    """(count, 384) of length 1 in any direction."""
    return _units(np.random.default_rng((0, seed)).standard_normal((count, DIMENSION), dtype=np.float32))


def name_of(place: int) -> str:
    """The name of an adapter."""
    return f"bench/lora-{place:06d}"


def tag_of(place: int) -> str:
    """The tag that an adapter shares with a tenth of all."""
    return f"tenth-{place % 10}"


def base_of(place: int) -> str:
    """The base model of an adapter."""
    return BASES[place // 10 % len(BASES)]  # whatever is told by the last digit has both


def registration(place: int, vector: Vector, namespace: str) -> Registration:
    """As a pulled adapter of the Hub brings it: 20 samples of 100 characters, three tags, a described card."""
    revision = f"{place:040x}"
    name = name_of(place)
    return Registration(
        name=name,
        namespace=namespace,
        pulled=Pulled(
            repo_id=name,
            revision=revision,
            folder=Path(f"/cache/models--{name.replace('/', '--')}/snapshots/{revision}"),
            license="apache-2.0",
            description=f"Adapter {place} of a benchmark. ".ljust(200, "."),
            tags=("lora", f"base_model:adapter:{base_of(place)}"),
            is_local=False,
        ),
        admitted=Admitted(AdapterConfig(base_of(place), 8, 16.0), f"{place:064x}", ("m.q_proj", "m.v_proj"), 1 << 20),
        base_model=base_of(place),
        representation=Representation(
            vector=vector,
            encoder=ENCODER,
            encoder_name=_ENCODER_NAME,
            origin="samples",
            texts=tuple(f"Adapter {place}, sample {sample}: ".ljust(100, "x") for sample in range(_SAMPLES)),
            count=_SAMPLES,
        ),
        tags=(tag_of(place),),
    )


def insert_in_bulk(engine: Engine, registrations: Iterable[Registration], actor: str) -> None:
    """Write into an empty registry the rows that ``Registry.add`` would write, in one transaction."""
    now, given = datetime.now(UTC), iter(registrations)
    with engine.begin() as connection:
        before = int(connection.scalars(select(MetaRow.value).where(MetaRow.key == VERSION)).one())
        connection.execute(insert(EncoderRow), {"fingerprint": ENCODER, "name": _ENCODER_NAME, "dimension": DIMENSION})
        number, namespaces = 0, set[str]()
        while part := list(islice(given, _PER_INSERT)):
            rows: dict[type[Base], list[dict[str, Any]]] = {}
            for one in part:
                number += 1
                if one.namespace not in namespaces:
                    namespaces.add(one.namespace)
                    connection.execute(insert(NamespaceRow), {"name": one.namespace, "created_at": now})
                for row in _rows(number, one, before + number, actor, now):
                    rows.setdefault(type(row), []).append(_values(row))
            for table, values in rows.items():
                connection.execute(insert(table), values)
        connection.execute(update(MetaRow).where(MetaRow.key == VERSION).values(value=str(before + number)))
        if number:
            record = EncoderRecord(ENCODER, _ENCODER_NAME)
            connection.execute(insert(MetaRow), {"key": ACTIVE, "value": record.as_text()})


def _rows(number: int, given: Registration, version: int, actor: str, now: datetime) -> Iterator[Base]:
    """All rows of one adapter, whose id will be ``number``."""
    represented = given.representation
    assert represented is not None
    row = adapter_row(given, now)
    row.id, row.origin, row.sample_count = number, represented.origin, represented.count
    yield row
    yield revision_row(number, given, now)
    yield from tag_rows(number, given.pulled.tags, given.tags)
    yield from sample_rows(number, represented.texts)
    yield embedding_row(number, represented.encoder, represented.vector)
    yield EventRow(
        version=version,
        at=now,
        actor=actor,
        action="registered",
        adapter_id=number,
        namespace=given.namespace,
        name=given.name,
        detail={"revision": given.revision, "origin": represented.origin},
    )


def _values(row: Base) -> dict[str, Any]:
    return {name: value for name, value in vars(row).items() if not name.startswith("_")}


def _units(vectors: Matrix) -> Matrix:
    lengths: Matrix = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / lengths
