"""Configuration is data: one dataclass tree, one YAML file per profile, dotted overrides."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from ..errors import StudyError, closest
from ..model.network import VARIANTS
from ..model.precision import OPT_LEVELS
from ..model.ternary import WEIGHTS
from ..training.recipe import StageConfig

PROFILES = Path(__file__).parent / "profiles"


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
    """A whole study: data, network, the two stages, the ablation's training stage.

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
    ablation: StageConfig = field(default_factory=StageConfig)
    ablation_prune: StageConfig = field(default_factory=StageConfig)
    ablation_width: float = 1.0
    ablation_limit: int | None = None  # images per class and split in ablations; None: as data.limit
    ablation_opt_level: str = "O3"  # at which ablations are tested and scored
    expect: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self):
        if not 0 <= self.seed < 2**63:
            raise StudyError(f"seed {self.seed} is outside 0 .. {2**63 - 1}; choose another")
        for part, name, choices in (
            (self.network, "variant", VARIANTS),
            (self.network, "weights", WEIGHTS),
            (self, "ablation_opt_level", OPT_LEVELS),
        ):
            value = getattr(part, name)
            if value not in choices:
                raise StudyError(f"{name} {value!r} is unknown; {closest(value, choices)}")


class _Loader(yaml.SafeLoader):
    """Booleans as of YAML 1.2, so that "off", a value of ``consistency``, is a word."""

    yaml_implicit_resolvers: typing.ClassVar = {
        first: [rule for rule in rules if rule[0] != "tag:yaml.org,2002:bool"]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("true|false"), list("tf"))


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
    name : "smoke", "cpu", "quick", "paper", or the path of a .yaml file of the same form
    variant, data, limit, seed, device : replace the profile's own where not None
    overrides : "train.epochs=3" and the like, a sequence or one string separated by spaces

    Raises
    ------
    StudyError : unknown profile, variant, name or value, with the nearest known one
    """
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    if not path.is_file():
        raise StudyError(
            f"profile {str(name)!r} is unknown; {closest(str(name), profile_names())}, or a .yaml file"
        )
    tree = read_yaml(path)
    variants = _mapping(tree.pop("variants", None), f"{path}: variants")
    for part in ("network", "data"):
        tree[part] = _mapping(tree.get(part), f"{path}: {part}")
    variant = variant or tree["network"].get("variant", "v3")
    if variant not in VARIANTS:
        raise StudyError(f"variant {variant!r} is unknown; {closest(variant, VARIANTS)}")
    tree = _merge(tree, _mapping(variants.get(variant), f"{path}: variants.{variant}"))
    tree = _merge(tree, {"name": path.stem, "network": {"variant": variant}})
    tree = _merge(tree, {"seed": seed, "device": device}, skip_none=True)
    tree = _merge(tree, {"data": {"source": data, "limit": limit}}, skip_none=True)
    for override in overrides.split() if isinstance(overrides, str) else overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise StudyError(f"override {override!r} has no '='; write it as train.epochs=3")
        try:
            value: object = yaml.load(text, _Loader)
        except (yaml.YAMLError, ValueError) as error:
            raise StudyError(
                f"override {override!r} has a value that is not YAML; correct {text!r}"
            ) from error
        tree = _merge(tree, _nested(key, value))
    if data is not None or limit is not None or not _is_own_data(tree):
        tree["expect"] = {}
    return _build(Profile, tree, where="")


def overridden(profile: Profile, changes: typing.Mapping[str, object]) -> Profile:
    """A profile with other values at dotted names, as ``{"ablation.alpha": 0.3}``; checked like a file's."""
    tree = dataclasses.asdict(profile)
    for key, value in changes.items():
        tree = _merge(tree, _nested(str(key), value))
    return _build(Profile, tree, where="")


def read_yaml(path: str | Path) -> dict:
    """The mapping that a YAML file holds, or a StudyError of one line."""
    try:
        tree = yaml.load(Path(path).read_text(), _Loader)
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise StudyError(f"{path} is not readable YAML ({str(error).splitlines()[0]}); correct it") from error
    return _mapping(tree, str(path))


def _nested(key: str, value: object) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _is_own_data(tree: dict) -> bool:
    return _mapping(tree.get("data"), "data").get("source", "synthetic") == "synthetic"


def _mapping(value: object, where: str) -> dict:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise StudyError(f"{where} is {value!r:.60}, not a mapping of fields; correct it")
    return value


def _merge(base: dict, over: dict, skip_none: bool = False) -> dict:
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key, {}), dict):
            merged[key] = _merge(merged.get(key, {}), value, skip_none)
        elif value is not None or not skip_none:
            merged[key] = value
    return merged


def _build(cls: type, tree: object, where: str):
    tree = _mapping(tree, where.rstrip(".") or "profile")
    kinds = typing.get_type_hints(cls)
    for name in tree:
        if name not in kinds:
            raise StudyError(f"parameter {where}{name} is unknown; {closest(name, kinds)}")
    return cls(**{name: _value(kinds[name], value, f"{where}{name}") for name, value in tree.items()})


def _value(kind, value, where: str):
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, f"{where}.")
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
            return {k: [float(low), float(high)] for k, (low, high) in value.items()}
        if kind is bool:
            if not isinstance(value, bool):
                raise TypeError
            return value
        if kind is int:
            if isinstance(value, bool) or int(value) != float(value):
                raise TypeError
            return int(value)
        if (kind is float and isinstance(value, bool)) or (kind is str and not isinstance(value, str)):
            raise TypeError
        return kind(value)
    except StudyError:
        raise
    except (TypeError, ValueError, AttributeError, OverflowError):
        expected = getattr(origin or kind, "__name__", str(kind))
        raise StudyError(f"parameter {where} is {value!r}, not of type {expected}; correct it") from None
