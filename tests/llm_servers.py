"""What the tests of explain/ share: a chat server that answers by script, a real one, and a toy world to explain.

The scripted server speaks enough of the OpenAI API over a real socket; what it answers is decided request by request. The
toy world is a store of word tokens whose activations are known by construction, so that right answers are known too.
"""

import json
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from activation_store import ActivationStore
from sae.architectures.standard import StandardSAE
from sae.sae import SAEConfig

# --- the toy world


def make_store(
    folder: Path,
    tokens: NDArray[np.int32],
    activations: Mapping[str, NDArray[np.float32]],
    train_sequences: int,
    special: Sequence[int] = (),
    shard_sequences: int = 128,
) -> ActivationStore:
    """A finished float32 store of (sequence, context) tokens and (row, d) activations a hook."""
    store = ActivationStore.create(
        folder,
        tokens,
        np.zeros_like(tokens),
        {hook: values.shape[1] for hook, values in activations.items()},
        dtype="float32",
        shard_sequences=shard_sequences,
        attributes={"special_token_ids": list(special), "train_sequences": train_sequences},
    )
    for shard in range(store.shards):
        rows = store.shard_sequences(shard)
        part = slice(rows.start * store.context, rows.stop * store.context)
        store.write_shard(shard, {hook: torch.from_numpy(values[part].copy()) for hook, values in activations.items()})
    store.finish({})
    return ActivationStore.open(folder)


def relu_dictionary(d: int, hook: str) -> StandardSAE:
    """An SAE whose latent i is max(x_i, 0), so that what it should find is what was put into the store."""
    sae = StandardSAE(SAEConfig("standard", d, d, hook))
    with torch.no_grad():
        for weight in (sae.W_enc, sae.W_dec):
            weight.copy_(torch.eye(d))
        for bias in (sae.b_enc, sae.b_dec):
            bias.zero_()
    return sae.requires_grad_(False)


class Words:
    """A tokenizer of whole words: token i is the i-th word with a space before it; token 0 is the special <s>."""

    words = (
        "<s>", " apple", " bread", " cloud", " dance", " eagle", " flute", " grape", " house", " island", " jungle",
        " kettle", " lemon", " market", " night", " ocean", " piano", " queen", " river", " stone", " tiger", " uncle",
    )  # fmt: skip

    def decode(self, ids: list[int]) -> str:
        return "".join(self.words[i] for i in ids)


KEY = "sk-monosem-0123456789abcdefghij"
"""What the tests give for a key; nothing that a run writes may hold it."""
HOOK, OTHER_HOOK = "blocks.0.hook_resid_post", "blocks.0.mlp.hook_post"
CONTEXT, WINDOW = 16, 8
SEQUENCES, TRAIN_SEQUENCES = 120, 90
ONLY_IN_TRAINING = len(Words.words) - 1  # a word that no held-out sequence holds
LATENTS = {"on one word": (0, 1, 2, 3), "training only": 4, "dead": 5, "on a word and by chance": 6}


def toy_store(folder: Path) -> ActivationStore:
    """120 sequences of 16 random words, the first one <s>, the last 30 held out; two hooks of 8 columns.

    At HOOK column i of 0..3 is 2 + i exactly on word i + 1 and 0 elsewhere; column 4 fires on a word that is in no held-out
    sequence; column 5 never fires; column 6 fires on words 5 and 6 with random strength; column 7 fires only on <s>.
    OTHER_HOOK holds Gaussian noise, plus 3 where the word's number is the column's.
    """
    chance = np.random.default_rng(0)
    tokens = chance.integers(1, ONLY_IN_TRAINING, (SEQUENCES, CONTEXT)).astype(np.int32)
    tokens[:TRAIN_SEQUENCES][chance.random((TRAIN_SEQUENCES, CONTEXT)) < 0.05] = ONLY_IN_TRAINING
    tokens[:, 0] = 0
    flat = tokens.reshape(-1)
    x = np.zeros((flat.size, 8), np.float32)
    for latent in LATENTS["on one word"]:
        x[flat == latent + 1, latent] = 2 + latent
    x[flat == ONLY_IN_TRAINING, 4] = 1.0
    x[:, 6] = np.where((flat == 5) | (flat == 6), chance.uniform(0.1, 1.0, flat.size), 0.0)
    x[flat == 0, 7] = 50.0
    noise = chance.normal(size=(flat.size, 8)) + 3.0 * (flat[:, None] == np.arange(8))
    return make_store(folder, tokens, {HOOK: x, OTHER_HOOK: noise.astype(np.float32)}, TRAIN_SEQUENCES, special=[0])


SENTENCES = (
    "The boat went down the river at dawn", "She baked fresh bread for the whole family",
    "We swam in the cold river last summer", "He cut the bread into thick white slices",
    "A bridge crosses the river near the mill", "The smell of bread filled the small kitchen",
    "Fish live in the river all year round", "They ate bread with butter and sweet jam",
    "Our house stands where the river bends south", "Good bread needs flour and salt and time",
    "The rain made the river rise very fast", "My aunt sells bread at the village market",
    "Few people dare cross the river in winter", "Warm bread is the best thing after work",
)  # fmt: skip


class Spoken:
    """A tokenizer of whole words for SENTENCES."""

    words = tuple(sorted({f" {word}" for sentence in SENTENCES for word in sentence.split()}))

    def decode(self, ids: list[int]) -> str:
        return "".join(self.words[i] for i in ids)


