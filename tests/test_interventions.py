"""Clamps of equal effect: the strength that gives a mean KL, and what the model writes with it."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from llm_servers import ChatServer, Reply, Request, completion, perfect
from test_outputs import RESID, sae_at
from torch import Tensor

import explain.explain as stage
from activation_store import ActivationStore, ModelConfig
from activation_store.errors import InputError
from activation_store.files import read_json_lines
from activation_store.hooks import locate_hooks, on_pass
from activation_store.subject import Subject, load_subject
from explain.config import ExplainConfig
from explain.examples import Unit
from explain.interventions import KL, Continuations, Written, prompts_of
from sae.architectures.directions import DirectionsSAE
from sae.architectures.identity import IdentitySAE
from sae.architectures.standard import StandardSAE
from sae.intervene import Add, Clamp, intervene
from sae.sae import SAE, SAEConfig


@pytest.fixture(scope="module")
def subject(tiny_model_dir: Path) -> Subject:
    return load_subject(ModelConfig(id=str(tiny_model_dir), dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def prompts(tiny_store: ActivationStore) -> Tensor:
    return prompts_of(tiny_store, 0)


def unit_of(sae: SAE, latent: int, top: float = 1.0) -> Unit:
    return Unit("sae", str(sae.cfg.hook_name), latent, 0.1, top, [], [])


def kl_by_hand(model: Any, sae: SAE, tokens: Tensor, move: Any) -> Tensor:
    """KL(clean || moved) at each position, by a hook of one line and torch's own divergence."""
    site = locate_hooks(model, [str(sae.cfg.hook_name)])[str(sae.cfg.hook_name)]
    with torch.no_grad():
        clean = model(tokens).logits.log_softmax(-1)
        with on_pass(model.get_submodule(site.path), site.side, move):
            steered = model(tokens).logits.log_softmax(-1)
    return torch.nn.functional.kl_div(steered, clean, log_target=True, reduction="none").sum(-1)


def test_the_kl_is_the_mean_over_positions_of_full_passes(subject: Subject, prompts: Tensor) -> None:
    """Also at the last position, after which the text goes on, and with the layers below the hook left out."""
    sae = sae_at(RESID, 32)
    continuations = Continuations(subject.model, subject.tokenizer, sae, prompts)
    for strength in (0.5, 3.0, 20.0):
        plain = kl_by_hand(subject.model, sae, prompts, lambda x: x + (strength - sae.encode(x)[..., 3:4]) * sae.W_dec[3])  # noqa: B023
        assert continuations.kl(3, strength) == pytest.approx(float(plain.mean()), rel=1e-3, abs=1e-6)


def test_special_tokens_are_neither_steered_nor_counted(subject: Subject, prompts: Tensor) -> None:
    special = [int(prompts[0, 2]), int(prompts[1, 0])]
    sae = sae_at(RESID, 32).with_metadata(special_token_ids=special)
    counts = ~torch.isin(prompts, torch.tensor(special))
    assert 2 <= (~counts).sum() < counts.numel()

    def clamp(x: Tensor) -> Tensor:
        return torch.where(counts[..., None], x + (5.0 - sae.encode(x)[..., 3:4]) * sae.W_dec[3], x)

    plain = kl_by_hand(subject.model, sae, prompts, clamp)[counts].mean()
    assert Continuations(subject.model, subject.tokenizer, sae, prompts).kl(3, 5.0) == pytest.approx(float(plain), rel=1e-3)
    silent = sae_at(RESID, 32).with_metadata(special_token_ids=prompts.unique().tolist())
    with pytest.raises(InputError, match="no token is steered"):
        Continuations(subject.model, subject.tokenizer, silent, prompts)


@pytest.mark.parametrize("target", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("top", [0.2, 1.0, 20.0])  # the search goes up, hardly moves, goes down
def test_the_strength_found_has_the_kl_asked_for(target: float, top: float, subject: Subject, prompts: Tensor) -> None:
    sae = sae_at(RESID, 32)
    continuations = Continuations(subject.model, subject.tokenizer, sae, prompts, target=target)
    reached = []
    for latent in range(4):
        strength, kl, passes = continuations.matched(latent, top)
        assert strength is not None
        assert top / 64 <= strength <= 256 * top
        assert kl == pytest.approx(continuations.kl(latent, strength), rel=1e-4)
        steps = [continuations.kl(latent, top * 4.0**i) for i in range(-3, 5)]
        if any(low < target <= high for low, high in pairwise(steps)):
            assert kl == pytest.approx(target, rel=0.1)
            reached.append(latent)
        assert passes <= 20
    assert len(reached) >= 2


def test_units_that_cannot_be_clamped_have_no_text_and_a_reason(subject: Subject, prompts: Tensor) -> None:
    def written(unit: Unit, target: float = KL) -> Written:
        return Continuations(subject.model, subject.tokenizer, sae, prompts, target=target).of(unit)

    sae = sae_at(RESID, 32)
    never = written(unit_of(sae, 1, 0.0))
    assert (never.reached, never.texts, never.reason, never.forwards) == (False, [], "it never fires", 0)
    far = written(unit_of(sae, 1), target=1e6)
    assert (far.reached, far.texts) == (False, [])
    assert "no strength gives a KL of 1e+06" in str(far.reason)
    with torch.no_grad():
        sae.W_dec[1] = 0  # a direction that does nothing
    still = written(unit_of(sae, 1))
    assert still.kl == pytest.approx(0.0, abs=1e-6)
    assert "no strength" in str(still.reason)
    with torch.no_grad():
        sae.W_dec[1] = torch.inf
    broken = written(unit_of(sae, 1))
    assert (broken.strength, broken.kl, broken.reached) == (None, None, False)  # no NaN, which JSON has not
    assert broken.reason == "no strength leaves the model's logits finite"
    transcoder = StandardSAE(SAEConfig("standard", 32, 12, "blocks.1.mlp.hook_in", hook_name_out="blocks.1.hook_mlp_out"))
    with pytest.raises(InputError, match="steering takes an SAE"):
        Continuations(subject.model, subject.tokenizer, transcoder, prompts)
    with pytest.raises(InputError, match="target: a mean KL of nan given"):
        Continuations(subject.model, subject.tokenizer, sae_at(RESID, 32), prompts, target=float("nan"))


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), [1.0, float("nan")]])
def test_strengths_that_are_not_finite_are_refused(strength: Any, subject: Subject) -> None:
    for edit in (Clamp(1, value=strength), Add(1, strength)):
        with pytest.raises(InputError, match=r"latent 1: strength .* it has to be finite"), intervene(
            subject.model, sae_at(RESID, 32), [edit]
        ):
            pass


