"""How rows lie on disk: int8 with a scale a row, by hand and by others' readers; every bit pattern decodes as elsewhere."""

from pathlib import Path
from typing import Any

import google_crc32c
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from numpy.typing import NDArray
from stores import DTYPES, MLP, NUMPY_DTYPE, READERS, RESID, create, make, write_all

from activation_store import ActivationStore
from activation_store.dtypes import Rows, bytes_a_row, decode, quantise

TINY = 127 * 2.0**-126  # the largest entry of a row below which its scale would be subnormal


# int8


def test_int8_golden_values() -> None:
    x = torch.tensor([[127.0, -63.5, 0.4], [0.0, -0.0, 0.0], [1.0, -2.54, 0.011], [-127e30, 1e30, 0.6e30]])
    raw, scales = quantise(x)
    assert raw.dtype == torch.int8
    assert raw.tolist() == [[127, -64, 0], [0, 0, 0], [50, -127, 1], [-127, 1, 1]]  # halves go to the even neighbour
    assert scales.dtype == torch.float32
    assert scales.tolist() == pytest.approx([1.0, 0.0, 0.02, 1e30])


def test_int8_on_disk_byte_by_byte(tmp_path: Path) -> None:
    tokens = np.zeros((1, 3), np.int32)
    store = ActivationStore.create(tmp_path / "s", tokens, tokens, {"h": 2}, dtype="int8")
    store.write_shard(0, {"h": torch.tensor([[127.0, -63.5], [0.0, 0.0], [254.0, 4.0]])})
    rows = b"\x7f\xc0\x00\x00\x7f\x02"
    payloads = {
        "activations/c/0/0": rows,
        "scales/c/0": b"\0\0\x80\x3f" + bytes(4) + b"\0\0\0\x40",  # 1, 0, 2
        "checksums/c/0": google_crc32c.value(rows).to_bytes(4, "little"),
    }
    for name, payload in payloads.items():
        crc = google_crc32c.value(payload).to_bytes(4, "little")
        assert (tmp_path / "s" / "h" / name).read_bytes() == payload + crc
    assert store.read("h", slice(None)).tolist() == [[127.0, -64.0], [0.0, 0.0], [254.0, 4.0]]


@pytest.mark.parametrize("reader", READERS)
def test_other_readers_make_of_int8_what_read_gives(tmp_path: Path, reader: str) -> None:
    made = make(tmp_path / "s", "int8", block_bytes=24)
    for hook, values in made.values.items():
        raw, scales = (READERS[reader](tmp_path / "s", f"{hook}/{name}") for name in ("activations", "scales"))
        assert (raw.dtype, raw.shape) == (np.int8, values.shape)
        assert (scales.dtype, scales.shape) == (np.float32, (35,))
        found = made.store.read(hook, slice(None)).numpy()
        np.testing.assert_array_equal(raw * scales[:, None], found)
        np.testing.assert_allclose(scales, np.abs(values).max(1) / 127, rtol=1e-6)
        assert (np.abs(found - values) <= 0.50002 * scales[:, None]).all()
        np.testing.assert_array_equal(made.store.read(hook, [34, 0, 16]).numpy(), found[[34, 0, 16]])


most = float(np.float32(3e38))  # nearer to the largest float32, 127 scales may round to infinity
entries = st.floats(-most, most, width=32)
rows_of_floats = nps.arrays(np.float32, nps.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=entries)


@given(x=rows_of_floats)
@settings(max_examples=300, deadline=None)
def test_no_int8_entry_is_off_by_more_than_half_a_scale(x: NDArray[np.float32]) -> None:
    raw, scales = (found.numpy() for found in quantise(torch.from_numpy(x)))
    largest = np.abs(x.astype(np.float64)).max(1)
    np.testing.assert_allclose(scales[largest > 1.01 * TINY], largest[largest > 1.01 * TINY] / 127, rtol=1e-6)
    assert (np.abs(raw.astype(int)) <= 127).all()
    error = np.abs(raw * scales.astype(np.float64)[:, None] - x)
    # float32 rounds x / scale, at most 127, by a few parts in 10^7; a row of next to nothing becomes zeros.
    assert (error <= np.where(scales > 0, scales * 0.50005, 1.01 * TINY)[:, None]).all()
    assert (raw[scales == 0] == 0).all()
    assert (largest[scales == 0] <= 1.01 * TINY).all()
    decoded = np.empty_like(x)
    decode(raw, "int8", scales, decoded)
    np.testing.assert_array_equal(decoded, raw * scales[:, None])


