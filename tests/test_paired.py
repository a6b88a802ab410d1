"""Batches of the same tokens from two stores: aligned whatever the widths, sought exactly, refused where tokens differ."""

from itertools import islice

import numpy as np
import pytest
import torch
from stores import create

from activation_store import InputError, PairedBatches
from sae import TrainConfig, train


def store_of(path, width, tokens, dtype="float32"):
    """A store whose activations tell their row: column 0 is the row's number."""
    store = create(path, tokens, tokens // 7, {"h": width}, dtype=dtype, shard_sequences=50, block_bytes=2048)
    for shard in range(store.shards):
        where = store.shard_sequences(shard)
        rows = torch.arange(where.start * store.context, where.stop * store.context).float()
        store.write_shard(shard, {"h": torch.cat([rows[:, None], torch.randn(len(rows), width - 1)], 1)})
    store.change_attributes(complete=True)
    return store


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(2, 50, (400, 16), generator=torch.Generator().manual_seed(0)).int().numpy()


@pytest.fixture(scope="module")
def stores(tmp_path_factory, tokens):
    folder = tmp_path_factory.mktemp("paired")
    return [store_of(folder / "narrow", 64, tokens), store_of(folder / "wide", 96, tokens)]


def test_rows_are_of_the_same_token_where_zipped_batches_are_not(stores):
    zipped = zip(*(store.batches("h", 100, seed=1, memory_mb=0.5) for store in stores), strict=True)
    assert not all(torch.equal(x[:, 0], y[:, 0]) for x, y in zipped)  # what this is for
    seen = []
    for x, y in PairedBatches(stores, ["h", "h"], 100, seed=1, memory_mb=0.5):
        assert (x.shape[1], y.shape[1]) == (64, 96)
        assert torch.equal(x[:, 0], y[:, 0])
        seen += x[:, 0].tolist()
    assert len(seen) == len(set(seen)) == PairedBatches(stores, ["h", "h"], 100).rows


def test_it_seeks_exactly_and_is_in_the_first_stores_order(stores):
    batches = PairedBatches(stores, ["h", "h"], 100, seed=3, memory_mb=0.1)
    whole = list(islice(batches.stream(0), 90))
    for start in (1, 17, 70):  # the last beyond an epoch
        for (x, y), (a, b) in zip(islice(batches.stream(start), 3), whole[start:], strict=False):
            assert torch.equal(x, a)
            assert torch.equal(y, b)
    alone = stores[0].batches("h", 100, seed=3, memory_mb=0.1, epochs=None)
    assert all(torch.equal(x, a) for (x, _), a in zip(whole[:5], islice(alone, 5), strict=True))
    assert "row " in batches.whereabouts(2, 5)


def test_stores_of_other_tokens_are_refused_by_name(stores, tmp_path, tokens):
    changed = np.array(tokens)
    changed[3, 3] += 1
    other = store_of(tmp_path / "other", 64, changed)
    with pytest.raises(InputError, match=r"narrow and .*other hold other tokens; harvest both models on the same data section"):
        PairedBatches([stores[0], other], ["h", "h"])
    with pytest.raises(InputError, match=r"hooks: 1 given for 2 stores"):
        PairedBatches(stores, ["h"])
    with pytest.raises(InputError):
        PairedBatches(stores, ["h", "nowhere"])


def test_a_crosscoder_of_two_models_is_trained_and_resumed(stores, tmp_path):
    batches = PairedBatches(stores, ["h", "h"], 128, seed=0)
    config = TrainConfig(architecture="topk", hook=("one", "two"), d_sae=64, k=4, steps=30, batch_size=128, checkpoint_every=10)
    whole = train(batches, config)

    def stop(done, total):
        if done == 17 * 128:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(batches, config, checkpoints=tmp_path, progress=stop)
    again = train(batches, config, checkpoints=tmp_path)
    assert again.cfg.widths == (64, 96)
    assert torch.equal(again.W_dec, whole.W_dec)
