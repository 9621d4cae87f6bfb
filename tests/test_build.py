"""What the build promises: levels that agree, no libtorch, nothing that answers to `import kernels`."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from turns import by_the_day, on_its_day

import fastalign.backend
from fastalign import kernels

ROOT = Path(__file__).parent.parent
BUILD = runpy.run_path(str(ROOT / "setup.py"))
native = fastalign.backend.native

SUMS = """
import sys, torch, fastalign.backend
from fastalign.ops import token_logprobs
torch.manual_seed(0)
out = []
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    x = (torch.randn(5, 1500, dtype=torch.float64) * 4).to(dtype).requires_grad_()
    found = token_logprobs(x, torch.arange(5) * 300, softcap=9.0, outputs=("log_probs", "entropy"))
    (found.log_probs.sum() + found.entropy.sum()).backward()
    out += [found.log_probs.sum().item(), found.entropy.sum().item(), x.grad.double().abs().sum().item()]
print(fastalign.backend.native.active_isa(), *out)
"""


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(native is None, reason="the native extension is not built")
def test_every_level_this_processor_has_gives_the_same_numbers():
    rows = []
    for isa in native.available_isas():
        code, out, err = run(SUMS, FASTALIGN_ISA=isa)
        assert code == 0, err
        name, *numbers = out.split()
        assert name == isa
        rows.append([float(x) for x in numbers])
    for row in rows[1:]:
        assert row == pytest.approx(rows[0], rel=2e-5)


def sources_in_turn():
    """(file, level) of the native extension, a quarter of them in turn."""
    files = [(name, "baseline") for name in BUILD["COMMON"]]
    files += [(name, level) for name in BUILD["OPS"] for level in BUILD["LEVELS"]]
    return by_the_day(files, 4)


@on_its_day("clang")
@pytest.mark.parametrize(("name", "level"), sources_in_turn())
def test_clang_compiles_the_extension(name, level, tmp_path):
    """As on macOS, without OpenMP; clang as Zig's package brings it."""
    pytest.importorskip("ziglang")
    pybind11 = pytest.importorskip("pybind11")
    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    flags = [flag for flag in BUILD["FLAGS"] if flag not in ("-O3", "-fopenmp")] + BUILD["LEVELS"][level]
    flags += ["-O0", "-fPIC", "-fno-sanitize=all", "-Werror", "-Wno-unknown-warning-option"]
    compiler = [sys.executable, "-m", "ziglang", "c++", *flags, *includes, f"-DFASTALIGN_LEVEL={level}"]
    done = subprocess.run(
        [*compiler, "-c", ROOT / "csrc" / f"{name}.cpp", "-o", tmp_path / "made.o"],
        env=os.environ | {"ZIG_GLOBAL_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def fake_compiler(folder, script):
    path = folder / "c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "no C++ compiler found (no-such-c++)"),
        ("exit 1", "cannot build it (exit code 1)"),
        ("echo 'probe.cpp:1:10: fatal error: Python.h: No such file' >&2; exit 1", "error: Python.h: No such file"),
        ("echo \"unrecognised option '-fopenmp'\" >&2; exit 2", "unrecognised option '-fopenmp'"),
    ],
    ids=["absent", "false", "no headers", "no OpenMP"],
)
def test_a_compiler_that_cannot_build_leaves_the_reference(script, said, tmp_path):
    compiler = "no-such-c++" if script is None else fake_compiler(tmp_path, script)
    command = [sys.executable, str(ROOT / "setup.py"), "build_ext", "--build-lib", str(tmp_path / "lib")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"CXX": compiler}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert said in done.stderr and "installing without the native extension" in done.stderr
    assert not (tmp_path / "lib").exists()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_compiler_that_fails_on_our_sources_fails_the_build(tmp_path):
    """Only the probe decides for the reference; a mistake of ours is never hidden by it."""
    compiler = fake_compiler(tmp_path, 'case "$*" in *probe.cpp*) exec g++ "$@";; *) exit 1;; esac')
    tree = tmp_path / "tree"
    for name in ("csrc", "kernels", "fastalign", "bench"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).symlink_to(ROOT / name)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib")]
    done = subprocess.run(command, cwd=tree, env=os.environ | {"CXX": compiler}, capture_output=True, text=True)
    assert done.returncode != 0 and "returned non-zero exit status 1" in done.stderr


@pytest.mark.skipif(native is None, reason="the native extension is not built")
def test_an_unknown_level_is_refused():
    code, _, err = run("import fastalign.backend as b; b.native.active_isa()", FASTALIGN_ISA="mmx")
    assert code != 0 and "FASTALIGN_ISA must be baseline, avx2 or avx512, got mmx" in err


