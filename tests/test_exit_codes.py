"""Exit codes: 2 in at most three lines for what the user can mend, 143 for SIGTERM, and output for every locale."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from small_models import liver_and_spleen
from training_runs import NAMES, write_recipe

from mome.atomic import check_output_folder
from mome.cli.exit_codes import describe
from mome.cli.main import main
from mome.errors import InputError, OutputError
from mome.printable import printable
from mome.processing import MoMEProcessor
from mome.spec import SpecError, brief, canonical, parse

DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    liver_and_spleen().save_pretrained(folder)
    MoMEProcessor(spacing=[4, 4, 4]).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    path = tmp_path / "scan.nii.gz"
    hu = np.random.default_rng(0).normal(0, 80, (12, 14, 10)).astype(np.int16)
    nib.save(nib.Nifti1Image(hu, np.diag([4.0, 4, 4, 1])), path)
    return path


def refused(capsys, words: str, *arguments: object, code: int = 2) -> str:
    """Runs a command that is refused in at most three lines which contain `words`; returns what it printed."""
    assert main([str(a) for a in arguments]) == code
    printed = capsys.readouterr().err
    lines = [line for line in printed.strip().splitlines() if not line.startswith(("caching", "note:"))]
    assert 1 <= len(lines) <= 3 and "Traceback" not in printed and "bug in mome" not in printed, printed
    assert words in " ".join(printed.split()), printed
    assert len(printed) < 2000
    return printed


# -- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--device", "meta", "'meta' cannot be used"),
        ("--device", "mps", "mps"),
        ("--device", "xla", "xla"),
        ("--device", "banana", "no such device"),
        ("--device", "cpu:-1", ""),
        ("--threads", "-1", "--threads is at least 0, got -1"),
        ("--threads", "100000", "--threads is at most"),
        ("--threads", "99999999999999999999", "--threads is at most"),
        ("--overlap", "nan", "overlap is from 0"),
    ],
)
def test_options_out_of_range(
    capsys, scan: Path, model_folder: str, tmp_path: Path, option: str, value: str, words: str
) -> None:
    if value == "mps":
        import torch

        if torch.backends.mps.is_available():
            pytest.skip("this machine has such a device")
    out = tmp_path / "out"
    refused(capsys, words, "segment", scan, "-p", "liver", "-m", model_folder, "-o", out, option, value)
    assert not out.exists()


def test_a_demo_that_cannot_be_written_is_found_first(capsys, tmp_path: Path, monkeypatch) -> None:
    def ran(*arguments: object) -> None:
        raise AssertionError("the demo began")

    monkeypatch.setattr("mome.inference.Segmenter.__init__", ran)
    (tmp_path / "file").write_text("")
    refused(capsys, "not a folder", "demo", "-o", tmp_path / "file")
    refused(capsys, "at least 0", "demo", "-o", tmp_path / "d", "--seed", "-1")
    if Path("/proc/self").exists():  # a folder in which even the superuser makes no file
        refused(capsys, "may not be written", "demo", "-o", "/proc/mome-demo")
        with pytest.raises(InputError, match="may not be written"):
            check_output_folder("/proc/mome")
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        refused(capsys, "may not be written", "demo", "-o", tmp_path / "closed" / "d")


# -- files of another type, depth or encoding ---------------------------------------------------------------------

BAD_JSON = {
    "a list": b"[]",
    "null": b"null",
    "a text": b'"studies"',
    "a number": b"7",
    "no JSON": b"{",
    "empty": b"",
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "many digits": b'{"a": ' + b"9" * 5000 + b"}",
    "utf-16": '{"studies": []}'.encode("utf-16"),
    "latin-1": '{"studies": "é"}'.encode("latin-1"),
    "another object": b'{"studies": {"a": 1}}',
    "other entries": b'{"studies": [1, "a", null]}',
}


@pytest.mark.parametrize("kind", BAD_JSON)
def test_a_report_of_another_form(capsys, scan: Path, model_folder: str, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_bytes(BAD_JSON[kind])
    arguments = ["segment", scan, "-p", "liver", "-m", model_folder, "-o", out]
    assert "report.json" in refused(capsys, "report here that cannot be read", *arguments)
    assert (out / "report.json").read_bytes() == BAD_JSON[kind] and len(list(out.iterdir())) == 1


def test_a_report_whose_entries_lack_something_is_no_reason_to_skip(
    scan: Path, model_folder: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["segment", str(scan), "-p", "liver", "-m", model_folder, "-o", str(out), "--resume"]
    assert main(arguments) == 0
    whole = json.loads((out / "report.json").read_text())
    for key, value in (
        ("structures", None), ("structures", [1]), ("notes", "a"), ("seconds", None), ("masks", "scan"), ("masks", [3]),
        ("masks", ["../scan.nii.gz"]), ("overlapping_voxels", "many"),
    ):  # fmt: skip
        study = {**whole["studies"][0], key: value}
        (out / "report.json").write_text(json.dumps({"studies": [study]}))
        assert main(arguments) == 0
        assert json.loads((out / "report.json").read_text())["studies"][0]["masks"] == ["scan_liver.nii.gz"]


@pytest.mark.parametrize("kind", [kind for kind in BAD_JSON if kind not in ("another object", "other entries")])
def test_a_case_list_that_is_no_object(capsys, tmp_path: Path, kind: str) -> None:
    recipe = write_recipe(tmp_path)
    (tmp_path / "data" / "cases.json").write_bytes(BAD_JSON[kind])
    assert "cases.json" in refused(capsys, "", "train", "--config", recipe, f"train.out={tmp_path / 'r'}")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("cases", "words"),
    [
        ({}, "lists no case"),
        ({"c0": []}, "no list 'annotated'"),
        ({"c0": {}}, "no list 'annotated'"),
        ({"c0": {"annotated": "mandible"}}, "no list 'annotated'"),
        ({"c0": {"annotated": {"mandible": 1}}}, "no list 'annotated'"),
        ({"c0": {"annotated": [6]}}, "no list 'annotated'"),
        ({"c0": {"annotated": ["mandible", "mandible"]}}, "lists a structure twice"),
        ({"c0": {"annotated": ["mandibel"]}}, "did you mean 'mandible'"),
        ({"../data/images/c0": {"annotated": ["mandible"]}}, "names are no paths"),
        ({"/etc/passwd": {"annotated": ["mandible"]}}, "names are no paths"),
        ({"": {"annotated": ["mandible"]}}, "names are no paths"),
        ({"c0": {"annotated": []}, "c1": {"annotated": []}}, "no training case annotates one of the labels"),
    ],
)
def test_a_case_list_of_another_form(capsys, tmp_path: Path, cases: dict, words: str) -> None:
    recipe = write_recipe(tmp_path)
    (tmp_path / "data" / "cases.json").write_text(json.dumps(cases))
    refused(capsys, words, "train", "--config", recipe, f"train.out={tmp_path / 'r'}")


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    from mome.data.case_folder import CaseFolder
    from mome.training.config_file import load_run_config

    recipe = write_recipe(tmp_path)
    for path in (recipe, tmp_path / "data" / "cases.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(load_run_config(recipe, []).labels) == len(CaseFolder(tmp_path / "data", "openkbp")) == 3


BAD_YAML = {
    "utf-16": "labels: [liver]".encode("utf-16"),
    "latin-1": "labels: [é]".encode("latin-1"),
    "a list": b"[liver]",
    "a text": b"labels",
    "a date": b"labels: [liver]\ncache: 2024-01-01",
    "no date": b"cache: 2024-99-99",
    "a set": b"model: !!set {experts}",
    "bytes": b"cache: !!binary aGk=",
    "no integer": b"train: {steps: !!int x}",
    "empty integer": b"train: {steps: !!int ''}",
    "no boolean": b"train: {channels_last: !!bool maybe}",
    "no timestamp": b"cache: !!timestamp x",
    "an object": b"cache: !!python/object/apply:os.system ['true']",
    "a number as key": b"model: {1: 2}",
    "a list as key": b"? [a]\n: b",
    "many digits": b"train: {steps: " + b"9" * 5000 + b"}",
    "a large number": b"train: {steps: 99999999999999999999999}",
    "not a number": b"train: {learning_rate: .nan}",
    "infinity": b"train: {weight_decay: .inf}",
    "a NUL": b'cache: "a\\0b"',
    "deep": b"model: " + b"[" * 3000,
    "deep and closed": b"model: {experts: " + b"[" * 60 + b"]" * 60 + b"}",
    "two documents": b"labels: [liver]\n---\nlabels: [liver]",
    "a control character": b"cache: \x07",
    "an alias inside its anchor": b"model: &a {experts: *a}",
    "empty": b"",
    "huge": b"#" * 3_000_000,
}


@pytest.mark.parametrize("kind", BAD_YAML)
def test_configurations_of_another_form(capsys, tmp_path: Path, kind: str) -> None:
    recipe = tmp_path / "run.yaml"
    recipe.write_bytes(BAD_YAML[kind])
    began = time.monotonic()
    refused(capsys, "", "train", "--config", recipe, f"train.out={tmp_path / 'r'}")
    assert time.monotonic() - began < 20 and not (tmp_path / "r").exists()


def _bomb(levels: int, key: str, merge: bool = False) -> str:
    lines = ["a0: &a0 {x: 1}" if merge else "a0: &a0 [x, x]"]
    for i in range(1, levels):
        again = ", ".join([f"*a{i - 1}"] * 9)
        lines.append(f"a{i}: &a{i} {{<<: [{again}]}}" if merge else f"a{i}: &a{i} [{again}]")
    return "\n".join([*lines, f"{key}: *a{levels - 1}"])


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("key", ["preset", "loss", "cache", "model", "labels"])
def test_anchor_bombs_are_bounded(capsys, tmp_path: Path, key: str, merge: bool) -> None:
    recipe = tmp_path / "run.yaml"
    recipe.write_text(_bomb(30, key, merge))
    tracemalloc.start()
    try:
        began = time.monotonic()
        refused(capsys, "stands for more than", "train", "--config", recipe)
        assert time.monotonic() - began < 10 and tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_an_alias_by_itself_is_fine(tmp_path: Path) -> None:
    from mome.training.config_file import load_run_config

    recipe = tmp_path / "run.yaml"
    recipe.write_text("labels: [liver]\nsources: &s [{kind: phantom, count: 2}]\nvalidation: *s\n")
    run = load_run_config(recipe, [])
    assert run.sources == run.validation and run.sources[0].count == 2


def test_messages_about_large_values_are_short() -> None:
    shared: list = ["x"]
    for _ in range(60):
        shared = [shared] * 9
    assert len(brief(shared, 80)) == 80
    with pytest.raises(SpecError) as caught:
        canonical(shared)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 200
    with pytest.raises(SpecError, match="64 bits"):
        parse("x(n=99999999999999999999)")
    deep: dict = {"name": "x"}
    for _ in range(5000):
        deep = {"name": "x", "a": deep}
    with pytest.raises(SpecError, match="nests too deeply"):
        canonical(deep)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("router=null", "model.router is null"),
        ("experts=null", "model.experts is null"),
        ("model={name: x}", "no argument 'model.name'"),
        ("model={pretrained: true}", "no argument 'model.pretrained'"),
        ("model={labels: [liver]}", "no argument 'model.labels'"),
        ("model={trust_remote_code: true}", "no argument 'model.trust_remote_code'"),
        ("processor={name: x}", "no argument 'processor.name'"),
        ("processor={spacing: null}", "processor.spacing is null"),
        ("model=[1]", "argument 'model' is a mapping"),
        ("experts={name: 5}", "named by a string or a dict"),
        ("loss=null", "argument 'loss' is"),
        ("loss={name: 5}", "named by a string or a dict"),
        ("loss=[1]", "argument 'loss' is"),
        ("sources=[]", "names no sources"),
        ("sources=[{kind: phantom, count: -1}]", "a source.count is from 0"),
        (
            "sources=[{kind: phantom, count: 1, weight: -1}, {kind: phantom, count: 1, weight: 2}]",
            "a source.weight is from 0",
        ),
        ("labels=[]", "names no labels"),
        ("validation=[]", "there are no validation cases"),
        ("sampling={foreground: 7}", "sampling.foreground is from 0 to 1"),
        ("sampling={jitter: -1}", "sampling.jitter is from 0"),
        ("augmentation={noise: -1}", "augmentation.noise is from 0 to 1"),
        ("augmentation={zoom: 5}", "augmentation.zoom is from 0"),
        ("sources=[{kind: phantom, count: 1, seed: -5}]", "a source.seed is from 0"),
        ("train.seed=-1", "train.seed is from 0"),
        ("train.batch_size=999999999", "train.batch_size is from 1"),
        ("cache=''", "cache is the path of a folder"),
        ("cache=/dev/null", "the output folder is not a folder"),
        ("train.threads=100000", "train.threads is at most"),
        ("train.workers=100000", "train.workers is at most"),
        ("train.clip_norm=-1", "train.clip_norm is at least 0"),
        ("a." * 40 + "b=1", "at most 20 keys"),
        ("=1", "written key=value"),
        ("train.steps=[" + "[" * 500, ""),
    ],
)
def test_overrides_of_another_form(capsys, tmp_path: Path, override: str, words: str) -> None:
    recipe = write_recipe(tmp_path)
    refused(capsys, words, "train", "--config", recipe, f"train.out={tmp_path / 'r'}", override)
    assert not list(tmp_path.glob("r/*.json"))


def test_names_that_a_file_cannot_have(capsys, model_folder: str, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 300 + ".nii.gz")
    refused(capsys, "File name too long", "segment", long, "-p", "liver", "-m", model_folder, "-o", tmp_path / "o")
    refused(capsys, "", "train", "--config", tmp_path)
    if os.geteuid():
        closed = tmp_path / "closed.yaml"
        closed.write_text("labels: [liver]")
        closed.chmod(0)
        refused(capsys, "cannot be read", "train", "--config", closed)


def test_errors_of_the_system() -> None:
    assert describe(PermissionError(13, "Permission denied", "/a"))[0] == 2
    assert describe(FileNotFoundError(2, "No such file", "/a"))[0] == 2
    assert describe(OSError(28, "No space left on device", "/a"))[0] == 1
    assert describe(OutputError("full"))[0] == 1 and describe(InputError("x"))[0] == 2
    assert describe(KeyError("x"))[0] == 1 and describe(MemoryError())[0] == 2
    code, lines = describe(UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range"))
    assert code == 2 and len(lines) == 3
    for error in (InputError("a", where="b\nc\x1b[31m", hint="d\ne"), OSError(13, "no", "a\nb\x1b]0;x")):
        lines = describe(error)[1]
        assert len(lines) <= 3 and not any("\x1b" in line or "\n" in line for line in lines)


# -- signals and locales ------------------------------------------------------------------------------------------


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        env={**os.environ, **environment},
        timeout=60,
        check=False,
    )


def test_sigterm_ends_as_ctrl_c_does(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
from mome.atomic import atomic_write
from mome.cli.exit_codes import guarded
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore the signal
def write(number):
    with atomic_write({str(tmp_path / "a.txt")!r}) as part:
        part.write_text("half")
        os.kill(os.getpid(), number)
        signal.pause()
sys.exit(guarded(lambda: write(signal.{{name}})))
"""
    for name, expected, words in (("SIGTERM", 143, b"stopped by SIGTERM"), ("SIGINT", 130, b"stopped")):
        done = run_python(code.replace("{name}", name))
        assert done.returncode == expected and done.stderr.strip() == words
        assert not list(tmp_path.iterdir())


