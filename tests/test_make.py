"""What a request of make's runs, and what it leaves alone. A stand-in notes which notebooks would run."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from msunet_core import StudyError
from msunet_core.data.sources import save_npz
from msunet_core.files import lock_folder
from msunet_core.study import make, runner, ship, shipped_page

ROOT = Path(__file__).parent.parent
NOTEBOOKS = list(make.NOTEBOOKS)
ALL = [*NOTEBOOKS, "pages"]
LOOK_AT_PRUNED = ["04_o3_validation", "05_scoring_walkthrough", "07_packed_network"]
MODULES = [
    "__init__",
    "__main__",
    "data/sources",
    "model/network",
    "study/runner",
    "study/make",
]
MODULES += [name.removesuffix(".py") for name in make.SITE]


class Checkout:
    """A folder with a stand-in for each file that a request looks at."""

    def __init__(self, folder: Path):
        self.folder, self.ran, self.fail, self.values = folder, [], None, {}
        for name in ("smoke", "quick"):
            self.write(f"msunet_core/study/profiles/{name}.yaml", "data: {source: synthetic}")
        for name in MODULES:
            self.write(f"msunet_core/{name}.py", "x = 1  # one\n")
        for name in NOTEBOOKS:
            self.edit(name, "study()")

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def edit(self, notebook: str, source: str, **metadata) -> None:
        content = new_notebook(cells=[new_code_cell(source, id="a")], metadata=metadata)
        self.write(f"notebooks/{notebook}.ipynb", nbformat.writes(content))

    def run_notebook(self, notebook: Path, output: Path, parameters) -> None:
        if notebook.stem == self.fail:
            raise StudyError(f"{notebook.stem}: cell 7 failed")
        self.ran.append(notebook.stem)
        self.values[notebook.stem] = dict(parameters)
        output.write_text(notebook.read_text())

    def render(self, request) -> None:
        self.ran.append("pages")
        (request.folder / "site").mkdir(exist_ok=True)
        (request.folder / "site/index.html").touch()

    def make(self, target: str = "reproduce", **given: str) -> list[str]:
        """What ran."""
        self.ran = []
        make.run(target, make.Request(given, target))
        return self.ran


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    made = Checkout(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MSUNET_RUNS", raising=False)
    monkeypatch.setenv("MAKEFLAGS", "")
    monkeypatch.setenv("MSUNET_COMMAND", "")
    monkeypatch.setattr(make, "ROOT", tmp_path)
    monkeypatch.setattr(make, "PACKAGE", tmp_path / "msunet_core")
    monkeypatch.setattr(make, "PROFILES", tmp_path / "msunet_core/study/profiles")
    monkeypatch.setattr(make, "SHIPPED", tmp_path / "runs/pretrained/msunet_v3.safetensors")
    monkeypatch.setattr(make, "run_notebook", made.run_notebook)
    monkeypatch.setattr(make, "render", made.render)
    return made


@pytest.fixture
def done(checkout):
    """A checkout after one whole run."""
    assert checkout.make() == ALL
    return checkout


@pytest.fixture
def npz(images, checkout):
    path = checkout.folder / "it's $(here) 100%.npz"
    save_npz(images, path)
    return path


def test_the_first_run_runs_everything_in_the_order_of_what_needs_what(checkout):
    assert checkout.make() == ALL
    place = NOTEBOOKS.index
    assert all(place(earlier) < place(name) for name, needs in make.NOTEBOOKS.items() for earlier in needs)


def test_every_notebook_of_the_repository_is_run():
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == sorted(NOTEBOOKS)


def test_a_second_run_runs_nothing(done):
    assert done.make() == []


@pytest.mark.parametrize(
    ("edited", "reruns"),
    [
        ("05_scoring_walkthrough", ["05_scoring_walkthrough", "pages"]),
        ("01_data_and_cutmix", ["01_data_and_cutmix", "pages"]),
        ("03_fp16_pruning", ["03_fp16_pruning", *LOOK_AT_PRUNED, "pages"]),
        ("02_ternary_training", [*NOTEBOOKS[1:3], *LOOK_AT_PRUNED, "pages"]),
        ("msunet_core/model/network.py", ALL),
        ("msunet_core/study/profiles/smoke.yaml", ALL),
        ("msunet_core/study/report.py", ["pages"]),
        ("msunet_core/study/claims.py", ["pages"]),
        ("docs/index.md", ["pages"]),
        ("docs/_static/study.css", ["pages"]),
        ("msunet_core/study/profiles/quick.yaml", []),
        ("msunet_core/study/runner.py", []),
        ("msunet_core/__main__.py", []),
        ("README.md", []),
    ],
)
def test_an_edit_reruns_what_depends_on_it_and_nothing_else(done, edited, reruns):
    if edited in NOTEBOOKS:
        done.edit(edited, "edited()")
    else:
        done.write(edited, "x: {}" if edited.endswith(".yaml") else "x = 2\n")
    assert done.make() == reruns
    assert done.make() == []


def test_times_comments_and_what_jupyter_writes_on_opening_rerun_nothing(done):
    for path in done.folder.rglob("*"):
        os.utime(path)
    for name in MODULES:
        done.write(f"msunet_core/{name}.py", '"""Of one."""\n\nx  =  1   # another comment\n')
    for folder in ("notebooks", "runs/smoke"):
        for name in NOTEBOOKS:
            path = done.folder / folder / f"{name}.ipynb"
            content = nbformat.read(path, 4)
            content.metadata["language_info"] = {"name": "python", "version": "3.13.1"}
            content.metadata["kernelspec"] = {"display_name": "Python 3 (ipykernel)", "name": "python3"}
            nbformat.write(content, path)
    assert done.make() == []


def test_a_comment_in_a_profile_or_grid_reruns_nothing_and_what_it_says_reruns_all(done):
    grid, profile = "msunet_core/study/ablations.yaml", "msunet_core/study/profiles/smoke.yaml"
    done.write(profile, "# why\ndata:\n  source: synthetic\n")
    assert done.make() == []
    done.write(grid, "factors: {x: {y: {}}}")
    assert done.make() == ALL
    done.write(grid, "factors:\n  x: # why\n    y: {}\n")
    assert done.make() == []
    done.write(grid, "factors:\n  x: {}\n  y: {}\n")
    assert done.make() == ALL


def test_what_make_is_given_and_nothing_else_of_the_environment_is_recorded(monkeypatch):
    asked = []
    monkeypatch.setattr(make, "run", lambda target, request: asked.append(request.command) or 0)
    given = {"SEED": "7", "PROFILE": "/home/me/my.yaml", "TOKEN": "secret", "GIVEN": "SEED"}
    for name, value in given.items():
        monkeypatch.setenv(f"STUDY_{name}", value)
    monkeypatch.setenv("STUDY_GOALS", "")
    assert make.main(["reproduce"]) == 0
    assert asked == ["make reproduce PROFILE=my.yaml SEED=7"]


def test_a_dry_run_says_what_would_run_and_does_nothing(done, monkeypatch, capsys):
    done.edit("03_fp16_pruning", "edited()")
    for flags, status in (("n", 0), ("q", 1), ("nk -- DATA=x", 0)):
        monkeypatch.setenv("MAKEFLAGS", flags)
        done.ran = []
        with lock_folder(done.folder / "runs/smoke"):
            assert make.run("reproduce", make.Request({}, "reproduce")) == status
        assert done.ran == []
        said = capsys.readouterr().out.splitlines()
        assert [line.split(":")[0] for line in said] == ["03_fp16_pruning", *LOOK_AT_PRUNED, "the pages"]
        assert said[0] == "03_fp16_pruning: notebooks/03_fp16_pruning.ipynb changed"
    monkeypatch.setenv("MAKEFLAGS", " -- RUN=n")
    assert done.make() == ["03_fp16_pruning", *LOOK_AT_PRUNED, "pages"]


@pytest.mark.parametrize(
    "given", [{"SEED": "1"}, {"DEVICE": "cpu"}, {"LIMIT": "3"}, {"VARIANT": "v1"}, {"SET": "train.epochs=3"}]
)
def test_a_changed_parameter_reruns_all_and_the_same_again_nothing(done, given):
    assert done.make(**given) == ALL
    assert done.make(**given) == []
    assert done.make() == ALL


def test_changed_images_rerun_all_and_touched_ones_nothing(checkout, npz, images):
    assert checkout.make(DATA=str(npz)) == ALL
    os.utime(npz)
    assert checkout.make(DATA=str(npz)) == []
    images.train_images[0] ^= 1
    save_npz(images, npz)
    assert checkout.make(DATA=str(npz)) == ALL


def write_pngs(folder: Path, *names: str) -> None:
    from PIL import Image

    for split in ("train", "test"):
        for name in names:
            (folder / split / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32)).save(folder / split / name)


@pytest.mark.parametrize("name", ["9" * 5000, "~no such person/images.npz"])
def test_a_name_of_data_that_can_be_no_file_has_a_digest_and_is_refused_later(name):
    assert make.data_digest(name) == ""


def test_an_image_more_in_a_class_folder_reruns_all_whatever_the_class_is_called(checkout):
    folder = checkout.folder / "images"
    write_pngs(
        folder, "a$(touch pwned)b/1.png", "x`touch pwned`/1.png", ">x/1.png", "cat;touch pwned;#/1.png"
    )
    assert checkout.make(DATA="./images") == ALL
    (folder / "train" / ">x" / "Thumbs.db").touch()  # what systems and editors leave is not read
    (folder / "train" / ">x" / ".#1.png").symlink_to("gone")
    assert checkout.make(DATA="./images") == []
    write_pngs(folder, ">x/2.png")
    assert checkout.make(DATA="./images") == ALL
    assert not (checkout.folder / "pwned").exists()


def test_other_committed_results_rerun_what_may_look_at_them(checkout):
    for name in ("pretrained/msunet_v3.safetensors", "record/history.csv", "ablations/evidence.csv"):
        checkout.write(f"runs/{name}", "one")
    assert checkout.make() == ALL
    checkout.write("runs/pretrained/msunet_v3.safetensors", "other")
    assert checkout.make() == [NOTEBOOKS[0], *LOOK_AT_PRUNED, "pages"]
    checkout.write("runs/record/history.csv", "other")
    assert NOTEBOOKS[1] in (ran := checkout.make()) and not {NOTEBOOKS[0], NOTEBOOKS[5]} & set(ran)
    checkout.write("runs/ablations/evidence.csv", "other")
    assert checkout.make() == [NOTEBOOKS[5], "pages"]
    checkout.write("runs/ablations/smoke.csv", "a trial of somebody's own")
    assert checkout.make() == []


def test_a_run_is_named_after_its_profile_and_leaves_the_others_alone(done):
    assert done.make(PROFILE="quick", DATA="synthetic") == ALL
    assert (done.folder / "runs/quick/site/index.html").exists()
    assert done.make(RUN="again") == ALL
    assert done.make() == []


def test_runs_go_where_the_environment_says(checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("MSUNET_RUNS", str(tmp_path / "big disk's"))
    assert checkout.make() == ALL
    assert (tmp_path / "big disk's/smoke/site/index.html").exists()
    assert not (checkout.folder / "runs").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"PROFILE": "smok"}, "did you mean 'smoke'"),
        ({"VARIANT": "v9"}, "'v9'"),
        ({"SET": "train.epoch=3"}, "did you mean 'epochs'"),
        ({"SET": "train.epochs"}, "train.epochs=3"),
        ({"SET": "name=mine"}, "a profile has the name of its file"),
        ({"SET": "network.width=0"}, "width 0.0 is outside"),
        ({"LIMIT": "0"}, "data.limit 0 keeps no image"),
        ({"SEED": "one"}, "SEED='one' is not a whole number"),
        ({"DEVICE": "nothing"}, "device 'nothing'"),
        ({"DATA": "./gone.npz"}, "no such file"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_notebook_and_leaves_a_run_as_it_is(done, given, said):
    with pytest.raises(StudyError, match=re.escape(said)):
        done.make(RUN="smoke", **given)
    assert done.ran == []
    assert done.make() == []


@pytest.mark.parametrize("name", ["a/b", "..", "a b", "$(touch x)", "-rf", ".hidden", "a\nb", "record"])
def test_a_run_name_that_is_no_folder_name_is_refused(done, name):
    with pytest.raises(StudyError, match=r"give another, RUN=|choose another name"):
        done.make(RUN=name)
    assert done.ran == []


def test_a_failing_notebook_stops_the_run_which_then_goes_on_where_it_stopped(checkout):
    checkout.fail = "03_fp16_pruning"
    with pytest.raises(StudyError, match="03_fp16_pruning: cell 7 failed"):
        checkout.make()
    assert checkout.ran == NOTEBOOKS[:2]
    checkout.fail = None
    assert checkout.make() == ALL[2:]


def test_parts_of_the_study_run_what_they_need(checkout):
    assert checkout.make("prune") == NOTEBOOKS[1:3]
    assert checkout.make("train") == []
    assert checkout.make() == ["01_data_and_cutmix", *NOTEBOOKS[3:], "pages"]


def test_notebooks_get_their_parameters(checkout, npz):
    checkout.make("train", SEED="7", SET="train.epochs=3 prune.lr=1e-3", DATA=str(npz))
    assert checkout.values == {
        "02_ternary_training": {
            "PROFILE": "smoke",
            "RUN": "smoke",
            "DATA": str(npz),
            "SEED": "7",
            "OVERRIDES": "train.epochs=3 prune.lr=1e-3",
        }
    }
    assert os.environ["MSUNET_COMMAND"].startswith("make train SEED=7 ")


def test_a_record_of_what_was_made_that_is_of_no_use_makes_everything_anew(done):
    for text in ("", "[]", '{"01_data_and_cutmix": 3}', "[" * 100_000):
        done.write("runs/smoke/.made.json", text)
        assert done.make() == ALL
    (done.folder / "runs/smoke/.made.json").unlink()
    os.mkfifo(done.folder / "runs/smoke/.made.json")
    assert done.make() == ALL


def test_a_second_run_at_the_same_time_is_refused(checkout):
    with (
        lock_folder(checkout.folder / "runs/smoke", "make reproduce"),
        pytest.raises(StudyError, match=r"runs/smoke is in use by process \d+ since .* \(make reproduce\)"),
    ):
        checkout.make()


def test_what_a_request_leaves_out_is_used_by_no_notebook():
    """The other half of the test above: an edit of these files cannot change a notebook's outputs."""
    left_out = {Path(name).stem for name in make.NOT_USED}
    names, package = "|".join(left_out), ROOT / "msunet_core"
    for path in package.rglob("*.py"):
        if path.relative_to(package).as_posix() in make.NOT_USED:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                used = {*(node.module or "").split("."), *(alias.name for alias in node.names)}
                assert not (node.level and left_out & used), path
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        source = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")
        assert not re.search(rf"msunet_core[\w.]*(\.| import.*\b)({names})\b", source), path


