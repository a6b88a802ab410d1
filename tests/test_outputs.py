"""What units do to the output: promoted tokens against the model's own logits, and clamps of equal effect."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llm_servers import ChatServer, Reply, Request, completion, perfect
from torch import Tensor

import explain.explain as stage
from activation_store import ActivationStore, ModelConfig
from activation_store.errors import InputError
from activation_store.files import read_json_lines
from activation_store.hooks import locate_hooks, on_pass
from activation_store.subject import Subject, load_subject
from explain.config import ExplainConfig
from explain.examples import Unit
from explain.interventions import KL, matched_strength, mean_kl, prompts_of, written
from explain.outputs import with_outputs
from sae.architectures.standard import StandardSAE
from sae.readout import output_logits, residual_directions
from sae.sae import SAE, SAEConfig

RESID, MLP, Z = "blocks.1.hook_resid_post", "blocks.1.mlp.hook_post", "blocks.1.attn.hook_z"


@pytest.fixture(scope="module")
def subject(tiny_model_dir: Path) -> Subject:
    return load_subject(ModelConfig(id=str(tiny_model_dir), dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(3)
        return GPT2LMHeadModel(GPT2Config(vocab_size=90, n_embd=32, n_layer=3, n_head=4, n_positions=64)).eval()


def sae_at(hook: str, d: int, seed: int = 0) -> StandardSAE:
    sae = StandardSAE(SAEConfig("standard", d, 12, hook))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return sae.requires_grad_(False)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("hook", [RESID, MLP, Z])
@torch.no_grad()
def test_directions_add_to_the_residual_stream_what_the_model_adds(
    family: str, hook: str, subject: Subject, gpt2: Any
) -> None:
    """Moved along a direction at its hook, the block's output moves by that: measured on the model itself."""
    model = subject.model if family == "llama" else gpt2
    width = {RESID: 32, MLP: 64 if family == "llama" else 128, Z: 32}[hook]
    sae = sae_at(hook, width)
    found = residual_directions(sae, model, [2, 5])
    tokens = torch.arange(2, 12)[None]
    sites = locate_hooks(model, [hook, "blocks.1.hook_resid_mid", RESID])
    after = "blocks.1.hook_resid_mid" if hook == Z else RESID  # before the MLP answers to what attention wrote

    def stream(delta: Tensor | None) -> Tensor:
        kept: list[Tensor] = []
        site, there = sites[hook], sites[after]
        with (
            on_pass(model.get_submodule(site.path), site.side, lambda x: x if delta is None else x + delta),
            on_pass(model.get_submodule(there.path), there.side, lambda x: kept.append(x.clone())),
        ):
            model(tokens)
        return kept[0]

    if hook == RESID:
        assert torch.allclose(found, sae.W_dec[[2, 5]])
        return
    for row, latent in zip(found, (2, 5), strict=True):
        moved = stream(sae.W_dec[latent]) - stream(None)
        assert torch.allclose(moved[0], row.expand_as(moved[0]), atol=1e-4)


def test_hooks_with_no_straight_way_to_the_logits_are_refused(subject: Subject) -> None:
    with pytest.raises(InputError, match=r"hook_name: blocks\.1\.attn\.hook_q is not on the residual stream"):
        residual_directions(sae_at("blocks.1.attn.hook_q", 32), subject.model, [0])
    unit = Unit("sae", "blocks.1.attn.hook_q", 0, 0.1, 1.0, [], [])
    assert with_outputs([unit], sae_at("blocks.1.attn.hook_q", 32), subject.model, subject.tokenizer) == [unit]


def test_units_carry_the_ends_of_the_ranking(subject: Subject) -> None:
    sae = sae_at(RESID, 32)
    units = [Unit("sae", RESID, latent, 0.1, 1.0, [], []) for latent in (4, 7)]
    found = with_outputs(units, sae, subject.model, subject.tokenizer, 3)
    logits = output_logits(sae, subject.model, [4, 7])
    for unit, row in zip(found, logits, strict=True):
        order = row.argsort(descending=True).tolist()
        assert unit.promoted == [(subject.tokenizer.decode([i]), pytest.approx(float(row[i]), rel=1e-4)) for i in order[:3]]
        ends = order[::-1][:3]
        assert unit.suppressed == [(subject.tokenizer.decode([i]), pytest.approx(float(row[i]), rel=1e-4)) for i in ends]


# --- clamps of equal effect


def setup(subject: Subject, store: ActivationStore) -> tuple[Tensor, Tensor]:
    prompts = prompts_of(store, 0)
    with torch.no_grad():
        return prompts, subject.model(prompts).logits.float().log_softmax(-1)


