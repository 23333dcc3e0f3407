"""Profiles and overrides: the published recipes, and every wrong name or value refused by name."""

from __future__ import annotations

import dataclasses

import pytest

from msunet_core import StageConfig, StudyError, load_profile
from msunet_core.study.profile import Profile, profile_names


def refused(message, **arguments):
    with pytest.raises(StudyError) as caught:
        load_profile(**arguments)
    assert "\n" not in str(caught.value)
    assert message in str(caught.value), str(caught.value)


def test_the_profiles_of_the_study_can_all_be_read_for_all_variants():
    assert {"cpu", "cpu2h", "evidence", "paper", "quick", "smoke"} <= {*profile_names()}
    for name in profile_names():
        for variant in ("v1", "v2", "v3"):
            profile = load_profile(name, variant=variant)
            assert (profile.name, profile.network.variant) == (name, variant)


# Specification §6 and §7, by hand.
PUBLISHED_TRAINING = {
    **{"epochs": 910, "batch_size": 64, "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
    **{"schedule": "step", "warmup_epochs": 5, "warmup_lr": 1e-4, "gamma": 0.25},
    "milestones": (300, 400, 500, 600, 700, 800, 900),
    **{"alpha": None, "alpha_start": 20, "alpha_end": 400, "ternary_gradient": "kernel"},
    **{"augment": True, "erase_probability": 0.4, "image_sizes": ()},
    **{"cutmix_probability": 0.5, "cutmix_until": None, "consistency": "as-released", "label_smoothing": 0.0},
    **{"pruner": "none", "freeze_ternary": False, "opt_level": "O0"},
}
PUBLISHED_PRUNING = PUBLISHED_TRAINING | {
    **{"lr": 1e-3, "warmup_epochs": 0, "milestones": (120, 170, 200, 220, 250), "alpha": 0.67749},
    **{"pruner": "V2", "ramp_epochs": 100, "se_sparsity": 0.9, "freeze_ternary": True},
    **{"cutmix_until": 140, "opt_level": "O2"},
}
V1_PRUNING = {
    **{"epochs": 157, "batch_size": 192, "schedule": "cosine", "final_lr": 5e-4, "pruner": "V1"},
    **{"augment": False, "cutmix_probability": 0.0, "label_smoothing": 0.1, "opt_level": "O0"},
}


@pytest.mark.parametrize(
    ("variant", "training", "pruning"),
    [
        ("v1", {}, V1_PRUNING),
        ("v2", {}, {"epochs": 285}),
        ("v3", {"epochs": 1050, "milestones": tuple(range(300, 1001, 100))}, {"epochs": 270}),
    ],
)
def test_the_paper_profile_is_the_published_recipe(variant, training, pruning):
    profile = load_profile("paper", variant=variant)
    for stage, published in (
        (profile.train, PUBLISHED_TRAINING | training),
        (profile.prune, PUBLISHED_PRUNING | pruning),
    ):
        own = dataclasses.asdict(stage)
        assert {name: own[name] for name in published} == published
    assert (profile.network.width, profile.network.weights) == (1.0, "ternary")
    assert profile.data.source == "cifar100"


def test_choices_are_laid_over_the_profile():
    profile = load_profile(
        "smoke",
        variant="v1",
        data="pictures.npz",
        limit=7,
        seed=3,
        device="cpu",
        overrides="train.epochs=3 train.milestones=[1,2] prune.alpha=null train.lr=1e-3 data.limit=9",
    )
    assert (profile.network.variant, profile.seed, profile.device) == ("v1", 3, "cpu")
    assert (profile.data.source, profile.data.limit) == ("pictures.npz", 9)
    assert (profile.train.epochs, profile.train.milestones, profile.train.lr) == (3, (1, 2), 1e-3)
    assert profile.prune.alpha is None
    assert load_profile("smoke", overrides=["train.epochs=3"]).train.epochs == 3


def test_off_is_a_word_and_not_a_boolean():
    assert load_profile("smoke", overrides="train.consistency=off").train.consistency == "off"


def test_expected_bands_hold_for_the_profiles_own_data_alone(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("expect: {top1: [1, 2]}\n")
    assert load_profile(str(path)).expect == {"top1": [1.0, 2.0]}
    assert load_profile(str(path), data="other.npz").expect == {}
    assert load_profile(str(path), limit=3).expect == {}
    assert load_profile(str(path), seed=3).expect == {}
    assert load_profile(str(path), variant="v1").expect == {}
    assert load_profile(str(path), overrides="train.epochs=1").expect == {}
    assert load_profile(str(path), device="cpu").expect == {"top1": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "smok"},
            "profile 'smok' is unknown; did you mean 'smoke'? choose one of cpu, cpu2h, evidence, paper, ",
        ),
        ({"name": "missing.yaml"}, "profile 'missing.yaml' is unknown"),
        ({"variant": "v4"}, "variant 'v4' is unknown; choose one of v1, v2, v3"),
        ({"seed": -1}, "seed -1 is outside 0"),
        ({"seed": 2**80}, "outside 0"),
        ({"overrides": "train.epoch=3"}, "parameter train.epoch is unknown; did you mean 'epochs'?"),
        ({"overrides": "trian.epochs=3"}, "parameter trian is unknown; did you mean 'train'?"),
        ({"overrides": "train.epochs"}, "override 'train.epochs' has no '='"),
        ({"overrides": "=3"}, "parameter  is unknown"),
        ({"overrides": "train.epochs=[1"}, "is not readable YAML"),
        ({"overrides": "train.lr=2020-99-99"}, "is not readable YAML"),
        ({"overrides": "train=3"}, "train is 3, not a mapping"),
        ({"overrides": "train.epochs.more=3"}, "parameter train.epochs is {'more': 3}, not of type int"),
        ({"overrides": "train.epochs=3.5"}, "parameter train.epochs is 3.5, not of type int"),
        ({"overrides": "train.epochs=true"}, "parameter train.epochs is True, not of type int"),
        ({"overrides": "train.epochs=.inf"}, "parameter train.epochs is inf, not of type int"),
        ({"overrides": "train.epochs=-1"}, "epochs -1 is outside 0 .. 100000"),
        ({"overrides": "train.lr=.nan"}, "lr nan is outside"),
        ({"overrides": "train.lr=fast"}, "parameter train.lr is 'fast', not of type float"),
        ({"overrides": "train.warmup_lr=.inf"}, "warmup_lr inf is outside"),
        ({"overrides": "train.alpha=.nan"}, "alpha nan is not a number >= 0"),
        ({"overrides": "train.batch_size=0"}, "batch_size 0 is outside 1"),
        ({"overrides": "train.milestones=12"}, "parameter train.milestones is 12, not of type tuple"),
        ({"overrides": "train.milestones='12'"}, "parameter train.milestones is '12', not of type tuple"),
        ({"overrides": "train.augment=1"}, "parameter train.augment is 1, not of type bool"),
        ({"overrides": "train.schedule=steps"}, "schedule 'steps' is unknown; did you mean 'step'?"),
        ({"overrides": "train.consistency=on"}, "consistency 'on' is unknown"),
        ({"overrides": "train.consistency=as-describd"}, "did you mean 'as-described'?"),
        ({"overrides": "train.opt_level=O4"}, "opt_level 'O4' is unknown"),
        ({"overrides": "prune.pruner=V4"}, "pruner 'V4' is unknown"),
        ({"overrides": "network.weights=tern"}, "weights 'tern' is unknown; did you mean 'ternary'?"),
        ({"overrides": "train.alpha_start=500"}, "alpha_start 500 is not in 0 .. alpha_end"),
        ({"overrides": "data.source=null"}, "parameter data.source is None, not of type str"),
    ],
)
def test_a_wrong_name_or_value_is_refused_in_one_line(arguments, message):
    refused(message, **arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [", "is not readable YAML"),
        ("- 1\n- 2\n", "is [1, 2], not a mapping of fields"),
        ("network: 3\n", "network is 3, not a mapping"),
        ("data: synthetic\n", "data is 'synthetic', not a mapping"),
        ("variants: [v1]\n", "variants is ['v1'], not a mapping"),
        ("variants: {v3: 7}\n", "variants.v3 is 7, not a mapping"),
        ("seed: 2020-99-99\n", "is not readable YAML"),
        ("expect: {top1: 3}\n", "parameter expect is {'top1': 3}, not of type dict"),
        ("expect: 3\n", "parameter expect is 3, not of type dict"),
        ("1: 2\n", "no text, number, list or mapping of names"),
    ],
)
def test_a_profile_file_that_does_not_fit_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    refused(message, name=str(path))


