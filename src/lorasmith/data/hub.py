"""A data set of the Hugging Face hub as a file of rows, through the library `datasets`."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from lorasmith.errors import DataError, MachineError, UsageError, os_errors
from lorasmith.files.atomic import aside
from lorasmith.files.digests import cache_folder


def export(repository: str, split: str | None) -> Path:
    """The rows of one split as a Parquet file in the cache.

    `HF_HOME`, `HF_ENDPOINT`, `HF_HUB_OFFLINE` and `HF_TOKEN` mean what they mean to the library. Raises
    `UsageError` where a split has to be named, `DataError` for a data set that the hub does not have or the
    library cannot read, `MachineError` where the library is missing.
    """
    try:
        import datasets
    except ImportError as error:
        raise MachineError(
            "data sets of the hub need the library datasets",
            where=repository,
            remedy="pip install 'lorasmith[data]', or download the files and give them",
        ) from error
    try:
        known = datasets.get_dataset_split_names(repository)
    except Exception as error:  # the library lets errors of many others through
        raise _unreadable(repository, error) from error
    chosen = split or (known[0] if len(known) == 1 else None)
    if chosen is None:
        raise UsageError(
            f"the data set has the splits {', '.join(known)}",
            where=repository,
            expected="one of them",
            remedy=f"give {repository}:{known[0]}",
        )
    try:
        rows = datasets.load_dataset(repository, split=chosen)
    except Exception as error:
        raise _unreadable(f"{repository}:{chosen}", error) from error
    # The fingerprint is the library's name for these very rows.
    name = hashlib.sha256(f"{repository}:{chosen}:{rows._fingerprint}".encode()).hexdigest()[:32]
    place = cache_folder() / "hub-rows" / f"{re.sub(r'[^A-Za-z0-9]', '-', repository)}-{name}.parquet"
    if not place.is_file():
        with os_errors(place, "write"):
            place.parent.mkdir(parents=True, exist_ok=True)
            partial = aside(place)
            rows.to_parquet(str(partial))
            partial.replace(place)
    return place


def _unreadable(named: str, error: Exception) -> DataError:
    told = " ".join(str(error).split())[:300]
    return DataError(
        f"the data set cannot be read: {told or type(error).__name__}",
        where=named,
        expected="org/name[:split] of a data set that this computer may read, or a file that is there",
        remedy="check name and split, HF_TOKEN for private ones, or give a local file",
    )
