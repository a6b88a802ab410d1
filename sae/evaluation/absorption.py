"""Feature absorption: a word's first letter, which the latent for that letter misses because another latent carries it.

Chanin et al. 2024, "A is for Absorption", as SAEBench measures it (with Till's absorption fraction). Where this differs:
probes are scikit-learn's optima of the same losses (of inputs scaled to E||x||^2 = d_in), not 50 epochs of Adam; a word is
always one token; 64 words share their examples; absorption is read at the activations that probes were tested on, not at a
second prompt; latents count with the norm of their decoder rows.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae.evaluation.spelling import LETTERS, Words
from sae.sae import SAE

PROBE_DECAY, SPARSE_DECAY = 1e-4, 1e-2  # L2 of letter probes, L1 of the probes that choose latents; per word
F1_JUMP = 0.03  # what one more main latent must add to the F1 of a sparse probe
MIN_PROBE_F1, MIN_LETTERS = 0.6, 20
FULL_COSINE, FRACTION_COSINE = 0.025, 0.1
SHARE = 0.4  # of the probe's projection that absorbing latents must carry
ABSORBING = 3  # latents that may absorb together
FIRES = 1e-8


def absorbed(f: Tensor, x: Tensor, direction: Tensor, decoder: Tensor, main: list[int]) -> tuple[Tensor, Tensor]:
    """Return how much of each word is absorbed, (word,) in 0..1, and whether one latent absorbs it whole, (word,) bool.

    f (word, d_sae) and x (word, d_in) of words that the probe `direction` (d_in) recognises; `main` are the letter's latents.
    With p the unit direction, latent i carries f_i (d_i . p) of x . p. Whole: no main latent fires, and the latent that carries
    most has cos(d_i, p) >= 0.025 and carries at least 0.4 of x . p. Fraction: the (at most 3) others with cosine >= 0.1 that
    carry most must reach 0.4 together; what they carry, as far as main latents do not, over that and what main latents carry.
    """
    p = direction / direction.norm()
    along = decoder @ p
    cosine = along / decoder.norm(dim=1)
    carried, total = f * along, x @ p
    by_main = carried[:, main].sum(1)
    others = torch.where((cosine >= FRACTION_COSINE) & (carried > 0), carried, 0)
    others[:, main] = 0
    by_others = others.topk(min(ABSORBING, others.shape[1]), dim=1).values.sum(1)
    taken = torch.minimum(by_others, total - by_main)
    fraction = torch.where(by_main <= 0, 1.0, taken / (taken + by_main)).clamp(0, 1)
    none = (by_main >= total) | (by_others / total < SHARE) | (total == 0)
    most, latent = carried.max(1)
    whole = (f[:, main] < FIRES).all(1) & (cosine[latent] >= FULL_COSINE) & (total > 0) & (most / total >= SHARE)
    return torch.where(none, 0.0, fraction), whole


def letter_probes(words: Words) -> tuple[NDArray[np.float64], NDArray[np.float64], dict[str, float]]:
    """Fit a logistic probe a letter on the training words; return (26, d_in), (26,) and each letter's F1 on the test words.

    A letter that is missing on either side has weights 0 and F1 0.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    x = words.x.numpy()
    scale = float(np.sqrt(x.shape[1] / np.square(x[~words.test]).sum(1).mean()))
    weights, biases, f1 = np.zeros((len(LETTERS), x.shape[1])), np.zeros(len(LETTERS)), dict.fromkeys(LETTERS, 0.0)
    for number, letter in enumerate(LETTERS):
        y = words.letters == number
        train, test = y[~words.test], y[words.test]
        if not train.any() or not test.any():
            continue
        fitted = LogisticRegression(C=1 / (PROBE_DECAY * len(train)), class_weight=_balance(train), max_iter=500)
        fitted.fit(x[~words.test] * scale, train)
        weights[number], biases[number] = fitted.coef_[0] * scale, fitted.intercept_[0]
        f1[letter] = float(f1_score(test, x[words.test] @ weights[number] + biases[number] > 0))
    return weights, biases, f1


