"""Moments of activations: what NumPy makes of the same rows, however they are split, and exactly back from the store."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from numpy.typing import NDArray
from stores import flipped, read_by_tensorstore, write_all

from activation_store import ActivationStore, HookStatistics, InputError
from activation_store.statistics import FULL_COVARIANCE, NORM_EDGES, Fold, Sums, from_bytes, to_bytes


def sums_of(x: NDArray[np.float32], kept: NDArray[np.bool_], batches: list[int]) -> dict[str, NDArray[Any]]:
    """Sums of rows given in batches cut at these places, by way of the bytes that a shard's are kept as."""
    sums = Sums(x.shape[1])
    for part, mask in zip(np.split(x, batches), np.split(kept, batches), strict=True):
        if len(part):
            rows = torch.from_numpy(part)
            sums.add(rows, torch.linalg.vector_norm(rows, dim=1), torch.from_numpy(mask))
    return from_bytes(to_bytes({"h": sums.arrays()}))["h"]


def statistics_of(x: NDArray[np.float32], kept: NDArray[np.bool_] | None = None) -> HookStatistics:
    fold = Fold()
    fold.add({"h": sums_of(x, np.ones(len(x), bool) if kept is None else kept, [])})
    return fold.statistics()["h"]


entries = st.floats(-1e3, 1e3, width=32).map(lambda x: x if abs(x) > 1e-12 else 0.0)  # whose squares float32 can hold


@given(data=st.data(), rows=st.integers(1, 60), width=st.integers(1, 5), spoil=st.sampled_from([1.0, np.inf, np.nan]))
@settings(max_examples=120, deadline=None)
def test_moments_are_numpys_in_any_split_into_shards_and_batches(
    data: st.DataObject, rows: int, width: int, spoil: float
) -> None:
    x = data.draw(nps.arrays(np.float32, (rows, width), elements=entries), label="x")
    kept = data.draw(nps.arrays(bool, rows), label="kept")
    x = np.where(kept[:, None] | (x == 0), x, np.float32(spoil))  # what is left out may be infinite, as sinks are in float16
    cuts = st.lists(st.integers(0, rows), max_size=4).map(sorted)
    shards = data.draw(cuts, label="shards")
    fold = Fold()
    for part, mask in zip(np.split(x, shards), np.split(kept, shards), strict=True):
        inner = [cut for cut in data.draw(cuts, label="batches") if cut < len(part)]
        fold.add({"h": sums_of(part, mask, inner)})
    found = fold.statistics()["h"]
    good = x[kept].astype(np.float64)
    assert found.rows == len(good)
    if not len(good):
        assert (found.mean == 0).all()
        assert (found.mean_norm, found.mean_square_norm, found.max_norm) == (0, 0, 0)
        return
    norms = np.linalg.norm(good, axis=1)
    size = float(np.abs(good).max())
    np.testing.assert_allclose(found.mean, good.mean(0), rtol=1e-5, atol=1e-6 * size)
    np.testing.assert_allclose(found.variance, good.var(0), rtol=1e-5, atol=1e-5 * size**2)
    assert found.covariance is not None
    np.testing.assert_allclose(found.covariance, np.cov(good.T, bias=True).reshape(width, width), rtol=1e-5, atol=1e-5 * size**2)
    np.testing.assert_array_equal(found.covariance, found.covariance.T)
    assert found.mean_norm == pytest.approx(norms.mean(), rel=1e-5)
    assert found.mean_square_norm == pytest.approx((norms**2).mean(), rel=1e-5)
    assert found.max_norm == pytest.approx(norms.max(), rel=1e-5)
    assert int(found.norm_histogram.sum()) == len(good)


def test_statistics_golden_values() -> None:
    found = statistics_of(np.array([[3, 4], [0, 0], [9, 9], [-3, 4]], np.float32), np.array([True, True, False, True]))
    assert found.rows == 3
    np.testing.assert_allclose(found.mean, [0, 8 / 3])
    np.testing.assert_allclose(found.variance, [6, 32 / 3 - 64 / 9])
    assert found.covariance is not None
    np.testing.assert_allclose(found.covariance, [[6, 0], [0, 32 / 9]], rtol=1e-6)
    assert (found.mean_norm, found.mean_square_norm, found.max_norm) == pytest.approx((10 / 3, 50 / 3, 5))


