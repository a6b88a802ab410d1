"""The cases of scripts/golden_formats.py, run with a peer's own python; nothing of ours is imported.

    PYTHON scripts/golden_cases.py PEER --inputs x.safetensors --out FOLDER     make, save and run the peer's SAEs
    PYTHON scripts/golden_cases.py PEER --inputs x.safetensors --read FOLDER...  load what lies there as the peer does, and run it
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from golden_draw import D_IN, D_OUT, D_SAE, Draw, K, keep

# SAELens


def saelens(x: Any, out: Path) -> None:
    from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
    from sae_lens.saes.transcoder import (
        JumpReLUSkipTranscoder,
        JumpReLUSkipTranscoderConfig,
        JumpReLUTranscoder,
        JumpReLUTranscoderConfig,
        SkipTranscoder,
        SkipTranscoderConfig,
        Transcoder,
        TranscoderConfig,
    )

    def sae(name: str, cls: Any, config: Any, seed: int, d_sae: int = D_SAE, unit: bool = True, **options: Any) -> None:
        draw = Draw(x, seed)
        d_out = options.get("d_out", D_IN)
        hooks = {"hook_name": "blocks.9.hook_resid_post"}
        if "reshape_activations" in options:
            hooks = {"hook_name": "blocks.9.attn.hook_z"}
        if "d_out" in options:
            hooks = {"hook_name": "blocks.9.ln2.hook_normalized", "hook_name_out": "blocks.9.hook_mlp_out"}
        metadata = SAEMetadata(model_name="smollm2-135m", prepend_bos=True, **hooks)
        made = cls(config(d_in=D_IN, d_sae=d_sae, metadata=metadata, **options))
        values = {"W_enc": draw.encoder(d_sae), "W_dec": draw.decoder(d_sae, d_out, unit), "b_dec": draw.mean(d_out)}
        for bias in ("b_enc", "b_gate", "b_mag"):
            if getattr(made, bias, None) is not None:
                values[bias] = draw.small(d_sae)
        if hasattr(made, "r_mag"):
            values["r_mag"] = draw.normal(d_sae) * 0.3
        if hasattr(made, "threshold"):
            values["threshold"] = draw.small(d_sae)  # some below zero, where ReLU decides
        if hasattr(made, "W_skip"):
            values["W_skip"] = draw.skip(d_out)
        draw.fill(made, **values)
        made.save_model(out / name)
        loaded = cls.load_from_disk(out / name).eval()
        rows = x.unflatten(1, (4, D_IN // 4)) if "reshape_activations" in options else x  # heads
        keep(out / name, loaded.encode(rows), loaded(rows))

    sae("standard", StandardSAE, StandardSAEConfig, 0)
    sae("standard_plain_input", StandardSAE, StandardSAEConfig, 1, apply_b_dec_to_input=False)
    sae("standard_square", StandardSAE, StandardSAEConfig, 2, d_sae=D_IN)
    sae("standard_layer_norm", StandardSAE, StandardSAEConfig, 3, normalize_activations="layer_norm")
    sae("standard_hook_z", StandardSAE, StandardSAEConfig, 16, reshape_activations="hook_z")
    sae("topk", TopKSAE, TopKSAEConfig, 4, k=K)
    sae("topk_rescaled", TopKSAE, TopKSAEConfig, 5, unit=False, k=K, rescale_acts_by_decoder_norm=True)
    sae("topk_layer_norm", TopKSAE, TopKSAEConfig, 6, k=K, normalize_activations="layer_norm")
    sae("jumprelu", JumpReLUSAE, JumpReLUSAEConfig, 7)
    sae("jumprelu_bfloat16", JumpReLUSAE, JumpReLUSAEConfig, 8, dtype="bfloat16")
    sae("gated", GatedSAE, GatedSAEConfig, 9)
    plain = {"apply_b_dec_to_input": False}
    sae("transcoder", Transcoder, TranscoderConfig, 10, d_out=D_OUT, **plain)
    sae("skip_transcoder", SkipTranscoder, SkipTranscoderConfig, 11, d_out=D_OUT, **plain)
    sae("jumprelu_transcoder", JumpReLUTranscoder, JumpReLUTranscoderConfig, 12, d_out=D_IN, **plain)
    sae("jumprelu_skip_transcoder", JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig, 13, d_out=D_IN, **plain)
    flat_saelens(x, out)
    gemma_by_saelens(x, out.parent)


def flat_saelens(x: Any, out: Path) -> None:
    """Configs of versions 2 and 3, written by hand as they were: flat, under old names; read by version 6's own loader."""
    from sae_lens import SAE
    from safetensors.torch import save_file

    old = {
        "model_name": "smollm2-135m", "hook_point": "blocks.9.hook_resid_post", "hook_point_layer": 9,
        "hook_point_head_index": None, "dataset_path": "some/text", "context_size": 128, "d_in": D_IN, "d_sae": D_SAE,
        "dtype": "torch.float32", "device": "cpu", "normalize_activations": False, "l1_coefficient": 5.0,
    }  # fmt: skip
    topk = {
        **{key: value for key, value in old.items() if not key.startswith("hook_point")}, "architecture": "standard",
        "hook_name": "blocks.9.hook_resid_post", "hook_layer": 9, "hook_head_index": None, "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K}, "apply_b_dec_to_input": False, "finetuning_scaling_factor": False, "prepend_bos": True,
        "sae_lens_training_version": "3.5.0", "normalize_activations": "expected_average_only_in",
    }  # fmt: skip
    for name, config, seed in (("flat_standard", old, 14), ("flat_topk", topk, 15)):
        draw = Draw(x, seed)
        (out / name).mkdir()
        (out / name / "cfg.json").write_text(json.dumps(config))
        weights = {"W_enc": draw.encoder(), "b_enc": draw.small(D_SAE), "W_dec": draw.decoder(), "b_dec": draw.mean()}
        save_file(weights, out / name / "sae_weights.safetensors")
        loaded = SAE.load_from_disk(out / name).eval()
        keep(out / name, loaded.encode(x), loaded(x))


