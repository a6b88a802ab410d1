"""Absorption against SAEBench's own code, on planted absorbers, and the first-letter task's words and prompts."""

import json

import numpy as np
import pytest
import torch
from test_evaluate import model  # noqa: F401 - a fixture
from test_intervene import HOOK, sae_for
from transformers import AutoTokenizer

from activation_store.errors import InputError
from activation_store.hooks import capture, locate_hooks
from sae import EvaluateConfig
from sae.architectures.standard import StandardSAE
from sae.evaluate import evaluate
from sae.evaluation import spelling
from sae.evaluation.absorption import absorbed, absorption, letter_probes, main_latents
from sae.evaluation.spelling import LETTERS, Words, example, read_words, vocabulary_words
from sae.sae import SAEConfig

# FeatureAbsorptionCalculator.calculate_absorption of sae-bench 0.6.0, given these latents, activations and decoder rows, with
# the probe along the first axis and latents 0 and 2 as the main ones
DECODER = [
    [1, 0, 0, 0], [0.8, 0.6, 0, 0], [0.6, 0, 0.8, 0], [0.05, 0, 0, 1], [0, 1, 0, 0], [-0.6, 0.8, 0, 0], [0.1, 0, 0, -0.9],
]  # fmt: skip
LATENTS = [
    [2, 0, 0, 0, 0, 0, 0], [0, 2, 0, 0, 0, 0, 0], [0, 2, 0, 0, 1, 0, 0], [0.5, 2, 0, 0, 0, 0, 0], [0, 0.3, 0, 0, 2, 0, 0],
    [0, 0, 0, 30, 0, 0, 0], [0, 0, 0.4, 0, 0, 3, 0], [0, 0, 0, 0, 0, 0, 0], [3, 1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 1, 4],
    [0.2, 0.9, 0.1, 0, 0, 0.4, 3],
]  # fmt: skip
ALONG = [1.8, 2.0, 1.4, 1.9, 1.5, 1.6, 0.7, 1.0, 2.5, -0.4, 1.2]
FRACTION = [0, 1, 1, 0.736842, 0, 0, 0, 0, 0, 0, 0.783333]
WHOLE = [False, True, True, False, False, True, False, False, False, False, False]


def test_it_is_what_saebench_computes():
    decoder = torch.nn.functional.normalize(torch.tensor(DECODER, dtype=torch.float32), dim=1)
    x = torch.zeros(11, 4)
    x[:, 0] = torch.tensor(ALONG)
    x[:, 1] = torch.randn(11)  # what the probe does not see
    f = torch.tensor(LATENTS, dtype=torch.float32)
    fraction, whole = absorbed(f, x, torch.tensor([3.0, 0, 0, 0]), decoder, [0, 2])
    assert fraction.tolist() == pytest.approx(FRACTION, abs=1e-5)
    assert whole.tolist() == WHOLE
    norms = torch.tensor([1.0, 2, 3, 0.5, 4, 5, 6])  # longer rows with smaller latents are the same SAE
    again = absorbed(f / norms, x, torch.tensor([3.0, 0, 0, 0]), decoder * norms[:, None], [0, 2])
    torch.testing.assert_close(again[0], fraction)
    assert again[1].tolist() == WHOLE


def made_words(count=2600, d=40, seed=0) -> tuple[Words, np.ndarray]:
    """Words of evenly many letters, x = their letter's axis times 3, and 2 more axes by chance; a tenth are of a special kind."""
    chance = np.random.default_rng(seed)
    letters = chance.permutation(np.arange(count) % 26)
    kind = chance.random(count) < 0.1
    x = np.zeros((count, d), np.float32)
    x[np.arange(count), letters] = 3
    x[:, 30:32] = chance.normal(size=(count, 2))
    x[kind, 33] = 4
    words = [f"{LETTERS[letter]}{i}" for i, letter in enumerate(letters)]
    return Words(words, torch.from_numpy(x), letters, np.arange(count) >= 0.8 * count), kind


def letter_sae(absorbing: bool) -> StandardSAE:
    """A latent a letter; with `absorbing`, those of letter "a" keep silent on special words, whose own latent carries it."""
    sae = StandardSAE(SAEConfig("standard", 40, 60, HOOK, apply_b_dec_to_input=False)).requires_grad_(False)
    for parameter in sae.parameters():
        parameter.zero_()
    for i in range(26):
        sae.W_enc[i, i] = sae.W_dec[i, i] = 1
    sae.W_enc[33, 40], sae.b_enc[40] = 1.0, 0.0
    sae.W_dec[40, 33] = 1
    if absorbing:  # latent 41 fires on special words with "a", and is 4 of the kind's axis and 3 of the letter's
        sae.W_enc[33, 0] = -1
        sae.W_enc[0, 41], sae.W_enc[33, 41], sae.b_enc[41] = 1, 1, -5.0  # 3 + 4 - 5 = 2; either alone stays silent
        sae.W_dec[41, 0], sae.W_dec[41, 33] = 0.6, 0.8
        sae.W_enc[:, 41] *= 2.5  # to carry 3 along the letter: 5 * 0.6
        sae.b_enc[41] *= 2.5
    return sae


