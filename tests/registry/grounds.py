"""What crash and crowd tests register: repositories of two revisions, folders, and the truth about their content."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lora_hub_sdk.engine.shapes import module_layout
from lora_hub_sdk.testing import LocalHub, tiny_adapter, unregistered
from lora_hub_sdk.testing.tiny import ATTENTION, MLP
from tests.registry.report import content_of
from tests.registry.worker import Place


class Grounds:
    """A Hub, folders of adapters, a place for a registry, and the sha256 of each content.

    ``repositories`` gives the commits of each repository, oldest first; ``folders`` the local folders by name.
    """

    def __init__(self, folder: Path, base: Path, hub: LocalHub) -> None:
        self.place = Place(str(folder / "hub.db"), folder / "cache", hub.url)
        self.folders: dict[str, Path] = {}
        self.repositories: dict[str, tuple[str, ...]] = {}
        self.contents: dict[tuple[str, str], str] = {}
        self._folder, self._base, self._hub = folder, base, hub

    def publish(self, repo_id: str) -> None:
        """A repository of two revisions of some 100 KB that share their configuration and card."""
        commits = []
        for seed in (1, 2):
            made = self._make(f"{repo_id}@{seed}", seed)
            commits.append(self._hub.publish(repo_id, made))
            self.contents[repo_id, commits[-1]] = content_of(made)
        self.repositories[repo_id] = tuple(commits)

    def fork(self, names: Iterable[str]) -> None:
        """Repositories of one revision that all have the same commit, as forks on the Hub do."""
        made, names = self._make("fork", 4), [*names]
        commits = [self._hub.publish(name, made) for name in names]
        repositories = [repo for name in names if (repo := self._hub.repo(name, "models")) is not None]
        for repo in repositories:
            repo.commits, repo.branches = repositories[0].commits, repositories[0].branches
            self.contents[repo.id, commits[0]] = content_of(made)

    def lay(self, name: str) -> str:
        """An adapter in a local folder; returns its revision."""
        self.folders[name] = made = self._make(name, 3)
        revision = unregistered(made, module_layout(self._base)).revision
        self.contents[str(made), revision] = content_of(made)
        return revision

    def newest(self, source: str) -> str:
        """The revision of a repository's main branch, or of a folder."""
        return [revision for known, revision in self.contents if known == source][-1]

    def _make(self, name: str, seed: int) -> Path:
        folder = self._folder / "sources" / name
        made = tiny_adapter(folder, self._base, rank=32, seed=seed, modules=(*ATTENTION, *MLP))
        (made / "README.md").write_text(f"---\nlicense: mit\n---\n# {name.partition('@')[0]}\n")
        return made
