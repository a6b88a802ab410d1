"""How busy a run of explanations keeps an LLM server: one that answers after 50 ms, in a process of its own.

The server counts, at every moment, how many requests it has; the figure is their mean over the run as a share of
`explain.concurrency`, from the first request to the last answer, beside the share of the client's own slots that were taken.

    python benchmarks/client.py [--units 300] [--concurrency 8 32]
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine

from explain.backends import ChatBackend
from explain.config import ExplainConfig
from explain.describe import Describer
from explain.examples import Example, Unit

RESULTS = Path(__file__).parent / "results"
LATENCY = 0.05


def serve(port: Any, finished: Any, totals: Any) -> None:
    """A server of asyncio streams: enough of HTTP and of the API, and nothing that would itself be slow."""
    state = {"running": 0, "area": 0.0, "at": 0.0, "first": 0.0, "last": 0.0, "answered": 0}

    def count(step: int) -> None:
        now = time.perf_counter()
        state["area"] += state["running"] * (now - state["at"]) if state["at"] else 0.0
        state["first"] = state["first"] or now
        state["at"] = state["last"] = now
        state["running"] += step

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
            count(1)
            body = json.loads(await reader.readexactly(length))
            await asyncio.sleep(LATENCY)
            properties = body["response_format"]["json_schema"]["schema"]["properties"]
            answer: dict[str, Any] = {"description": "something"}
            for name in ("activations", "answers"):
                if name in properties:
                    answer = {name: [random.randint(0, 1) for _ in range(properties[name]["minItems"])]}
            message = {"role": "assistant", "content": json.dumps(answer)}
            usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
            choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
            reply = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": choices, "usage": usage}
            raw = json.dumps(reply).encode()
            state["answered"] += 1
            count(-1)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw)

    async def main() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        port.value = server.sockets[0].getsockname()[1]
        while not finished.value:
            await asyncio.sleep(0.05)
        totals[:] = [state["area"], state["last"] - state["first"], state["answered"]]
        os._exit(0)

    asyncio.run(main())


def units(number: int) -> list[Unit]:
    chance = random.Random(0)
    words = [f" word{i}" for i in range(500)]

    def example(window: int, kind: str) -> Example:
        tokens = [chance.choice(words) for _ in range(32)]
        activations = [chance.random() * (chance.random() < 0.1 and kind != "random") for _ in tokens]
        return Example(window, kind, list(range(32)), tokens, [*activations[:-1], 1.0 * (kind != "random")])

    made = []
    for latent in range(number):
        train = [example(i, "top") for i in range(20)]
        test = [example(100 + i, "top") for i in range(10)] + [example(200 + i, "random") for i in range(10)]
        made.append(Unit("sae", "blocks.0.hook_resid_post", latent, 0.01, 1.0, train, test, 1000, 100_000))
    return made


def measure(number: int, concurrency: int) -> dict[str, Any]:
    port, finished = multiprocessing.Value("i", 0), multiprocessing.Value("i", 0)
    totals = multiprocessing.Array("d", 3)
    server = multiprocessing.Process(target=serve, args=(port, finished, totals), daemon=True)
    server.start()
    while not port.value:
        time.sleep(0.01)
    os.environ["OPENAI_API_KEY"] = "none"
    os.environ["NO_PROXY"] = "127.0.0.1"
    config = ExplainConfig(
        backend="openai", base_url=f"http://127.0.0.1:{port.value}/v1", concurrency=concurrency, instrument="integers",
        resamples=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        backend = ChatBackend(config, Path(folder))
        describer = Describer(config, backend, Path(folder), 0)
        held, limit = [0.0], backend.client._limit

        async def watch() -> None:
            while True:
                held.append(limit._running)
                await asyncio.sleep(0.002)

        async def all_units() -> float:
            watching = asyncio.create_task(watch())
            start = time.perf_counter()
            await describer.take(units(number), lambda: None)
            seconds = time.perf_counter() - start
            watching.cancel()
            await backend.close()
            return seconds

        seconds = asyncio.run(all_units())
        assert not describer.failures, describer.failures
    finished.value = 1
    server.join(5)
    area, span, answered = totals
    return {
        "concurrency": concurrency, "units": number, "requests": int(answered), "seconds": round(seconds, 2),
        "requests_per_second": round(answered / span, 1), "ideal_requests_per_second": concurrency / LATENCY,
        "busy_at_the_server": round(area / span / concurrency, 4), "slots_taken": round(sum(held) / len(held) / concurrency, 4),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=300)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8, 32])
    args = parser.parse_args()
    cases = [measure(args.units, concurrency) for concurrency in args.concurrency]
    result = {"what": "share of the concurrency limit kept busy, an LLM of 50 ms", "cases": cases, "machine": machine("openai")}
    print(json.dumps(result, indent=2))
    if args.units >= 300:
        (RESULTS / "client-cpu.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
