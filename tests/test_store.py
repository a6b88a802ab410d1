"""The store: what others' readers find in it, what read() returns, how it refuses, and what batches() draws."""

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import ml_dtypes
import numpy as np
import pytest
import tensorstore
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from activation_store import ActivationStore, HookStatistics, InputError

RESID, MLP = "blocks.0.hook_resid_post", "blocks.0.mlp.hook_post"
NUMPY_DTYPE = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
DTYPES = list(NUMPY_DTYPE)
NO_STATISTICS = HookStatistics(rows=1, mean=np.zeros(1), mean_norm=1.0, mean_square_norm=1.0, max_norm=1.0)


@dataclass(frozen=True)
class Made:
    """A store, and what was put in, in the dtype on disk."""

    store: ActivationStore
    tokens: NDArray[np.int32]
    documents: NDArray[np.int32]
    values: dict[str, NDArray[Any]]


def to_torch(values: NDArray[Any]) -> torch.Tensor:
    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def write_all(store: ActivationStore, values: Mapping[str, NDArray[Any]]) -> None:
    for shard in range(store.shards):
        where = store.shard_sequences(shard)
        rows = slice(where.start * store.context, where.stop * store.context)
        store.write_shard(shard, {hook: to_torch(x[rows]) for hook, x in values.items()})


def make(
    path: Path,
    dtype: str = "float32",
    *,
    sequences: int = 7,
    context: int = 5,
    shard: int = 3,
    widths: Mapping[str, int] | None = None,
    train: int | None = None,
    seed: int = 0,
) -> Made:
    """A finished store of random numbers with the awkward ones among them; tokens 0 and 1 are special."""
    widths = {RESID: 3, MLP: 6} if widths is None else widths
    chance = np.random.default_rng(seed)
    tokens = chance.integers(0, 9, (sequences, context), dtype=np.int32)
    documents = np.sort(chance.integers(0, 4, (sequences, context), dtype=np.int32), axis=None).reshape(tokens.shape)
    awkward = [0.0, -0.0, 1.0, -1.0, 1e-7, 65504.0, -3.140625, float("inf"), -float("inf")]
    values = {}
    for hook, width in widths.items():
        x = chance.normal(size=(sequences * context, width)).astype(np.float32)
        flat = x.reshape(-1)
        flat[: len(awkward)] = awkward[: len(flat)]
        chance.shuffle(flat)
        values[hook] = x.astype(NUMPY_DTYPE[dtype])
    facts = {"special_token_ids": [0, 1], "train_sequences": sequences if train is None else train}
    store = ActivationStore.create(
        path, tokens, documents, widths, dtype=dtype, shard_sequences=shard, attributes=facts
    )
    write_all(store, values)
    store.finish(dict.fromkeys(widths, NO_STATISTICS))
    return Made(ActivationStore.open(path), tokens, documents, values)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """One store a dtype: 7 sequences of 5 tokens in shards of 3, so the last shard holds one sequence of its three."""
    return {dtype: make(tmp_path_factory.mktemp(dtype) / "store", dtype) for dtype in DTYPES}


def copy(made: Mapping[str, Made], path: Path) -> Path:
    return Path(shutil.copytree(made["float32"].store.path, path / "store"))


def chunk_files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("c/*/*") if file.is_file())


# Other people's readers


def read_by_zarr(path: Path, array: str) -> NDArray[Any]:
    group = zarr.open(path, mode="r")
    return np.asarray(group[array][:])


def read_by_tensorstore(path: Path, array: str) -> NDArray[Any]:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / array)}}
    return np.asarray(tensorstore.open(spec, open=True, read=True).result().read().result())