def test_the_histogram_counts_norms_between_its_edges_and_the_outer_bins_take_the_rest() -> None:
    assert len(NORM_EDGES) == 241
    assert (NORM_EDGES[0], NORM_EDGES[8], NORM_EDGES[-1]) == (2.0**-10, 2.0**-9, 2.0**20)
    norms = np.array([0.0, 1e-9, 2.0**-9, 1.0, 1.05, 1.5, 2.0**19.99, 1e30], np.float32)
    found = statistics_of(norms[:, None]).norm_histogram
    by_hand = {0: 2, 8: 1, 80: 2, 84: 1, 239: 2}  # 1.5 = 2^(4.68 / 8)
    assert {int(i): int(found[i]) for i in np.flatnonzero(found)} == by_hand


@given(
    seed=st.integers(0, 999), size=st.sampled_from([1.0, 0.01, 5000.0]), spread=st.sampled_from([0.1, 0.5, 1.0]),
    mean=st.sampled_from([0.0, 3.0]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_the_median_norm_is_right_to_two_percent(seed: int, size: float, spread: float, mean: float) -> None:
    chance = np.random.default_rng(seed)
    x = (size * chance.normal(mean, 1, (3000, 4)) * np.exp(spread * chance.normal(size=(3000, 1)))).astype(np.float32)
    x = x[np.linalg.norm(x, axis=1) < 2.0**19]
    expected = float(np.median(np.linalg.norm(x, axis=1)))
    assert statistics_of(x).median_norm == pytest.approx(expected, rel=0.02)


def test_the_median_of_one_bin_is_in_its_middle_and_of_nothing_no_number() -> None:
    histogram = np.zeros(240, np.int64)
    histogram[88] = 10
    one = HookStatistics(10, np.zeros(1), 1.0, 1.0, 1.0, norm_histogram=histogram)
    assert one.median_norm == pytest.approx(2 * 2 ** (1 / 16))
    histogram = histogram.copy()
    histogram[80] = 30  # three quarters lie below 2^(1/8): the median is two thirds into that bin
    two = HookStatistics(40, np.zeros(1), 1.0, 1.0, 1.0, norm_histogram=histogram)
    assert two.median_norm == pytest.approx(2 ** (2 / 3 / 8))
    assert np.isnan(HookStatistics(0, np.zeros(1), 0.0, 0.0, 0.0).median_norm)


@pytest.mark.parametrize("width", [FULL_COVARIANCE, FULL_COVARIANCE + 1])
def test_hooks_too_wide_for_a_covariance_have_its_diagonal(width: int) -> None:
    x = np.random.default_rng(0).normal(1, 2, (40, width)).astype(np.float32)
    found = statistics_of(x, np.arange(40) % 5 > 0)
    good = x[np.arange(40) % 5 > 0].astype(np.float64)
    np.testing.assert_allclose(found.mean, good.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.variance, good.var(0), rtol=1e-4)
    if width > FULL_COVARIANCE:
        assert found.covariance is None
    else:
        assert found.covariance is not None
        np.testing.assert_allclose(found.covariance, np.cov(good.T, bias=True), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found.covariance.diagonal(), found.variance, rtol=1e-4)


def test_rows_left_out_change_no_bit() -> None:
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    kept = np.arange(50) % 7 > 0
    expected = statistics_of(np.where(kept[:, None], x, np.float32(0)), kept)
    for spoil in (np.inf, -np.inf, np.nan, 3e38):
        found = statistics_of(np.where(kept[:, None], x, np.float32(spoil)), kept)
        for name, value in vars(expected).items():
            np.testing.assert_array_equal(getattr(found, name), value)


# Kept as bytes


SUMS = {"blocks.0.hook:odd": sums_of(np.ones((4, 2), np.float32), np.ones(4, bool), []), "h": {"rows": np.array(3)}}


def same(one: dict[str, dict[str, NDArray[Any]]], other: dict[str, dict[str, NDArray[Any]]]) -> bool:
    if {hook: sorted(found) for hook, found in one.items()} != {hook: sorted(found) for hook, found in other.items()}:
        return False
    return all(np.array_equal(value, other[hook][name]) for hook, found in one.items() for name, value in found.items())


def test_sums_come_back_from_bytes() -> None:
    assert same(from_bytes(to_bytes(SUMS)), SUMS)


@given(data=st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_garbage_is_no_sums(data: bytes) -> None:
    with pytest.raises(ValueError, match="no sums"):
        from_bytes(data)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_sums_that_are_cut_off_or_changed_are_refused_or_whole(data: st.DataObject) -> None:
    whole = to_bytes(SUMS)
    with pytest.raises(ValueError, match="no sums"):
        from_bytes(whole[: data.draw(st.integers(0, len(whole) - 1), label="cut at")])
    bad = bytearray(whole)
    bad[data.draw(st.integers(0, len(whole) - 1), label="byte")] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    try:
        found = from_bytes(bytes(bad))
    except ValueError as error:
        assert "no sums" in str(error)  # noqa: PT017 (a flip in a time stamp of the file changes nothing)
    else:
        assert same(found, SUMS)


@pytest.mark.parametrize("array", [np.zeros(3), np.array(["x"])], ids=["numbers", "text"])
def test_another_file_of_numpys_is_no_sums(tmp_path: Path, array: NDArray[Any]) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(ValueError, match="no sums"):
        from_bytes((tmp_path / "x.npy").read_bytes())


# In a store


def store_with(path: Path, x: NDArray[np.float32], kept: HookStatistics) -> ActivationStore:
    tokens = np.zeros((2, len(x) // 2), np.int32)
    store = ActivationStore.create(path, tokens, tokens, {"h": x.shape[1]}, dtype="float32")
    write_all(store, {"h": x})
    store.finish({"h": kept})
    return ActivationStore.open(path)


def test_statistics_come_back_exactly_with_their_covariance_as_a_zarr_array(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(100, 5)).astype(np.float32)
    kept = statistics_of(x)
    found = store_with(tmp_path / "s", x, kept).statistics("h")
    for name, value in vars(kept).items():
        np.testing.assert_array_equal(getattr(found, name), value)
    assert found.mean.dtype == np.float64
    assert found.median_norm == kept.median_norm
    group = zarr.open(tmp_path / "s", mode="r")
    np.testing.assert_array_equal(group["h/covariance"][:], kept.covariance)
    np.testing.assert_array_equal(read_by_tensorstore(tmp_path / "s", "h/covariance"), kept.covariance)
    attributes = dict(group.attrs)["statistics"]["h"]
    assert attributes["rows"] == 100
    assert attributes["covariance"] is True
    np.testing.assert_allclose(attributes["mean"], x.mean(0, dtype=np.float64), atol=1e-7)


def test_statistics_come_back_exactly_without_a_covariance(tmp_path: Path) -> None:
    kept = HookStatistics(rows=5, mean=np.array([1 / 3, -1e-300]), mean_norm=0.1, mean_square_norm=2 / 3, max_norm=7.0)
    found = store_with(tmp_path / "s", np.ones((6, 2), np.float32), kept).statistics("h")
    for name, value in vars(kept).items():
        np.testing.assert_array_equal(getattr(found, name), value)
    assert not (tmp_path / "s" / "h" / "covariance").exists()
    json.loads((tmp_path / "s" / "zarr.json").read_text())


def test_a_damaged_covariance_is_refused(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(10, 2)).astype(np.float32)
    store = store_with(tmp_path / "s", x, statistics_of(x))
    file = tmp_path / "s" / "h" / "covariance" / "c" / "0" / "0"
    with flipped(file, 5), pytest.raises(InputError) as error:
        store.statistics("h")
    assert str(file) in str(error.value)
    file.unlink()
    with pytest.raises(InputError, match="missing"):
        store.statistics("h")