def spoken_store(folder: Path) -> ActivationStore:
    """SENTENCES, one a row of 8 words, the last 6 held out; column 0 fires on "river", column 1 on "bread"."""
    tokens = np.array([[Spoken.words.index(f" {word}") for word in s.split()] for s in SENTENCES], np.int32)
    x = np.stack([tokens.reshape(-1) == Spoken.words.index(f" {word}") for word in ("river", "bread")], 1)
    return make_store(folder, tokens, {HOOK: 2 * x.astype(np.float32)}, len(SENTENCES) - 6)


# --- the scripted server


@dataclass(frozen=True)
class Request:
    """One request as it arrived: `number` counts from 0, `running` how many were being served at that moment."""

    number: int
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    at: float
    running: int

    @property
    def user(self) -> str:
        """The first user message: the task, whatever was said since."""
        return next(m["content"] for m in self.body["messages"] if m["role"] == "user")

    @property
    def simulates(self) -> dict[str, Any] | None:
        """The description, count and tokens of a simulation; None for a proposal."""
        try:
            asked = json.loads(self.user)
        except ValueError:
            return None
        return asked if isinstance(asked, dict) and "count" in asked else None

    @property
    def about(self) -> str:
        """The word that the request is about: the one marked most often, or the description."""
        if self.simulates is not None:
            return str(self.simulates["description"])
        found = re.findall(r"<<(.*?)>>", self.user)
        return Counter(found).most_common(1)[0][0].strip() if found else "nothing"


@dataclass(frozen=True)
class Reply:
    """What to answer. `body` is sent as JSON, bytes and str as they are; `cut` promises more bytes than are sent."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: bool = False


def completion(content: Any, **message: Any) -> dict[str, Any]:
    """A chat completion in the shape that api.openai.com gives it."""
    return {
        "id": "chatcmpl-C8kQ1", "object": "chat.completion", "created": 1757000000, "model": "gpt-4o-mini-2024-07-18",
        "choices": [{
            "index": 0, "message": {"role": "assistant", "content": content, "refusal": None, "annotations": [], **message},
            "logprobs": None, "finish_reason": "stop",
        }],
        "usage": {
            "prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
        },
        "service_tier": "default", "system_fingerprint": "fp_8bda4d3a2c",
    }  # fmt: skip


def error(message: str, code: str = "error") -> dict[str, Any]:
    """An error body in OpenAI's shape."""
    return {"error": {"message": message, "type": code, "param": None, "code": code}}


def perfect(request: Request) -> str:
    """The right answer in the toy world: the description is the marked word, and it fires on that word alone."""
    asked = request.simulates
    if asked is None:
        return json.dumps({"description": request.about})
    tokens = [asked["tokens"][str(i)] for i in range(asked["count"])]
    return json.dumps({"activations": [10 if token.strip() == asked["description"] else 0 for token in tokens]})


def good(request: Request) -> Reply:
    """A server in good health."""
    return Reply(completion(perfect(request)))


class ChatServer:
    """Serves /chat/completions by `script` and lists one model; `requests` holds every chat request that arrived."""

    def __init__(self, script: Callable[[Request], Reply] = good, models: Reply | None = None) -> None:
        self.script = script
        self.models = models or Reply({"object": "list", "data": [{"id": "gpt-4o-mini", "object": "model"}]})
        self.requests: list[Request] = []
        self.answered: list[Request] = []  # those that got a whole 200
        self._lock = threading.Lock()
        self._running = 0
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                """Be quiet."""

            def do_GET(self) -> None:
                self.reply(owner.models)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner._lock:
                    owner._running += 1
                    request = Request(
                        len(owner.requests), self.path, {k.lower(): v for k, v in self.headers.items()}, body,
                        time.monotonic(), owner._running,
                    )  # fmt: skip
                    owner.requests.append(request)
                try:
                    reply = owner.script(request)
                    time.sleep(reply.delay)
                finally:
                    with owner._lock:
                        owner._running -= 1
                if reply.status == 200 and not reply.cut:
                    owner.answered.append(request)
                self.reply(reply)

            def reply(self, reply: Reply) -> None:
                raw, kind = reply.body, "application/json"
                if isinstance(raw, str):
                    raw, kind = raw.encode(), "text/plain; charset=utf-8"
                elif not isinstance(raw, bytes):
                    raw = json.dumps(raw).encode()
                try:
                    self.send_response(reply.status)
                    headers = {"Content-Type": kind, "Content-Length": str(len(raw) + 1000 * reply.cut), **reply.headers}
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(raw)
                except OSError:
                    return  # the client has given up waiting
                self.close_connection = self.close_connection or reply.cut

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Say nothing of clients that hang up; faults of a script are seen by the client as a cut connection."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "ChatServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()


# --- a real server

_LIVE = """
import sys, threading, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.port, p.hostnames, p.model_alias = sys.argv[1], int(sys.argv[2]), ["127.0.0.1"], {"labeller"}
p.n_ctx, p.n_parallel = 8192, 2
p.n_predict, p.sampling.penalty_repeat, p.sampling.penalty_last_n = 200, 1.1, 256  # else SmolLM2 repeats itself without end
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1  # with more, llama.cpp's threads spin: on busy cores 200 times slower
server = xllamacpp.Server(p)
sys.stdin.read()  # until the parent closes the pipe, or dies
"""


@contextmanager
def live_server(gguf: Path, log: Path, patience: float = 60.0) -> Iterator[str]:
    """Serve a GGUF with llama.cpp in a process of its own; yields the base URL once it answers, and kills it at the end."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _LIVE, str(gguf), str(port)], stdin=subprocess.PIPE, stdout=output, stderr=output
        )
    base_url = f"http://127.0.0.1:{port}/v1"
    try:
        end = time.monotonic() + patience
        while not _answers(f"{base_url}/models"):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the llama.cpp server did not come up: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        yield base_url
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False