READERS: dict[str, Callable[[Path, str], NDArray[Any]]] = {"zarr": read_by_zarr, "tensorstore": read_by_tensorstore}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reader", READERS)
def test_other_readers_see_the_same_numbers(made: dict[str, Made], reader: str, dtype: str) -> None:
    store, read = made[dtype].store, READERS[reader]
    for name, expected in (("tokens", made[dtype].tokens), ("documents", made[dtype].documents)):
        found = read(store.path, name)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, expected)
    for hook, values in made[dtype].values.items():
        found = read(store.path, f"{hook}/activations")
        if dtype == "bfloat16":
            assert found.dtype == np.uint16
            found = found.view(ml_dtypes.bfloat16)
        assert found.dtype == values.dtype
        assert found.tobytes() == values.tobytes()  # bit for bit: -0.0 is not 0.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_metadata_as_zarr_sees_it(made: dict[str, Made], dtype: str) -> None:
    group = zarr.open(made[dtype].store.path, mode="r")
    assert isinstance(group, zarr.Group)
    assert group.metadata.zarr_format == 3
    assert sorted(group) == sorted([RESID, MLP, "tokens", "documents"])
    attributes = dict(group.attrs)
    assert attributes["hooks"] == [RESID, MLP]
    assert attributes["context"] == 5
    assert attributes["complete"] is True
    assert attributes["special_token_ids"] == [0, 1]
    array = group[f"{MLP}/activations"]
    assert array.shape == (35, 6)
    assert array.chunks == (15, 6)
    assert array.attrs["dtype"] == dtype  # a bfloat16 array says what its uint16 bits mean


def test_a_chunk_file_byte_by_byte(tmp_path: Path) -> None:
    """Two sequences of two tokens, d = 1, in shards of one sequence: all little-endian, the crc32c last."""
    tokens = np.array([[1, 2], [3, 260]], np.int32)
    store = ActivationStore.create(tmp_path / "s", tokens, tokens, {"h": 1}, dtype="bfloat16", shard_sequences=1)
    store.write_shard(0, {"h": torch.tensor([[1.0], [-2.0]], dtype=torch.bfloat16)})
    payloads = {
        "tokens/c/0/0": b"\x01\0\0\0\x02\0\0\0",
        "tokens/c/1/0": b"\x03\0\0\0\x04\x01\0\0",
        "h/activations/c/0/0": b"\x80\x3f\x00\xc0",  # 1.0 is 0x3f80, -2.0 is 0xc000
    }
    for name, payload in payloads.items():
        crc = google_crc32c.value(payload).to_bytes(4, "little")
        assert (tmp_path / "s" / name).read_bytes() == payload + crc


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_chunk_ends_in_the_crc32c_of_its_payload(made: dict[str, Made], dtype: str) -> None:
    files = chunk_files(made[dtype].store.path)
    assert len(files) == 4 * 3  # tokens, documents and two hooks, three shards each
    for file in files:
        data = file.read_bytes()
        assert int.from_bytes(data[-4:], "little") == google_crc32c.value(data[:-4])


def test_a_flipped_bit_is_caught_by_zarr_in_every_chunk(made: dict[str, Made], tmp_path: Path) -> None:
    path = copy(made, tmp_path)
    for file in chunk_files(path):
        array = str(file.relative_to(path).parents[2])
        good = file.read_bytes()
        bad = bytearray(good)
        bad[len(bad) // 3] ^= 1
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=r"(?i)checksum"):
            read_by_zarr(path, array)
        file.write_bytes(good)
        read_by_zarr(path, array)


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
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_any_geometry_survives_the_disk(
    sequences: int, context: int, shard: int, width: int, dtype: str, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = make(
            Path(folder) / "s", dtype, sequences=sequences, context=context, shard=shard, widths={"h": width}, seed=seed
        )
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


@given(start=bound, stop=bound, step=st.one_of(st.none(), st.integers(-9, 9).filter(bool)), dtype=st.sampled_from(DTYPES))
@settings(max_examples=150, deadline=None)
def test_slices_read_as_numpy_reads_them(
    made: dict[str, Made], start: int | None, stop: int | None, step: int | None, dtype: str
) -> None:
    expected = made[dtype].values[MLP].astype(np.float32)[start:stop:step]
    found = made[dtype].store.read(MLP, slice(start, stop, step))
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), expected)


@given(rows=st.lists(st.integers(-35, 34), max_size=60), as_array=st.booleans(), dtype=st.sampled_from(DTYPES))
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


# open() and its refusals


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing-here.*monosem harvest"):
        ActivationStore.open(tmp_path / "nothing-here")


def test_an_unfinished_store(tmp_path: Path) -> None:
    tokens = np.zeros((2, 3), np.int32)
    ActivationStore.create(tmp_path / "s", tokens, tokens, {"h": 2})
    with pytest.raises(InputError, match=r"unfinished.*monosem harvest"):
        ActivationStore.open(tmp_path / "s")