@pytest.mark.skipif(native is None or shutil.which("readelf") is None, reason="needs the extension and readelf")
def test_the_extension_links_no_libtorch_and_the_plain_openmp():
    listing = subprocess.run(["readelf", "-d", native.__file__], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", listing)
    assert not [name for name in needed if "torch" in name or "c10" in name]
    assert "libgomp.so.1" in needed


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_no_code_for_a_newer_processor_is_shared_with_an_older_one():
    objects = [path for level in ("avx2", "avx512") for path in (ROOT / "build/objects").glob(f"*/{level}/*.o")]
    if not objects:
        pytest.skip("no object files beside the sources")
    for path in objects:
        listing = subprocess.run(
            ["nm", "-C", "--defined-only", str(path)], capture_output=True, text=True, check=True
        ).stdout
        weak = [line.split(" ", 2)[2] for line in listing.splitlines() if line.split(" ")[1] in "WVu"]
        shared = [name for name in weak if f"fastalign::{path.parent.name}::" not in name and "DW.ref" not in name]
        assert not shared, f"{path.name}: the linker may use these on any processor: {shared[:3]}"


def test_nothing_here_answers_to_import_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code, _, err = run("import transformers.integrations.hub_kernels, fastalign.kernels", PYTHONPATH=str(ROOT))
    assert code == 0, err
    assert kernels.names() == sorted(kernels.names())


def test_import_is_light():
    code, out, err = run(
        "import sys, fastalign, fastalign.cli.main; print(*(m for m in ('torch', 'transformers', 'trl', 'matplotlib', "
        "'ray', 'triton', 'sklearn', 'scipy', 'pyarrow', 'datasets', 'numpy', 'rich') if m in sys.modules))"
    )
    assert code == 0, err
    assert out.split() == []


def test_a_module_goes_by_its_own_name():
    """`from package import name` is `import package.name`, where it is a module."""
    code, out, err = run(
        "import importlib, pkgutil, types\n"
        "for package in ('fastalign', 'fastalign.integrations', 'fastalign.report'):\n"
        "    whole = importlib.import_module(package)\n"
        "    for name in (found.name for found in pkgutil.iter_modules(whole.__path__)):\n"
        "        value = getattr(whole, name, None)\n"
        "        if isinstance(value, types.ModuleType) and value.__name__ != f'{package}.{name}':\n"
        "            print(package, name, value.__name__)\n"
    )
    assert (code, out.split()) == (0, []), err


def test_every_public_name_is_there_when_it_is_asked_for():
    for package in ("fastalign", "fastalign.data", "fastalign.soup"):
        code, out, err = run(
            f"import {package} as p\nlisted = set(dir(p))\nassert listed >= set(p.__all__), set(p.__all__) - listed\n"
            f"from {package} import *\nprint(*(name for name in p.__all__ if globals()[name] is not getattr(p, name)))"
        )
        assert (code, out.split()) == (0, []), err
    with pytest.raises(AttributeError, match="module 'fastalign' has no attribute 'soups'"):
        fastalign.soups  # noqa: B018


@pytest.mark.skipif(native is None or not Path("/proc/self/maps").exists(), reason="needs the extension and Linux")
@pytest.mark.parametrize("first", ["torch", "fastalign"])
def test_extension_and_torch_share_one_openmp(first):
    second = {"torch": "fastalign", "fastalign": "torch"}[first]
    code, out, err = run(
        f"import {first}, {second}\nlines = open('/proc/self/maps').read().split('\\n')\n"
        "print(*{line.split()[-1] for line in lines if 'gomp' in line or 'libomp' in line})"
    )
    assert code == 0, err
    assert len(out.split()) == 1


def test_without_the_extension_the_reference_runs_and_says_so():
    code, _, err = run(
        "import sys; sys.modules['fastalign._C'] = None\n"
        "import torch, fastalign\n"
        "x = fastalign.ops.token_logprobs(torch.zeros(2, 4), torch.tensor([0, 1]))\n"
        "assert torch.allclose(x, torch.tensor(4.0).log().neg().expand(2))\n"
        "fastalign.ops.token_logprobs(torch.zeros(2, 4), torch.tensor([0, 1]))\n"
    )
    assert code == 0, err
    assert err.count("fastalign's native extension is not built") == 1 and "pip install -e ." in err
    code, _, err = run(
        "import sys; sys.modules['fastalign._C'] = None\nimport fastalign.backend\nfastalign.backend.forced()",
        FASTALIGN_BACKEND="cpu",
    )
    assert code != 0 and "FASTALIGN_BACKEND 'cpu' needs the native extension" in err


def test_every_package_is_in_the_wheel():
    text = (ROOT / "pyproject.toml").read_text()
    result = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "fastalign").rglob("__init__.py")}
    assert "fastalign.models" in result
    assert [name for name in sorted(result) if f'"{name}",' not in text] == []


def test_the_architecture_page_is_what_the_imports_say():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import draw_architecture as it; assert it.PAGE.read_text(encoding='utf-8') == it.page();"
            "assert it.DIAGRAM.read_text(encoding='utf-8') == it.diagram()",
        ],
        cwd=ROOT / "tools",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, "python tools/draw_architecture.py" + done.stderr[-500:]


def test_no_private_name_is_used_in_another_file():
    """A name that begins with an underscore is its file's own; private modules belong to their package."""
    root = Path(__file__).parents[1]
    outside = []
    for path in [*root.glob("fastalign/**/*.py"), *root.glob("kernels/**/*.py"), *root.glob("bench/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastalign."):
                private = [one.name for one in node.names if one.name.startswith("_") and one.name != "_C"]
                modules = {file.stem for file in root.glob("kernels/fastalign_kernels/_*.py")}
                outside += [f"{path}: {name}" for name in private if name not in modules]
    assert not outside
