"""Many hooks in one pass: every kind of place, aligned row by row, with the values that TransformerBridge sees there."""

from pathlib import Path

import numpy as np
import pytest
import torch

from activation_store import ActivationStore, DataConfig, HarvestConfig, ModelConfig
from activation_store.harvest import harvest
from activation_store.subject import load_subject

HOOKS = tuple(
    f"blocks.1.{place}"
    for place in (
        "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "attn.hook_z", "hook_attn_out", "mlp.hook_in", "mlp.hook_post",
        "hook_mlp_out",
    )
)  # fmt: skip


@pytest.fixture(scope="module")
def store(tiny_model_dir: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    subject = load_subject(ModelConfig(id=str(tiny_model_dir), dtype="float32", device="cpu"))
    data = DataConfig(source=str(tiny_text), context=16, tokens=1600, held_out=0.1)
    config = HarvestConfig(hooks=HOOKS, dtype="float32", batch_size=4, shard_mb=0.02)
    return harvest(subject, data, config, tmp_path_factory.mktemp("many") / "activations")


def test_every_row_of_every_hook_is_what_the_bridge_sees_at_its_token(store: ActivationStore, tiny_model_dir: Path) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(tiny_model_dir), device="cpu", dtype=torch.float32)
    for first in (0, 40):  # two places, of different shards
        tokens = torch.from_numpy(store.tokens[first : first + 3].copy()).long()
        with torch.no_grad():
            _, cache = bridge.run_with_cache(tokens)
        rows = slice(first * store.context, (first + 3) * store.context)
        for hook in HOOKS:
            seen = cache[hook].reshape(3 * store.context, -1)
            assert store.width(hook) == seen.shape[1], hook
            assert torch.allclose(store.read(hook, rows), seen, atol=2e-5), hook


def test_pairs_are_drawn_row_by_row(store: ActivationStore) -> None:
    """What a transcoder (MLP in, MLP out) and a crosscoder (three residual streams) read, over several turns of blocks."""
    for hooks in (("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"), HOOKS[:3]):
        batches = store.batches(hooks, 100, seed=2, memory_mb=0.05)
        seen = 0
        for rows, item in zip(batches.row_numbers(), batches, strict=True):
            for hook, x in zip(hooks, item, strict=True):
                assert torch.equal(x, store.read(hook, rows))
            seen += len(rows)
        assert seen == batches.rows == int((~store.special[: store.train_sequences]).sum())


def test_the_residual_stream_adds_up(store: ActivationStore) -> None:
    rows = np.arange(0, store.rows, 7)
    pre, mid, post = (store.read(hook, rows) for hook in HOOKS[:3])
    assert torch.allclose(pre + store.read("blocks.1.hook_attn_out", rows), mid, atol=1e-5)
    assert torch.allclose(mid + store.read("blocks.1.hook_mlp_out", rows), post, atol=1e-5)