ASCII = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}


def test_what_a_locale_cannot_print_is_escaped() -> None:
    code = (
        "import sys; from mome.cli.exit_codes import guarded; sys.exit(guarded(lambda: print('\\xe9 \\u2013 \\udcff')))"
    )
    done = run_python(code, **ASCII)
    assert done.returncode == 0 and done.stdout.strip() == rb"\xe9 \u2013 \udcff"
    done = run_python(code, PYTHONIOENCODING="utf-8")
    assert done.returncode == 0 and done.stdout.strip() == "é – ".encode() + rb"\udcff"
    done = run_python("from mome.cli.main import main; raise SystemExit(main(['list', 'labels', '*']))", **ASCII)
    assert done.returncode == 0 and b"liver" in done.stdout and not done.stderr


@pytest.mark.wide
def test_commands_under_an_ascii_locale(scan: Path, model_folder: str, tmp_path: Path) -> None:
    other = tmp_path / "scän.nii.gz"
    scan.rename(other)
    out = tmp_path / "out"
    for arguments in (
        ["segment", str(other), "-p", "liver", "-m", model_folder, "-o", str(out)],
        ["evaluate", str(out), str(out)],
        ["info", "mome_ct_tiny"],
        ["segment", str(tmp_path / "fehlt-ü.nii.gz"), "-p", "liver", "-o", str(out)],
    ):
        code = "import sys; from mome.cli.main import main; raise SystemExit(main(sys.argv[1:]))"
        done = run_python(code, *arguments, **ASCII)
        assert done.returncode == (2 if "fehlt" in arguments[1] else 0), done.stderr
        assert b"Traceback" not in done.stderr


