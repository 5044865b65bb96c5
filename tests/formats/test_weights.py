"""Foreign weights are converted unchanged, and no code of a file runs."""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import PAYLOADS, text
from safetensors.torch import load_file
from torch import Tensor

from lpcam.formats.weights import convert_weights
from lpcam.runtime.errors import ArtefactError
from lpcam.runtime.files import digest_file, read_tensors


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "bn.running_var": torch.rand(4, generator=generator).half(),
        "bn.num_batches_tracked": torch.tensor(7),
        "half": torch.rand(3, generator=generator).bfloat16(),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "mask": torch.tensor([True, False]),
        "none": torch.zeros(0, 3),
    }


def saved(path: Path, value: Any, *, archive: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=archive)
    return path


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in expected.items()
    )


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "older layout"])
def test_every_value_and_dtype_is_kept(tmp_path: Path, archive: bool) -> None:
    source = saved(tmp_path / "w.pkl", OrderedDict(weights()), archive=archive)
    target = tmp_path / "new" / "w.safetensors"
    done = convert_weights(source, target)
    assert equal(load_file(target), weights())
    assert done == f"7 tensors with 119 values written to {target}"


def test_the_file_says_what_it_was_made_from(tmp_path: Path) -> None:
    source = saved(tmp_path / "w.pth", {"net": {"module.a": torch.ones(2), "note": "x"}})
    target = tmp_path / "w.safetensors"
    convert_weights(source, target)
    _, record = read_tensors(target)
    assert record["source"] == "w.pth" and record["source_digest"] == digest_file(source)
    assert (record["taken_from"], record["stripped"]) == (["net"], "module.")
    assert record["left_out"] == ["note"]
    first = target.read_bytes()
    assert str(tmp_path).encode() not in first
    convert_weights(source, target)
    assert target.read_bytes() == first


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "net"])
def test_a_checkpoint_is_unwrapped_and_says_so(tmp_path: Path, key: str) -> None:
    checkpoint = {"epoch": torch.tensor(3), "optimizer": {"state": {}}, key: {"a": torch.ones(1)}}
    done = convert_weights(saved(tmp_path / "w.pth", checkpoint), tmp_path / "w.safetensors")
    assert "1 tensors with" in done and f"taken from {key!r}" in done


def test_module_is_stripped_only_where_all_names_have_it(tmp_path: Path) -> None:
    all_of_them = {f"module.{name}": tensor for name, tensor in weights().items()}
    done = convert_weights(saved(tmp_path / "a.pth", all_of_them), tmp_path / "a.safetensors")
    assert equal(load_file(tmp_path / "a.safetensors"), weights())
    assert "prefix 'module.' removed" in done
    mixed = {"module.a": torch.ones(1), "b": torch.ones(1)}
    convert_weights(saved(tmp_path / "b.pth", mixed), tmp_path / "b.safetensors")
    assert set(load_file(tmp_path / "b.safetensors")) == {"module.a", "b"}


def test_a_prefix_takes_a_part(tmp_path: Path) -> None:
    source = saved(
        tmp_path / "w.pth",
        {"module.backbone.a": torch.ones(1), "module.head.a": torch.zeros(1)},
    )
    done = convert_weights(source, tmp_path / "w.safetensors", prefix="backbone.")
    assert equal(load_file(tmp_path / "w.safetensors"), {"a": torch.ones(1)})
    assert "weights): 'module.head.a'" in done and "prefix 'module.backbone.' removed" in done
    convert_weights(source, tmp_path / "w.safetensors", prefix="module.backbone.")  # as it spells
    assert equal(load_file(tmp_path / "w.safetensors"), {"a": torch.ones(1)})
    for prefix in ("encoder.", "head.a"):
        with pytest.raises(ArtefactError, match=f"'{prefix}'.*'module.backbone.a'"):
            convert_weights(source, tmp_path / "w.safetensors", prefix=prefix)


