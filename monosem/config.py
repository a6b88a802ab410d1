"""One YAML a run, with dotted overrides. Whatever is wrong with it is said in one line, before anything loads."""

import difflib
import hashlib
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError, model_validator

from activation_store.config import DataConfig, HarvestConfig, ModelConfig, Section
from activation_store.errors import InputError, first_line
from explain.config import DECIDES_NOTHING, ExplainConfig
from sae.config import EvaluateConfig, SteerConfig, TrainConfig
from sae.sweep import expand, named, require_shared

_ONE, _SEVERAL = "one SAE", "several SAEs"


class ReportConfig(Section):
    """The report."""

    title: str | None = None


class RunConfig(Section):
    """A whole run. `seed` fixes token order, initialisation, shuffling and example choice; train.seed may differ.

    `train` is one SAE, or a sweep: a list of them, or settings with a `grid` of fields and their values. A sweep is trained in
    one pass over the activations, in the order that the run's seed gives.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    runs_dir: Path = Path("runs")
    seed: int = Field(default=0, ge=0)
    model: ModelConfig
    data: DataConfig
    harvest: HarvestConfig
    train: Annotated[
        Annotated[TrainConfig, Tag(_ONE)] | Annotated[tuple[TrainConfig, ...], Tag(_SEVERAL)],
        Discriminator(lambda value: _SEVERAL if isinstance(value, list | tuple) else _ONE),
    ]
    evaluate: EvaluateConfig = EvaluateConfig()
    explain: ExplainConfig = ExplainConfig()
    steer: SteerConfig = SteerConfig()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="before")
    @classmethod
    def _one_seed(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("train"), dict | list):
            return value
        seed = {"seed": value["seed"]} if "seed" in value else {}
        if isinstance(value["train"], dict) and "grid" not in value["train"]:
            return {**value, "train": {**seed, **value["train"]}}
        members: list[Any] = []
        for settings in value["train"] if isinstance(value["train"], list) else [value["train"]]:
            members += [{**seed, **own} for own in expand(settings)] if isinstance(settings, dict) else [settings]
        if not members:
            raise ValueError("train: an empty list; give one SAE or more")
        return {**value, "train": members}

    @model_validator(mode="after")
    def _sections_agree(self) -> "RunConfig":
        hooks, members = self.harvest.hooks, self.members
        require_shared(members)
        given = [("train.hook", hook) for config in members.values() for hook in config.hooks]
        given += [("train.hook_out", hook) for config in members.values() for hook in config.hooks_out]
        for field, hook in (*given, ("explain.neuron_hook", self.explain.neuron_hook)):
            if hook is not None and hook not in hooks:
                raise ValueError(f"{field}: {hook!r} given; allowed: one of harvest.hooks, {', '.join(hooks)}")
        if self.explain.sae is not None and self.explain.sae not in members:
            allowed = f"one of {', '.join(members)}" if self.is_sweep else "none, for this run trains one SAE"
            raise ValueError(f"explain.sae: {self.explain.sae!r} given; allowed: {allowed}")
        window, context = self.explain.window, self.data.context
        if context % window:
            raise ValueError(f"explain.window: {window} given; allowed: a divisor of data.context, {context}")
        return self

    @property
    def folder(self) -> Path:
        """Where the run lives."""
        return self.runs_dir / self.name

    @property
    def is_sweep(self) -> bool:
        """Whether several SAEs are trained."""
        return isinstance(self.train, tuple)

    @property
    def members(self) -> dict[str, TrainConfig]:
        """The SAEs to train by name; "" is the name of one that is alone. In a sweep every one names its hooks."""
        if isinstance(self.train, TrainConfig):
            return {"": self.train}
        default = {"hook": self.harvest.hooks[0]}
        return named([config if config.hooks else config.model_copy(update=default) for config in self.train])

    @property
    def chosen(self) -> str:
        """The name of the SAE that is explained and steered with."""
        return self.explain.sae or next(iter(self.members))

    @property
    def shared(self) -> TrainConfig:
        """The first SAE's settings: where it trains with others, some are those of all (see `sae.train_sweep`)."""
        return next(iter(self.members.values()))

    @property
    def untrained(self) -> "RunConfig":
        """The same run, of the chosen SAE alone, on the model as it is before training: a control."""
        seed = self.model.random_weights
        return self.model_copy(update={
            "name": f"{self.name}-untrained", "train": self.members[self.chosen],
            "model": self.model.model_copy(update={"random_weights": self.seed if seed is None else seed + 1}),
            "explain": self.explain.model_copy(update={"sae": None, "untrained": 0}),
        })  # fmt: skip

    @property
    def hook(self) -> str:
        """The hook that the chosen SAE reads, the first of several."""
        hooks = self.members[self.chosen].hooks
        return hooks[0] if hooks else self.harvest.hooks[0]

    def key(self, *sections: str) -> str:
        """Return a hash of some sections: equal keys, equal settings, but for those that decide no result."""
        everything = self.model_dump(mode="json", exclude={"explain": DECIDES_NOTHING})
        values = {name: everything[name] for name in sections}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