def test_a_planted_absorber_is_found_and_without_it_there_is_none():
    words, kind = made_words()
    probes = letter_probes(words)
    assert min(probes[2].values()) > 0.95
    clean = absorption(letter_sae(False), words, probes, 10)
    assert (clean["state"], clean["letters_told"]) == ("measured", 26)
    assert clean["mean_full_absorption"] == clean["mean_absorption_fraction"] == 0
    assert clean["mean_split_latents"] == 1
    assert [clean["letters"][letter]["latents"] for letter in LETTERS] == [[i] for i in range(26)]
    found = absorption(letter_sae(True), words, probes, 1)  # one main latent a letter, so that the absorber is none
    of_a = words.test & (words.letters == 0)
    share = kind[of_a].mean()
    assert share > 0
    assert found["letters"]["a"]["recognised"] == of_a.sum()
    assert found["letters"]["a"]["full_absorption"] == pytest.approx(share)
    assert found["letters"]["a"]["absorption_fraction"] == pytest.approx(share)
    assert found["letters"]["b"]["full_absorption"] == 0
    assert found["mean_full_absorption"] == pytest.approx(share / 26)


def test_a_letter_that_two_latents_share_is_split():
    words, _ = made_words()
    chance = np.random.default_rng(1)
    y = words.letters == 4
    f = np.where(chance.random((len(y), 30)) < 0.05, 1.0, 0)
    first = chance.random(len(y)) < 0.6
    f[:, 5], f[:, 9] = 2.0 * (y & first), 2.0 * (y & ~first)
    from scipy.sparse import csr_array

    train, test = ~words.test, words.test
    assert sorted(main_latents(csr_array(f[train]), csr_array(f[test]), y[train], y[test], 10)) == [5, 9]


def test_without_letters_in_the_activations_it_is_undefined_with_the_reason(tiny_store):
    words, _ = made_words(600)
    noise = Words(words.words, torch.randn(600, 32), words.letters, words.test)
    found = absorption(sae_for(32, HOOK), noise, letter_probes(noise), 10)
    assert found["state"] == "undefined"
    assert "20 are needed" in found["reason"]
    assert found["mean_full_absorption"] is None


class Vocabulary:
    bos_token_id = 1

    def get_vocab(self):
        return {"<s>": 1, "cat": 2, "Ġdog": 3, "Ġ": 4, "é": 5, "x1": 6, "▁owl": 7, "Zoo": 8}

    def convert_tokens_to_string(self, tokens):
        return tokens[0].replace("Ġ", " ").replace("▁", "")


def test_words_are_single_tokens_of_letters(monkeypatch):
    with pytest.raises(InputError, match="the vocabulary holds 4 words"):
        vocabulary_words(Vocabulary())
    monkeypatch.setattr(spelling, "_TOGETHER", -8)
    assert vocabulary_words(Vocabulary()) == {"cat": 2, " dog": 3, " owl": 7, "Zoo": 8}
    assert example(" dog") == "\n dog has the first letter: D"


@pytest.mark.parametrize("hook", [HOOK, "blocks.0.hook_resid_pre", "blocks.2.attn.hook_z"])
def test_words_are_read_as_in_their_whole_prompt(model, tiny_model_dir, monkeypatch, hook):  # noqa: F811
    """The examples' keys and values are shared: each word's activation must be that of the prompt in full."""
    monkeypatch.setattr(spelling, "_TOGETHER", 5)
    monkeypatch.setattr(spelling, "_EXAMPLES", 3)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    prompts = []

    def listen(_module, args, kwargs):
        prompts.append(kwargs["input_ids"])

    handle = model.register_forward_pre_hook(listen, with_kwargs=True)
    words = read_words(model, tokenizer, hook, 40, True, 0)
    handle.remove()
    assert len(words.words) == len(set(words.words)) == len(words.x)
    site = locate_hooks(model, [hook])
    prefixes = [ids for i, ids in enumerate(prompts) if ids.shape[1] > 1 and (i == 0 or ids is not prompts[i - 1])]
    for prefix, asked in zip(prefixes, (ids for ids in prompts if ids.shape[1] == 1), strict=True):
        assert prefix[0, 0] == tokenizer.bos_token_id
        shown = tokenizer.decode(prefix[0])
        rows = [words.words.index(tokenizer.decode(one)) for one in asked]
        for row, word in zip(rows, asked, strict=True):
            assert f"\n{words.words[row]} has" not in shown
            whole = torch.cat([prefix[0], word])[None]
            expected = capture(model, site, whole)[hook][0, -1]
            torch.testing.assert_close(words.x[row], expected, atol=1e-4, rtol=1e-4)
    assert shown.count(" has the first letter: ") == 3
    letters = [word.strip()[0].lower() for word in words.words]
    assert [LETTERS[number] for number in words.letters] == letters
    assert words.test.sum() == len(words.words) - int(0.8 * len(words.words))


def test_an_evaluation_reports_it_when_asked(tiny_store, model, tiny_model_dir, monkeypatch):  # noqa: F811
    monkeypatch.setattr(spelling, "_TOGETHER", 16)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    config = EvaluateConfig(ce_sequences=1, resamples=0, dark_matter=False, absorption=True)
    found = evaluate(sae_for(32, HOOK), tiny_store, model, config, tokenizer=tokenizer)["absorption"]
    assert found["state"] in ("measured", "undefined")
    assert set(found["probe_f1"]) == set(LETTERS)
    json.dumps(found, allow_nan=False)
    with pytest.raises(InputError, match="need the model's tokenizer"):
        evaluate(sae_for(32, HOOK), tiny_store, model, config)
    with pytest.raises(InputError, match="the vocabulary holds 4 words"):
        evaluate(sae_for(32, HOOK), tiny_store, model, config, tokenizer=Vocabulary())
