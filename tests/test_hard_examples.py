"""Which examples are chosen beside the strongest: spread over strengths, near by direction, near in meaning; and validation."""

from pathlib import Path

import numpy as np
import pydantic
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_servers import CONTEXT, HOOK, TRAIN_SEQUENCES, WINDOW, Words, make_store, relu_dictionary

from activation_store import ActivationStore
from activation_store.errors import InputError
from explain.config import ExplainConfig
from explain.embedding import Embedder
from explain.evidence import Ranking, gather_evidence, window_range
from explain.examples import Example, Unit, _spread, assert_disjoint, choose_units, population_weights, shared
from explain.judge import Judgement, judged, questions
from explain.neighbours import nearest_latents
from sae.architectures.identity import IdentitySAE
from sae.architectures.standard import StandardSAE
from sae.sae import SAE, SAEConfig


class ByFirstWord:
    """An embedder of one dimension a word: texts are near where they share words."""

    def encode(self, texts: list[str]) -> np.ndarray:
        vectors = np.array([[text.split().count(word.strip()) for word in Words.words] for text in texts], np.float32)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def units_of(
    sae: SAE, store: ActivationStore, latents: list[int], seed: int = 0, **given: object
) -> list[Unit]:
    config = ExplainConfig(window=WINDOW, **given)  # type: ignore[arg-type]
    splits = {"train": config.train_top, "held_out": config.test_top, **({"valid": config.test_top} if config.chooses else {})}
    evidence = {
        split: gather_evidence(
            sae, store, HOOK, split, window=WINDOW, top=2 * top, sample=config.reservoir, seed=seed, reserved=config.reserved
        )
        for split, top in splits.items()
    }
    embedder = ByFirstWord() if config.test_similar else None
    return choose_units(
        sae, store, "sae", HOOK, latents, evidence["train"], evidence["held_out"], config, Words().decode, seed,
        evidence.get("valid"), embedder,  # type: ignore[arg-type]
    )  # fmt: skip


def pair_of_latents() -> StandardSAE:
    """Latents 0 and 1 of the toy world with decoder rows at an angle of 37 degrees; the others at right angles to both."""
    sae = relu_dictionary(8, HOOK)
    with torch.no_grad():
        sae.W_dec[1, :2] = torch.tensor([0.8, 0.6])
    return sae


# --- spread over strengths


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_a_sample_is_spread_evenly_over_strengths(found: int, number: int, seed: int) -> None:
    chance = np.random.default_rng(seed)
    sample = Ranking.empty(1, 60)
    values = chance.permutation(found) + 1.0
    sample.windows[0, :found] = torch.arange(100, 100 + found)
    sample.values[0, :found] = torch.from_numpy(values).float()
    spread = _spread(sample, 0, number, np.random.default_rng(seed))
    windows = [window for window, _ in spread]
    assert len(set(windows)) == len(windows) == min(2 * number, found)
    rank = {100 + i: int(value) - 1 for i, value in enumerate(values)}
    for window, tenth in spread:
        assert tenth == 1 + rank[window] * 10 // found
    parts = min(number, 10, found)
    if parts:  # the first windows are from as many even parts by strength as there can be
        part_of = {r: i for i, part in enumerate(np.array_split(np.arange(found), min(number, 10))) for r in part.tolist()}
        assert len({part_of[rank[window]] for window in windows[:parts]}) == parts


def test_every_firing_window_comes_as_often_within_its_tenth() -> None:
    counts = np.zeros(20)
    for seed in range(600):
        sample = Ranking.empty(1, 20)
        order = np.random.default_rng(seed).permutation(20)  # the reservoir's order is random
        sample.windows[0], sample.values[0] = torch.from_numpy(order), torch.from_numpy(order + 1.0).float()
        for window, _ in _spread(sample, 0, 5, np.random.default_rng(seed + 1))[:5]:
            counts[window] += 1
    assert counts.sum() == 3000
    assert ((counts - 150) ** 2 / 150).sum() < 45  # chi-square, at most 19 degrees of freedom: 1 in 1000


# --- hard negatives


