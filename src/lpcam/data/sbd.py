"""``train_aug``: VOC's train list enlarged by the Semantic Boundaries Dataset (SBD).

Of SBD every image that is not in VOC's val; with the released files 10,582 in all (specification of
data sets, section 1).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpcam.data.dataset import check_unique
from lpcam.data.images import upright_size
from lpcam.data.labels import read_lines
from lpcam.data.masks import read_index_mask, write_mask
from lpcam.data.voc import CLASSES, LISTS, find_root, read_list
from lpcam.runtime.errors import DataError, import_extra
from lpcam.runtime.files import write_bytes
from lpcam.runtime.parallel import progress_map

LIST = "train_aug"  #: Name of the list.
MASKS = "SegmentationClassAug"  #: Folder of the masks of the list and of VOC's val.


def make_train_aug(voc: Path, sbd: Path, output: Path | None = None, *, workers: int = 1) -> str:
    """Write the list ``train_aug`` and index masks of its images and VOC's val; what was done.

    Images of VOC's train and val get VOC's masks; the others get those of SBD, which have no 255.
    Equal masks that exist are kept, so a stopped call can be repeated. The list is written last.

    Args:
        voc: as in `lpcam.data.voc.read_voc`; with JPEGImages, SegmentationClass, train and val.
        sbd: the folder ``benchmark_RELEASE``, its ``dataset``, or the parent of the first.
        output: folder to write; None: the VOC folder.
        workers: number of images processed at a time.

    Raises:
        DataError: if something is missing, damaged, of another size, or there with other contents.
    """
    loadmat = import_extra("scipy.io", "objects", "SBD's .mat files need SciPy").loadmat
    root, places = find_root(voc), (sbd, sbd / "dataset", sbd / "benchmark_RELEASE" / "dataset")
    dataset = next((folder for folder in places if (folder / "cls").is_dir()), None)
    if dataset is None:
        raise DataError(
            f"{sbd} is not an SBD folder; expected benchmark_RELEASE/dataset (or a folder that "
            "holds it) with cls/ID.mat, train.txt and val.txt"
        )
    output = output or root
    train, val = read_list(root, "train"), read_list(root, "val")
    in_sbd = set[str]()
    for path in (dataset / "train.txt", dataset / "val.txt"):
        ids_of_list = [image_id for _, image_id in read_lines(path)]
        check_unique(ids_of_list, f"list {path}")
        if not ids_of_list:
            raise DataError(f"list {path} is empty; download SBD again")
        in_sbd.update(ids_of_list)
    official = {*train, *val}
    ids = tuple(sorted({*train, *(in_sbd - set(val))}))
    list_path = output / LISTS / f"{LIST}.txt"
    if list_path.is_file() and read_list(output, LIST) != ids:
        raise DataError(
            f"{list_path} exists with other images than the {len(ids)} of VOC and SBD, or in "
            "another order; move it away or choose another output folder"
        )

    everything = sorted(official | set(ids))
    truth = {i: dataset / "cls" / f"{i}.mat" for i in everything}
    truth |= {i: root / "SegmentationClass" / f"{i}.png" for i in official}
    images = {i: root / "JPEGImages" / f"{i}.jpg" for i in everything}
    copies = {i: dataset / "img" / path.name for i, path in images.items() if not path.is_file()}
    images |= {i: copy for i, copy in copies.items() if copy.is_file()}
    missing = [path for path in (*truth.values(), *images.values()) if not path.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} files of the lists are missing, the first is {missing[0]}; unpack all "
            "of VOC's trainval archive and of SBD's benchmark archive"
        )

    def make(image_id: str) -> bool:
        path, target = truth[image_id], output / MASKS / f"{image_id}.png"
        mask = read_index_mask(path) if image_id in official else _read_mat(path, loadmat)
        size = upright_size(images[image_id])
        if mask.shape != size:
            raise DataError(
                f"the mask of {path} is {mask.shape[0]} x {mask.shape[1]} (height x width) but its "
                f"image {images[image_id]} is {size[0]} x {size[1]}; download both again"
            )
        if not target.is_file():
            write_mask(target, mask)
            return True
        if not np.array_equal(read_index_mask(target), mask):
            way = "move it away or choose another output folder"
            raise DataError(f"{target} exists and differs from {path}; {way}")
        return False

    written = sum(progress_map("masks", make, everything, workers))
    if not list_path.is_file():
        write_bytes(list_path, "".join(f"{image_id}\n" for image_id in ids).encode())
    counts = {
        "train": len(train),
        "val": len(val),
        "sbd": len(in_sbd),
        "sbd in val": len(in_sbd & set(val)),
        "train_aug": len(ids),
        "masks written": written,
        "masks kept": len(everything) - written,
    }
    told = ", ".join(f"{name}: {count:,}" for name, count in counts.items())
    return f"{told}\nlist {list_path}\nmasks in {output / MASKS}"


def _read_mat(path: Path, loadmat: Callable[..., Any]) -> NDArray[np.uint8]:
    """The class mask of one of SBD's ``cls/ID.mat``, uint8 (H, W): 0, and 1 to 20 as in VOC."""
    try:
        data = io.BytesIO(path.read_bytes())
        values = loadmat(data, variable_names=["GTcls"])["GTcls"]["Segmentation"][0, 0]
    except Exception as error:  # damaged files make SciPy raise anything
        raise DataError(
            f"{path} is damaged or has no GTcls.Segmentation ({type(error).__name__}: "
            f"{str(error)[:120]}); download it again"
        ) from error
    values = np.asarray(values)
    matrix = values.ndim == 2 and values.dtype.kind in "iu" and values.size
    if not matrix or values.min() < 0 or values.max() > len(CLASSES):
        bounds = f" with values from {values.min()} to {values.max()}" if matrix else ""
        raise DataError(
            f"GTcls.Segmentation of {path} is {values.dtype} {values.shape}{bounds}; expected a "
            f"matrix of integers from 0 to {len(CLASSES)}, as in SBD's cls folder"
        )
    return np.ascontiguousarray(values, dtype=np.uint8)
