"""Coverage-guided fuzzing of what reads files of strangers: ``make fuzz SECONDS=600``.

    python tests/fuzz/fuzz.py [READER ...] [--seconds 600]

needs atheris (``pip install atheris``), which the study itself does not. Each reader starts from small valid
files. An input is the parts of a file, ``SEP`` between them, and is put together with right lengths, digests
and checksums, so that bytes reach what stands behind those; an input without parts is a file as it is.
A finding is what :func:`faults.verdict` calls neither refused nor read (a traceback, a message that is not
one line, more than 20 seconds of computing), and a process that takes more than 2 GiB or ends by itself.
Findings and what was learnt lie in build/fuzz/READER/ and are where the next run begins.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "fuzz"
SEP = b"\n~~~~\n"
LONGEST = {"yaml": 2**9}  # bytes of an input; else
LONG = 2**16
SECONDS = 600
AT_ONCE = 2


# --- files from parts, and parts from files ---------------------------------------------------------------


def packed_parts(content: bytes) -> list[bytes]:
    header, data = header_and_data(content)
    inner = header.pop("__metadata__")["packed"]
    return [inner.encode(), json.dumps(header).encode(), data]


def packed_file(inner: bytes, streams: bytes, data: bytes) -> bytes:
    from msunet_core.measure import packed_format

    told = json.dumps(inner.decode(errors="replace")).encode()
    header = packed_format.HEAD + b"0" * 32 + b'","packed":' + told + b"}," + streams[1:]
    content = bytearray(len(header).to_bytes(8, "little") + header + data)
    content[packed_format.DIGEST_AT] = packed_format.digest_of(bytes(content))
    return bytes(content)


def own_parts(content: bytes) -> list[bytes]:
    header, data = header_and_data(content)
    text = header.pop("__metadata__")["study"]
    return [b"own", text.encode(), json.dumps(header).encode(), data]


def own_file(text: bytes, tensors: bytes, data: bytes) -> bytes:
    import safetensors.torch

    from msunet_core.model.checkpoint import digest_of

    said = text.decode(errors="replace")

    def whole(digest: str) -> bytes:
        told = json.dumps({"study": said, "digest": digest})
        header = b'{"__metadata__":' + told.encode() + b"," + tensors[1:]
        return len(header).to_bytes(8, "little") + header + data

    try:
        return whole(digest_of(said, safetensors.torch.load(whole(""))))
    except Exception:  # no tensors, no digest of them
        return whole("")


def published_parts(content: bytes) -> list[bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    stored = [names[name] for name in sorted(names) if name.startswith("data/")]
    return [b"zip", names["data.pkl"], *stored]


def published_file(pickle: bytes, *stored: bytes) -> bytes:
    members = {"data.pkl": pickle, "version": b"3\n", "byteorder": b"little", ".data/serialization_id": b"1"}
    return zipped(
        {f"a/{name}": m for name, m in (members | {f"data/{i}": s for i, s in enumerate(stored)}).items()}
    )


def npz_parts(content: bytes) -> list[bytes]:
    parts = []
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in archive.namelist():
            member = archive.read(name)
            end = 10 + int.from_bytes(member[8:10], "little")
            parts += [name.encode(), member[10:end], member[end:]]
    return parts


def npz_file(*parts: bytes) -> bytes:
    members = {}
    for name, header, data in zip(*[iter(parts)] * 3, strict=False):
        magic = b"\x93NUMPY\x01\x00" + (len(header) % 2**16).to_bytes(2, "little")
        members[name.decode("ascii", "replace")] = magic + header + data
    return zipped(members)


def header_and_data(content: bytes) -> tuple[dict, bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def zipped(members: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, member in members.items():
            archive.writestr(zipfile.ZipInfo(name), member)
    return content.getvalue()


def file_of(reader: str, source: bytes) -> bytes:
    """The file that an input stands for."""
    parts = source.split(SEP)
    if reader == "packed" and len(parts) == 3:
        return packed_file(*parts)
    if reader == "checkpoint" and parts[0] == b"own" and len(parts) == 4:
        return own_file(*parts[1:])
    if reader == "checkpoint" and parts[0] == b"zip" and len(parts) > 1:
        return published_file(*parts[1:])
    if reader == "npz" and len(parts) > 2:
        return npz_file(*parts)
    return source


# --- small valid files ------------------------------------------------------------------------------------


def seeds(reader: str, folder: Path) -> list[bytes]:
    """Inputs to begin with."""
    import argparse as a_module_of_namespaces

    import torch

    from msunet_core import ImageData, build_msunet, pack
    from msunet_core.data.sources import save_npz
    from msunet_core.model.checkpoint import save_checkpoint

    path, found = folder / "seed.safetensors", []
    torch.manual_seed(0)
    if reader == "packed":
        for changes in ({}, {"variant": "v2"}, {"weights": "binary"}, {"weights": "float"}):
            for merge in (True, False):
                pack(
                    build_msunet(**{"variant": "v3", "num_classes": 2, "width": 0.01} | changes),
                    path,
                    merge=merge,
                )
                found.append(SEP.join(packed_parts(path.read_bytes())))
    elif reader == "checkpoint":
        model = build_msunet("v3", num_classes=2, width=0.01)
        state = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
        rows = [{"epoch": 0, "loss": 0.5}]
        info = {
            "epoch": 1,
            "step": 0,
            "network": model.config,
            "history": rows,
            "layers": [],
            "losses": [0.5],
        }
        save_checkpoint(path, state, {**info, "identity": {"seed": 0}, "stage": "train", "opt_level": "O2"})
        found.append(SEP.join(own_parts(path.read_bytes())))
        content = {
            "epoch": 3,
            "arch": "msunet",
            "metric": 80.1,
            "args": a_module_of_namespaces.Namespace(lr=0.1),
        }
        content["state_dict"] = {
            "conv_stem.weight": torch.zeros(2, 3),
            "classifier.bias": torch.zeros(2).half(),
        }
        content["optimizer"] = {"state": {0: {"momentum_buffer": torch.nn.Parameter(torch.zeros(2))}}}
        for new in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=new)
            raw = path.read_bytes()
            found += [raw, SEP.join(published_parts(raw))] if new else [raw]
    elif reader == "npz":
        pictures, labels = torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.arange(2)
        save_npz(ImageData(pictures, labels, pictures, labels, class_names=("a", "bé"), source="seed"), path)
        found = [path.read_bytes(), SEP.join(npz_parts(path.read_bytes()))]
    else:
        profiles = sorted((ROOT / "msunet_core/study/profiles").glob("*.yaml"))
        found = [profile.read_bytes() for profile in profiles]
        found += [
            b"3",
            b"[1, 2]",
            b"{a: 1}",
            b"&a {x: *a}",
            b"<<: {a: 1}",
            b"!!int '3'",
            b"2020-01-01",
            b"0x1F",
        ]
    return found


# --- one reader -------------------------------------------------------------------------------------------


def fuzz(reader: str, seconds: int) -> None:
    """In a process of its own; libFuzzer ends it."""
    import atheris

    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch
    import torch._weights_only_unpickler as unpickler

    include = ["msunet_core", "yaml", "zipfile", "pickletools", "numpy.lib._format_impl"]
    for name in [
        n for n in sys.modules if n.startswith(("yaml", "zipfile", "pickletools", "numpy.lib._format_impl"))
    ]:
        if not name.startswith("numpy"):
            del sys.modules[name]
    with atheris.instrument_imports(include=include):
        import faults

        from msunet_core import load_checkpoint, load_profile
        from msunet_core.data.sources import load_data
        from msunet_core.measure.packed_reader import Reader
        from msunet_core.measure.unpack import network_of
        from msunet_core.study.profile import _parsed
    atheris.instrument_func(unpickler.Unpickler.load)
    torch.set_num_threads(1)

    def packed(path: Path) -> dict:
        return network_of(Reader(path).read()).state_dict()

    def own_or_published(path: Path) -> dict:
        return load_checkpoint(path)[0].state_dict()

    def npz(path: Path) -> dict:
        return {"x": load_data(path).train_images}

    def yaml(path: Path) -> dict:
        with contextlib.suppress(faults.StudyError):  # the value of an override, which is of any kind
            _parsed(path.read_bytes().decode(errors="replace"), "override")
        load_profile(str(path))
        return {}

    load = {"packed": packed, "checkpoint": own_or_published, "npz": npz, "yaml": yaml}[reader]
    folder, scratch = BUILD / reader, Path(tempfile.mkdtemp(prefix="fuzz-"))
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds(reader, scratch)):
        (corpus / f"seed-{number}").write_bytes(seed)
        outcome = verdict_of(faults, load, reader, seed, scratch)
        print(f"seed {number}: {len(seed)} bytes, {outcome}", flush=True)
    found: set[str] = set()

    def one(source: bytes) -> None:
        outcome = verdict_of(faults, load, reader, source, scratch)
        kind = re.sub(r"\d+", "0", outcome)[:120]
        if outcome not in ("refused", "other", "same") and kind not in found:
            found.add(kind)
            name = folder / f"finding-{len(found)}"
            name.write_bytes(file_of(reader, source))
            print(f"FINDING {outcome[:300]!r} in {name.relative_to(ROOT)}", flush=True)

    suffix = [
        f"-max_total_time={seconds}",
        f"-max_len={LONGEST.get(reader, LONG)}",
        "-timeout=0",
        "-rss_limit_mb=2048",
    ]
    atheris.Setup(
        [
            sys.argv[0],
            str(corpus),
            *suffix,
            f"-artifact_prefix={folder}/",
            "-print_final_stats=1",
            "-len_control=0",
        ],
        one,
        enable_python_coverage=True,
    )
    atheris.Fuzz()


def verdict_of(faults, load: Callable, reader: str, source: bytes, scratch: Path) -> str:
    names = {"packed": "a.safetensors", "checkpoint": "a.pth.tar", "npz": "a.npz", "yaml": "a.yaml"}
    path = scratch / names[reader]
    path.write_bytes(file_of(reader, source))
    return faults.verdict(load, path, {})


# --- all of them ------------------------------------------------------------------------------------------

READERS = ("packed", "checkpoint", "npz", "yaml")


def in_a_process(reader: str, seconds: int) -> str:
    """Fuzz one reader; a line of the table."""
    folder = BUILD / reader
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "--one", reader, "--seconds", str(seconds)]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
        try:
            status = process.wait(2 * seconds + 900)
        except subprocess.TimeoutExpired:  # in C, where no clock rings
            process.kill()
            status = process.wait()
    text = (folder / "log.txt").read_text(errors="replace")
    runs = re.findall(r"stat::number_of_executed_units: *(\d+)", text) or re.findall(r"^#(\d+)", text, re.M)
    edges, corpus = (re.findall(rf"{name}: (\d+)", text) for name in ("cov", "corp"))
    memory = re.findall(r"stat::peak_rss_mb: *(\d+)", text)
    findings = len(re.findall("^FINDING", text, re.M)) + (status != 0)
    cells = [runs[-1:], edges[:1], edges[-1:], corpus[-1:], memory[-1:]]
    return "".join(f"{(cell or ['?'])[0]:>12}" for cell in cells) + f"{findings:>12}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"of {', '.join(READERS)}; all of them")
    parser.add_argument("--seconds", type=int, default=SECONDS, help=f"for each reader (default {SECONDS})")
    parser.add_argument("--one", choices=READERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        fuzz(arguments.one, arguments.seconds)
        return 0
    readers = arguments.readers or READERS
    if unknown := [reader for reader in readers if reader not in READERS]:
        parser.error(f"no reader {unknown[0]!r}; choose from {', '.join(READERS)}")
    if importlib.util.find_spec("atheris") is None:
        parser.error("this needs atheris: pip install atheris (3.0.0 on Python 3.11, else 3.1.0)")
    print(
        f"{'reader':12}"
        + "".join(
            f"{n:>12}" for n in ("executions", "edges first", "edges last", "corpus", "peak MiB", "findings")
        )
    )
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        for reader, line in zip(
            readers, pool.map(lambda r: in_a_process(r, arguments.seconds), readers), strict=True
        ):
            print(f"{reader:12}{line}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