# Gemma Scope: the files by hand, the figures by the loaders of SAELens and of circuit-tracer


def gemma_weights(x: Any, seed: int, d_out: int = D_IN) -> dict[str, Any]:
    draw = Draw(x, seed)
    return {
        "W_enc": draw.encoder(), "W_dec": draw.decoder(d_out=d_out), "b_enc": draw.small(D_SAE), "b_dec": draw.mean(d_out),
        "threshold": draw.small(D_SAE).abs(),
    }  # fmt: skip


def gemma_files(x: Any, golden: Path) -> None:
    import numpy as np
    from safetensors.torch import save_file

    for name, seed in (("sae", 20), ("transcoder", 21)):
        folder = golden / "gemma_scope" / name
        folder.mkdir(parents=True)
        np.savez(folder / "params.npz", **{key: value.numpy() for key, value in gemma_weights(x, seed).items()})
    for name, seed in (("sae", 22), ("transcoder", 23), ("transcoder_affine", 24)):
        folder = golden / "gemma_scope_2" / name
        folder.mkdir(parents=True)
        tensors = {key.lower(): value for key, value in gemma_weights(x, seed).items()}
        hooks = {"hf_hook_point_in": "model.layers.9.output"}
        if name != "sae":
            hooks = {"hf_hook_point_in": "model.layers.9.pre_feedforward_layernorm.output",
                     "hf_hook_point_out": "model.layers.9.post_feedforward_layernorm.output"}  # fmt: skip
        if name == "transcoder_affine":
            tensors["affine_skip_connection"] = Draw(x, 25).skip()  # (d_in, d_out) there
        save_file(tensors, folder / "params.safetensors")
        config = {"architecture": "jump_relu", "model_name": "gemma-v3-270m", **hooks, "width": D_SAE, "l0": 10,
                  "affine_connection": name == "transcoder_affine"}  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))