def test_shared_and_strided_memory_is_written_out(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"tied": whole, "too": whole, "turned": whole.T, "part": whole[1:, 1:]}
    state["parameter"] = torch.nn.Parameter(whole + 1)
    expected = {name: tensor.detach().clone() for name, tensor in state.items()}
    convert_weights(saved(tmp_path / "w.pth", state), tmp_path / "w.safetensors")
    assert equal(load_file(tmp_path / "w.safetensors"), expected)


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "older layout"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", "<i8", "|u1"])
def test_arrays_of_numpy_become_tensors(tmp_path: Path, archive: bool, dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    state = {"rows": array, "columns": np.asfortranarray(array), "miou": np.float64(0.5)}
    source = saved(tmp_path / "w.pth", state, archive=archive)
    done = convert_weights(source, tmp_path / "w.safetensors")
    native = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    assert equal(load_file(tmp_path / "w.safetensors"), {"rows": native, "columns": native})
    assert "left out (not weights): 'miou'" in done


def member(source: Path) -> bytes:
    with zipfile.ZipFile(source) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("data.pkl")]
        return archive.read(name)


def replaced(source: Path, program: bytes) -> Path:
    """The archive with another pickle in it, all else as torch.save wrote it."""
    with zipfile.ZipFile(source) as archive:
        contents = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(source, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, program if name.endswith("data.pkl") else content)
    return source


def in_archive(path: Path, payload: bytes) -> None:
    replaced(saved(path, {"a": torch.ones(2)}), payload)


def in_older_layout(path: Path, payload: bytes) -> None:
    head = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001}):
        pickle.dump(value, head, protocol=2)
    path.write_bytes(head.getvalue() + payload)


@pytest.mark.parametrize(
    "place", [in_archive, in_older_layout, Path.write_bytes], ids=["archive", "older", "plain"]
)
@pytest.mark.parametrize("name", PAYLOADS)
def test_a_file_that_runs_code_is_refused_and_does_not_run(
    tmp_path: Path, name: str, place: Callable[[Path, bytes], None]
) -> None:
    marker, source = tmp_path / "ran", tmp_path / "w.pth"
    payload = PAYLOADS[name](f"echo > {marker}")
    place(source, payload)
    with pytest.raises(ArtefactError, match=r"w\.pth is refused") as caught:
        convert_weights(source, tmp_path / "w.safetensors")
    assert not marker.exists()
    assert list(tmp_path.iterdir()) == [source]
    # torch's own message says how to switch the safety off
    assert "weights_only" not in str(caught.value) and "add_safe_globals" not in str(caught.value)
    pickle.loads(payload)
    assert marker.exists(), "the payload does not work, so its refusal proves nothing"


class Allowed:
    """What another package has declared safe for its own files."""

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("the code of another package ran")


def test_what_other_packages_have_allowed_is_not_allowed_here(tmp_path: Path) -> None:
    source = saved(tmp_path / "w.pth", {"a": torch.ones(1)})
    program = f"\x80\x02c{Allowed.__module__}\nAllowed\n)\x81}}b.".encode("latin1")
    replaced(source, program)
    before = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([Allowed]):
        with pytest.raises(ArtefactError, match=r"asks for \S+Allowed"):
            convert_weights(source, tmp_path / "w.safetensors")
        assert set(torch.serialization.get_safe_globals()) == {*before, Allowed}
    assert set(torch.serialization.get_safe_globals()) == before


def test_an_archive_that_unpacks_to_much_more_is_refused(tmp_path: Path) -> None:
    source = saved(tmp_path / "w.pth", {"a": torch.zeros(1_000_000)})
    with zipfile.ZipFile(source) as archive:
        contents = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    assert source.stat().st_size < 10_000
    with pytest.raises(ArtefactError, match=r"4,00\d,\d+ bytes"):
        convert_weights(source, tmp_path / "w.safetensors")


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "older layout"])
def test_a_view_that_claims_more_than_its_memory_is_refused(tmp_path: Path, archive: bool) -> None:
    state = {"a": torch.ones(1).expand(10**9, 10**6)}
    source = saved(tmp_path / "w.pth", state, archive=archive)
    with pytest.raises(ArtefactError, match="4,000,000,000,000,000 bytes"):
        convert_weights(source, tmp_path / "w.safetensors")


