"""Configuration is data: one dataclass tree, one YAML file per profile, dotted overrides."""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from ..errors import StudyError, closest, reason, shown
from ..files import read_text
from ..model.network import VARIANTS
from ..model.precision import OPT_LEVELS
from ..model.ternary import WEIGHTS
from ..training.recipe import StageConfig

PROFILES = Path(__file__).parent / "profiles"
# What a profile does not say of its ablations is short: a few images, minutes on two cores.
SHORT_ABLATIONS = {
    "ablation": {
        **{"epochs": 2, "lr": 0.1, "schedule": "one-cycle", "warmup_epochs": 1, "warmup_lr": 0.01},
        **{"alpha_start": 0, "alpha_end": 2},  # of the row whose alpha is ramped
    },
    "ablation_prune": {
        **{"epochs": 1, "lr": 0.01, "schedule": "cosine", "warmup_epochs": 0, "final_lr": 1e-4},
        "ramp_epochs": 0,
    },
    "ablation_width": 0.25,
    "ablation_limit": 20,
}


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from; ``limit`` keeps the first N of each class and split."""

    source: str = "synthetic"
    limit: int | None = None


@dataclass(frozen=True)
class NetworkConfig:
    """Arguments of :func:`msunet_core.build_msunet`."""

    variant: str = "v3"
    weights: str = "ternary"
    width: float = 1.0


@dataclass(frozen=True)
class Profile:
    """A whole study: data, network, the two stages, and those of the ablations.

    ``expect`` holds bands [low, high] of measured numbers of this profile on its own data, for
    the regression check of the notebooks; a profile or data set without a band is not checked.
    """

    name: str = "smoke"
    seed: int = 0
    device: str = "auto"
    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    train: StageConfig = field(default_factory=StageConfig)
    prune: StageConfig = field(default_factory=StageConfig)
    ablation: StageConfig = field(default_factory=lambda: StageConfig(**SHORT_ABLATIONS["ablation"]))
    ablation_prune: StageConfig = field(
        default_factory=lambda: StageConfig(**SHORT_ABLATIONS["ablation_prune"])
    )
    ablation_width: float = SHORT_ABLATIONS["ablation_width"]
    ablation_limit: int | None = SHORT_ABLATIONS[
        "ablation_limit"
    ]  # images per class and split; None: as data.limit
    ablation_opt_level: str = "O3"  # at which ablations are tested and scored
    expect: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self):
        if not 0 <= self.seed < 2**63:
            raise StudyError(f"seed {shown(self.seed)} is outside 0 .. {2**63 - 1}; choose another")
        for name, limit in (("data.limit", self.data.limit), ("ablation_limit", self.ablation_limit)):
            if limit is not None and limit < 1:
                raise StudyError(f"{name} {shown(limit)} keeps no image; give 1 or more, or leave it out")
        for part, name, choices in (
            (self.network, "variant", VARIANTS),
            (self.network, "weights", WEIGHTS),
            (self, "ablation_opt_level", OPT_LEVELS),
        ):
            value = getattr(part, name)
            if value not in choices:
                raise StudyError(f"{name} {value!r} is unknown; {closest(value, choices)}")

    def shortfalls(self) -> list[str]:
        """In what a run of it is a toy, short of the published set-up; empty where it is not."""
        limit, width = self.data.limit, self.network.width
        told = {
            "synthetic images": self.data.source == "synthetic",
            f"at most {limit} of each class": limit is not None,
            f"a network of {width:g} times the published width": width != 1.0,
        }
        return [words for words, holds in told.items() if holds]


MAX_YAML = 2**16  # characters of a profile or a value; the longest of ours has 2,000
MAX_BRACKETS = 300
MAX_DEPTH = 8  # mappings and lists within each other; ours have 3
MAX_VALUES = 5000  # with what aliases repeat
MAX_INTEGER = 2**63  # no number of the study is larger


class _Loader(yaml.SafeLoader):
    """YAML as far as a profile needs it: no name twice, nothing deep.

    Booleans as of YAML 1.2, so that "off", a value of ``consistency``, is a word.
    """

    yaml_implicit_resolvers: typing.ClassVar = {
        first: [rule for rule in rules if rule[0] != "tag:yaml.org,2002:bool"]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    depth = 0

    def compose_node(self, parent, index):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise StudyError(f"it is nested more than {MAX_DEPTH} deep; write it flat")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, value in node.value:
            if key.value == "<<" and not isinstance(value, yaml.MappingNode):
                raise StudyError("it merges (<<) more than one mapping; write them out")
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise StudyError(f"it has {shown(key.value)} twice; remove one")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("true|false"), list("tf"))


def _parsed(text: str, where: str) -> object:
    """A YAML text as mappings with names, lists, texts, numbers, booleans and None, and nothing else.

    Raises StudyError for any other text; ``where`` begins its message.
    """
    if len(text) > MAX_YAML:
        raise StudyError(f"{where} has {len(text)} characters, more than {MAX_YAML}; shorten it")
    if text.count("[") + text.count("{") > MAX_BRACKETS:  # PyYAML's time grows with their square
        raise StudyError(f"{where} has more than {MAX_BRACKETS} brackets; write it flat")
    try:
        value = yaml.load(text, _Loader)
    except StudyError as error:
        raise StudyError(f"{where} is not a profile's YAML: {error}") from error
    except Exception as error:  # PyYAML raises its own kinds, and what constructors of values happen to raise
        raise StudyError(f"{where} is not readable YAML ({reason(error)}); correct it") from error
    return _plain(value, where, MAX_DEPTH, iter(range(MAX_VALUES)))


def _plain(value: object, where: str, depth: int, room: typing.Iterator[int]) -> object:
    """A copy of plain values without aliases; StudyError where ``depth`` or ``room`` for them is used up."""
    if next(room, None) is None or depth < 0:
        raise StudyError(
            f"{where} holds more than {MAX_VALUES} values or repeats itself for ever; shorten it"
        )
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: _plain(each, f"{where}: {name}", depth - 1, room) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain(each, where, depth - 1, room) for each in value]
    whole = isinstance(value, int) and abs(value) <= MAX_INTEGER
    if value is None or whole or isinstance(value, str | float):
        return value
    raise StudyError(f"{where} holds {shown(value)}, no text, number, list or mapping of names; correct it")


def profile_names() -> list[str]:
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def load_profile(
    name: str = "smoke",
    *,
    variant: str | None = None,
    data: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    overrides: typing.Iterable[str] | str = (),
) -> Profile:
    """Read a profile and lay the given choices over it.

    Parameters
    ----------
    name : "smoke", "evidence", "cpu2h", "cpu", "quick", "paper", or the path of a .yaml file of the same form
    variant, data, limit, seed, device : replace the profile's own where not None
    overrides : "train.epochs=3" and the like, a sequence or one string separated by spaces

    Raises
    ------
    StudyError : unknown profile, variant, name or value, with the nearest known one
    """
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    if not os.path.isfile(path):
        raise StudyError(
            f"profile {str(name)!r} is unknown; {closest(str(name), profile_names())}, or a .yaml file"
        )
    tree = read_yaml(path)
    variants = _mapping(tree.pop("variants", None), f"{path}: variants")
    for part in ("network", "data"):
        tree[part] = _mapping(tree.get(part), f"{path}: {part}")
    own_variant = tree["network"].get("variant", "v3")
    variant = variant or own_variant
    if not isinstance(variant, str) or variant not in VARIANTS:
        raise StudyError(f"variant {shown(variant)} is unknown; {closest(variant, VARIANTS)}")
    tree = _merge(tree, _mapping(variants.get(variant), f"{path}: variants.{variant}"))
    tree = _merge(tree, {"name": path.stem, "network": {"variant": variant}})
    tree = _merge(tree, {"seed": seed, "device": device}, skip_none=True)
    tree = _merge(tree, {"data": {"source": data, "limit": limit}}, skip_none=True)
    for override in overrides.split() if isinstance(overrides, str) else overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise StudyError(f"override {shown(override)} has no '='; write it as train.epochs=3")
        if key == "name":
            raise StudyError("a profile has the name of its file: copy that under another one")
        if key == "network.variant":
            raise StudyError("network.variant brings a recipe of its own: give VARIANT (--variant) instead")
        if key.count(".") >= MAX_DEPTH:
            raise StudyError(f"override {shown(key)} names no parameter; write it as train.epochs=3")
        tree = _merge(tree, _nested(key, _parsed(text, f"override {shown(key)}")))
    others = [value for value in (data, limit, seed) if value is not None]
    if others or overrides or variant != own_variant:
        tree["expect"] = {}  # measured with none of these
    return _laid_over(Profile(), tree, where="")


def profile_of(parameters: typing.Mapping[str, object]) -> Profile:
    """The profile that a notebook's parameters mean, by the names of their cell; None and "" say nothing.

    Raises StudyError as :func:`load_profile`, and where no PROFILE is named.
    """
    given = {name: value for name, value in parameters.items() if value not in (None, "")}
    own = {name.lower(): given.get(name) for name in ("VARIANT", "DATA", "LIMIT", "SEED", "DEVICE")}
    return load_profile(str(given.get("PROFILE", "")), **own, overrides=str(given.get("OVERRIDES", "")))


def overridden(profile: Profile, changes: typing.Mapping[str, object]) -> Profile:
    """A profile with other values at dotted names, as ``{"ablation.alpha": 0.3}``; checked like a file's."""
    tree: dict = {}
    for key, value in changes.items():
        tree = _merge(tree, _nested(str(key), value))
    return _laid_over(profile, tree, where="")


