"""What runs after each other share, such as the arms of an experiment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lpcam.classifiers.feature_store import FeatureStore
from lpcam.pipeline.run_folder import RunFolder
from lpcam.runtime.files import link, read_bytes, write_bytes


@dataclass
class Shared:
    """Finished results of other runs, and features in memory."""

    folders: Sequence[Path] = ()  #: Folders of other runs.
    _stores: dict[str, FeatureStore] = field(default_factory=dict)

    def begin(self, folder: Path) -> None:
        """Give a new run what another one found out about the images and the engine."""
        own, others = RunFolder(folder), map(RunFolder, self.folders)
        other = next((one for one in others if one.index.is_file()), None)
        if other is not None and not own.index.is_file():
            write_bytes(own.index, read_bytes(other.index))
            link(other.engine, own.engine)

    def features(self, key: str, make: Callable[[], FeatureStore]) -> FeatureStore:
        """The features of a key; those of another key are forgotten, as they need memory."""
        if key not in self._stores:
            self._stores.clear()
            self._stores[key] = make()
        return self._stores[key]

    def forget(self) -> None:
        """Give the memory of the features back."""
        self._stores.clear()
