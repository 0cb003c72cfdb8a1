"""API keys: who may ask the server, for which namespace, and for what."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal, cast, get_args

from sqlalchemy import Engine, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from lora_hub_sdk.errors import ConfigurationError, KeyNotFoundError, NameTakenError
from lora_hub_sdk.registry.naming import LONGEST_NAMESPACE, check_name
from lora_hub_sdk.registry.records import utc
from lora_hub_sdk.registry.tables import ApiKeyRow

#: "generate" answers, "read" lists and searches adapters, "register" adds and removes them, "metrics" is the server's
#: own page, which counts for all namespaces together.
Right = Literal["generate", "read", "register", "metrics"]
RIGHTS: Final[tuple[Right, ...]] = get_args(Right)
_LONGEST_NAME: Final = 128
_SECRET: Final = re.compile(r"lh_[A-Za-z0-9_-]{43}")
#: Enough of a secret to tell one from another by eye; 37 characters, 222 bits, stay unknown.
_SHOWN: Final = 9


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key without its secret, of which ``prefix`` is the beginning. Times are in UTC."""

    id: int
    name: str
    namespace: str
    rights: tuple[Right, ...]
    prefix: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None

    def allows(self, right: Right) -> bool:
        """Whether the key was given this right."""
        return right in self.rights

    def is_valid(self, now: datetime | None = None) -> bool:
        """Whether the key is neither revoked nor expired."""
        return self.revoked_at is None and (self.expires_at is None or (now or datetime.now(UTC)) < self.expires_at)


class ApiKeys:
    """The keys of one registry. Thread-safe. A secret is shown once, when its key is made; only its sha256 is kept.

    The secret is 256 random bits, so that a fast hash is enough: there is nothing to guess.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def create(
        self,
        name: str,
        *,
        namespace: str,
        rights: Iterable[Right] = ("generate", "read"),
        expires_at: datetime | None = None,
    ) -> tuple[ApiKey, str]:
        """Make a key, and return it with its secret: "lh_" and 43 characters.

        Args:
            name: unique among all keys, revoked ones too.
            namespace: the only one that the key opens; it may have no adapters yet.
            expires_at: a time with a zone; None for a key that stays.

        Raises:
            NameTakenError: there is, or was, a key of that name.
            ConfigurationError: no name, an unknown right or none, or a time that is past or has no zone.
        """
        check_name("name", name, _LONGEST_NAME)
        check_name("namespace", namespace, LONGEST_NAMESPACE)
        now = datetime.now(UTC)
        secret = f"lh_{secrets.token_urlsafe(32)}"
        row = ApiKeyRow(
            name=name,
            namespace=namespace,
            rights=_checked_rights(rights),
            prefix=secret[:_SHOWN],
            digest=secret_digest(secret),
            created_at=now,
            expires_at=_checked_end(expires_at, now),
        )
        try:
            with Session(self._engine, expire_on_commit=False) as session, session.begin():
                session.add(row)
        except IntegrityError as error:
            raise NameTakenError(
                f"there is, or was, an API key {name!r}; names are not given twice, so that a log tells of one key: "
                "choose another"
            ) from error
        return _key_of(row), secret

    def find(self, secret: str) -> ApiKey | None:
        """The key of a secret; None for one that is unknown, revoked or expired."""
        if not _SECRET.fullmatch(secret):
            return None
        with Session(self._engine) as session:
            row = session.scalar(select(ApiKeyRow).where(ApiKeyRow.digest == secret_digest(secret)))
        key = None if row is None else _key_of(row)
        return key if key is not None and key.is_valid() else None

    def list(self) -> tuple[ApiKey, ...]:
        """Every key that was ever made, revoked and expired ones too, in the order of making."""
        with Session(self._engine) as session:
            return tuple(map(_key_of, session.scalars(select(ApiKeyRow).order_by(ApiKeyRow.id))))

    def revoke(self, name: str) -> ApiKey:
        """End a key for ever; nothing changes where that was done already.

        Raises:
            KeyNotFoundError: there is none of that name.
        """
        named = ApiKeyRow.name == name
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            # Written first, since SQLite refuses to turn a reader into a writer while others write.
            ended = update(ApiKeyRow).where(named, ApiKeyRow.revoked_at.is_(None))
            session.execute(ended.values(revoked_at=datetime.now(UTC)))
            row = session.scalar(select(ApiKeyRow).where(named))
        if row is None:
            raise KeyNotFoundError(f"there is no API key {name!r}; `lora-hub keys list` shows them all")
        return _key_of(row)


def secret_digest(secret: str) -> str:
    """What is kept of a secret: 64 hex digits."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _checked_rights(given: Iterable[str]) -> list[str]:
    chosen = {given} if isinstance(given, str) else set(given)
    if not chosen or not chosen <= set(RIGHTS):
        raise ConfigurationError(f"rights={sorted(chosen)!r}: expected one or more of {', '.join(RIGHTS)}")
    return [right for right in RIGHTS if right in chosen]


def _checked_end(end: datetime | None, now: datetime) -> datetime | None:
    if end is None:
        return None
    if end.tzinfo is None:
        raise ConfigurationError(f"expires_at={end.isoformat()!r} has no time zone; give one, like datetime.now(UTC)")
    if end <= now:
        raise ConfigurationError(f"expires_at={end.isoformat()!r} is past")
    return end.astimezone(UTC)


def _key_of(row: ApiKeyRow) -> ApiKey:
    return ApiKey(
        id=row.id,
        name=row.name,
        namespace=row.namespace,
        rights=tuple(cast(Right, right) for right in row.rights),
        prefix=row.prefix,
        created_at=utc(row.created_at),
        expires_at=None if row.expires_at is None else utc(row.expires_at),
        revoked_at=None if row.revoked_at is None else utc(row.revoked_at),
    )
