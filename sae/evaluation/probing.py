"""Sparse probing: can a label be read from a few latents (Gurnee et al. 2023; Gao et al. 2024, section 4.1; SAEBench)?

A text's tokens are encoded and pooled; logistic probes see the k latents whose class means differ most on the training
texts, or all. Three controls say what a figure is worth: the same probes on the raw activations, on a random dictionary of as
many latents and the same L0, and with shuffled labels (selectivity, after Hewitt & Liang 2019).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from activation_store.hooks import capture, locate_hooks
from activation_store.store import ActivationStore
from sae.architectures.topk import TopKSAE
from sae.config import ProbingConfig
from sae.evaluation.labelled import Labelled
from sae.ops import SparseLatents
from sae.sae import SAE, SAEConfig

_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C of probes that see everything; cross-validated on training texts
Labels = NDArray[np.int64]


def random_dictionary(sae: SAE, l0: float, mean: Tensor, seed: int) -> TopKSAE:
    """Return a dictionary of random directions as wide as `sae`, which fires round(l0) latents a token, about `mean` (d_in)."""
    cfg = sae.cfg
    k = min(max(round(l0), 1), cfg.d_sae)
    random = TopKSAE(SAEConfig("topk", cfg.d_in, cfg.d_sae, cfg.hook_name, k=k)).requires_grad_(False)
    rows = torch.randn(cfg.d_sae, cfg.d_in, generator=torch.Generator().manual_seed(seed))
    random.W_dec.copy_(nn.functional.normalize(rows, dim=1))
    random.W_enc.copy_(random.W_dec.T)
    random.b_enc.zero_()
    random.b_dec.copy_(mean)
    return random.to(sae.b_dec.device)


@torch.inference_mode()
def pooled_latents(
    saes: Mapping[str, SAE], texts: Sequence[str], model: nn.Module, tokenizer: Any, store: ActivationStore, hooks: Sequence[str],
    config: ProbingConfig, batch: int, progress: Callable[[int], None] = lambda texts: None,
) -> tuple[dict[str, Any], NDArray[np.float32]]:  # fmt: skip
    """Return the pooled latents of each SAE, a scipy CSR matrix (text, d_sae), and pooled activations (text, d_in).

    Texts are prepared as the store's were (BOS, special ids); special tokens count in neither. Pooling is the mean over a
    text's tokens or their maximum. Texts of like length share a forward pass.
    """
    from scipy.sparse import csr_array, vstack

    sites = locate_hooks(model, list(hooks))
    device = next(iter(model.parameters())).device
    bos = [tokenizer.bos_token_id] if store.attrs.get("prepend_bos") and tokenizer.bos_token_id is not None else []
    special = torch.tensor(store.attrs["special_token_ids"])
    encoded = tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=config.context - len(bos))["input_ids"]
    order = np.argsort([len(ids) for ids in encoded], kind="stable")
    parts: dict[str, list[Any]] = {name: [] for name in saes}
    activations = np.zeros((len(texts), sum(store.width(hook) for hook in hooks)), np.float32)
    for start in range(0, len(texts), batch):
        chosen = order[start : start + batch]
        rows = [torch.tensor(bos + encoded[i]) for i in chosen]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # on the right, where a causal model's tokens do not look
        within = torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        mask = within & ~torch.isin(tokens, special)
        found = capture(model, sites, tokens.to(device))
        x = torch.cat([found[hook][mask.to(device)].float() for hook in hooks], 1)
        text = mask.nonzero()[:, 0]
        activations[chosen] = pool_dense(x.cpu(), text, len(chosen), config.pooling).numpy()
        for name, sae in saes.items():
            f = sae.encode_sparse(x.to(sae.b_dec.device))
            of_text, latents, values = (part.numpy() for part in pool(f, text, len(chosen), config.pooling))
            parts[name].append(csr_array((values, (of_text, latents)), shape=(len(chosen), sae.cfg.d_sae)))
        progress(len(chosen))
    back = np.argsort(order, kind="stable")
    return {name: vstack(found, format="csr")[back] for name, found in parts.items()}, activations


def pool(f: SparseLatents, text: Tensor, texts: int, how: str) -> tuple[Tensor, Tensor, Tensor]:
    """Pool latents over the tokens of each text: (text, latent, value) of what is not zero; `text` (token,) says whose each is.

    A mean is over all tokens of the text, a maximum is at least 0. On the CPU, which adds in a fixed order.
    """
    rows, latents, entries = f.rows.long().cpu(), f.index.cpu(), f.values.cpu()
    codes, of = torch.unique(text[rows] * f.d_sae + latents, return_inverse=True)
    values = torch.zeros(len(codes))
    if how == "mean":
        values.index_add_(0, of, entries)
        values /= torch.bincount(text, minlength=texts)[codes // f.d_sae]
    else:
        values.scatter_reduce_(0, of, entries, "amax")
    return codes // f.d_sae, codes % f.d_sae, values


def pool_dense(x: Tensor, text: Tensor, texts: int, how: str) -> Tensor:
    """Pool rows (token, d) over the tokens of each text, (text, d); a text without tokens is 0."""
    index = text[:, None].expand_as(x)
    out = torch.zeros(texts, x.shape[1], device=x.device)
    return out.scatter_reduce_(0, index, x, "mean" if how == "mean" else "amax", include_self=False)


def probe(
    train: Any, test: Any, y_train: Labels, y_test: Labels, k: int | None
) -> tuple[float, float, list[int]]:  # fmt: skip
    """Fit a logistic probe on `k` columns (None: all) of (text, feature), sparse or not; return accuracy, AUC and the columns.

    The columns are those whose class means differ most on the training texts. Columns are scaled to variance 1; the probe of
    all has its strength chosen by cross-validation on the training texts.
    """
    from scipy.sparse import issparse
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
    from sklearn.metrics import accuracy_score, roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if k is None:
        chosen = np.flatnonzero(np.asarray(abs(train).sum(axis=0)).ravel())  # what never fires on these texts says nothing
        fitted: Any = LogisticRegressionCV(
            Cs=_STRENGTHS, cv=3, scoring="neg_log_loss", l1_ratios=(0.0,), use_legacy_attributes=False, max_iter=1000
        )
    else:
        difference = np.asarray(train[y_train == 1].mean(axis=0) - train[y_train == 0].mean(axis=0)).ravel()
        chosen = np.argsort(-np.abs(difference), kind="stable")[:k]
        fitted = LogisticRegression(max_iter=1000)
    if not len(chosen):  # nothing fires at all
        return float(max(np.mean(y_test), 1 - np.mean(y_test))), 0.5, []
    narrow = [part[:, chosen] for part in (train, test)]
    if k is not None and issparse(train):
        narrow = [part.toarray() for part in narrow]
    fitted = make_pipeline(StandardScaler(with_mean=not issparse(narrow[0])), fitted).fit(narrow[0], y_train)
    accuracy = accuracy_score(y_test, fitted.predict(narrow[1]))
    return float(accuracy), float(roc_auc_score(y_test, fitted.decision_function(narrow[1]))), chosen.tolist()


def probe_dataset(features: Mapping[str, Any], data: Labelled, config: ProbingConfig, seed: int) -> dict[str, Any]:
    """Probe each of `features` ((text, n), by dictionary) for each class of a data set against the rest.

    Of two classes only the second is probed for. A task has as many texts of its class as of others, and one split for all
    dictionaries. Return, by task, dictionary and k: accuracy, auc, control_accuracy (labels shuffled, features chosen anew)
    and selectivity, their difference; and the columns chosen.
    """
    from sklearn.model_selection import train_test_split

    labels = np.array(data.labels)
    chance = np.random.default_rng(seed)
    tasks: dict[str, Any] = {}
    for number, name in enumerate(data.classes):
        if len(data.classes) == 2 and number == 0:
            continue
        positive, others = np.flatnonzero(labels == number), np.flatnonzero(labels != number)
        count = min(len(positive), len(others))
        rows = np.concatenate([chance.permutation(positive)[:count], chance.permutation(others)[:count]])
        y = np.repeat([1, 0], count)
        split = train_test_split(rows, y, chance.permutation(y), test_size=config.test_fraction, stratify=y, random_state=seed)
        train, test, *targets = split
        task: dict[str, Any] = {"train_texts": len(train), "test_texts": len(test)}
        for dictionary, values in features.items():
            task[dictionary] = {}
            for k in (*config.k, None):
                accuracy, auc, chosen = probe(values[train], values[test], targets[0], targets[1], k)
                control, _, _ = probe(values[train], values[test], targets[2], targets[3], k)
                task[dictionary][str(k or "all")] = {
                    "accuracy": accuracy, "auc": auc, "control_accuracy": control, "selectivity": accuracy - control,
                    **({"columns": chosen} if k is not None else {}),
                }  # fmt: skip
        tasks[name] = task
    return tasks


def sparse_probing(
    saes: Mapping[str, SAE], l0: Mapping[str, float], datasets: Sequence[Labelled], model: nn.Module, tokenizer: Any,
    store: ActivationStore, hooks: Sequence[str], config: ProbingConfig, batch: int, seed: int,
    progress: Callable[[int], None] = lambda texts: None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Return sparse probing's figures of each SAE (all of the same hooks, their L0 in `l0`): by data set, and means over tasks.

    Dictionaries are "sae", "activations" and "random"; see `probe_dataset`. The model runs once over each text for all SAEs.
    A data set that cannot be probed stands there with the reason.
    """
    mean = torch.from_numpy(np.concatenate([np.asarray(store.statistics(hook).mean) for hook in hooks])).float()
    random = {name: random_dictionary(sae, l0[name], mean, seed) for name, sae in saes.items()}
    both = {("sae", name): sae for name, sae in saes.items()} | {("random", name): sae for name, sae in random.items()}
    keyed = {"/".join(key): sae for key, sae in both.items()}
    results: dict[str, dict[str, Any]] = {name: {"datasets": {}} for name in saes}
    for data in datasets:
        if data.reason is not None:
            for result in results.values():
                result["datasets"][data.name] = {"state": "undefined", "reason": data.reason}
            continue
        latents, activations = pooled_latents(keyed, data.texts, model, tokenizer, store, hooks, config, batch, progress)
        shared = {"activations": activations}
        dense = probe_dataset(shared, data, config, seed)
        for name, result in results.items():
            found = probe_dataset({kind: latents[f"{kind}/{name}"] for kind in ("sae", "random")}, data, config, seed)
            tasks = {task: {**found[task], **dense[task]} for task in found}
            facts = {"state": "probed", "texts": len(data.texts), "dropped": data.dropped, "classes": data.classes}
            result["datasets"][data.name] = {**facts, "tasks": tasks}
    for result in results.values():
        done = [task for data in result["datasets"].values() for task in data.get("tasks", {}).values()]
        result["tasks"] = len(done)
        result["mean"] = {kind: _means([task[kind] for task in done]) for kind in ("sae", "activations", "random")}
    return results


def _means(tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean over tasks of each figure, by k."""
    figures = ("accuracy", "auc", "control_accuracy", "selectivity")
    return {k: {name: float(np.mean([task[k][name] for task in tasks])) for name in figures} for k in (tasks[0] if tasks else {})}
