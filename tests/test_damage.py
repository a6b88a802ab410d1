"""What is no store, or a store of another kind, or a damaged one, is refused in one line; no wrong row is ever handed out."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from stores import MEND, MLP, RESID, Made, flipped, make

from activation_store import ActivationStore, InputError
from activation_store.arrays import Array

DAMAGED = ["float32", "int8"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """7 sequences of 5 tokens in shards of 3, four blocks each: the last shard holds one sequence of its three."""
    return {
        dtype: make(tmp_path_factory.mktemp(dtype) / "store", dtype, block_bytes=96 if dtype == "float32" else 24, train=6)
        for dtype in DAMAGED
    }


def copy(made: Mapping[str, Made], path: Path, dtype: str = "float32") -> Path:
    return Path(shutil.copytree(made[dtype].store.path, path / "store"))


def refuses(error: BaseException, file: Path) -> bool:
    """Whether an error is one line that names the file and the mend."""
    return isinstance(error, InputError) and str(file) in str(error) and MEND in str(error) and "\n" not in str(error)


# open() and its refusals


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing-here.*monosem harvest"):
        ActivationStore.open(tmp_path / "nothing-here")


def test_an_unfinished_store(tmp_path: Path) -> None:
    tokens = np.zeros((2, 3), np.int32)
    ActivationStore.create(tmp_path / "s", tokens, tokens, {"h": 2})
    with pytest.raises(InputError, match=r"unfinished.*monosem harvest"):
        ActivationStore.open(tmp_path / "s")


@pytest.mark.parametrize(
    ("schema", "mend"),
    [(0, "harvest again"), (1, "harvest again"), ("2", "harvest again"), (None, "harvest again"), (3, "update monosem")],
)
def test_another_schema(made: dict[str, Made], tmp_path: Path, schema: Any, mend: str) -> None:
    path = copy(made, tmp_path)
    meta = json.loads((path / "zarr.json").read_text())
    meta["attributes"]["schema"] = schema
    (path / "zarr.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match="schema") as error:
        ActivationStore.open(path)
    message = str(error.value)
    assert all(part in message for part in (str(path), repr(schema), "reads 2", mend))
    assert "\n" not in message


def test_a_zarr_group_of_somebody_else(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "other", zarr_format=3).create_array("x", shape=(2,), dtype="int32")
    with pytest.raises(InputError, match="other"):
        ActivationStore.open(tmp_path / "other")


@pytest.mark.parametrize("text", ["", '{"zarr_format": 3, ', "[]", '{"zarr_format": 3, "node_type": "group"}', "\xff"])
def test_metadata_that_is_no_metadata(made: dict[str, Made], tmp_path: Path, text: str) -> None:
    path = copy(made, tmp_path)
    (path / "zarr.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError) as error:
        ActivationStore.open(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("gone", ["tokens", "documents", "offsets", RESID, f"{MLP}/activations/zarr.json", f"{RESID}/checksums"])
def test_an_array_that_is_gone(made: dict[str, Made], tmp_path: Path, gone: str) -> None:
    path = copy(made, tmp_path)
    if (path / gone).is_dir():
        shutil.rmtree(path / gone)
    else:
        (path / gone).unlink()
    with pytest.raises(InputError) as error:
        ActivationStore.open(path)
    assert str(path / gone) in str(error.value)


def test_an_array_laid_out_otherwise(made: dict[str, Made], tmp_path: Path) -> None:
    path = copy(made, tmp_path)
    shutil.rmtree(path / RESID / "activations")
    zarr.open_group(path, mode="a")[RESID].create_array(
        "activations", shape=(35, 3), chunks=(15, 3), dtype="float32", compressors=[zarr.codecs.ZstdCodec()]
    )
    with pytest.raises(InputError, match="zstd"):
        ActivationStore.open(path)


# Damage


def read_everything(path: Path) -> list[NDArray[Any]]:
    """Whatever a store gives but its batches, by row."""
    store = ActivationStore.open(path)
    found = [store.read(hook, slice(None)).numpy() for hook in store.hooks] + [store.norms(hook) for hook in store.hooks]
    return [*found, store.tokens, store.documents, store.offsets]


def draw_everything(path: Path) -> list[NDArray[Any]]:
    """Batches of both hooks and both splits, a little of the store in memory at a time."""
    store = ActivationStore.open(path)
    drawn = (store.batches((RESID, MLP), 8, seed=3, split=split, memory_mb=1e-6) for split in ("train", "held_out"))
    return [x.numpy() for batches in drawn for batch in batches for x in batch]


USES = {
    "read": (read_everything, ("activations", "checksums", "scales", "norms", "tokens", "documents", "offsets")),
    "batches": (draw_everything, ("activations", "checksums", "scales", "tokens", "documents")),
}


@pytest.fixture(scope="module")
def whole(made: dict[str, Made]) -> dict[tuple[str, str], list[NDArray[Any]]]:
    return {(dtype, use): run(made[dtype].store.path) for dtype in DAMAGED for use, (run, _) in USES.items()}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("dtype", DAMAGED)
@given(data=st.data())
@settings(max_examples=70, deadline=None)
def test_a_flipped_bit_anywhere_is_refused_or_does_not_matter(
    made: dict[str, Made], whole: dict[tuple[str, str], list[NDArray[Any]]], dtype: str, use: str, data: st.DataObject
) -> None:
    path = made[dtype].store.path
    run, arrays = USES[use]
    file = data.draw(st.sampled_from(sorted(f for f in path.rglob("c/**/*") if f.is_file())), label="file")
    at, bit = data.draw(st.integers(0, file.stat().st_size - 1), label="byte"), data.draw(st.integers(0, 7), label="bit")
    name, _, chunk = str(file.relative_to(path)).partition("/c/")
    array = Array.open(made[dtype].store.folder, name)
    kind, number = name.rpartition("/")[2], int(chunk.partition("/")[0])
    # Nothing hangs on an array that is not used, nor on padding and trailer of activations: blocks have sums of their own.
    matters = kind in arrays and (kind != "activations" or at < array.length(number) * array.row_bytes)
    with flipped(file, at, bit):
        if matters:
            with pytest.raises(InputError) as error:
                run(path)
            assert refuses(error.value, file), error.value
        else:
            assert [x.tobytes() for x in run(path)] == [x.tobytes() for x in whole[dtype, use]]
        assert array.fault(number) == "checksum does not match"  # what `monosem store verify` asks: it looks at every byte
    assert array.fault(number) is None


@pytest.mark.parametrize("dtype", DAMAGED)
def test_damage_in_the_padding_of_the_last_chunk_spoils_no_row_and_is_found_all_the_same(
    made: dict[str, Made], tmp_path: Path, dtype: str
) -> None:
    path = copy(made, tmp_path, dtype)
    array = Array.open(ActivationStore.open(path).folder, f"{MLP}/activations")
    file = path / MLP / "activations" / "c" / "2" / "0"
    with flipped(file, 5 * array.row_bytes, 6):  # the first byte past the five rows that count
        assert torch.equal(ActivationStore.open(path).read(MLP, slice(None)), made[dtype].store.read(MLP, slice(None)))
        assert array.fault(2) == "checksum does not match"
        with pytest.raises(InputError) as error:
            array.chunk(2)
        assert refuses(error.value, file)


def test_chunks_that_changed_places_are_refused(made: dict[str, Made], tmp_path: Path) -> None:
    path = copy(made, tmp_path)
    folder = path / RESID / "activations" / "c"
    os.rename(folder / "0", folder / "aside")
    os.rename(folder / "1", folder / "0")
    os.rename(folder / "aside", folder / "1")
    with pytest.raises(InputError) as error:
        ActivationStore.open(path).read(RESID, [0])
    assert refuses(error.value, folder / "0" / "0")
    ActivationStore.open(path).read(RESID, [34])


@pytest.mark.parametrize("size", [None, 0, 17, 179])
@pytest.mark.parametrize("use", ["read", "batches"])
def test_a_chunk_missing_or_cut_below_its_payload(made: dict[str, Made], tmp_path: Path, size: int | None, use: str) -> None:
    path = copy(made, tmp_path)
    file = path / RESID / "activations" / "c" / "1" / "0"
    assert file.stat().st_size == 15 * 3 * 4 + 4
    if size is None:
        file.unlink()
    else:
        os.truncate(file, size)
    with pytest.raises(InputError) as error:
        USES[use][0](path)
    assert refuses(error.value, file)
    assert "missing" in str(error.value) if size is None else f"{size} bytes, expected 184" in str(error.value)


@pytest.mark.parametrize("size", [180, 183, 185, 400])
def test_a_chunk_whose_end_alone_is_wrong_gives_the_right_rows_or_none(
    made: dict[str, Made], tmp_path: Path, size: int
) -> None:
    path = copy(made, tmp_path)
    file = path / RESID / "activations" / "c" / "1" / "0"
    os.truncate(file, size)  # longer: zeros
    try:
        found = ActivationStore.open(path).read(RESID, slice(None))
    except InputError as error:
        assert refuses(error, file)  # noqa: PT017 (either is right: every block has its own checksum)
    else:
        np.testing.assert_array_equal(found.numpy(), made["float32"].values[RESID])
    array = Array.open(ActivationStore.open(path).folder, f"{RESID}/activations")
    assert array.fault(1) == f"{size} bytes, expected 184"
    assert not array.present(1)


@pytest.mark.parametrize("array", ["tokens", "documents", f"{RESID}/checksums", f"{RESID}/scales"])
@pytest.mark.parametrize("size", [None, 0, 9])
@pytest.mark.parametrize("use", ["read", "batches"])
def test_a_small_array_cut_off(made: dict[str, Made], tmp_path: Path, array: str, size: int | None, use: str) -> None:
    path = copy(made, tmp_path, "int8")
    file = next((path / array / "c").rglob("0"))
    file = file / "0" if file.is_dir() else file
    if size is None:
        file.unlink()
    else:
        os.truncate(file, size)
    with pytest.raises(InputError) as error:
        USES[use][0](path)
    assert refuses(error.value, file)
    assert ("missing" if size is None else f"{size} bytes") in str(error.value)