# --- the command line by way of make ----------------------------------------------------------------------


def asked(target: str, **given: str) -> list[str]:
    return make.command_line(target, make.Request(given, target))


def test_score_validate_and_pack_ask_for_what_they_need():
    needed = ("validate", {}, "DATA"), ("pack", {}, "CHECKPOINT"), ("pack", {"CHECKPOINT": "a"}, "OUT")
    for target, given, missing in needed:
        with pytest.raises(StudyError, match=f"give {missing}="):
            make.Request(given, target).check_variables(target)
    assert asked("score") == ["score"]
    assert asked("ablations", OUT="own", JOBS="2") == ["ablations", "--jobs=2", "--out=own"]
    assert asked("validate", DATA="images.npz") == ["validate", "--data=images.npz"]
    assert asked("pack", CHECKPOINT="it's here", OUT="-b") == ["pack", "it's here", "./-b"]
    assert asked("pack", CHECKPOINT="a", OUT="b", VARIANT="v1", DATA="x.npz", LIMIT="3", DEVICE="cpu") == [
        "pack", "a", "b", "--variant=v1", "--data=x.npz", "--limit=3", "--device=cpu"
    ]  # fmt: skip
    assert asked("score", CHECKPOINT="a.pth.tar", VARIANT="v1", OPT_LEVEL="O3") == [
        "score", "a.pth.tar", "--variant=v1", "--opt-level=O3"
    ]  # fmt: skip