def gemma_by_saelens(x: Any, golden: Path) -> None:
    """SAELens' loaders ask the hub for files; here they get the local ones."""
    import torch
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.registry import get_sae_class
    from safetensors import safe_open

    if not (golden / "gemma_scope").exists():
        gemma_files(x, golden)

    def shapes(repository: str, file: str) -> dict[str, list[int]]:
        with safe_open(golden / "gemma_scope_2" / "sae" / "params.safetensors", framework="pt") as opened:
            return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118

    loaders.get_safetensors_tensor_shapes = shapes
    sizes, first = {"d_in": D_IN, "d_sae": D_SAE}, "layer_9/width_16k/average_l0_10"
    for folder, load, repository, path in (
        ("gemma_scope/sae", loaders.gemma_2_sae_huggingface_loader, "google/gemma-scope-2b-pt-res", first),
        ("gemma_scope/transcoder", loaders.gemma_2_transcoder_huggingface_loader, "google/gemma-scope-2b-pt-transcoders", first),
        ("gemma_scope_2/sae", loaders.gemma_3_sae_huggingface_loader, "google/gemma-scope-2-270m-pt",
         "resid_post/layer_9_width_16k_l0_small"),
    ):  # fmt: skip
        place = golden / folder
        loaders.hf_hub_download = lambda repo_id, filename, place=place, **_: str(place / Path(filename).name)
        overrides = {**sizes, "d_out": D_IN} if folder.endswith("transcoder") else sizes
        config, state, _ = load(repository, path, "cpu", False, overrides)
        config = loaders.handle_config_defaulting(config)
        cls, config_cls = get_sae_class(config["architecture"])
        made = cls(config_cls.from_dict(config)).eval()
        made.load_state_dict(state)
        with torch.no_grad():
            keep(place, made.encode(x), made(x))


