"""What README says in numbers is what the committed files hold."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest

from msunet_core import score, unpack
from msunet_core.measure.unpack import SHIPPED
from msunet_core.model.ternary import layer_statistics
from msunet_core.study.ablations import read_results
from msunet_core.training.records import ran_away

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
STAGES = ("train", "prune")


# The networks that are shipped, by how their row in the table of results begins.
ROWS = {"| **ours": SHIPPED, "| ours, v3, `cpu2h`": SHIPPED.parent / "cpu2h" / SHIPPED.name}


@pytest.fixture(params=ROWS, ids=["shipped", "cpu2h"])
def row_and_file(request):
    """The cells of a row of ours in the table of results, and the file that it tells of."""
    (line,) = [line for line in README.splitlines() if line.startswith(request.param)]
    return [cell.strip() for cell in line.strip("|").split("|")], ROWS[request.param]


def test_a_row_of_results_is_its_file(row_and_file):
    row, path = row_and_file
    info = json.loads(read_metadata(path)["packed"])
    scored = score(unpack(path, "O0"), "O3")
    assert info["accuracy"]["images"] == 10_000
    assert row[1:8] == [
        f"{info['accuracy']['top1']:.2f} %",
        f"{info['accuracy']['top5']:.2f} %",
        f"{scored.params / 1e6:.5f} M",
        f"{scored.flops / 1e6:.2f} M",
        f"{scored.value:.5f}",
        f"{path.stat().st_size:,} bytes",
        f"{sum(len(pd.read_csv(path.with_name(f'{stage}_history.csv'))) for stage in STAGES)} epochs, no GPU",
    ]


def test_the_levels_of_a_network_are_those_of_its_file(row_and_file):
    row, path = row_and_file
    levels = pd.read_csv(path.with_name("levels.csv"), dtype=str).set_index("level")
    assert list(levels.index) == ["O0", "O2", "O3"] and set(levels["images"]) == {"10000"}
    o3 = levels.loc["O3"]
    assert [f"{o3['top1']} %", f"{o3['top5']} %", o3["score"]] == [row[1], row[2], row[5]]


def read_metadata(path: Path) -> dict:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


def test_readme_says_how_the_networks_were_made(row_and_file):
    _, path = row_and_file
    provenance = json.loads(path.with_name("provenance.json").read_text())
    info = json.loads(read_metadata(path)["packed"])["provenance"]
    assert info["commit"] == provenance["git"]["commit"]
    assert provenance["git"]["clean"]
    for said in (
        f"{sum(map(sum, provenance['epoch_seconds'].values())) / 3600:.1f} h of training",
        f"{provenance['hardware']['cores']} cores of {provenance['hardware']['cpu']}",
        f"seed {provenance['seed']}",
        f"PROFILE={provenance['profile']}",
    ):
        assert said in README


def test_readme_says_what_the_shipped_network_had_before_pruning():
    top1 = pd.read_csv(SHIPPED.with_name("train_history.csv"))["test_top1"].iloc[-1]
    assert f"the last 6 of which prune: {top1:.2f} % before them" in README


def test_the_zeros_that_readme_tells_are_those_of_notebook_05():
    page = (ROOT / "notebooks" / "05_scoring_walkthrough.ipynb").read_text()
    ((mean, ours),) = re.findall(
        r"(\d+)% would give the published operations, and the shipped network has (\d+)%", page
    )
    assert f"zeros: {ours} % of the multiplications in its ternary layers have a weight of 0" in README
    assert f"from the published operations one calculates {mean} %" in README


def test_the_example_prints_the_score_of_the_shipped_network():
    assert f'print(score(model, "O3").value)  # {score(unpack(SHIPPED, "O0"), "O3").value:.5f};' in README


def test_a_file_is_at_most_a_twentieth_larger_than_its_score_says(row_and_file):
    _, path = row_and_file
    scored = score(unpack(path, "O0"), "O3")
    assert path.stat().st_size <= 1.05 * 4 * scored.params


def test_no_ternary_layer_of_a_shipped_network_froze(row_and_file):
    _, path = row_and_file
    layers = layer_statistics(unpack(path, "O0"))
    assert len(layers) == 18
    # Two small layers of the shipped network have more zeros than the others (docs/stability.md).
    many = {"blocks.1.0.conv_pwl.1", "blocks.0.0.conv_pw"}
    assert all(0.35 <= layer["zeros"] <= (0.70 if layer["layer"] in many else 0.65) for layer in layers)
    assert all(layer["empty_channels"] <= 0.02 for layer in layers)
    assert not ran_away(pd.read_csv(path.with_name("train_layers.csv")).to_dict("records"))


def test_the_shipped_files_name_no_path_of_a_machine():
    for path in sorted(path for path in SHIPPED.parent.rglob("*") if path.is_file()):
        found = re.findall(rb"/(?:home|root|tmp|work|usr|opt)/[\w./-]*", path.read_bytes())
        assert not found or path.suffix == ".png", f"{path.name}: {found}"


def test_the_tables_of_speed_are_the_committed_measurement(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench

    report = json.loads((ROOT / "benchmarks" / "bench.json").read_text())
    told, tables = (ROOT / "docs" / "speed.md").read_text(), bench.markdown(report).strip().split("\n\n")
    assert len(tables) == 4  # training with what it was measured on, the packed v3 and v1
    assert not [table for table in tables if table not in told]


def test_the_tables_of_recipes_are_the_committed_measurements():
    page = (ROOT / "docs" / "recipes.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("| ") and "top-1" not in line]
    told = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    training, pruning = (read_results(ROOT / "runs" / "recipes", name).table for name in ("short", "pruning"))
    assert f"{pruning['mean'][0]:.1f} % before it is pruned" in page
    rows = pd.concat([table.iloc[1:].dropna(subset="mean") for table in (training, pruning)])
    assert told == [
        [row["choice"], row["value"], f"{row['mean']:.1f}", _points(row["difference"])]
        for _, row in rows.iterrows()
    ]


def test_what_averaging_changed_is_the_committed_measurement():
    told = (ROOT / "docs" / "recipes.md").read_text()
    found = pd.read_csv(ROOT / "runs" / "recipes" / "averaged.csv")
    top1 = found.pivot(index="seed", columns="averaged over", values="top1")
    assert len(top1) == 3
    last = top1.pop("last step")
    whole, half = (top1[name] - last for name in ("last epoch", "second half of the last epoch"))
    assert f"it cost {-whole.mean():.1f} points ({-whole.max():.1f} to {-whole.min():.1f} in three" in told
    assert f"it changed {half.mean():.1f} ({half.min():.1f} to {half.max():+.1f})".replace("-", "−") in told
    assert f"the three seeds had {last.min():.1f} to {last.max():.1f}" in told


def _points(difference: float) -> str:
    return "" if math.isnan(difference) else f"{difference:+.1f}"


def test_the_effects_are_those_of_the_evidence():
    table = read_results(ROOT / "runs" / "ablations", "evidence").table
    assert set(table["n"]) == {6} and len(table) == 30
    assert f"reaches {table['mean'][0]:.1f} % top-1" in README
    effects = table.set_index(["choice", "value"])
    told = dict(
        re.findall(r"^\| (.+) \| .+ \| ([+−]\d+\.\d\d(?: \(not resolved\))?) \|$", README, re.MULTILINE)
    )
    rows = {
        "float weights": ("weights", "float"),
        "binary weights": ("weights", "binary"),
        "α 0.3": ("alpha", "0.3"),
        "α 1.0": ("alpha", "1.0"),
        "α rising from 0, as the published one does": ("alpha", "ramped"),
        "gradient dL/dT": ("gradient", "dL/dT"),
        "CutMix": ("CutMix", "on"),
        "consistency as described": ("consistency", "as described"),
        "consistency as released": ("consistency", "as released"),
        "random erasing": ("random erasing", "on"),
        "squeeze-excitation pruned": ("pruner", "V1"),
        "depthwise weights pruned too": ("pruner", "V2"),
        "the classifier pruned as well": ("pruner", "V3"),
        "test at O3": ("opt level", "O3"),
        "v2's network": ("variant", "v2"),
    }
    effects["not resolved"] = effects["resolved"].map({True: "", False: " (not resolved)"})
    assert told == {
        words: f"{effects.loc[row, 'difference']:+.2f}{effects.loc[row, 'not resolved']}".replace("-", "−")
        for words, row in rows.items()
    }


def test_what_stability_tells_of_layers_that_ran_away_is_what_was_recorded():
    told = (ROOT / "docs" / "stability.md").read_text()
    counts = re.findall(r"^  \| (.+) \| (\d) \|$", told, re.MULTILINE)
    table = read_results(ROOT / "runs" / "ablations", "evidence").table.set_index(["choice", "value"])
    rows = {
        "baseline": ("baseline", "v3"),
        "α 0.3": ("alpha", "0.3"),
        "α ramped": ("alpha", "ramped"),
        "α 1.0": ("alpha", "1.0"),
        "binary": ("weights", "binary"),
        "dL/dT": ("gradient", "dL/dT"),
        "CutMix": ("CutMix", "on"),
        "CutMix, consistency as described": ("consistency", "as described"),
        "CutMix, consistency as released": ("consistency", "as released"),
        "random erasing": ("random erasing", "on"),
        "v1 and v2": ("variant", "v2"),
    }
    assert len(counts) == len(rows)
    for (words, count), (begin, row) in zip(counts, rows.items(), strict=True):
        assert words.startswith(begin) and int(count) == table.loc[row, "ran_away"], words
    decay = pd.read_csv(ROOT / "runs" / "recipes" / "decay_layers.csv")
    assert ran_away(decay.to_dict("records")) == {"blocks.1.0.conv_pw.0": 9}
    spread = decay.pivot(index="epochs", columns="layer", values="spread")
    shrunk = spread.loc[8] / spread.loc[0]
    assert f"between {shrunk.min():.2f} and {shrunk.max():.2f}" in told
    grown = (spread.loc[9] / spread.loc[8]).max()
    empty = decay[decay["epochs"] == 9]["empty_channels"].max()
    assert f"grew {grown:.0f}-fold, and {empty:.0%}".replace("%", " %") in told
    rising = pd.read_csv(ROOT / "runs" / "recipes" / "rising_layers.csv").query("epochs == 15")
    alpha = pd.read_csv(ROOT / "runs" / "recipes" / "rising_history.csv")["alpha"].iloc[14]
    told = told.replace("\n", " ")
    assert (
        f"at α = {alpha:.2f}, `{rising.iloc[0]['layer']}` had {100 * rising.iloc[0]['zeros']:.0f} %" in told
    )
    assert f"distributed weights have {100 * math.erf(alpha / math.sqrt(2)):.0f} %" in told
    for network, path in (
        ("two-hour network has", ROWS["| ours, v3, `cpu2h`"]),
        ("shipped one", SHIPPED),
    ):
        layers = pd.read_csv(path.with_name("train_layers.csv"))
        zeros = layers[layers["epochs"] == layers["epochs"].max()].set_index("layer")["zeros"]
        assert f"the {network} {100 * zeros.min():.0f} to {100 * zeros.max():.0f} %" in told
    for layer, share in zeros.sort_values().tail(2).items():
        assert f"`{layer}` {100 * share:.0f} %" in told
    assert "no layer has more than one empty output channel" in told
    weights = {name: len(value) for name, value in unpack(SHIPPED, "O0").named_parameters()}
    empty = layers["empty_channels"] * (layers["layer"] + ".weight").map(weights)
    assert empty.max() == pytest.approx(1)
    spread = layers.pivot(index="epochs", columns="layer", values="spread")
    of_first = spread / spread.loc[0]
    assert f"between {of_first.min().min():.2f} and {of_first.max().max():.2f} times its first value" in told
    runs = json.loads((ROOT / "runs" / "ablations" / "evidence_runs.json").read_text())
    trained = {name: run["ran_away"] > 0 for name, run in runs.items() if name.startswith("train-")}
    discrete = [away for name, away in trained.items() if "-float-" not in name]
    assert f"in {sum(discrete)} of the {len(discrete)} trainings with ternary or binary weights" in told
    assert f"In {sum(discrete)} of the {len(discrete)} trainings with ternary or binary weights" in README


def test_what_stability_tells_of_the_seeds_is_what_was_recorded():
    told = (ROOT / "docs" / "stability.md").read_text().replace("\n", " ")
    seeds = read_results(ROOT / "runs" / "ablations", "evidence").seeds
    trained = ("baseline", "gradient", "alpha", "CutMix", "consistency", "random erasing")
    costs = {}
    for row, of in seeds[seeds["choice"].isin(trained)].groupby(["choice", "value"], sort=False):
        away = of["ran_away"] > 0
        if 0 < away.sum() < len(of):
            costs[row] = of["top1"][~away].mean() - of["top1"][away].mean()
    assert f"up to {math.ceil(10 * max(costs.values())) / 10} points below" in told
    above = {row for row, cost in costs.items() if cost < 0}
    assert above == {
        ("CutMix", "on"),
        ("consistency", "off"),
        ("consistency", "as released"),
    }  # two rows, one twice
    by = seeds.set_index(["choice", "value"])
    baseline, other = by.loc["baseline", "v3"].set_index("seed"), by.loc["alpha", "0.3"].set_index("seed")
    (seed,) = baseline.index[baseline["ran_away"] == 0]
    assert f"α 0.3 is {other['top1'][seed] - baseline['top1'][seed]:.1f} points better" in told


def test_every_file_that_the_pages_link_exists():
    pages = [ROOT / "README.md", ROOT / "runs" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for page in pages:
        links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
        missing = [link for link in links if not (page.parent / link).exists()]
        assert not missing, f"{page.name} links {missing}"