def test_what_is_refused_is_one_line_and_a_status(checkout, monkeypatch, capfd):
    monkeypatch.setenv("STUDY_DEVICE", "no\x1b[31m\nthing" + "x" * 500)
    assert make.main(["reproduce"]) == 1
    out, err = capfd.readouterr()
    assert out == "" and "device" in err and err.count("\n") == 1 and "\x1b" not in err and len(err) <= 301
    assert checkout.ran == []


def test_pages_that_were_interrupted_are_made_the_next_time(done, monkeypatch):
    done.edit("07_packed_network", "another()")

    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(make, "render", interrupted)
        with pytest.raises(KeyboardInterrupt):
            done.make()
    assert done.ran == ["07_packed_network"]
    assert done.make() == ["pages"]


def test_pages_follow_a_notebook_that_another_target_ran(done):
    done.edit("02_ternary_training", "another()")
    assert done.make("train") == ["02_ternary_training"]
    assert done.make()[-1] == "pages"


def test_an_interrupt_is_told_in_one_line(checkout, monkeypatch, capfd):
    def interrupted(*_):
        raise runner.Interrupted("01: interrupted")

    monkeypatch.setattr(make, "run_notebook", interrupted)
    assert make.main(["reproduce"]) == runner.INTERRUPTED
    assert capfd.readouterr().err.splitlines()[-1] == "01: interrupted; run the same command again to go on"


