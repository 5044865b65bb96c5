"""FiftyOne and datumaro, CVAT's reader of data sets: what their own interfaces find in our exports.

They pin their own dependencies: LPCAM_FIFTYONE and LPCAM_DATUMARO name a Python that has them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lpcam.data.dataset import ClassTable
from lpcam.data.masks import write_mask
from lpcam.formats.masks.base import MaskEntry
from lpcam.formats.masks.export import export_masks

TABLE = ClassTable(("cow", "horse"), (10, 3))
FIFTYONE = """
import json, sys
try:
    import fiftyone as fo
except ImportError:
    sys.exit("FiftyOne is not installed")
from fiftyone.core.odm import database
try:
    database.establish_db_conn(fo.config)
except Exception as error:
    # Its MongoDB is downloaded while it is installed. A stand-in counts as well.
    try:
        import mongomock, mongomock.codec_options, mongomock.store, mongoengine
    except ImportError:
        sys.exit(f"FiftyOne has no database ({error})")
    store, connect = mongomock.store.ServerStore(), mongoengine.connect
    class Client(mongomock.MongoClient):
        def __init__(self, *words, **options):
            super().__init__(_store=store)
    import bson.codec_options
    bson.codec_options.TypeRegistry.__eq__ = lambda *_: True
    mongomock.codec_options.is_supported = lambda options: options
    database.pymongo.MongoClient = Client
    database._is_client_closed = lambda client: client is None
    database._validate_db_version = lambda *_: None
    database.mongoengine.connect = lambda name, **_: connect(name, mongo_client_class=Client)
    fo.config.database_uri, fo.config.database_validation = "mongodb://localhost", False
data = fo.Dataset.from_dir(sys.argv[1], dataset_type=fo.types.FiftyOneDataset)
found = {"counts": data.count_values("objects.detections.label"), "images": len(data)}
found["targets"] = data.default_mask_targets
found["bounds"] = data.bounds("quality")
found["masks"] = [sample.masks.get_mask().tolist() for sample in data]
found["heat"] = [sample.heat.get_map().tolist() for sample in data if sample.heat]
print("FOUND" + json.dumps(found))
"""
DATUMARO = """
import json, sys
try:
    import datumaro
except ImportError:
    sys.exit("datumaro is not installed")
found = {}
data = datumaro.Dataset.import_from(sys.argv[1], "cvat")
names = [one.name for one in data.categories()[datumaro.AnnotationType.label]]
for item in data:
    found[item.id] = [[names[one.label], one.image.tolist()] for one in item.annotations]
print("FOUND" + json.dumps(found))
"""


def asked(program: str, variable: str, *words: Path, home: Path) -> Any:
    """What a program for another Python prints; skips with the reason where it cannot run."""
    environment = {**os.environ, "HOME": str(home), "FIFTYONE_DO_NOT_TRACK": "true"}
    environment["FIFTYONE_DISABLE_SERVICES"] = ""
    command = [os.environ.get(variable, sys.executable), "-c", program, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode and (last := done.stderr.strip().splitlines()[-1]).startswith(
        ("FiftyOne", "datumaro")
    ):
        pytest.skip(f"{last}; {variable} may name a Python that has it")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.partition("FOUND")[2])


@pytest.fixture
def entries(tmp_path: Path) -> list[MaskEntry]:
    found = []
    for number, size in enumerate([(31, 44), (20, 63)]):
        coarse = np.random.default_rng(number).choice([0, 3, 10, 255], size=(8, 16))
        mask = np.kron(coarse, np.ones((4, 4)))[: size[0], : size[1]].astype(np.uint8)
        entry = MaskEntry(
            f"i{number}", tmp_path / f"data/i{number}.png", tmp_path / f"{number}.png"
        )
        entry.mask.parent.joinpath("data").mkdir(exist_ok=True)
        write_mask(entry.mask, mask)
        Image.new("RGB", size[::-1]).save(entry.image or Path())
        found.append(entry)
    return found


def test_fiftyone_opens_and_counts(entries: list[MaskEntry], tmp_path: Path) -> None:
    def judge(entry: MaskEntry, mask: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        return (mask == 3).astype(np.float32), {"quality": 0.25 if entry.id == "i0" else 0.75}

    done = export_masks(entries, TABLE, tmp_path / "out", "fiftyone", instances=True, judge=judge)
    found = asked(FIFTYONE, "LPCAM_FIFTYONE", tmp_path / "out", home=tmp_path)
    assert found["images"] == 2 and sum(found["counts"].values()) == done.annotations > 5
    assert found["targets"] == {"3": "horse", "10": "cow"}
    assert found["bounds"] == [0.25, 0.75]
    for entry, mask, heat in zip(entries, found["masks"], found["heat"], strict=True):
        truth = np.array(Image.open(entry.mask))
        np.testing.assert_array_equal(mask, truth)
        np.testing.assert_array_equal(heat, 255 * (truth == 3))


def test_datumaro_reads_what_cvat_imports(entries: list[MaskEntry], tmp_path: Path) -> None:
    export_masks(entries, TABLE, tmp_path / "out", "cvat")
    (tmp_path / "data").rename(tmp_path / "out/images")
    found = asked(DATUMARO, "LPCAM_DATUMARO", tmp_path / "out", home=tmp_path)
    for entry in entries:
        truth = np.array(Image.open(entry.mask))
        mask = np.zeros_like(truth)
        for name, pixels in found[entry.id]:
            mask[np.array(pixels) > 0] = TABLE.mask_ids[TABLE.index(name)]
        np.testing.assert_array_equal(mask, np.where(truth == 255, 0, truth))