@pytest.mark.parametrize("schema", [0, 2, "1", None])
def test_another_schema(made: dict[str, Made], tmp_path: Path, schema: Any) -> None:
    path = copy(made, tmp_path)
    meta = json.loads((path / "zarr.json").read_text())
    meta["attributes"]["schema"] = schema
    (path / "zarr.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match="schema") as error:
        ActivationStore.open(path)
    assert repr(schema) in str(error.value)


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


@pytest.mark.parametrize("gone", ["tokens", "documents", RESID, f"{MLP}/activations/zarr.json"])
def test_an_array_that_is_gone(made: dict[str, Made], tmp_path: Path, gone: str) -> None:
    path = copy(made, tmp_path)
    if (path / gone).is_dir():
        shutil.rmtree(path / gone)
    else:
        (path / gone).unlink()
    with pytest.raises(InputError) as error:
        ActivationStore.open(path)
    assert str(path / gone) in str(error.value)


@pytest.mark.parametrize("size", [None, 0, 17, 183, 185])
def test_a_chunk_missing_or_of_the_wrong_size(made: dict[str, Made], tmp_path: Path, size: int | None) -> None:
    path = copy(made, tmp_path)
    file = path / RESID / "activations" / "c" / "1" / "0"
    assert file.stat().st_size == 184
    if size is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:size].ljust(size, b"\0"))

    def use() -> None:
        ActivationStore.open(path).read(RESID, [14, 15])

    with pytest.raises(InputError) as error:
        use()
    assert all(part in str(error.value) for part in (str(file), f"{size or 0} bytes", "184", "harvest"))


def test_tokens_cut_off(made: dict[str, Made], tmp_path: Path) -> None:
    path = copy(made, tmp_path)
    os.truncate(path / "tokens" / "c" / "0" / "0", 9)
    with pytest.raises(InputError, match=r"tokens.*9 bytes"):
        print(ActivationStore.open(path).tokens)


def test_an_array_laid_out_otherwise(made: dict[str, Made], tmp_path: Path) -> None:
    path = copy(made, tmp_path)
    shutil.rmtree(path / RESID / "activations")
    zarr.open_group(path, mode="a")[RESID].create_array(
        "activations", shape=(35, 3), chunks=(15, 3), dtype="float32", compressors=[zarr.codecs.ZstdCodec()]
    )
    with pytest.raises(InputError, match="zstd"):
        ActivationStore.open(path)


# create(), write_shard(), finish()


def test_create_refuses_shapes_and_dtypes_that_make_no_store(tmp_path: Path) -> None:
    tokens = np.zeros((2, 3), np.int32)
    with pytest.raises(InputError, match=r"\(2, 3\).*\(2, 2\)"):
        ActivationStore.create(tmp_path / "s", tokens, tokens[:, :2], {"h": 2})
    with pytest.raises(InputError, match=r"\(0, 3\)"):
        ActivationStore.create(tmp_path / "s", tokens[:0], tokens[:0], {"h": 2})
    with pytest.raises(InputError, match=r"float64.*float32, float16, bfloat16"):
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


def test_statistics_come_back_exactly(tmp_path: Path) -> None:
    tokens = np.zeros((2, 3), np.int32)
    store = ActivationStore.create(tmp_path / "s", tokens, tokens, {"h": 2}, dtype="float32")
    write_all(store, {"h": np.ones((6, 2), np.float32)})
    kept = HookStatistics(rows=5, mean=np.array([1 / 3, -1e-300]), mean_norm=0.1, mean_square_norm=2 / 3, max_norm=7.0)
    store.finish({"h": kept})
    found = ActivationStore.open(str(tmp_path / "s")).statistics("h")
    np.testing.assert_array_equal(found.mean, kept.mean)
    assert found.mean.dtype == np.float64
    for name in ("rows", "mean_norm", "mean_square_norm", "max_norm"):
        assert getattr(found, name) == getattr(kept, name)
    assert dict(zarr.open(tmp_path / "s", mode="r").attrs)["statistics"]["h"]["rows"] == 5


# batches()