def read_yaml(path: str | Path) -> dict:
    """The mapping that a YAML file holds, or a StudyError of one line."""
    return _mapping(_parsed(read_text(path, MAX_YAML), str(path)), str(path))


def _nested(key: str, value: object) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _mapping(value: object, where: str) -> dict:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise StudyError(f"{where} is {shown(value)}, not a mapping of fields; correct it")
    return value


def _merge(base: dict, over: dict, skip_none: bool = False) -> dict:
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key, {}), dict):
            merged[key] = _merge(merged.get(key, {}), value, skip_none)
        elif value is not None or not skip_none:
            merged[key] = value
    return merged


def _laid_over(base, tree: object, where: str):
    """A copy of a dataclass with the values of a mapping; what that does not say stays."""
    tree = _mapping(tree, where.rstrip(".") or "profile")
    kinds = typing.get_type_hints(type(base))
    for name in tree:
        if name not in kinds:
            raise StudyError(f"parameter {where}{name} is unknown; {closest(name, kinds)}")
    changes = {
        name: _value(kinds[name], value, f"{where}{name}", getattr(base, name))
        for name, value in tree.items()
    }
    return dataclasses.replace(base, **changes)


def _value(kind, value, where: str, base=None):
    if dataclasses.is_dataclass(kind):
        return _laid_over(base, value, f"{where}.")
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    origin = typing.get_origin(kind)
    try:
        if origin is tuple:
            if not isinstance(value, (list, tuple)):
                raise TypeError
            return tuple(_value(int, v, where) for v in value)
        if origin is dict:
            return {str(k): [float(low), float(high)] for k, (low, high) in value.items()}
        if kind is bool:
            if not isinstance(value, bool):
                raise TypeError
            return value
        if kind is int:
            if isinstance(value, bool) or int(value) != (value if isinstance(value, int) else float(value)):
                raise TypeError
            return int(value)
        if (kind is float and isinstance(value, bool)) or (kind is str and not isinstance(value, str)):
            raise TypeError
        return kind(value)
    except StudyError:
        raise
    except (TypeError, ValueError, AttributeError, OverflowError):
        expected = getattr(origin or kind, "__name__", str(kind))
        raise StudyError(f"parameter {where} is {shown(value)}, not of type {expected}; correct it") from None
