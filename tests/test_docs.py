"""The documentation: its blocks run, its links lead somewhere, its errors are the code's, its generated pages are
current, and the site builds."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from turns import by_the_day, on_its_day

import fastalign

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md"]
PAGES += [*sorted(DOCS.rglob("*.md")), *sorted(DOCS.rglob("*.py")), *sorted((ROOT / "bench").glob("*.md"))]
LINK = re.compile(r"\]\((?!\w+:)([^)\s#]*)(?:#([^)\s]+))?\)")


def tool(name):
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


walk_docs = tool("walk_docs")


def prose(page):
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


@cache
def anchors(page):
    """As GitHub and the site make them of headings."""
    result = set()
    for title in re.findall(r"^#+ (.+)$", prose(page), re.M):
        plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", title).strip().lower()
        result.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return result


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(prose(page)):
        to = (page.parent / target).resolve() if target else page
        assert to.exists(), f"{target} of {page.name}"
        if anchor:
            assert anchor in anchors(to), f"{target}#{anchor} of {page.name}"


@pytest.mark.parametrize("page", walk_docs.pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_parse_and_their_commands_and_names_exist(page):
    for block in walk_docs.blocks(page):
        walk_docs.check(block)


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("```bash\nfastalign sample --out a --sample-count 3\n```\n", "sample-count"),
        ("```bash\nfastalign train dpu --out a\n```\n", "dpu"),
        ("```bash\npip install 'fastalign[everything]'\n```\n", "everything"),
        ("```bash\ncurl localhost\n```\n", "no rule"),
        ("```python\nfrom fastalign.palette import solv\n```\n", "solv"),
    ],
)
def test_what_does_not_exist_is_caught(tmp_path, text, wrong):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises((walk_docs.Failed, ImportError), match=wrong):
        walk_docs.check(walk_docs.blocks(page)[0])


@pytest.mark.parametrize(
    "page", by_the_day(filter(walk_docs.runs, walk_docs.pages()), 25), ids=lambda page: str(page.relative_to(ROOT))
)
def test_blocks_run_in_an_empty_folder(page):
    """On tiny models, other pages each day; `python tools/walk_docs.py` runs all with the real one."""
    command = [sys.executable, "-W", "ignore", ROOT / "tools" / "walk_docs.py", "--tiny", page]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert done.stdout.count("ok ") >= 1


def test_the_page_of_commands_is_current():
    written = tool("write_commands")
    assert written.PAGE.read_text(encoding="utf-8") == written.page(), "run python tools/write_commands.py"


def test_the_table_of_presets_is_current():
    written = tool("write_presets")
    assert written.PAGE.read_text(encoding="utf-8") == written.page(), "run python tools/write_presets.py"


@pytest.mark.parametrize("package", ["palette", "decode", "rewards", "soup", "losses", "ops", "train"])
def test_every_public_name_is_in_the_reference(package):
    page = (DOCS / "reference" / f"{package}.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^::: .*\.(\w+)$", page, re.M))
    assert {*getattr(fastalign, package).__all__} - {"METHODS", "Perplexity"} == shown, (
        "the page has a line `::: module.name` each"
    )


def messages():
    """A pattern of every text in the code, with anything in its braces."""
    for path in [*(ROOT / "fastalign").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            if sum(len(text) for text in texts if isinstance(text, str)) >= 12:
                yield "".join(".+" if text is None else re.escape(str(text)) for text in texts)


def test_the_errors_are_the_codes():
    known = [re.compile(pattern) for pattern in messages()]
    shown = [
        block.text.strip().removeprefix("fastalign: ")
        for block in walk_docs.blocks(DOCS / "faq.md")
        if block.kind == "text"
    ]
    assert len(shown) > 20
    for line in shown:
        assert any(one.fullmatch(line) for one in known), line


@on_its_day("site")
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for page in (tmp_path / "site").rglob("*.html"):
        assert not re.search(r'(?:src|href)="(?:https?:)?//[^"]*\.(?:js|css|woff2?)"', page.read_text(encoding="utf-8"))
