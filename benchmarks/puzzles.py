"""Do the simulator and the proposer understand explanations? The 19 human-written puzzles of OpenAI's neuron-explainer.

Each has sentences with an activation for every token, the explanation they were made from, and some that sound alike and are
false. The simulator is given each explanation in turn: the true one should score highest. The proposer is shown half of
the sentences, and what it says is simulated on the others. Puzzles are read from the package's own environment.

    python scripts/set_up_peers.py --only neuron_explainer
    python benchmarks/puzzles.py --model demo/SmolLM2-135M-Instruct.Q4_1.gguf [--dtype bfloat16] [--only colors ...]
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine

from explain.backends import Explanation, LookupBackend, RequestFailed
from explain.backends.local import LocalBackend
from explain.config import ExplainConfig
from explain.examples import Example, Unit
from explain.scores import correlation_intervals, correlation_scores

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def read_puzzles() -> dict[str, Any]:
    environment = ROOT / ".venv-peers" / "neuron_explainer"
    found = list(environment.glob("lib/python*/site-packages/neuron_explainer/explanations/puzzles.json"))
    if not found:
        raise SystemExit("the puzzles are not there: python scripts/set_up_peers.py --only neuron_explainer")
    puzzles: dict[str, Any] = json.loads(found[0].read_text(encoding="utf-8"))
    return puzzles


def sentences(puzzle: dict[str, Any], ids: dict[str, int]) -> list[Example]:
    """Return a puzzle's sentences; a token is a string, or a string and its activation."""
    found = []
    for number, sentence in enumerate(puzzle["sentences"]):
        pairs = [part if isinstance(part, list) else [part, 0] for part in sentence]
        tokens = [str(token) for token, _ in pairs]
        token_ids = [ids.setdefault(token, len(ids)) for token in tokens]
        found.append(Example(number, "top", token_ids, tokens, [float(value) for _, value in pairs]))
    return found


async def solve(puzzle: dict[str, Any], backend: LocalBackend, lookup: LookupBackend) -> dict[str, Any]:
    examples = sentences(puzzle, {})
    true = [example.activations for example in examples]

    async def score(text: str) -> tuple[float, dict[str, list[float] | None]]:
        predicted = [simulation.expected for simulation in await backend.simulate(Explanation(text), examples)]
        return correlation_scores(true, predicted).ev_correlation, correlation_intervals(true, predicted)

    own, intervals = await score(puzzle["explanation"])
    false = [(await score(text))[0] for text in puzzle["false_explanations"]]
    unit = Unit("puzzle", puzzle["name"], 0, 0.0, 10.0, examples[::2], examples[1::2])
    of_test = [example.activations for example in unit.test]

    async def held_out(by: LocalBackend | LookupBackend) -> tuple[str, float | None]:
        try:
            explanation = await by.propose(unit)
        except RequestFailed as error:
            return f"failed: {error}", None
        predicted = [simulation.expected for simulation in await by.simulate(explanation, unit.test)]
        value = correlation_scores(of_test, predicted).ev_correlation
        return explanation.text, value if value == value else None

    proposed, proposed_score = await held_out(backend)
    return {
        "puzzle": puzzle["name"], "true": own, "interval": intervals["ev_correlation"], "false": false,
        "true_is_best": own > max(false), "proposed": proposed, "proposed_score": proposed_score,
        "lookup_score": (await held_out(lookup))[1],
    }  # fmt: skip


async def solve_all(names: list[str], backend: LocalBackend, lookup: LookupBackend) -> list[dict[str, Any]]:
    puzzles = read_puzzles()
    found = []
    for name in names or puzzles:
        found.append(await solve(puzzles[name], backend, lookup))
        line = found[-1]
        print(f"{name}: true {line['true']:.3f}, false {max(line['false']):.3f}; says {line['proposed']!r}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", nargs="*", default=[])
    args = parser.parse_args()
    config = ExplainConfig(
        backend="local", model=args.model, local_dtype=args.dtype, local_device=args.device, max_answer_tokens=48
    )
    with tempfile.TemporaryDirectory() as folder:
        backend = LocalBackend(config, Path(folder))
        start = time.perf_counter()
        puzzles = asyncio.run(solve_all(args.only, backend, LookupBackend(config, Path(folder))))
        seconds = time.perf_counter() - start
    best = sum(line["true_is_best"] for line in puzzles)
    pairs = [line["true"] > value for line in puzzles for value in line["false"]]

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.mean(known) if known else None

    result = {
        "what": "neuron-explainer's puzzles: correlation of simulations from true, false and proposed explanations",
        "instrument": {**backend.facts(), "model": Path(args.model).name}, "puzzles": len(puzzles), "true_is_best": best,
        "true_above_false": sum(pairs) / len(pairs), "mean_true": mean([line["true"] for line in puzzles]),
        "mean_false": mean([value for line in puzzles for value in line["false"]]),
        "mean_proposed_held_out": mean([line["proposed_score"] for line in puzzles]),
        "mean_lookup_held_out": mean([line["lookup_score"] for line in puzzles]),
        "seconds": seconds, "each": puzzles, "machine": machine("transformers"),
    }  # fmt: skip
    print({key: value for key, value in result.items() if key not in ("each", "machine", "what")})
    if not args.only:
        name = Path(args.model).name.removesuffix(".gguf").lower()
        path = RESULTS / f"puzzles-{name}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(path)


if __name__ == "__main__":
    main()