# --- what is shipped --------------------------------------------------------------------------------------


def finished_run(folder):
    for name in (*ship.COPIED, "train/metrics.json", "prune/metrics.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    log = "2026-11-24 14:17:31 train: epoch 0: lr 0.1, 90.5 s\n2026-11-24 14:19:00 train: resume\n"
    (folder / "train" / "log.txt").write_text(log + log.replace("epoch 0", "epoch 1").replace("90.5", "7.0"))
    files = {"DATA": "/home/somebody/images/cifar100.npz", "PROFILE": "/home/somebody/mine é.yaml"}
    told = {"command": "make prune", "profile": files["PROFILE"], "parameters": {**files, "SEED": 0}}
    (folder / "provenance.json").write_text(json.dumps(told))


def test_shipping_copies_the_evidence_of_a_run_and_no_path_of_the_machine(tmp_path):
    finished_run(tmp_path / "run")
    (tmp_path / "levels.csv").write_text("level\n")
    ship.ship(tmp_path / "run", [tmp_path / "levels.csv"], tmp_path / "shipped")
    shipped = tmp_path / "shipped"
    assert (shipped / "levels.csv").read_text() == "level\n"
    assert {n: (shipped / n).read_bytes().decode() for n in ship.COPIED.values()} == {
        name: source for source, name in ship.COPIED.items()
    }
    told = json.loads((shipped / "provenance.json").read_text())
    assert told == {
        "command": "make prune",
        "profile": "mine é.yaml",
        "parameters": {"DATA": "cifar100.npz", "PROFILE": "mine é.yaml", "SEED": 0},
        "epoch_seconds": {"train": [90.5, 7.0], "prune": []},
    }


def test_a_run_is_shipped_whole_into_the_folder_that_is_named_or_not_at_all(checkout, monkeypatch):
    finished_run(checkout.folder / "runs/cpu2h")
    asked = make.Request({"RUN": "cpu2h", "DATA": "d.npz", "OUT": "two"}, "pretrained")
    commands, fails = [], ["validate"]

    def done(command, check):
        commands.append(command[3:])
        Path(command[5] if command[3] == "pack" else command[6].removeprefix("--out=")).write_text(command[3])
        return subprocess.CompletedProcess(command, int(command[3] in fails))

    monkeypatch.setattr(make.subprocess, "run", done)
    monkeypatch.setattr(shipped_page, "save_budget", lambda path: commands.append(path))
    with lock_folder(checkout.folder / "runs/cpu2h"), pytest.raises(StudyError, match="is in use"):
        make.run("pretrained", asked)
    with pytest.raises(SystemExit):
        make.run("pretrained", asked)
    assert [command[0] for command in commands] == ["pack", "validate"] and not Path("two").exists()
    fails.clear()
    assert make.run("pretrained", asked) == 0
    (_, _, (pack, start, packed, *_), (validate, measured, data, *_), picture) = commands
    assert picture == checkout.folder / "runs/pretrained/budget.png"
    assert (pack, start, validate, data) == ("pack", "runs/cpu2h/prune", "validate", "--data=d.npz")
    assert packed == measured
    names = {*ship.COPIED.values(), "provenance.json", "levels.csv", "msunet_v3.safetensors"}
    assert {path.name for path in Path("two").iterdir()} == names
    assert (Path("two/levels.csv").read_text(), Path("two/msunet_v3.safetensors").read_text()) == (
        "validate",
        "pack",
    )
    assert not Path("runs/pretrained").exists()


@pytest.mark.parametrize(
    ("goals", "given", "said"),
    [
        (
            "score",
            {"RUN": "cpu2h"},
            "RUN=cpu2h is nothing that make score takes; give CHECKPOINT=runs/cpu2h/",
        ),
        ("train", {"PORT": "8899"}, "PORT=8899 is nothing that make train takes; leave it out"),
        ("reproduce", {"JOBS": "4"}, "JOBS=4 is nothing that make reproduce takes; leave it out"),
        (
            "ablations",
            {"SEED": "1"},
            "SEED=1 is nothing that make ablations takes; edit msunet_core/study/ablations.yaml",
        ),
        ("ablations", {"RUN": "a"}, "RUN=a is nothing that make ablations takes; give a folder, OUT="),
        ("train prune", {"OPT_LEVEL": "O3"}, "OPT_LEVEL=O3 is nothing that make train and prune takes"),
    ],
)
def test_a_variable_that_no_goal_takes_is_refused_instead_of_ignored(checkout, goals, given, said):
    with pytest.raises(StudyError, match=re.escape(said)):
        make.run(goals.split()[0], make.Request(given, goals))


def test_a_variable_that_one_of_several_goals_takes_is_let_through(checkout):
    assert "02_ternary_training" in checkout.make("train", SEED="3")
    make.Request({"DATA": "cifar100", "CHECKPOINT": "a"}, "reproduce validate").check_variables("validate")


def test_an_unknown_profile_is_refused_before_its_folder_is_made(checkout):
    with pytest.raises(StudyError, match="profile 'smok' is unknown"):
        checkout.make(PROFILE="smok")
    assert not Path("runs").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"git": {}}', '{"parameters": []}'])
def test_shipping_a_run_with_a_provenance_of_no_use_is_refused(tmp_path, content):
    finished_run(tmp_path / "run")
    (tmp_path / "run" / "provenance.json").write_text(content)
    with pytest.raises(
        StudyError, match=r"provenance\.json (is not JSON|was written by no run).*; run notebook 03 there"
    ):
        ship.ship(tmp_path / "run", [], tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()


def test_shipping_half_a_run_is_refused_and_copies_nothing(tmp_path):
    finished_run(tmp_path / "run")
    for name in ("prune/history.csv", "prune/metrics.json"):  # the latter of a stage that was stopped
        (tmp_path / "run" / name).unlink()
        with pytest.raises(StudyError, match=rf"has no {name}; run notebooks 02 and 03 there first"):
            ship.ship(tmp_path / "run", [], tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()