def test_a_row_of_subnormal_numbers_becomes_zeros() -> None:
    raw, scales = quantise(torch.tensor([[1e-40, 0.0, -3e-41], [190 * 2.0**-149, 0.0, 0.0], [2e-36, 0.0, 1e-36]]))
    assert raw.tolist() == [[0, 0, 0], [0, 0, 0], [127, 0, 64]]
    assert scales[:2].tolist() == [0, 0]


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_row_with_an_infinite_entry_stays_no_number_and_spoils_no_other(tmp_path: Path) -> None:
    tokens = np.zeros((1, 3), np.int32)
    store = ActivationStore.create(tmp_path / "s", tokens, tokens, {"h": 2}, dtype="int8")
    store.write_shard(0, {"h": torch.tensor([[1.27, 0.0], [float("inf"), 1.0], [float("nan"), 1.0]])})
    found = store.read("h", slice(None))
    assert found[0].tolist() == pytest.approx([1.27, 0.0])
    assert not found[1:, 0].isfinite().any()
    assert not np.isfinite(store.norms("h")[1:]).any()


# Decoding


def decoded(raw: NDArray[Any], dtype: str) -> NDArray[np.uint32]:
    out = np.full((len(raw) + 2, raw.shape[1]), 7.0, np.float32)
    decode(raw, dtype, None, out[1:-1])
    assert (out[[0, -1]] == 7).all()  # into the rows given and no others
    return out[1:-1].view(np.uint32)


def test_every_bfloat16_decodes_as_in_ml_dtypes() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(decoded(bits, "bfloat16"), bits.view(ml_dtypes.bfloat16).astype(np.float32).view(np.uint32))


def test_every_float16_decodes_as_in_numpy_and_float32_is_itself() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(
        decoded(bits.view(np.float16), "float16"), bits.view(np.float16).astype(np.float32).view(np.uint32)
    )
    raw = np.random.default_rng(0).integers(0, 2**32, (64, 64), dtype=np.uint32)
    np.testing.assert_array_equal(decoded(raw.view(np.float32), "float32"), raw)


def test_every_int8_decodes_as_in_numpy() -> None:
    raw = np.arange(-128, 128).astype(np.int8).reshape(16, 16)
    scales = np.linspace(0, 3, 16, dtype=np.float32)
    out = np.empty((16, 16), np.float32)
    decode(raw, "int8", scales, out)
    np.testing.assert_array_equal(out, raw.astype(np.float32) * scales[:, None])


# Encoding


@pytest.mark.parametrize("given_as", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_encodes_as_the_store_writes_and_norms_are_of_what_is_stored(dtype: str, given_as: torch.dtype) -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(20, 9)).astype(np.float32)).to(given_as)
    rows = Rows.of(x, dtype)
    if dtype == "int8":
        assert rows.scales is not None
        expected = x.float().numpy()  # int8: norms are those before rounding
        np.testing.assert_array_equal(rows.raw.numpy(), np.rint(expected / rows.scales.numpy()[:, None]))
    else:
        assert rows.scales is None
        expected = x.to(getattr(torch, dtype)).float().numpy()
        np.testing.assert_array_equal(rows.raw.float().numpy(), expected)
    assert rows.norms.dtype == torch.float32
    np.testing.assert_allclose(rows.norms.numpy(), np.linalg.norm(expected.astype(np.float64), axis=1), rtol=1e-6)


def test_float16_norms_do_not_overflow() -> None:
    assert Rows.of(torch.full((1, 100), 60000.0), "float16").norms.tolist() == pytest.approx([600_000.0], rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_a_row_is_what_the_files_take(tmp_path: Path, dtype: str) -> None:
    tokens = np.zeros((4, 8), np.int32)
    store = create(tmp_path / "s", tokens, tokens, {RESID: 5, MLP: 24}, dtype=dtype, shard_sequences=2)
    write_all(store, {hook: np.zeros((32, width), NUMPY_DTYPE[dtype]) for hook, width in ((RESID, 5), (MLP, 24))})
    for hook, width in ((RESID, 5), (MLP, 24)):
        names = ["activations", "norms", *(["scales"] if dtype == "int8" else [])]
        files = [file for name in names for file in (tmp_path / "s" / hook / name / "c").rglob("*") if file.is_file()]
        assert sum(file.stat().st_size - 4 for file in files) == 32 * bytes_a_row(width, dtype)