# -- what is printed ----------------------------------------------------------------------------------------------


def test_terminal_escapes_are_written_out(capsys, model_folder: str, tmp_path: Path) -> None:
    assert printable("a\x1b[31m\nb\x9b\u202e\udcff") == r"a\x1b[31m\x0ab\x9b\u202e\udcff"
    assert printable("Nähe – 5 µm, 肝") == "Nähe – 5 µm, 肝"
    bad = "a\x1b]0;owned\x07"
    printed = refused(capsys, r"a\x1b]0;owned\x07", "segment", tmp_path / bad, "-p", "liver", "-o", tmp_path / "o")
    assert "\x1b" not in printed
    from rich.console import Console

    from mome.cli.evaluate import _table
    from mome.cli.segment import _print_study

    score = {"mean": 1.0, "median": 1.0}
    row = {"structure": f"{bad}[red]x[/red]", "n": 1, "dice": score, "nsd": score, "hd95": score}
    Console(stderr=True, width=200).print(_table([row], 2.0, " "))
    structure = {"name": bad, "volume_ml": 1.0, "warning": f"{bad} is odd"}
    done = {"name": bad, "status": "done", "seconds": 1.0, "notes": [bad], "masks": [bad], "overlapping_voxels": None}
    _print_study({**done, "structures": [structure]}, Path(bad), Console(stderr=True, width=200), set())
    _print_study({"name": bad, "status": "failed", "error": f"no\n{bad}"}, Path(bad), Console(stderr=True), set())
    printed = capsys.readouterr().err
    assert "\x1b" not in printed and "\x07" not in printed and printed.count(r"\x1b]0;owned\x07") == 9
    assert "[red]x[/red]" in printed


def test_readers_do_not_print_before_us(capfd, model_folder: str, scan: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd.nii"
    image = nib.load(scan)
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine), odd)
    data = bytearray(odd.read_bytes())
    data[76:80] = np.float32(0.5).tobytes()  # pixdim[0], which is 1 or -1
    odd.write_bytes(data)
    main(["segment", str(odd), "-p", "liver", "-m", model_folder, "-o", str(tmp_path / "o")])
    assert "qfac" not in capfd.readouterr().err
    pytest.importorskip("SimpleITK")
    broken = tmp_path / "broken.mha"
    broken.write_bytes(
        b"ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_SHORT\nElementDataFile = LOCAL\nxx"
    )
    assert main(["segment", str(broken), "-p", "liver", "-m", model_folder, "-o", str(tmp_path / "o2")]) == 2
    printed = capfd.readouterr().err
    assert "WARNING" not in printed and "itk::" not in printed


def test_labels_of_a_run_are_known(capsys, tmp_path: Path) -> None:
    assert NAMES
    recipe = write_recipe(tmp_path)
    refused(
        capsys, "did you mean 'mandible'", "train", "--config", recipe, "labels=[mandibel]", f"train.out={tmp_path}/r"
    )
