"""_C.pyi declares what the compiled module has: the same names, each with as many arguments."""

import ast
import re
from pathlib import Path

import fastalign
from fastalign.backend import native

STUB = Path(fastalign.__file__).with_name("_C.pyi")


def test_the_stub_has_the_functions_of_the_compiled_module():
    declared = {
        node.name: len(node.args.posonlyargs)
        for node in ast.parse(STUB.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    # pybind11 begins a docstring with the signature, whose arguments are arg0, arg1, ...
    compiled = {
        name: len(re.findall(r"\barg\d+: ", what.__doc__.splitlines()[0]))
        for name, what in vars(native).items()
        if callable(what) and not name.startswith("_")
    }
    assert declared == compiled