def test_arrays_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    content = b"c_codecs\nencode\n(" + text("\0" * 2048) + text("latin1") + b"tRq\x00"
    entries = b"".join(
        text(f"a{number}")
        + b"cnumpy.core.multiarray\n_reconstruct\n(tR(K\x01M\x00\x01\x85cnumpy\ndtype\n("
        + text("f8")
        + b"tR\x89"
        + (b"h\x00" if number else content)
        + b"tb"
        for number in range(30)
    )
    in_archive(tmp_path / "w.pth", b"\x80\x02}(" + entries + b"u.")
    with pytest.raises(ArtefactError, match="61,440 bytes"):
        convert_weights(tmp_path / "w.pth", tmp_path / "w.safetensors")


def test_a_pickle_that_asks_for_all_memory_is_refused(tmp_path: Path) -> None:
    huge = (1 << 62).to_bytes(8, "little")
    in_archive(tmp_path / "w.pth", b"\x80\x02cbuiltins\nbytearray\n\x8a\x08" + huge + b"\x85R.")
    with pytest.raises(ArtefactError, match="MemoryError"):
        convert_weights(tmp_path / "w.pth", tmp_path / "w.safetensors")


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "older layout"])
@pytest.mark.parametrize("part", [0.3, 0.99])
def test_a_cut_file_is_refused(tmp_path: Path, archive: bool, part: float) -> None:
    source = saved(tmp_path / "w.pth", weights(), archive=archive)
    source.write_bytes(source.read_bytes()[: int(part * source.stat().st_size)])
    with pytest.raises(ArtefactError, match=r"w\.pth is refused"):
        convert_weights(source, tmp_path / "w.safetensors")
    assert list(tmp_path.iterdir()) == [source]


def torchscript() -> bytes:
    with warnings.catch_warnings(action="ignore"):
        return bytes(torch.jit.script(torch.nn.Linear(2, 2)).save_to_buffer())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"weights",
        b"\x89PNG\r\n",
        b"PK\x03\x04" + bytes(90),
        pickle.dumps({"a": 1.0}, protocol=2),
        torchscript,
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: Any) -> None:
    (tmp_path / "w.pth").write_bytes(content() if callable(content) else content)
    with pytest.raises(ArtefactError, match=r"w\.pth is refused"):
        convert_weights(tmp_path / "w.pth", tmp_path / "w.safetensors")


def quantised() -> dict[str, Tensor]:
    return {"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "no state dict"),
        ({"lr": 1}, "'lr'"),
        ([torch.ones(1)], "found list"),
        (torch.ones(1), "found Tensor"),
        ({1: torch.ones(1)}, "key 1"),
        ({"a": torch.ones(1), "b": [1]}, "'b'"),
        ({"a": torch.tensor([1.0, float("nan")])}, "'a'"),
        ({"a": torch.tensor(float("-inf")).half()}, "'a'"),
        ({"a": torch.ones(1, dtype=torch.complex64)}, "torch.complex64"),
        ({"a": torch.eye(2).to_sparse()}, "sparse"),
        (quantised, "qint8"),
        ({"a": torch.ones(2, device="meta")}, "meta"),
        ({"a": torch.ones(1), "b": np.array([None])}, "several objects"),
        ({"a": torch.ones(1), "b": np.array(["text"])}, "other than numbers"),
        ({"a": torch.ones(1), "b": np.ones(1, complex)}, "other than numbers"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_weights_is_refused(tmp_path: Path, state: Any, message: str) -> None:
    source = saved(tmp_path / "w.pth", state() if callable(state) else state)
    with pytest.raises(ArtefactError, match=message):
        convert_weights(source, tmp_path / "w.safetensors")
    assert list(tmp_path.iterdir()) == [source]


def test_sources_and_targets_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    source = saved(tmp_path / "w.pth", weights())
    same = saved(tmp_path / "w.safetensors", weights())
    for one in (source, same):
        before = one.read_bytes()
        with pytest.raises(ArtefactError, match=one.name):
            convert_weights(one, one)
        assert one.read_bytes() == before
    for missing in (tmp_path, tmp_path / "other.pth"):
        with pytest.raises(ArtefactError, match="is not a file"):
            convert_weights(missing, tmp_path / "w.safetensors")