def test_bytes_that_are_not_text_are_refused_as_a_profile(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_bytes(bytes(range(128, 256)))
    refused("is not UTF-8 text", name=str(path))


@pytest.mark.parametrize("text", ["", "network:\ndata:\nvariants:\n"])
def test_an_empty_profile_is_the_default_one(tmp_path, text):
    path = tmp_path / "empty.yaml"
    path.write_text(text)
    assert load_profile(str(path)) == dataclasses.replace(Profile(), name="empty")


def test_a_configuration_cannot_be_changed_behind_a_runs_back():
    with pytest.raises(dataclasses.FrozenInstanceError):
        StageConfig().lr = 1.0


@pytest.mark.parametrize(
    "text",
    [
        "!!timestamp x", "!!int ''", "!!float ''", "!!bool x", "!!binary é", "!!binary YQ==", "!!set {a, b}",
        "!!omap [a: 1]", "!!pairs [a: 1]", "!!python/object/apply:os.system ['touch pwned']", "!unknown x",
        "2020-01-01", "9" * 5000, "0x" + "f" * 5000, "1:" * 3000 + "1", "[" * 5000, "{" * 5000, "- " * 3000,
        "&a {x: *a}", "&a [*a]", "*a", "{a: 1, a: 2}", "{? [1]: 2}", "{? {}: 2}", "{<<: [{a: 1}, {b: 2}]}",
        "{<<: 3}", "=", "~: 1", "a: b: c", "\t", "'", "%", "x" * 70_000, "{1: 2}", "\0", "\ud800", ".nan",
        "-.inf", "[1, 2", "!!str [a]", "!!map [a]", "!!seq {}", "&", "? ", "- - - - - - - - - - - x",
        "{null: 1}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["{}", "seed: {}", "train: {}", "train:\n  milestones: {}", "variants: {}"])
def test_no_value_of_yaml_is_a_traceback_or_more_than_a_line(tmp_path, text, place):
    path = tmp_path / "own.yaml"
    path.write_bytes(place.replace("{}", text).encode(errors="surrogatepass"))
    for arguments in ({"name": str(path)}, {"overrides": [f"seed={text}"]}, {"overrides": [f"{text}=3"]}):
        try:
            profile = load_profile(**arguments)
        except StudyError as error:
            assert len(str(error)) <= 300 and str(error).isprintable()
        else:
            assert profile.seed in (0, 1, 2)


def test_an_alias_is_a_value_and_a_bomb_of_them_is_refused(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("train: &a {epochs: 7, lr: 0.2}\nprune: {<<: *a, lr: 0.1}")
    profile = load_profile(str(path))
    assert (profile.prune.epochs, profile.prune.lr, profile.train.lr) == (7, 0.1, 0.2)
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    path.write_text("\n".join(["a0: &a0 [x]", *levels]))
    refused("more than 5000 values", name=str(path))
    merges = [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 30)]
    path.write_text("\n".join(["a0: &a0 {x: 1}", *merges]))
    refused("merges (<<)", name=str(path))


@pytest.mark.parametrize("kind", ["twice", "again in an override"])
def test_a_name_that_is_given_twice_is_refused(tmp_path, kind):
    path = tmp_path / "own.yaml"
    path.write_text("train: {epochs: 3, epochs: 4}" if kind == "twice" else "seed: 1")
    if kind == "twice":
        refused("it has 'epochs' twice", name=str(path))
    else:
        refused("it has 'epochs' twice", overrides=["train={epochs: 3, epochs: 4}"])


def test_the_largest_seed_that_is_promised_is_taken():
    assert load_profile(seed=2**63 - 1).seed == 2**63 - 1
    assert load_profile(overrides=[f"seed={2**63 - 1}"]).seed == 2**63 - 1
    refused("seed 9223372036854775808 is outside", seed=2**63)


@pytest.mark.parametrize("name", sorted({*profile_names()} - {"evidence"}))
def test_the_ablations_that_a_notebook_runs_are_short_in_every_profile(name):
    """Notebook 06 runs 18 trainings; at the budget of `paper` they would take months."""
    profile = load_profile(name)
    images = profile.ablation.epochs * 100 * (profile.ablation_limit or 500)
    assert images <= 5_000 and profile.ablation_width <= 0.25


def test_what_a_profile_does_not_say_of_its_ablations_is_short(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("ablation: {epochs: 7}\nablation_limit: null\n")
    profile = load_profile(str(own), overrides="ablation.lr=0.3")
    assert (profile.ablation.epochs, profile.ablation.lr, profile.ablation.schedule) == (7, 0.3, "one-cycle")
    assert (profile.ablation_width, profile.ablation_limit) == (0.25, None)
