"""The store: what others' readers find in it, what read() returns, and what create() and write_shard() leave behind."""

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import ml_dtypes
import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import DTYPES, EXACT, MLP, READERS, RESID, Made, flipped, make, read_by_zarr

from activation_store import ActivationStore, InputError, arrays

BLOCKS = {"float32": 96, "float16": 48, "bfloat16": 48, "int8": 24}  # bytes of four rows of MLP: four blocks a shard


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """One store a dtype: 7 sequences of 5 tokens in shards of 3, so the last shard holds one sequence of its three."""
    return {dtype: make(tmp_path_factory.mktemp(dtype) / "store", dtype, block_bytes=BLOCKS[dtype]) for dtype in DTYPES}


def copy(made: Mapping[str, Made], path: Path, dtype: str = "float32") -> Path:
    return Path(shutil.copytree(made[dtype].store.path, path / "store"))


def chunk_files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("c/**/*") if file.is_file())


def array_of(path: Path, file: Path) -> str:
    """The array that a chunk file belongs to."""
    return str(file.relative_to(path)).partition("/c/")[0]


# Other people's readers


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("reader", READERS)
def test_other_readers_see_the_same_numbers(made: dict[str, Made], reader: str, dtype: str) -> None:
    store, read = made[dtype].store, READERS[reader]
    for name in ("tokens", "documents", "offsets"):
        found = read(store.path, name)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, getattr(made[dtype], name))
        np.testing.assert_array_equal(getattr(store, name), found)
    for hook, values in made[dtype].values.items():
        found = read(store.path, f"{hook}/activations")
        if dtype == "bfloat16":
            assert found.dtype == np.uint16
            found = found.view(ml_dtypes.bfloat16)
        assert found.dtype == values.dtype
        assert found.tobytes() == values.tobytes()  # bit for bit: -0.0 is not 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reader", READERS)
def test_norms_are_those_of_the_values_as_stored(made: dict[str, Made], reader: str, dtype: str) -> None:
    for hook, values in made[dtype].values.items():
        found = READERS[reader](made[dtype].store.path, f"{hook}/norms")
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, np.linalg.norm(values.astype(np.float64), axis=1), rtol=1e-6)
        np.testing.assert_array_equal(made[dtype].store.norms(hook), found)
        np.testing.assert_array_equal(made[dtype].store.norms(hook, 1), found[15:30])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reader", READERS)