def test_nearest_latents_are_those_of_greatest_cosine() -> None:
    chance = torch.Generator().manual_seed(0)
    sae = StandardSAE(SAEConfig("standard", 16, 600, HOOK))
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(600, 16, generator=chance) * torch.rand(600, 1, generator=chance))
    found = nearest_latents(sae, range(600), 7)
    unit = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T).fill_diagonal_(-1)
    for latent in (0, 299, 599):
        assert found[latent] == cosines[latent].argsort(descending=True)[:7].tolist()
    assert nearest_latents(IdentitySAE.of(HOOK, 8), [0, 3]) == {0: [], 3: []}  # neurons have no neighbours


def test_neighbour_windows_are_silent_and_the_neighbours_strongest(store: ActivationStore) -> None:
    unit, other, lonely = units_of(pair_of_latents(), store, [0, 1, 2], test_neighbour=3, train_negatives=2)
    assert unit.neighbours == [1]
    assert other.neighbours == [0]
    assert lonely.neighbours == []
    hard = [e for e in unit.test if e.kind == "neighbour"]
    assert hard
    for example in hard:
        assert example.hard
        assert example.neighbour == 1
        assert max(example.activations) == 0
        assert 2 in example.token_ids  # the word that latent 1 fires on
    assert not [e for e in lonely.test if e.hard]
    shown = [e for e in unit.train if max(e.activations) == 0]
    assert len(shown) == 2
    assert shown[0].kind == "neighbour"
    assert [e.kind for e in lonely.train if max(e.activations) == 0] == ["random", "random"]


def test_similar_windows_are_silent_and_near(store: ActivationStore) -> None:
    (unit,) = units_of(relu_dictionary(8, HOOK), store, [0], test_similar=4, similar_among=60, embedder="by-word")
    similar = [e for e in unit.test if e.kind == "similar"]
    assert len(similar) == 4
    assert all(e.hard and max(e.activations) == 0 for e in similar)
    strongest = [set(e.text.split()) for e in unit.test if e.kind == "top"]
    shared_words = np.mean([max(len(set(e.text.split()) & top) for top in strongest) for e in similar])
    others = [e for e in unit.test if e.kind == "random" and max(e.activations) == 0]
    by_chance = np.mean([max(len(set(e.text.split()) & top) for top in strongest) for e in others])
    assert shared_words > by_chance


def test_a_sentence_embedder_knows_what_is_near(embedder_dir: Path) -> None:
    vectors = Embedder(str(embedder_dir)).encode(["The cat sleeps.", "A kitten is napping.", "Shares fell on Monday."])
    assert vectors.shape == (3, 384)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(3), abs=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3
    assert Embedder(str(embedder_dir)).encode([]).shape == (0, 384)


def test_a_folder_without_an_embedder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"explain\.embedder: cannot load"):
        Embedder(str(tmp_path))


def test_hard_negatives_stand_for_no_windows() -> None:
    def window(number: int, kind: str, fires: bool) -> Example:
        return Example(number, kind, [0], ["a"], [float(fires)])

    examples = [
        window(1, "top", True), window(2, "sampled", True), window(3, "random", False), window(4, "neighbour", False),
        window(5, "similar", False),
    ]  # fmt: skip
    assert population_weights(examples, fired=11, windows=100) == [1.0, 10.0, 89.0, 0.0, 0.0]


def test_hard_negatives_count_in_their_own_figures_alone(store: ActivationStore) -> None:
    (unit,) = units_of(pair_of_latents(), store, [0], test_neighbour=4)
    asked = questions(unit, "detection", 0)
    hard = [i for i, question in enumerate(asked) if question.hard]
    assert len(hard) >= 2
    answers = [Judgement(float(question.truth)) for question in asked]
    right = judged(asked, answers, 0, 0)
    for i in hard:  # all of them wrong
        answers[i] = Judgement(1.0)
    found = judged(asked, answers, 0, 0)
    assert found["balanced_accuracy"] == right["balanced_accuracy"] == 1.0
    assert right["hard"]["balanced_accuracy"] == 1.0
    assert found["hard"]["balanced_accuracy"] == 0.5
    assert found["population"] == right["population"]
    firing = sum(question.truth for question in asked)
    silent = len(asked) - firing - len(hard)
    assert found["always_yes"] == pytest.approx(2 * firing / (2 * firing + silent))
    easy = [i for i in range(len(asked)) if i not in hard]
    plain = judged([asked[i] for i in easy], [answers[i] for i in easy], 0, 0)
    assert plain["hard"] is None
    assert {**found, "hard": None} == plain