def circuit_tracer(x: Any, out: Path) -> None:
    import torch
    import yaml
    from circuit_tracer.transcoder import single_layer_transcoder as theirs
    from circuit_tracer.transcoder.activation_functions import JumpReLU, TopK

    set_config = {"model_name": "smollm2-135m", "model_kind": "transcoder_set", "scan": "some/scan",
                  "feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}  # fmt: skip
    relu = torch.nn.functional.relu
    for name, activation, skip, d_sae, seed in (
        ("relu", relu, False, D_SAE, 30), ("relu_skip", relu, True, D_SAE, 31), ("jumprelu", JumpReLU, False, D_SAE, 32),
        ("jumprelu_skip", JumpReLU, True, D_SAE, 33), ("topk", TopK(K), False, D_SAE, 34), ("relu_square", relu, False, D_IN, 35),
    ):  # fmt: skip
        draw = Draw(x, seed)
        if activation is JumpReLU:
            activation = JumpReLU(draw.small(d_sae).abs(), 0.1)
        made = theirs.SingleLayerTranscoder(
            D_IN, d_sae, activation, 9, skip_connection=skip, device=torch.device("cpu"), dtype=torch.float32
        )
        values = {"W_enc": draw.encoder(d_sae).T, "W_dec": draw.decoder(d_sae), "b_enc": draw.small(d_sae), "b_dec": draw.mean()}
        draw.fill(made, **values, **({"W_skip": draw.skip()} if skip else {}))
        (out / name).mkdir(parents=True)
        file = out / name / "layer_9.safetensors"
        made.to_safetensors(str(file))
        (out / name / "config.yaml").write_text(yaml.safe_dump(set_config))
        if name == "topk":  # which to_safetensors leaves out
            from safetensors.torch import load_file, save_file

            save_file({**load_file(file), "k": torch.tensor(K)}, file)
        else:
            made = theirs.load_relu_transcoder(str(file), 9, torch.device("cpu"))
        with torch.no_grad():
            keep(out / name, made.encode(x), made(x))
    golden, cpu = out.parent, torch.device("cpu")
    for name in ("transcoder", "transcoder_affine"):
        folder = golden / "gemma_scope_2" / name
        made = theirs.load_gemma_scope_2_transcoder(str(folder / "params.safetensors"), 9, cpu)
        with torch.no_grad():
            keep(folder, made.encode(x), made(x))


def dictionary_learning(x: Any, out: Path) -> None:
    import torch
    from dictionary_learning import dictionary as theirs
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    def save(made: Any, k: int | None, name: str) -> None:
        (out / name).mkdir(parents=True)
        torch.save(made.state_dict(), out / name / "ae.pt")
        trainer = {
            "dict_class": type(made).__name__, "trainer_class": "SomeTrainer", "activation_dim": D_IN, "dict_size": D_SAE,
            "layer": 9, "lm_name": "smollm2-135m", "submodule_name": "resid_post_layer_9", "lr": 1e-3, "device": "cpu",
        }  # fmt: skip
        if k is not None:
            trainer["k"] = k
        config = {"trainer": trainer, "buffer": {"d_submodule": D_IN, "io": "out", "n_ctxs": 100, "ctx_len": 128}}
        (out / name / "config.json").write_text(json.dumps(config))
        keep(out / name, *run_dictionary(out / name, x))

    def linear(draw: Draw, unit: bool = True) -> dict[str, Any]:
        return {"encoder__weight": draw.encoder().T, "decoder__weight": draw.decoder(unit=unit).T}

    draw = Draw(x, 40)
    made = theirs.AutoEncoder(D_IN, D_SAE)
    save(draw.fill(made, **linear(draw), encoder__bias=draw.small(D_SAE), bias=draw.mean()), None, "AutoEncoder")
    draw = Draw(x, 41)  # decoder columns of other norms, which their loader brings to 1
    made = theirs.AutoEncoder(D_IN, D_SAE)
    values = {**linear(draw, unit=False), "encoder__bias": draw.small(D_SAE), "bias": draw.mean()}
    save(draw.fill(made, **values), None, "AutoEncoder_norms")
    draw = Draw(x, 42)
    made = theirs.AutoEncoderNew(D_IN, D_SAE)
    values = {**linear(draw, unit=False), "encoder__bias": draw.small(D_SAE), "decoder__bias": draw.mean()}
    save(draw.fill(made, **values), None, "AutoEncoderNew")
    draw = Draw(x, 43)
    made = theirs.GatedAutoEncoder(D_IN, D_SAE)
    biases = {"gate_bias": draw.small(D_SAE), "mag_bias": draw.small(D_SAE), "r_mag": draw.normal(D_SAE) * 0.3}
    save(draw.fill(made, **linear(draw), **biases, decoder_bias=draw.mean()), None, "GatedAutoEncoder")
    draw = Draw(x, 44)
    values = {**linear(draw), "encoder__bias": draw.small(D_SAE), "b_dec": draw.mean()}
    save(draw.fill(AutoEncoderTopK(D_IN, D_SAE, K), **values), K, "AutoEncoderTopK")
    draw = Draw(x, 45)
    values = {**linear(draw), "encoder__bias": draw.small(D_SAE), "b_dec": draw.mean(), "threshold": draw.small(1)[0].abs() + 1}
    save(draw.fill(BatchTopKSAE(D_IN, D_SAE, K), **values), K, "BatchTopKSAE")
    draw = Draw(x, 46)
    own = {"W_enc": draw.encoder(), "W_dec": draw.decoder(), "b_enc": draw.small(D_SAE), "b_dec": draw.mean()}
    made = MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [16, 24, D_SAE - 40])
    save(draw.fill(made, **own, threshold=draw.small(1)[0].abs() + 1), K, "MatryoshkaBatchTopKSAE")
    draw = Draw(x, 47)
    own = {"W_enc": draw.encoder(), "W_dec": draw.decoder(), "b_enc": draw.small(D_SAE), "b_dec": draw.mean()}
    save(draw.fill(theirs.JumpReluAutoEncoder(D_IN, D_SAE), **own, threshold=draw.small(D_SAE)), None, "JumpReluAutoEncoder")


def run_dictionary(folder: Path, x: Any) -> tuple[Any, Any]:
    import torch
    from dictionary_learning.utils import load_dictionary

    made, _ = load_dictionary(str(folder), "cpu")
    with torch.no_grad():
        return made.encode(x), made(x)


def sparsify(x: Any, out: Path) -> None:
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    for name, seed, options in (
        ("layers.9", 50, {"num_latents": D_SAE}), ("layers.8", 51, {"expansion_factor": 2}),
        ("layers.9.mlp", 52, {"num_latents": D_SAE, "transcode": True}),
        ("layers.8.mlp", 53, {"num_latents": D_SAE, "transcode": True, "skip_connection": True}),
        ("layers.7", 54, {"num_latents": D_SAE, "skip_connection": True}), ("layers.6", 55, {"num_latents": D_IN}),
    ):  # fmt: skip
        draw, made = Draw(x, seed), SparseCoder(D_IN, SparseCoderConfig(k=K, **options))
        d_sae = made.num_latents
        values = {"encoder__weight": draw.encoder(d_sae).T, "encoder__bias": draw.small(d_sae), "W_dec": draw.decoder(d_sae),
                  "b_dec": draw.mean(), **({"W_skip": draw.skip()} if made.W_skip is not None else {})}  # fmt: skip
        draw.fill(made, **values).save_to_disk(out / name)
        keep(out / name, *run_sparsify(out / name, x))