def plainly(subject: Subject, sae: SAE, prompts: Tensor, move: Any) -> list[str]:
    """Greedy text without a cache, a step at a time, up to the end that the model gives itself."""
    site = locate_hooks(subject.model, [str(sae.cfg.hook_name)])[str(sae.cfg.hook_name)]
    with torch.no_grad(), on_pass(subject.model.get_submodule(site.path), site.side, move):
        ids = prompts
        for _ in range(12):
            ids = torch.cat([ids, subject.model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    texts = []
    for row in ids[:, prompts.shape[1] :].tolist():
        end = row.index(subject.tokenizer.eos_token_id) if subject.tokenizer.eos_token_id in row else len(row)
        texts.append(subject.tokenizer.decode(row[:end], skip_special_tokens=True))
    return texts


def test_texts_are_the_models_with_the_unit_clamped(subject: Subject, prompts: Tensor) -> None:
    sae = sae_at(RESID, 32)
    continuations = Continuations(subject.model, subject.tokenizer, sae, prompts)
    found = continuations.of(unit_of(sae, 3))
    assert found == Continuations(subject.model, subject.tokenizer, sae, prompts).of(unit_of(sae, 3))
    assert found.reached
    assert found.kl == pytest.approx(KL, rel=0.1)
    assert found.edit == "clamp"
    strength = found.strength
    assert strength is not None
    assert found.texts == plainly(subject, sae, prompts, lambda x: x + (strength - sae.encode(x)[..., 3:4]) * sae.W_dec[3])
    assert found.clean == plainly(subject, sae, prompts, lambda x: None)
    assert found.texts != found.clean
    assert found.forwards <= 20 + 12
    json.dumps(vars(found), allow_nan=False)


@pytest.mark.parametrize("kind", ["neurons", "directions"])
def test_given_directions_are_added_to(kind: str, subject: Subject, prompts: Tensor) -> None:
    hook, width = ("blocks.1.mlp.hook_post", 64) if kind == "neurons" else (RESID, 32)
    sae = IdentitySAE.of(hook, width) if kind == "neurons" else DirectionsSAE.random(width, 12, hook=hook)
    found = Continuations(subject.model, subject.tokenizer, sae, prompts).of(unit_of(sae, 5))
    assert (found.reached, found.edit) == (True, "add")
    direction = sae.directions(torch.tensor([5]))[0]
    kl = kl_by_hand(subject.model, sae, prompts, lambda x: x + found.strength * direction)
    assert float(kl.mean()) == pytest.approx(float(found.kl or 0), rel=1e-3)
    assert found.texts == plainly(subject, sae, prompts, lambda x: x + found.strength * direction)


def test_gpt2_has_it_too() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    class Tokenizer:
        pad_token_id, eos_token_id = None, 1

        def decode(self, ids: Tensor, skip_special_tokens: bool) -> str:
            return " ".join(str(int(i)) for i in ids)

    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = GPT2Config(vocab_size=90, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.2)
        model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    sae, tokens = sae_at("blocks.1.attn.hook_z", 32), torch.arange(2, 26).view(3, 8)
    found = Continuations(model, Tokenizer(), sae, tokens).of(unit_of(sae, 2))
    strength = found.strength
    assert found.reached
    assert strength is not None
    kl = kl_by_hand(model, sae, tokens, lambda x: x + (strength - sae.encode(x)[..., 2:3]) * sae.W_dec[2])
    assert float(kl.mean()) == pytest.approx(float(found.kl or 0), rel=1e-3)


def test_the_demo_model_writes_otherwise_at_equal_effect(demo_model_dir: Path) -> None:
    subject = load_subject(ModelConfig(id=str(demo_model_dir), dtype="float32", device="cpu"))
    tokenizer = subject.tokenizer
    texts = ["I think that the most important thing is", "In the morning she went out to see the"]
    tokens = torch.tensor([tokenizer(text)["input_ids"][:8] for text in texts])
    sae = sae_at("blocks.14.hook_resid_post", 576)
    with torch.no_grad():  # directions of norm 1 and their own readers, as training leaves them
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    sae.with_metadata(special_token_ids=tokens[:, 0].tolist())  # the attention sink stays as it is, as a BOS does
    continuations = Continuations(subject.model, tokenizer, sae, tokens, tokens=6)
    found = [continuations.of(unit_of(sae, latent, 5.0)) for latent in (1, 4)]
    for one in found:
        assert one.reached
        assert one.kl == pytest.approx(KL, rel=0.1)
        assert one.texts != one.clean
        assert all(text.strip() for text in one.clean)
    assert found[0].texts != found[1].texts


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
