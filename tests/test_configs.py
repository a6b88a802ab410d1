"""The configs that ship, and what a wrong config is told."""

import re
from pathlib import Path

import pytest
import yaml

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))
PUBLISHED = [path for path in FILES if path.stem != "demo"]
BASE = CONFIGS / "gpt2-small.yaml"
# Facts of the models, from their config.json: width of the residual stream, number of blocks
MODELS = {
    "openai-community/gpt2": (768, 12),
    "EleutherAI/pythia-70m-deduped": (512, 6),
    "google/gemma-2-2b": (2304, 26),
    "meta-llama/Llama-3.1-8B": (4096, 32),
}


def load(path, overrides=()):
    from monosem.config import load_config

    return load_config(path, overrides)


def refusal(path, overrides=()):
    """Return the one line with which a config is refused."""
    from activation_store.errors import InputError

    with pytest.raises(InputError) as caught:
        load(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def comments(path):
    return "\n".join(re.findall(r"#(.*)", path.read_text()))


def written(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def without(section):
    values = yaml.safe_load(BASE.read_text())
    del values[section]
    return yaml.safe_dump(values)


def by_name(path):
    return path.stem


def test_the_runs_that_users_start_are_there():
    names = {"demo", "gpt2-small", "pythia-70m", "pythia-70m-sweep", "gemma-2-2b", "llama-3.1-8b"}
    assert {path.stem for path in FILES} >= names


@pytest.mark.parametrize("path", FILES, ids=by_name)
def test_ships_valid(path):
    assert load(path).name == path.stem


@pytest.mark.parametrize("path", FILES, ids=by_name)
def test_steps_fit_the_tokens(path):
    config = load(path)
    sequences = config.data.tokens // config.data.context
    training_rows = (sequences - max(1, round(sequences * config.data.held_out))) * config.data.context
    epochs = config.shared.steps * config.shared.batch_size / training_rows
    assert 0.5 <= epochs <= 20


@pytest.mark.parametrize("path", PUBLISHED, ids=by_name)
def test_cites_a_source(path):
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|https://\S+\.\S+/\S+", comments(path))


@pytest.mark.parametrize("path", PUBLISHED, ids=by_name)
def test_hook_is_inside_the_model(path):
    config = load(path)
    _, blocks = MODELS[config.model.id]
    assert 0 <= int(config.hook.split(".")[1]) < blocks


@pytest.mark.parametrize("path", PUBLISHED, ids=by_name)
def test_states_its_disk(path):
    config = load(path)
    stated = re.search(r"Disk: (\d+)M x (\d+) x 2 bytes = (\d+) GB", comments(path))
    assert stated is not None
    millions, width, gigabytes = map(int, stated.groups())
    assert config.harvest.dtype == "bfloat16"
    assert (millions * 1_000_000, width) == (config.data.tokens, MODELS[config.model.id][0])
    assert gigabytes == round(config.data.tokens * width * 2 / 1e9)


@pytest.mark.parametrize("path", PUBLISHED, ids=by_name)
def test_warm_ups_are_the_steps_that_the_comments_say(path):
    config = load(path)
    said = re.findall(r"^  (\w+_fraction): \S+  # ([\d,]+) steps$", path.read_text(), re.M)
    for field, steps in said:
        assert getattr(config.shared, field) * config.shared.steps == pytest.approx(int(steps.replace(",", "")), rel=0.03)


@pytest.mark.parametrize(
    ("override", "field", "given", "allowed"),
    [
        pytest.param("train.colour=3", "train.colour", "3", "lr_warmup_fraction, lr_decay_fraction", id="key"),
        pytest.param("train.steps=many", "train.steps", "'many'", "a valid integer", id="type"),
        pytest.param("train.lr=-1", "train.lr", "-1", "greater than 0", id="value"),
    ],
)
def test_a_fault_names_field_value_and_what_is_allowed(override, field, given, allowed):
    message = refusal(BASE, [override])
    assert message.startswith(f"{BASE}: {field}: {given} given; ")
    assert allowed in message.partition("allowed: ")[2]


def test_a_misspelled_key_suggests_the_right_one():
    assert "train.l1_coeficient: 4 given; no such key, did you mean l1_coefficient?" in refusal(BASE, ["train.l1_coeficient=4"])


def test_a_misspelled_section_suggests_the_right_one():
    assert "traim: {'lr': 1} given; no such key, did you mean train?" in refusal(BASE, ["traim.lr=1"])


def test_several_faults_are_told_in_one_line():
    message = refusal(BASE, ["train.lr=-1", "data.held_out=2", "model.dtype=int8"])
    for clause in ("train.lr: -1 given", "data.held_out: 2 given", "model.dtype: 'int8' given"):
        assert clause in message


@pytest.mark.parametrize("section", ["model", "data", "harvest", "train"])
def test_a_missing_section_is_named(tmp_path, section):
    assert f": {section}: missing" in refusal(written(tmp_path, without(section)))


def test_a_missing_field_is_named(tmp_path):
    assert "train.d_sae: missing" in refusal(written(tmp_path, without("train")), ["train.steps=1"])


def test_a_key_given_twice_is_refused(tmp_path):
    text = BASE.read_text()
    assert text.count("  lr: 4.0e-4\n") == 1
    message = refusal(written(tmp_path, text.replace("  lr: 4.0e-4\n", "  lr: 4.0e-4\n  lr: 1.0e-4\n")))
    assert "key given twice: lr" in message
    assert str(tmp_path / "run.yaml") in message


def test_a_section_that_is_a_list_is_refused(tmp_path):
    message = refusal(written(tmp_path, without("harvest") + "harvest: []\n"))
    assert ": harvest: [] given; allowed: " in message


@pytest.mark.parametrize("text", ["", "- a\n", "just words\n"], ids=["empty", "list", "words"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    assert "mapping of sections" in refusal(written(tmp_path, text))


def test_broken_yaml_is_refused(tmp_path):
    assert "not YAML" in refusal(written(tmp_path, "name: [a\n"))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    assert f"{tmp_path / 'none.yaml'}: cannot be read" in refusal(tmp_path / "none.yaml")


@pytest.mark.parametrize("override", ["train.lr", "=3"])
def test_an_override_without_key_or_equals_is_refused(override):
    assert f"override {override!r}: give section.key=value" in refusal(BASE, [override])


def test_an_override_into_a_plain_value_is_refused():
    assert "'steps' has no keys inside" in refusal(BASE, ["train.steps.more=3"])


def test_overrides_are_applied():
    config = load(BASE, ["train.lr=1e-3", "explain.window=64", "harvest.hooks=[blocks.1.hook_mlp_out]", "seed=7"])
    assert config.train.lr == 1e-3  # YAML 1.1 reads 1e-3 as a string
    assert config.explain.window == 64  # a section that the file does not have
    assert config.harvest.hooks == ("blocks.1.hook_mlp_out",)
    assert (config.seed, config.train.seed) == (7, 7)
    assert load(BASE).train.lr == 4e-4


def test_the_later_override_wins():
    assert load(BASE, ["train.lr=1", "train.lr=2"]).train.lr == 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.hook=blocks.3.hook_resid_pre", "train.hook: 'blocks.3.hook_resid_pre' given; allowed: "),
        ("explain.neuron_hook=blocks.3.hook_mlp_out", "explain.neuron_hook: 'blocks.3.hook_mlp_out' given; allowed: "),
        ("explain.window=7", "explain.window: 7 given; allowed: a divisor of data.context, 128"),
    ],
)
def test_sections_that_disagree_are_refused(override, said):
    assert said in refusal(BASE, [override])