# --- three sides


def test_validation_windows_are_the_last_of_the_training_split(store: ActivationStore) -> None:
    per_sequence = CONTEXT // WINDOW
    cut, border = (TRAIN_SEQUENCES - 18) * per_sequence, TRAIN_SEQUENCES * per_sequence
    assert window_range(store, WINDOW, "train", 0.2) == (0, cut)
    assert window_range(store, WINDOW, "valid", 0.2) == (cut, border)
    assert window_range(store, WINDOW, "held_out", 0.2) == window_range(store, WINDOW, "held_out")
    units = units_of(relu_dictionary(8, HOOK), store, [0, 1, 6], best_of=2, backend="local", valid_share=0.2)
    for unit in units:
        assert unit.valid
        assert {e.window < cut for e in unit.train} == {True}
        assert {cut <= e.window < border for e in unit.valid} == {True}
        assert {e.window >= border for e in unit.test} == {True}
        assert shared(unit) == (0, 0)
    assert not units_of(relu_dictionary(8, HOOK), store, [0])[0].valid


def test_no_text_stands_on_two_of_three_sides(tmp_path: Path) -> None:
    # Ten texts, each over and over: every one can stand on one side alone
    texts = np.random.default_rng(0).integers(1, 20, (10, WINDOW))
    tokens = np.tile(texts, (24, 1))[np.random.default_rng(1).permutation(240)].reshape(120, 2 * WINDOW).astype(np.int32)
    x = (tokens.reshape(-1) % 3 == 0).astype(np.float32)[:, None]
    repeating = make_store(tmp_path / "store", tokens, {HOOK: x}, 90)
    few = {"train_top": 3, "train_sampled": 0, "test_top": 2, "test_sampled": 2, "test_random": 2}
    (unit,) = units_of(relu_dictionary(1, HOOK), repeating, [0], best_of=2, backend="local", valid_share=0.3, **few)
    assert unit.train
    assert unit.valid
    assert_disjoint(unit)
    assert len({e.text for e in unit.train + unit.valid + unit.test}) == len(unit.train + unit.valid + unit.test)


@pytest.mark.parametrize("sides", [("train", "valid"), ("train", "test"), ("valid", "test")])
def test_what_two_sides_share_is_seen(sides: tuple[str, str]) -> None:
    def example(window: int, text: str) -> Example:
        return Example(window, "top", [0], [text], [1.0])

    given = {"train": [example(1, "a")], "valid": [example(2, "b")], "test": [example(3, "c")]}
    same_window = {**given, sides[1]: [Example(given[sides[0]][0].window, "top", [0], ["z"], [1.0])]}
    same_text = {**given, sides[1]: [example(9, f" {given[sides[0]][0].tokens[0].upper()}")]}
    for case, expected in ((given, (0, 0)), (same_window, (1, 0)), (same_text, (0, 1))):
        unit = Unit("sae", HOOK, 0, 0.1, 1.0, case["train"], case["test"], valid=case["valid"])
        assert shared(unit) == expected
        if expected != (0, 0):
            with pytest.raises(AssertionError, match="sae/0"):
                assert_disjoint(unit)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"test_similar": 2}, "explain.test_similar: needs explain.embedder"),
        ({"show": ("negatives",), "backend": "openai"}, "explain.train_negatives is 0"),
        ({"show": ("outputs",)}, "explain.show: means nothing to explain.backend lookup"),
        ({"best_of": 3}, "explain.best_of / refine: means nothing"),
        ({"clusters": 3}, "explain.clusters: means nothing"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        ExplainConfig(**settings)  # type: ignore[arg-type]