@torch.no_grad()
def test_the_kl_of_several_strengths_at_once_is_that_of_each_alone(subject: Subject, tiny_store: ActivationStore) -> None:
    sae = sae_at(RESID, 32)
    prompts, clean = setup(subject, tiny_store)
    strengths = [0.5, 3.0, 20.0]
    together = mean_kl(subject.model, sae, 3, strengths, prompts, clean)
    site = locate_hooks(subject.model, [RESID])[RESID]
    for strength, kl in zip(strengths, together.tolist(), strict=True):
        def clamp(x: Tensor, to: float = strength) -> Tensor:
            return x + (to - sae.encode(x)[..., 3:4]) * sae.W_dec[3]

        with on_pass(subject.model.get_submodule(site.path), site.side, clamp):
            steered = subject.model(prompts).logits.log_softmax(-1)
        plain = torch.nn.functional.kl_div(steered, clean, log_target=True, reduction="none").sum(-1).mean()
        assert kl == pytest.approx(float(plain), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("latent", range(6))
def test_the_strength_found_has_the_kl_asked_for(latent: int, subject: Subject, tiny_store: ActivationStore) -> None:
    sae = sae_at(RESID, 32)
    prompts, clean = setup(subject, tiny_store)
    strength, kl = matched_strength(subject.model, sae, latent, 1.0, prompts, clean, target=0.5)
    (again,) = mean_kl(subject.model, sae, latent, [strength], prompts, clean).tolist()
    assert kl == pytest.approx(again, rel=1e-4)
    assert kl == pytest.approx(0.5, rel=0.1)


def test_units_that_cannot_be_clamped_have_no_text_and_a_reason(subject: Subject, tiny_store: ActivationStore) -> None:
    sae, prompts = sae_at(RESID, 32), prompts_of(tiny_store, 0)
    never = written(subject.model, subject.tokenizer, sae, Unit("sae", RESID, 1, 0.0, 0.0, [], []), prompts)
    assert (never.reached, never.texts, never.reason) == (False, [], "it never fires")
    unit = Unit("sae", RESID, 1, 0.1, 1.0, [], [])
    far = written(subject.model, subject.tokenizer, sae, unit, prompts, target=1e6)
    assert (far.reached, far.texts) == (False, [])
    assert "no strength gives a KL of 1e+06" in str(far.reason)
    with torch.no_grad():
        sae.W_dec[1] = 0  # a direction that does nothing
    still = written(subject.model, subject.tokenizer, sae, unit, prompts)
    assert still.kl == pytest.approx(0.0, abs=1e-6)
    assert "no strength" in str(still.reason)


def test_texts_are_the_models_with_the_unit_clamped(subject: Subject, tiny_store: ActivationStore) -> None:
    sae, prompts = sae_at(RESID, 32), prompts_of(tiny_store, 0)
    unit = Unit("sae", RESID, 3, 0.1, 1.0, [], [])
    found = written(subject.model, subject.tokenizer, sae, unit, prompts)
    assert found == written(subject.model, subject.tokenizer, sae, unit, prompts)
    assert found.reached
    assert found.kl == pytest.approx(KL, rel=0.1)
    assert len(found.texts) == len(prompts)
    assert found.strength is not None
    site = locate_hooks(subject.model, [RESID])[RESID]

    def clamp(x: Tensor) -> Tensor:
        return x + (found.strength - sae.encode(x)[..., 3:4]) * sae.W_dec[3]

    with torch.no_grad(), on_pass(subject.model.get_submodule(site.path), site.side, clamp):
        ids = prompts
        for _ in range(12):  # no cache, a step at a time
            ids = torch.cat([ids, subject.model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    new = [subject.tokenizer.decode(row[prompts.shape[1] :], skip_special_tokens=True) for row in ids]
    stopped = [bool((row[prompts.shape[1] :] == subject.tokenizer.eos_token_id).any()) for row in ids]
    for text, plain, ended in zip(found.texts, new, stopped, strict=True):
        assert text == plain or ended


@pytest.mark.usefixtures("api")
def test_the_stage_puts_outputs_and_interventions_to_the_judge(
    subject: Subject, tiny_store: ActivationStore, tmp_path: Path
) -> None:
    sae: SAE = sae_at(RESID, 32)

    def answers(request: Request) -> Reply:
        if '"texts"' in request.user:
            return Reply(completion(json.dumps({"answer": 1})))
        return Reply(completion(perfect(request) if request.simulates else json.dumps({"description": "waves"})))

    config = ExplainConfig(
        backend="openai", latents=6, window=8, train_top=3, train_sampled=2, test_top=2, test_sampled=2, test_random=4,
        scores=("outputs", "intervention"), show=("outputs",), resamples=50,
    )  # fmt: skip
    with ChatServer(answers) as server:
        config = config.model_copy(update={"base_url": server.base_url})
        stage.explain(sae, tiny_store, subject.tokenizer, config, tmp_path, model=subject.model)
        proposals = [request.user for request in server.requests if "texts" not in request.user]
    units = {f"sae/{line['latent']}": line for line in read_json_lines(tmp_path / "units.jsonl")}
    assert all(len(unit["promoted"]) == 10 for unit in units.values())
    assert all("It makes more likely: " in shown for shown in proposals)
    clamped = {line["unit"]: line for line in read_json_lines(tmp_path / "continuations.jsonl")}
    assert set(clamped) == set(units)
    assert sum(line["reached"] for line in clamped.values()) >= 3
    for line in read_json_lines(tmp_path / "scores.jsonl"):
        assert line["state"] == "scored"
        assert 0 <= line["outputs"]["accuracy"] <= 1
        if not clamped[line["unit"]]["reached"]:
            assert line["intervention"]["accuracy"] is None