SEQUENCES, CONTEXT, TRAIN = 53, 7, 40


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A store whose column 0 is the row's own number, so that a batch says which rows it is made of."""
    chance = np.random.default_rng(5)
    tokens = chance.integers(0, 9, (SEQUENCES, CONTEXT), dtype=np.int32)
    number = np.arange(SEQUENCES * CONTEXT, dtype=np.float32)
    values = {"h": np.stack([number, -number], 1), "other": np.stack([number] * 3, 1)}
    store = ActivationStore.create(
        tmp_path_factory.mktemp("numbered") / "s", tokens, tokens, {"h": 2, "other": 3}, dtype="float32",
        shard_sequences=11, attributes={"special_token_ids": [0, 1], "train_sequences": TRAIN},
    )  # fmt: skip
    write_all(store, values)
    store.finish({"h": NO_STATISTICS, "other": NO_STATISTICS})
    return Made(ActivationStore.open(store.path), tokens, tokens, values)


def drawable(made: Made, split: str) -> list[int]:
    """The rows of a split that are not special, one by one."""
    span = range(TRAIN) if split == "train" else range(TRAIN, SEQUENCES)
    return [i * CONTEXT + j for i in span for j in range(CONTEXT) if made.tokens[i, j] not in (0, 1)]


def numbers(batches: Any) -> list[list[int]]:
    return [[int(n) for n in batch[:, 0]] for batch in batches]


def joined(batches: Any) -> list[int]:
    return [n for batch in numbers(batches) for n in batch]


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_an_epoch_draws_every_row_of_the_split_once_and_no_other(numbered: Made, split: str) -> None:
    rows = drawable(numbered, split)
    assert 0 < len(rows) < SEQUENCES * CONTEXT / 1.2
    batches = list(numbered.store.batches("h", 16, seed=3, split=split))
    assert all(batch.dtype == torch.float32 and batch.shape == (16, 2) for batch in batches[:-1])
    assert len(batches[-1]) == len(rows) % 16
    assert all(torch.equal(batch[:, 1], -batch[:, 0]) for batch in batches)  # whole rows, not columns mixed
    assert sorted(joined(batches)) == rows


def test_the_splits_share_no_row_and_leave_out_only_the_special(numbered: Made) -> None:
    train = set(joined(numbered.store.batches("h", 50)))
    held = set(joined(numbered.store.batches("h", 50, split="held_out")))
    assert not train & held
    assert max(train) < TRAIN * CONTEXT <= min(held)
    special = set(np.flatnonzero(np.isin(numbered.tokens.reshape(-1), [0, 1])).tolist())
    assert train | held | special == set(range(SEQUENCES * CONTEXT))
    assert not (train | held) & special
    np.testing.assert_array_equal(numbered.store.special.reshape(-1).nonzero()[0], sorted(special))


