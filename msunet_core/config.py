"""Configuration is data: one dataclass tree, one YAML file per profile, dotted overrides."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from .cutmix import CONSISTENCY
from .data import IMAGE_SIZE
from .errors import StudyError, closest
from .network import VARIANTS
from .precision import OPT_LEVELS
from .pruning import PRUNERS, RAMP_EPOCHS
from .ternary import WEIGHTS

PROFILES = Path(__file__).parent / "profiles"
SCHEDULES = ("step", "cosine", "one-cycle")


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
class StageConfig:
    """One training stage (SPEC section 6); epochs count from 0, rates and alpha hold for an epoch."""

    epochs: int = 1
    batch_size: int = 64
    # Learning rate: warm-up from warmup_lr, then "step" (x gamma at each milestone), "cosine" from
    # lr to final_lr, or "one-cycle" (linear up over warmup_epochs, linear down to final_lr, per step).
    lr: float = 0.1
    schedule: str = "step"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.25
    warmup_epochs: int = 5
    warmup_lr: float = 1e-4
    final_lr: float = 0.0
    cycle_epochs: int | None = None  # "cosine" starts anew after so many; None: one over all epochs
    momentum: float = 0.9
    weight_decay: float = 1e-4
    label_smoothing: float = 0.0
    augment: bool = True  # False: "clean" images, none of crop, flip, jitter and erasing
    erase_probability: float = 0.4  # random erasing, per image
    # Progressive resizing: side in pixels of the training images of each epoch, whole ones after the last.
    image_sizes: tuple[int, ...] = ()
    cutmix_probability: float = 0.5
    cutmix_until: int | None = None  # first epoch without CutMix; None: on to the end
    consistency: str = "as-released"
    alpha: float | None = None  # fixed threshold; None: the schedule from alpha_start to alpha_end
    alpha_start: int = 20
    alpha_end: int = 400
    freeze_ternary: bool = False
    opt_level: str = "O0"
    pruner: str = "none"
    ramp_epochs: int = RAMP_EPOCHS
    checkpoint_every: int = 1
    evaluate_every: int = 1
    # With several processes: batch norm over the whole batch, as one process has it. False, over the images
    # of each process, is faster and another training.
    sync_batch_norm: bool = True
    deterministic: bool = False  # on a GPU: the same bits each time, slower; a CPU always repeats

    def __post_init__(self):
        for name, low, high in (
            ("epochs", 0, 100_000),
            ("batch_size", 1, 65_536),
            ("lr", 0, 100),
            ("gamma", 0, 1),
            ("warmup_epochs", 0, 100_000),
            ("warmup_lr", 0, 100),
            ("final_lr", 0, 100),
            ("momentum", 0, 1),
            ("weight_decay", 0, 1),
            ("label_smoothing", 0, 1),
            ("erase_probability", 0, 1),
            ("cutmix_probability", 0, 1),
            ("ramp_epochs", 0, 100_000),
            ("checkpoint_every", 1, 100_000),
            ("evaluate_every", 1, 100_000),
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise StudyError(f"{name} {value!r} is outside {low} .. {high}; correct it in the profile")
        for size in self.image_sizes:
            if not 8 <= size <= IMAGE_SIZE:
                raise StudyError(
                    f"image_sizes holds {size}, outside 8 .. {IMAGE_SIZE}; correct it in the profile"
                )
        for name, choices in (
            ("schedule", SCHEDULES),
            ("consistency", CONSISTENCY),
            ("opt_level", OPT_LEVELS),
            ("pruner", PRUNERS),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise StudyError(f"{name} {value!r} is unknown; {closest(value, choices)}")
        if self.cycle_epochs is not None and self.cycle_epochs < 1:
            raise StudyError(f"cycle_epochs {self.cycle_epochs} is not 1 or more; correct it in the profile")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise StudyError(f"alpha {self.alpha!r} is not a number >= 0; 0.67749 is the published threshold")
        if not 0 <= self.alpha_start <= self.alpha_end:
            raise StudyError(f"alpha_start {self.alpha_start} is not in 0 .. alpha_end {self.alpha_end}")


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
    expect: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self):
        if not 0 <= self.seed < 2**63:
            raise StudyError(f"seed {self.seed} is outside 0 .. {2**63 - 1}; choose another")
        for name, choices in (("variant", VARIANTS), ("weights", WEIGHTS)):
            value = getattr(self.network, name)
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
    try:
        tree = yaml.load(path.read_text(), _Loader)
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise StudyError(f"{path} is not readable YAML ({str(error).splitlines()[0]}); correct it") from error
    tree = _mapping(tree, str(path))
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
        for part in reversed(key.split(".")):
            value = {part: value}
        tree = _merge(tree, value)
    if data is not None or limit is not None or not _is_own_data(tree):
        tree["expect"] = {}
    return _build(Profile, tree, where="")


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