def run_sparsify(folder: Path, x: Any) -> tuple[Any, Any]:
    import torch
    from sparsify import SparseCoder

    made = SparseCoder.load_from_disk(folder)
    with torch.no_grad():
        values, latents, _ = made.encode(x)
        f = x.new_zeros(len(x), made.num_latents).scatter_(1, latents, values)
        return f, made(x).sae_out


def openai(x: Any, out: Path) -> None:
    """By hand; nothing of ours takes part. topk_small has inputs of which the layer norm's epsilon is no small part."""
    import torch

    for name, topk, seed, scale in (("relu", False, 60, 1.0), ("topk", True, 61, 1.0), ("topk_small", True, 62, 1e-4)):
        x = x * scale
        draw = Draw(x, seed)
        state = {
            "pre_bias": draw.mean(), "latent_bias": draw.small(D_SAE), "encoder.weight": draw.encoder().T.contiguous(),
            "decoder.weight": draw.decoder().T.contiguous(), "stats_last_nonzero": torch.zeros(D_SAE, dtype=torch.int64),
            "latents_activation_frequency": torch.ones(D_SAE), "latents_mean_square": torch.zeros(D_SAE),
        }  # fmt: skip
        if topk:  # the input that the biases see has mean 0 and deviation 1
            state |= {"pre_bias": draw.normal(D_IN) * 0.1, "latent_bias": draw.normal(D_SAE) * 0.3}
        mean, deviation = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        normed = (x - mean) / (deviation + 1e-5) if topk else x
        z = (normed - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]
        if topk:
            largest = z.topk(K, dim=-1)
            f = torch.zeros_like(z).scatter(-1, largest.indices, largest.values.relu())
        else:
            f = z.relu()
        x_hat = f @ state["decoder.weight"].T + state["pre_bias"]
        (out / name).mkdir(parents=True)
        activation = {"k": K, "postact_fn": "ReLU"} if topk else {}
        state |= {"activation": "TopK" if topk else "ReLU", "activation_state_dict": activation}
        torch.save(state, out / name / "9.pt")
        keep(out / name, f, x_hat * deviation + mean if topk else x_hat, **({"x": x} if scale != 1 else {}))


# What we saved, through the peers' own loaders


def run_saelens(folder: Path, x: Any) -> tuple[Any, Any]:
    import torch
    from sae_lens import SAE

    made = SAE.load_from_disk(folder).eval()
    with torch.no_grad():
        return made.encode(x), made(x)


def run_circuit_tracer(folder: Path, x: Any) -> tuple[Any, Any]:
    import torch
    from circuit_tracer.transcoder import single_layer_transcoder as theirs

    file = next(file for file in folder.iterdir() if file.name.startswith(("layer_", "transcoder.", "params.")))
    loaders = {"params.npz": theirs.load_gemma_scope_transcoder, "params.safetensors": theirs.load_gemma_scope_2_transcoder}
    made = loaders.get(file.name, theirs.load_relu_transcoder)(str(file), 9, torch.device("cpu"))
    with torch.no_grad():
        return made.encode(x), made(x)


MAKERS: dict[str, Callable[[Any, Path], None]] = {
    "saelens": saelens, "dictionary_learning": dictionary_learning, "sparsify": sparsify, "circuit_tracer": circuit_tracer,
    "openai": openai,
}  # fmt: skip
READERS: dict[str, Callable[[Path, Any], tuple[Any, Any]]] = {
    "saelens": run_saelens, "dictionary_learning": run_dictionary, "sparsify": run_sparsify, "circuit_tracer": run_circuit_tracer,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=MAKERS)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--read", type=Path, nargs="+", default=[])
    args = parser.parse_args()
    from safetensors.torch import load_file

    x = load_file(args.inputs)["x"]
    if args.out is not None:
        MAKERS[args.peer](x, args.out / args.peer)
    for folder in args.read:
        keep(folder, *READERS[args.peer](folder, x))


if __name__ == "__main__":
    main()