class _UniqueKeys(yaml.SafeLoader):
    """YAML that refuses a key given twice, where the standard loader keeps the last in silence."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]  # what << brings, a key may give anew
    keys = [loader.construct_object(key) for key in own]
    twice = sorted({str(key) for key in keys if keys.count(key) > 1})
    if twice:
        raise yaml.constructor.ConstructorError(None, None, f"key given twice: {', '.join(twice)}", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_UniqueKeys.add_constructor("tag:yaml.org,2002:map", _mapping)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply `section.key=value` overrides (values are YAML too).

    Raises InputError naming file, field, what was given and what is allowed.
    """
    path = Path(path)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)  # a SafeLoader
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: a run config is a mapping of sections, {', '.join(RunConfig.model_fields)}")
    for override in overrides:
        _apply(values, override)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path}: {describe(error)}") from None


def _apply(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise InputError(f"override {override!r}: give section.key=value, such as train.l1_coefficient=4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"override {override!r}: the value is not YAML ({first_line(error)})") from error
    *sections, last = dotted.split(".")
    into = [values]
    for section in sections:
        inner = [found.setdefault(section, {}) for found in into]
        into = [one for found in inner for one in (found if isinstance(found, list) else [found])]  # of a sweep, in every SAE
        if not all(isinstance(one, dict) for one in into):
            raise InputError(f"override {override!r}: {section!r} has no keys inside")
    for found in into:
        found[last] = value


def describe(error: ValidationError) -> str:
    """Return all faults of a config in one line, one clause a field.

    >>> try: TrainConfig(d_sae=0, steps=1)
    ... except ValidationError as e: print(describe(e))
    d_sae: 0 given; allowed: greater than or equal to 1
    """
    clauses: dict[str, list[str]] = {}
    given: dict[str, Any] = {}
    owner = next((model for model in (RunConfig, TrainConfig) if model.__name__ == error.title), None)
    for fault in error.errors():
        names, model = _field_path(owner, fault["loc"])
        field = ".".join(names)
        given.setdefault(field, fault.get("input"))
        if fault["type"] == "extra_forbidden":
            allowed = list(model.model_fields) if model is not None else []
            close = difflib.get_close_matches(names[-1], allowed, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            clauses.setdefault(field, []).append(f"no such key, {hint}allowed: {', '.join(allowed)}")
        elif fault["type"] == "missing" and isinstance(fault["loc"][-1], str):
            clauses.setdefault(field, []).append("missing")
        elif fault["type"] == "value_error":  # one of our own validators, which already says everything
            clauses.setdefault(field, []).append(str(fault["ctx"]["error"]))
        else:
            allowed_values = fault["msg"].removeprefix("Input should be ")
            clauses.setdefault(field, []).append(f"allowed: {allowed_values}")
    lines = []
    for field, parts in clauses.items():
        whole = " or ".join(dict.fromkeys(parts))
        whole = whole.replace(" or allowed: ", " or ")
        if whole == "missing":
            lines.append(f"{field}: missing, and it has no default")
        elif whole.startswith(("allowed", "no such key")):
            lines.append(f"{field}: {given[field]!r} given; {whole}")
        else:
            lines.append(whole)
    return "; ".join(lines)


def _field_path(model: type[BaseModel] | None, loc: tuple[str | int, ...]) -> tuple[list[str], type[BaseModel] | None]:
    """Return the field names of an error's location, without pydantic's tags for union members, and the innermost model."""
    names: list[str] = []
    for part in (part for part in loc if part not in (_ONE, _SEVERAL)):
        if isinstance(part, int):
            names.append(str(part))
        elif model is None:
            if names:  # inside a plain value: what follows are type tags
                break
            names.append(part)
        else:
            names.append(part)
            inner = model.model_fields[part].annotation if part in model.model_fields else None
            if part in model.model_fields:
                model = _model_of(inner)
            if model is None:
                break
    return names, model


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, Annotated, tuple):
        return next((m for m in map(_model_of, typing.get_args(annotation)) if m is not None), None)
    return None