def test_each_of_several_epochs_draws_every_row_once_in_another_order(numbered: Made) -> None:
    rows = drawable(numbered, "train")
    drawn = joined(numbered.store.batches("h", 33, seed=1, epochs=3))
    epochs = [drawn[i * len(rows) : (i + 1) * len(rows)] for i in range(3)]
    assert all(sorted(epoch) == rows for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len(drawn) == 3 * len(rows)


def test_orders_are_thoroughly_shuffled_and_differ_by_seed(numbered: Made) -> None:
    rows = drawable(numbered, "train")
    orders = [joined(numbered.store.batches("h", 20, seed=seed)) for seed in range(6)]
    orders += [joined(numbered.store.batches("h", 20, seed=0, epochs=3))[i * len(rows) :][: len(rows)] for i in (1, 2)]
    ranks = np.argsort(orders, axis=1)  # where each row falls in each order
    correlation = np.corrcoef(np.vstack([ranks, np.arange(len(rows))]))
    limit = 4.5 / np.sqrt(len(rows))  # of independent orders, one in 150,000 pairs goes beyond; seeds are fixed
    assert np.abs(correlation - np.eye(len(correlation))).max() < limit


def test_equal_seeds_give_equal_batches_again_and_again(numbered: Made) -> None:
    batches = numbered.store.batches("h", 20, seed=4)
    first = numbers(batches)
    assert numbers(batches) == first  # the object can be iterated as often as wanted
    assert numbers(ActivationStore.open(numbered.store.path).batches("h", 20, seed=4)) == first


def test_hooks_are_drawn_in_step(numbered: Made) -> None:
    assert numbers(numbered.store.batches("h", 20, seed=4)) == numbers(numbered.store.batches("other", 20, seed=4))


@given(
    batch_size=st.integers(1, 300), start=st.integers(0, 40), seed=st.integers(0, 2**40), epochs=st.integers(1, 3)
)
@settings(max_examples=60, deadline=None)
def test_a_batch_does_not_depend_on_where_reading_began(
    numbered: Made, batch_size: int, start: int, seed: int, epochs: int
) -> None:
    whole = numbered.store.batches("h", batch_size, seed=seed, epochs=epochs)
    everything = numbers(whole)
    later = numbered.store.batches("h", batch_size, seed=seed, start=start, epochs=epochs)
    assert numbers(later) == everything[start:]
    assert len(whole) == len(everything) == -(-epochs * len(drawable(numbered, "train")) // batch_size)
    assert len(later) == max(0, len(everything) - start)


@given(one=st.integers(1, 300), other=st.integers(1, 300), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_the_batch_size_only_cuts_the_stream(numbered: Made, one: int, other: int, seed: int) -> None:
    def stream(size: int) -> list[int]:
        return joined(numbered.store.batches("h", size, seed=seed, epochs=2))

    assert stream(one) == stream(other)


@given(batch_size=st.integers(1, 400), start=st.integers(0, 12), begun=st.integers(0, 5), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_the_endless_stream_seeks_exactly(
    numbered: Made, batch_size: int, start: int, begun: int, seed: int
) -> None:
    batches = numbered.store.batches("h", batch_size, seed=seed, start=begun)
    count = start + 8
    expected = numbers(itertools.islice(batches.stream(0), count))
    assert numbers(itertools.islice(batches.stream(start), 8)) == expected[start:]
    endless = numbered.store.batches("h", batch_size, seed=seed, start=start, epochs=None)
    assert numbers(itertools.islice(endless, 8)) == expected[start:]
    assert all(len(batch) == batch_size for batch in expected)  # no short batch at the border of two epochs
    rows = len(drawable(numbered, "train"))
    epochs = count * batch_size // rows + 1
    flat = [n for batch in expected for n in batch]
    assert flat == joined(numbered.store.batches("h", batch_size, seed=seed, epochs=epochs))[: len(flat)]


def test_an_endless_stream_has_no_length(numbered: Made) -> None:
    with pytest.raises(TypeError, match="endless"):
        len(numbered.store.batches("h", 20, epochs=None))


def test_splits_that_cannot_be_drawn_from_are_refused(numbered: Made, made: dict[str, Made]) -> None:
    with pytest.raises(InputError, match=r"'test'.*train, held_out"):
        numbered.store.batches("h", split="test")
    with pytest.raises(InputError, match="held_out"):
        made["float32"].store.batches(MLP, split="held_out")


def test_a_split_of_special_tokens_only_is_refused(tmp_path: Path) -> None:
    tokens = np.zeros((2, 3), np.int32)
    store = ActivationStore.create(
        tmp_path / "s", tokens, tokens, {"h": 1}, attributes={"special_token_ids": [0], "train_sequences": 1}
    )
    with pytest.raises(InputError, match="special"):
        store.batches("h")


@pytest.mark.parametrize(
    "wrong",
    [{"batch_size": 0}, {"batch_size": -4}, {"start": -1}, {"seed": -1}, {"epochs": -1}],
    ids=str,
)
def test_arguments_that_make_no_batches_are_refused_by_name(numbered: Made, wrong: dict[str, int]) -> None:
    arguments: dict[str, Any] = {"batch_size": 16, **wrong}

    def use() -> None:
        next(iter(numbered.store.batches("h", **arguments)))

    with pytest.raises(InputError, match=next(iter(wrong))):
        use()


def test_a_harvested_store_is_drawn_the_same_way(tiny_store: ActivationStore) -> None:
    hook = "blocks.1.hook_resid_post"
    values = read_by_zarr(tiny_store.path, f"{hook}/activations")
    tokens = read_by_zarr(tiny_store.path, "tokens")
    kept = [i for i in range(tiny_store.train_sequences * 16) if tokens.reshape(-1)[i] not in (0, 1)]
    drawn = torch.cat(list(tiny_store.batches(hook, 512, seed=0))).numpy()
    assert len(drawn) == len(kept)
    np.testing.assert_array_equal(np.sort(drawn, axis=0), np.sort(values[kept], axis=0))
