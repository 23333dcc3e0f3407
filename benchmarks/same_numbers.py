"""Does this checkout compute the same numbers as another one? If so, its committed results stay valid.

    python benchmarks/same_numbers.py ../before --data cifar100
    python benchmarks/same_numbers.py ../before --data cifar100 --carry runs/ablations/evidence

Every row of the ablations is trained, shortened (a few images, two epochs, one seed), by the code of both
checkouts on this machine: two minutes on two cores. Where all tests and curves are the same to the digit,
``--carry`` writes the digest of this checkout's code where ``*_runs.json`` and ``*_provenance.json`` have
that of the other. Nothing else of a result changes: its commit stays that of the code which computed it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
SHORT = (
    "ablation_limit=8",
    "ablation.epochs=2",
    "ablation.warmup_epochs=1",
    "ablation.image_sizes=[16,24]",
    "ablation.evaluate_every=1",
)


def results_of(checkout: Path, data: str, out: Path) -> dict[str, dict]:
    """What the shortened grid comes to by a checkout's code, by the words of each run."""
    grid = out / "grid.yaml"
    whole = (checkout / "msunet_core" / "study" / "ablations.yaml").read_text().splitlines()
    grid.write_text("\n".join("seeds: [0]" if line.startswith("seeds:") else line for line in whole))
    command = [sys.executable, "-m", "msunet_core", "ablations", "--profile", "evidence", "--grid", str(grid)]
    command += ["--data", data, "--jobs", "2", "--out", str(out), "--set", *SHORT]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    subprocess.run(command, cwd=checkout, env=environment, check=True)
    runs = json.loads((out / "evidence_runs.json").read_text())
    return {name.partition("/")[0].rpartition("-")[0]: result for name, result in runs.items()}


def differing(ours: dict[str, dict], theirs: dict[str, dict]) -> list[str]:
    """Runs that only one has, or whose tests or curves are not the same to the digit."""

    def numbers(runs: dict[str, dict], name: str) -> list:
        return [runs[name][what] for what in ("tests", "curve")] if name in runs else []

    return [
        name for name in sorted(ours.keys() | theirs.keys()) if numbers(ours, name) != numbers(theirs, name)
    ]


def carry(results: str, before: str, now: str) -> int:
    """Put the digest ``now`` where the files of ``results`` have ``before``; how many lines had it."""
    count = 0
    for path in (Path(f"{results}_runs.json"), Path(f"{results}_provenance.json")):
        text = path.read_text()
        count += text.count(f'"code": "{before}"')
        path.write_text(text.replace(f'"code": "{before}"', f'"code": "{now}"'))
    return count


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, help="the checkout that computed the committed results")
    parser.add_argument("--data", required=True, help="cifar100, or an .npz of it")
    parser.add_argument(
        "--carry", nargs="*", default=[], metavar="RESULTS", help="as runs/ablations/evidence"
    )
    given = parser.parse_args(arguments)
    data = given.data if given.data == "cifar100" else str(Path(given.data).resolve())
    with tempfile.TemporaryDirectory() as scratch:
        found = []
        for number, checkout in enumerate((given.other.resolve(), HERE)):
            out = Path(scratch, str(number))
            out.mkdir()
            found.append(results_of(checkout, data, out))
    theirs, ours = found
    if odd := differing(ours, theirs):
        print(f"{len(odd)} of {len(ours)} runs differ: {', '.join(odd)}; compute the results anew")
        return 1
    (before,), (now,) = ({run["code"] for run in runs.values()} for runs in (theirs, ours))
    print(f"{len(ours)} runs, all the same to the digit; code {before} there, {now} here")
    for results in given.carry:
        print(f"{results}: {carry(results, before, now)} digests")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