def main_latents(f_train: Any, f_test: Any, train: NDArray[np.bool_], test: NDArray[np.bool_], most: int) -> list[int]:
    """Return the latents that stand for a letter: as long as one more raises the F1 of a sparse probe by 0.03, it is one.

    Latents come in the order of an L1 probe's weights. f_* are (word, d_sae), sparse.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    sparse = LogisticRegression(
        l1_ratio=1.0, solver="liblinear", C=1 / (SPARSE_DECAY * len(train)), class_weight=_balance(train), max_iter=200,
        intercept_scaling=100, random_state=0,
    ).fit(f_train, train)  # fmt: skip
    order = np.argsort(-sparse.coef_[0], kind="stable")[:most]
    found: list[int] = []
    best = -np.inf
    for k in range(1, len(order) + 1):
        narrow = [f[:, order[:k]].toarray() for f in (f_train, f_test)]
        dense = LogisticRegression(max_iter=500, class_weight="balanced").fit(narrow[0], train)
        score = float(f1_score(test, dense.decision_function(narrow[1]) > 0))
        if score <= best + F1_JUMP:
            break
        best, found = score, order[:k].tolist()
    return found


def _balance(y: NDArray[np.bool_]) -> dict[bool, float]:
    return {False: 1.0, True: float((~y).sum() / y.sum())}


@torch.inference_mode()
def absorption(
    sae: SAE, words: Words, probes: tuple[NDArray[np.float64], NDArray[np.float64], dict[str, float]], k: int
) -> dict[str, Any]:  # fmt: skip
    """Return absorption by letter and its means over the letters that the model's activations tell (probe F1 above 0.6).

    A letter's rates are over the test words that start with it and that its probe recognises. With fewer than 20 such
    letters it is undefined, with the reason. mean_split_latents counts main latents a letter.
    """
    weights, biases, f1 = probes
    told = [letter for letter in LETTERS if f1[letter] > MIN_PROBE_F1]
    facts = {"words": len(words.words), "test_words": int(words.test.sum()), "probe_f1": f1, "letters_told": len(told)}
    means = ("mean_absorption_fraction", "mean_full_absorption", "mean_split_latents")
    if len(told) < MIN_LETTERS:
        reason = f"probes tell {len(told)} letters with F1 above {MIN_PROBE_F1}; {MIN_LETTERS} are needed"
        return {"state": "undefined", "reason": reason, **facts, **dict.fromkeys(means)}
    from scipy.sparse import csr_array

    f = sae.encode_sparse(words.x.to(sae.b_dec.device))
    rows, latents, values = (part.cpu().numpy() for part in (f.rows, f.latents, f.values))
    sparse = csr_array((values, (rows, latents)), shape=(len(words.words), sae.cfg.d_sae))
    decoder = sae.W_dec.detach().float().cpu()
    letters: dict[str, dict[str, Any]] = {}
    for letter in told:
        number = LETTERS.index(letter)
        y = words.letters == number
        main = main_latents(sparse[~words.test], sparse[words.test], y[~words.test], y[words.test], k)
        which = np.flatnonzero(words.test & y & (words.x.numpy() @ weights[number] + biases[number] > 0))
        direction = torch.from_numpy(weights[number]).float()
        fraction, whole = absorbed(torch.from_numpy(sparse[which].toarray()), words.x[which], direction, decoder, main)
        letters[letter] = {
            "recognised": len(which), "latents": main, "split_latents": len(main), "absorption_fraction": float(fraction.mean()),
            "full_absorption": float(whole.float().mean()),
        }  # fmt: skip
    mean = {name: float(np.mean([found[name.removeprefix("mean_")] for found in letters.values()])) for name in means}
    return {"state": "measured", **facts, **mean, "letters": letters}