def test_every_block_of_rows_has_its_crc32c_listed(made: dict[str, Made], reader: str, dtype: str) -> None:
    store = made[dtype].store
    assert (store.block_rows, store.shard_blocks) == (4, 4)
    for hook in (RESID, MLP):
        rows = READERS[reader](store.path, f"{hook}/activations")
        shards = [rows[:15], rows[15:30], rows[30:]]
        blocks = [shard[start : start + 4].tobytes() for shard in shards for start in (0, 4, 8, 12)]
        assert [len(block) // rows[0].nbytes for block in blocks] == [4, 4, 4, 3, 4, 4, 4, 3, 4, 1, 0, 0]
        found = READERS[reader](store.path, f"{hook}/checksums")
        assert found.tolist() == [google_crc32c.value(block) for block in blocks]  # of nothing it is 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_metadata_as_zarr_sees_it(made: dict[str, Made], dtype: str) -> None:
    group = zarr.open(made[dtype].store.path, mode="r")
    assert isinstance(group, zarr.Group)
    assert group.metadata.zarr_format == 3
    assert sorted(group) == sorted([RESID, MLP, "tokens", "documents", "offsets"])
    assert sorted(group[MLP]) == ["activations", "checksums", "norms", *(["scales"] if dtype == "int8" else [])]
    attributes = dict(group.attrs)
    assert attributes["schema"] == 2
    assert attributes["hooks"] == [RESID, MLP]
    assert attributes["sequence_arrays"] == ["tokens", "documents", "offsets"]
    assert attributes["context"] == 5
    assert attributes["block_rows"] == 4
    assert attributes["complete"] is True
    assert attributes["special_token_ids"] == [0, 1]
    array = group[f"{MLP}/activations"]
    assert array.shape == (35, 6)
    assert array.chunks == (15, 6)
    assert array.attrs["dtype"] == dtype  # a bfloat16 array says what its uint16 bits mean


@pytest.mark.parametrize(
    ("widths", "dtype", "rows"),
    [({"h": 4096}, "bfloat16", 8), ({"h": 576}, "bfloat16", 64), ({"h": 3, "w": 16384}, "float32", 1), ({"h": 99999}, "int8", 1)],
    ids=str,
)
def test_a_block_is_the_fewest_rows_a_power_of_two_that_make_64_kib_of_the_widest_hook(
    tmp_path: Path, widths: dict[str, int], dtype: str, rows: int
) -> None:
    tokens = np.zeros((2, 3), np.int32)
    assert ActivationStore.create(tmp_path / "s", tokens, tokens, widths, dtype=dtype).block_rows == rows


def test_a_chunk_file_byte_by_byte(tmp_path: Path) -> None:
    """Two sequences of two tokens, d = 1, in shards of one sequence: all little-endian, the crc32c last."""
    tokens = np.array([[1, 2], [3, 260]], np.int32)
    store = ActivationStore.create(
        tmp_path / "s", tokens, tokens, {"h": 1}, offsets=tokens - 2, dtype="bfloat16", shard_sequences=1
    )
    store.write_shard(0, {"h": torch.tensor([[1.0], [-2.0]], dtype=torch.bfloat16)})
    rows = b"\x80\x3f\x00\xc0"  # 1.0 is 0x3f80, -2.0 is 0xc000
    payloads = {
        "tokens/c/0/0": b"\x01\0\0\0\x02\0\0\0",
        "tokens/c/1/0": b"\x03\0\0\0\x04\x01\0\0",
        "offsets/c/0/0": b"\xff\xff\xff\xff\0\0\0\0",
        "h/activations/c/0/0": rows,
        "h/norms/c/0": b"\0\0\x80\x3f\0\0\0\x40",
        "h/checksums/c/0": google_crc32c.value(rows).to_bytes(4, "little"),
    }
    for name, payload in payloads.items():
        crc = google_crc32c.value(payload).to_bytes(4, "little")
        assert (tmp_path / "s" / name).read_bytes() == payload + crc


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_chunk_ends_in_the_crc32c_of_its_payload(made: dict[str, Made], dtype: str) -> None:
    files = chunk_files(made[dtype].store.path)
    assert len(files) == (3 + 2 * (4 if dtype == "int8" else 3)) * 3  # three shards each
    for file in files:
        data = file.read_bytes()
        assert int.from_bytes(data[-4:], "little") == google_crc32c.value(data[:-4])


def test_a_flipped_bit_is_caught_by_zarr_in_every_chunk(made: dict[str, Made], tmp_path: Path) -> None:
    path = copy(made, tmp_path, "int8")
    for file in chunk_files(path):
        with flipped(file, file.stat().st_size // 3), pytest.raises(ValueError, match=r"(?i)checksum"):
            read_by_zarr(path, array_of(path, file))
        read_by_zarr(path, array_of(path, file))


def test_the_last_partial_shard_is_whole_on_disk_and_cut_on_reading(made: dict[str, Made]) -> None:
    store, values = made["float32"].store, made["float32"].values[RESID]
    file = store.path / RESID / "activations" / "c" / "2" / "0"
    assert file.stat().st_size == 3 * 5 * 3 * 4 + 4  # three sequences' room, one of them used
    assert (store.shards, store.shard_sequences(2)) == (3, slice(6, 7))
    last = store.read(RESID, slice(30, None))
    assert last.shape == (5, 3)
    np.testing.assert_array_equal(last.numpy(), values[30:])
    np.testing.assert_array_equal(store.read(RESID, slice(None)).numpy(), values)
    with pytest.raises(InputError, match="35 rows"):
        store.read(RESID, [35])  # on disk there is padding there


@given(
    sequences=st.integers(1, 9),
    context=st.integers(1, 6),
    shard=st.integers(1, 11),
    width=st.integers(1, 5),
    dtype=st.sampled_from(EXACT),
    block_bytes=st.sampled_from([1, 20, 100, 1 << 16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_any_geometry_survives_the_disk(
    sequences: int, context: int, shard: int, width: int, dtype: str, block_bytes: int, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = make(
            Path(folder) / "s", dtype, sequences=sequences, context=context, shard=shard, widths={"h": width},
            block_bytes=block_bytes, seed=seed,
        )  # fmt: skip
        assert (made.store.rows, made.store.context, made.store.width("h")) == (sequences * context, context, width)
        assert made.store.dtype("h") == dtype
        found = made.store.read("h", slice(None))
        assert found.dtype == torch.float32
        np.testing.assert_array_equal(found.numpy(), made.values["h"].astype(np.float32))
        np.testing.assert_array_equal(made.store.tokens, made.tokens)
        np.testing.assert_array_equal(made.store.documents, made.documents)
        for read in READERS.values():
            bits = read(made.store.path, "h/activations")
            assert bits.tobytes() == made.values["h"].tobytes()


# read()

bound = st.one_of(st.none(), st.integers(-50, 50))


@given(start=bound, stop=bound, step=st.one_of(st.none(), st.integers(-9, 9).filter(bool)), dtype=st.sampled_from(EXACT))
@settings(max_examples=150, deadline=None)
def test_slices_read_as_numpy_reads_them(
    made: dict[str, Made], start: int | None, stop: int | None, step: int | None, dtype: str
) -> None:
    expected = made[dtype].values[MLP].astype(np.float32)[start:stop:step]
    found = made[dtype].store.read(MLP, slice(start, stop, step))
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), expected)


@given(rows=st.lists(st.integers(-35, 34), max_size=60), as_array=st.booleans(), dtype=st.sampled_from(EXACT))
@settings(max_examples=150, deadline=None)
def test_rows_in_any_order_read_as_numpy_reads_them(
    made: dict[str, Made], rows: list[int], as_array: bool, dtype: str
) -> None:
    expected = made[dtype].values[MLP].astype(np.float32)[np.array(rows, np.int64)]
    found = made[dtype].store.read(MLP, np.array(rows, np.int32) if as_array else rows)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [slice(0, 4), [0, 1, 2, 3]], ids=["slice", "list"])
def test_what_was_read_belongs_to_the_caller(made: dict[str, Made], dtype: str, rows: Any) -> None:
    store = made[dtype].store
    first = store.read(MLP, rows)
    before = first.clone()
    first.fill_(7.0)
    assert torch.equal(store.read(MLP, rows), before)


def test_a_store_too_large_for_memory_reads_the_same(made: dict[str, Made], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays.Table, "IN_MEMORY", 16)
    for dtype in DTYPES:
        store = ActivationStore.open(made[dtype].store.path)
        assert isinstance(store.tokens, np.memmap)
        np.testing.assert_array_equal(store.tokens, made[dtype].tokens)
        assert torch.equal(store.read(MLP, slice(None)), made[dtype].store.read(MLP, slice(None)))


def test_many_threads_may_read_one_store(made: dict[str, Made]) -> None:
    expected = made["int8"].store.read(MLP, slice(None))
    for _ in range(20):
        store, found = ActivationStore.open(made["int8"].store.path), []  # nothing of its small arrays read yet
        start = threading.Barrier(3)

        def read(store: ActivationStore = store, found: list[bool] = found, start: threading.Barrier = start) -> None:
            start.wait()
            found.append(torch.equal(store.read(MLP, slice(None)), expected))

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [True] * 3


@pytest.mark.parametrize("rows", [[35], [-36], [0, 99], np.array([10**12])], ids=str)
def test_rows_outside_the_store_are_refused(made: dict[str, Made], rows: Any) -> None:
    with pytest.raises(InputError, match="35 rows"):
        made["float32"].store.read(MLP, rows)


@pytest.mark.parametrize(
    "rows", [np.arange(35) % 3 == 0, [0.5, 1.5], np.zeros((2, 2), int)], ids=["mask", "floats", "two-dimensional"]
)
def test_what_is_not_row_numbers_is_refused_or_read_as_numpy_reads_it(made: dict[str, Made], rows: Any) -> None:
    values = made["float32"].values[MLP]
    try:
        found = made["float32"].store.read(MLP, rows)
    except InputError as error:
        assert "rows" in str(error)  # noqa: PT017 (either is right; rows 0 and 1 for False and True are not)
        return
    np.testing.assert_array_equal(found.numpy(), values[rows])


def test_several_hooks_stay_aligned_with_the_tokens(made: dict[str, Made]) -> None:
    store = made["float32"].store
    for sequence, position in ((0, 0), (2, 4), (3, 0), (6, 4)):
        row = sequence * 5 + position
        assert store.tokens.reshape(-1)[row] == made["float32"].tokens[sequence, position]
        for hook in (RESID, MLP):
            np.testing.assert_array_equal(store.read(hook, [row])[0].numpy(), made["float32"].values[hook][row])


def test_an_unknown_hook_lists_the_known(made: dict[str, Made]) -> None:
    store = made["float32"].store
    asks: list[Callable[[], Any]] = [
        lambda: store.read("blocks.0.hook_resid", [0]),
        lambda: store.batches("blocks.0.hook_resid"),
        lambda: store.width("blocks.0.hook_resid"),
        lambda: store.dtype("blocks.0.hook_resid"),
        lambda: store.statistics("blocks.0.hook_resid"),
    ]
    for ask in asks:
        with pytest.raises(InputError) as error:
            ask()
        assert all(name in str(error.value) for name in ("'blocks.0.hook_resid'", RESID, MLP))


def test_a_store_without_offsets_says_so(tmp_path: Path) -> None:
    tokens = np.zeros((2, 3), np.int32)
    store = ActivationStore.create(tmp_path / "s", tokens, tokens, {"h": 2})
    with pytest.raises(InputError, match="without offsets"):
        print(store.offsets)


# create(), write_shard(), finish()


def test_create_refuses_shapes_and_dtypes_that_make_no_store(tmp_path: Path) -> None:
    tokens = np.zeros((2, 3), np.int32)
    with pytest.raises(InputError, match=r"\(2, 3\).*\(2, 2\)"):
        ActivationStore.create(tmp_path / "s", tokens, tokens[:, :2], {"h": 2})
    with pytest.raises(InputError, match=r"\(0, 3\)"):
        ActivationStore.create(tmp_path / "s", tokens[:0], tokens[:0], {"h": 2})
    with pytest.raises(InputError, match=r"offsets \(1, 3\)"):
        ActivationStore.create(tmp_path / "s", tokens, tokens, {"h": 2}, offsets=tokens[:1])
    with pytest.raises(InputError, match=r"float64.*float32, float16, bfloat16, int8"):
        ActivationStore.create(tmp_path / "s", tokens, tokens, {"h": 2}, dtype="float64")
    assert not (tmp_path / "s").exists()


def test_create_never_deletes_files_that_are_no_store(tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter1.tex").write_text("years of work")
    tokens = np.zeros((2, 3), np.int32)
    try:
        ActivationStore.create(folder, tokens, tokens, {"h": 2})
    except InputError as error:
        assert str(folder) in str(error)  # noqa: PT017 (to refuse is right, to write beside it would be too)
    assert (folder / "chapter1.tex").read_text() == "years of work"


def test_create_over_a_store_leaves_nothing_of_it(tmp_path: Path) -> None:
    make(tmp_path / "s")
    tokens = np.zeros((2, 3), np.int32)
    store = ActivationStore.create(tmp_path / "s", tokens, tokens, {"h": 2})
    assert store.hooks == ["h"]
    assert sorted(file.name for file in store.path.iterdir()) == ["documents", "h", "tokens", "zarr.json"]
    with pytest.raises(InputError, match="unfinished"):
        ActivationStore.open(tmp_path / "s")


@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(15, 3, dtype=torch.float16),
        torch.zeros(14, 3),
        torch.zeros(16, 3),
        torch.zeros(15, 2),
        torch.zeros(15, 1),
        torch.zeros(45),
    ],
    ids=["dtype", "too few rows", "too many rows", "too narrow", "one column", "flat"],
)
def test_write_shard_refuses_what_does_not_fit(tmp_path: Path, values: torch.Tensor) -> None:
    made = make(tmp_path / "s")
    before = made.store.read(RESID, slice(None))
    with pytest.raises((TypeError, ValueError)):
        made.store.write_shard(0, {RESID: values})
    assert torch.equal(ActivationStore.open(made.store.path).read(RESID, slice(None)), before)


def test_a_shard_takes_views_and_strided_tensors(tmp_path: Path) -> None:
    made = make(tmp_path / "s")
    values = torch.arange(45.0).view(3, 15).T  # not contiguous
    made.store.write_shard(0, {RESID: values})
    assert torch.equal(ActivationStore.open(made.store.path).read(RESID, slice(15)), values)


def test_a_shard_that_fails_leaves_the_old_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(tmp_path / "s")
    before = made.store.read(RESID, slice(None)).clone()

    def fail(fd: int) -> None:
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(RuntimeError, match="injected"):
            made.store.write_shard(1, {RESID: torch.zeros(15, 3)})
    assert torch.equal(ActivationStore.open(made.store.path).read(RESID, slice(None)), before)
    assert os.listdir(made.store.path / RESID / "activations" / "c" / "1") == ["0"]
