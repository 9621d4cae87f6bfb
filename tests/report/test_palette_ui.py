"""The palette page: its answers are the solver's, it listens to this machine's own page alone, and a browser can work
it."""

import http.client
import json
import socket
import threading
import webbrowser
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import browser
import numpy as np
import pytest
from typer.testing import CliRunner

from fastalign import palette
from fastalign._base.errors import UserError
from fastalign.cli.main import app
from fastalign.decode import Candidates
from fastalign.palette.feasibility import INWARD
from fastalign.report.ui import Session, server

ROOT = Path(__file__).parents[2]
NAMES = ["kind", "short"]
TRAP = "<img src=x onerror=\"document.title='caught'\">"


@pytest.fixture(scope="module")
def session():
    rng = np.random.default_rng(0)
    rewards = rng.standard_normal((6, 40, 2)).astype(np.float32)
    rewards[..., 1] -= 0.5 * rewards[..., 0]
    texts = [[f"{TRAP} text {j} of {i}" for j in range(40)] for i in range(6)]
    return Session(NAMES, rewards, [f"prompt {i}" for i in range(6)], texts, "a folder/scored.parquet")


@contextmanager
def served(session, allowed=()):
    with server.open_server(session, 0, allowed) as caught:
        thread = threading.Thread(target=caught.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield caught
        caught.shutdown()
        thread.join()


@pytest.fixture
def page_server(session):
    with served(session) as caught:
        yield caught


def ask(to, method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", to.server_port)
    connection.request(
        method, f"/{to.token}{path}", body, {name.replace("_", "-"): value for name, value in headers.items()}
    )
    reply = connection.getresponse()
    result = reply.status, reply.read().decode(), reply.headers
    connection.close()
    return result


@pytest.mark.parametrize("joint", [False, True])
def test_an_answer_is_the_solvers(session, joint):
    requested, sense = session.mean + [0.6, -0.3], [">=", "=="]
    result = session.answer({"palette": requested.tolist(), "sense": sense, "joint": joint, "first": 4})
    solution = palette.solve(session.flat, requested, groups=None if joint else session.groups, sense=sense)
    assert result["feasible"] and result["beyond"] is None and result["ms"] > 0
    np.testing.assert_allclose(result["lambda"], solution.lam, rtol=1e-9)
    np.testing.assert_allclose(result["levels"], solution.levels, rtol=1e-9)
    assert result["kl"] == pytest.approx(float(solution.kl)) and result["ess"] == pytest.approx(float(solution.ess))
    assert [each["prompt"] for each in result["examples"]] == ["prompt 4", "prompt 5"]
    weights = np.exp(session.rewards[4].astype(float) @ solution.lam)
    picked = result["examples"][0]["picked"]
    assert picked[0]["text"] == session.texts[4][weights.argmax()]
    assert picked[0]["weight"] == pytest.approx(weights.max() / weights.sum())
    assert [each["text"] for each in result["examples"][0]["base"]] == session.texts[4][:3]
    json.dumps(result, allow_nan=False)


def test_the_command_in_an_answer_makes_its_palette(session):
    words = session.answer({"palette": [0.25, -1.5], "sense": [">=", "<="], "joint": True})["command"]
    assert words == (
        "fastalign map 'a folder/scored.parquet' --values kind,short --palette 'kind=0.25,short<=-1.5' --joint "
        "--out palette.json"
    )


def test_out_of_reach_comes_with_what_can_be_reached(session):
    requested = session.mean + [3.0, 3.0]
    result = session.answer({"palette": requested.tolist()})
    solution = palette.solve(session.flat, requested, groups=session.groups)
    assert (
        not result["feasible"]
        and result["beyond"]["scaling"] == pytest.approx(solution.scaling)
        and solution.scaling < 1
    )
    # Inside of the nearest, where λ is finite and the λ of `fastalign map`; and both ways out are in reach.
    inside = session.mean + INWARD * (solution.nearest - session.mean)
    np.testing.assert_allclose(result["beyond"]["nearest"], inside, rtol=1e-6)
    np.testing.assert_allclose(
        result["lambda"], palette.solve(session.flat, inside, groups=session.groups).lam, rtol=1e-6
    )
    assert (np.array(result["levels"]) >= np.array(result["beyond"]["nearest"]) - 1e-6).all()
    for way in ("nearest", "scaled"):
        there = session.answer({"palette": result["beyond"][way]})
        assert there["feasible"] and np.isfinite(there["lambda"]).all(), way
    scaled = np.array(result["beyond"]["scaled"])
    np.testing.assert_allclose(scaled, session.mean + INWARD * solution.scaling * 3.0, rtol=1e-6)


def test_each_value_spans_what_it_can_realise_alone(session):
    about = session.describe()
    for j, value in enumerate(about["values"]):
        for dual, groups in (("per_prompt", session.groups), ("joint", None)):
            low, high = value[dual]
            others = session.flat.min(axis=0), session.flat.max(axis=0)  # which ask nothing as at least, as at most
            for sense, end, inwards in ((">=", high, -1e-4), ("<=", low, 1e-4)):
                requested = others[sense == "<="].astype(np.float64)
                for requested[j], reached in ((end + inwards, True), (end - inwards, False)):
                    assert palette.solve(session.flat, requested, groups=groups, sense=sense).feasible == reached
    assert about["starts"]["q80"] == palette.quantile_palette(session.flat, 0.8).tolist()


@pytest.mark.parametrize(
    "question, message",
    [
        (b"{", "the question must be JSON"),
        (b"\xff", "the question must be JSON"),
        (b"[" * 60_000, "the question must be JSON"),
        (b'{"palette":' * 5_000, "the question must be JSON"),
        (b'{"palette": [0, ' + b"1" * 5_000 + b"]}", "the question must be JSON"),
        (b"[1, 2]", "the question must be an object with a palette, got list"),
        (b"{}", "palette must be 2 finite numbers (kind, short), got None"),
        (b'{"palette": [1]}', "palette must be 2 finite numbers (kind, short), got [1]"),
        (b'{"palette": [1, NaN]}', "palette must be 2 finite numbers"),
        (b'{"palette": [1, Infinity]}', "palette must be 2 finite numbers"),
        (b'{"palette": [1, "2"]}', "palette must be 2 finite numbers"),
        (b'{"palette": [0, 0], "sense": [">", ">="]}', "sense must be 2 of >= == <="),
        (b'{"palette": [0, 0], "first": 6}', "first must be a prompt's number from 0 to 5, got 6"),
    ],
)
def test_a_bad_question_is_one_clear_line(page_server, question, message):
    status, text, _ = ask(page_server, "POST", "/solve", question)
    assert status == 400
    assert message in json.loads(text)["error"] and "\n" not in json.loads(text)["error"]


def test_only_its_own_page_is_answered(page_server):
    port = page_server.server_port
    question = b'{"palette": [0, 0]}'
    assert ask(page_server, "POST", "/solve", question)[0] == 200
    assert (
        ask(page_server, "POST", "/solve", question, Host=f"localhost:{port}", Origin=f"http://127.0.0.1:{port}")[0]
        == 200
    )
    for headers in (
        {"Host": f"evil.example:{port}"},
        {"Host": "127.0.0.1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
    ):
        status, text, _ = ask(page_server, "POST", "/solve", question, **headers)
        assert status == 403 and json.loads(text)["error"].startswith(
            f"open it as http://127.0.0.1:{port}/ with the token"
        )
        for path in ("/", "/values"):
            status, text, _ = ask(page_server, "GET", path, **headers)
            assert status == 403 and "prompt" not in text
    assert ask(page_server, "GET", "/../desk.py")[0] == 404 and ask(page_server, "POST", "/", question)[0] == 404
    assert ask(page_server, "POST", "/solve", b" " * (server.LONGEST_QUESTION + 1))[0] == 413
    policy = ask(page_server, "GET", "/")[2]["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_nothing_is_answered_without_the_token(page_server):
    for path in (
        "/",
        "/values",
        "/page.js",
        "/solve",
        f"/{page_server.token[:-1]}/values",
        f"/?{page_server.token}",
        "//values",
    ):
        for method in ("GET", "POST"):
            connection = http.client.HTTPConnection("127.0.0.1", page_server.server_port)
            connection.request(method, path, b"{}")
            reply = connection.getresponse()
            text = reply.read().decode()
            assert reply.status == 403 and "token" in text and page_server.token not in text and "prompt" not in text
            connection.close()


def test_an_address_may_have_a_query(page_server):
    for path in ("/?from=mail", "/values?x=1", "/page.css?v=2"):
        assert ask(page_server, "GET", path)[0] == 200
    assert ask(page_server, "POST", "/solve?x", b'{"palette": [0, 0]}')[0] == 200


@pytest.mark.parametrize("length", ["", "x", "-1", "1.5", "+2", "\xb2", "9" * 5000, None])
def test_a_bad_content_length_is_reported(page_server, length):
    with socket.create_connection(page_server.server_address, timeout=10) as connection:
        line = "" if length is None else f"Content-Length: {length}\r\n"
        head = (
            f"POST /{page_server.token}/solve HTTP/1.1\r\nHost: localhost:{page_server.server_port}\r\n{line}\r\n{{}}"
        )
        connection.sendall(head.encode("latin-1"))
        message = connection.makefile("rb").read()  # to its end: the connection is closed
    assert message.startswith(b"HTTP/1.1 400") and b"Content-Length must be" in message


@pytest.mark.parametrize("path", ["//[", "http://[/", "*", "?", "/%00", "http://127.0.0.1/x/values"])
def test_an_odd_address_is_refused(page_server, capfd, path):
    with socket.create_connection(page_server.server_address, timeout=10) as connection:
        connection.sendall(f"GET {path} HTTP/1.0\r\nHost: localhost:{page_server.server_port}\r\n\r\n".encode())
        assert connection.makefile("rb").readline().startswith(b"HTTP/1.1 403")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("allowed", "host", "status"),
    [
        ((), "localhost:9000", 403),
        (("localhost:9000",), "localhost:9000", 200),
        (("localhost:9000",), "localhost:9001", 403),
        (("localhost",), "localhost:9001", 200),
        (("Gpu.Lab",), "gpu.lab", 200),
        (("a.lab", "gpu.lab:80"), "GPU.lab:80", 200),
        (("gpu.lab",), "gpu.lab.evil.example", 403),
        (("gpu.lab",), "evil.example:80/gpu.lab", 403),
        (("[::1]",), "[::1]:9000", 200),
    ],
)
def test_other_names_are_answered_where_they_are_allowed(session, allowed, host, status):
    with served(session, allowed) as page_server:
        question = b'{"palette": [0, 0]}'
        for scheme in ("http", "https"):
            headers = {"Host": host, "Origin": f"{scheme}://{host}"}
            assert ask(page_server, "POST", "/solve", question, **headers)[0] == status
        assert ask(page_server, "GET", "/values", Host=host)[0] == status
        own = f"127.0.0.1:{page_server.server_port}"
        assert ask(page_server, "GET", "/values", Host=own)[0] == 200
        assert ask(page_server, "POST", "/solve", question, Host=own, Origin="http://evil.example")[0] == 403


@pytest.mark.parametrize("name", ["", "http://gpu.lab", "gpu.lab/x", "gpu lab", "gpu.lab:x", "a:1:2"])
def test_an_allowed_host_is_a_name(session, name):
    with pytest.raises(UserError, match="allowed-host must be a name or name:port"):
        server.open_server(session, 0, [name])


def test_one_that_keeps_silent_is_left_and_many_may_wait(session, monkeypatch, capfd):
    monkeypatch.setattr(server._Handler, "timeout", 0.2)
    with served(session) as caught:
        silent = [socket.create_connection(("127.0.0.1", caught.server_port)) for _ in range(60)]
        silent[0].sendall(b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
        silent[1].sendall(b"GE")
        for one in silent:
            one.settimeout(10)
            assert one.recv(1) == b""
            one.close()
        assert ask(caught, "GET", "/values")[0] == 200
    assert caught.request_queue_size >= 100 and capfd.readouterr().err == ""


def test_the_page_asks_for_nothing_from_elsewhere():
    for name, _ in server._FILES.values():
        text = (Path(server.__file__).parent / name).read_text(encoding="utf-8")
        assert "http:" not in text and "https:" not in text and "innerHTML" not in text


def test_the_wheel_carries_the_page():
    tomllib = pytest.importorskip("tomllib")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert "fastalign.report.ui" in declared["packages"]
    assert set(declared["package-data"]["fastalign.report.ui"]) == {name for name, _ in server._FILES.values()}


def test_the_command_serves_until_it_is_interrupted(session, tmp_path, monkeypatch):
    tokens = [[[1]] * 40 for _ in range(6)]
    whole = Candidates(list(session.prompts), session.texts, tokens, [[[-1.0]] * 40 for _ in range(6)])
    whole.to_parquet(tmp_path / "candidates.parquet")
    whole.with_rewards(NAMES, session.flat).to_parquet(tmp_path / "scored.parquet")
    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)

    def serve_forever(self):
        assert self.server_address[0] == "127.0.0.1"
        raise KeyboardInterrupt

    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", serve_forever)

    def run(*arguments):
        result = CliRunner().invoke(app, ["palette-ui", *map(str, arguments)])
        return result.exit_code, result.stdout + result.stderr

    code, text = run(tmp_path / "scored.parquet", "--values", "short")
    assert code == 0 and text.startswith(opened[0] + "  (Ctrl-C") and len(urlsplit(opened[0]).path) > 20
    names = ["--allowed-host", "localhost:9000", "--allowed-host", "gpu.lab"]
    assert run(tmp_path / "scored.parquet", "--no-browser", *names)[0] == 0 and len(opened) == 1
    for arguments, message in (
        (["nowhere.parquet"], "no such file"),
        ([tmp_path / "candidates.parquet"], "must be a fastalign scored file"),
        ([tmp_path / "scored.parquet", "--values", "mild"], "one at least, got mild"),
        ([tmp_path / "scored.parquet", "--port", 70000], "port must lie in 0..65535, got 70000"),
        ([tmp_path / "scored.parquet", "--allowed-host", "http://a"], "allowed-host must be a name or name:port"),
    ):
        code, text = run(*arguments)
        assert code == 1 and message in text and text.count("\n") == 1


def test_a_port_in_use_is_one_line(session, page_server):
    port = page_server.server_port
    with pytest.raises(UserError, match=f"port {port} cannot be opened .*; 0 picks a free one"):
        server.open_server(session, port)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    if browser.find() is None:
        pytest.skip(f"needs a browser: none of {', '.join(browser.NAMES)} is here")
    with browser.Browser(tmp_path_factory.mktemp("browser")) as caught:
        yield caught


ANSWERED = """new Promise(done => {
  const look = () => Number(document.body.dataset.answers ?? 0) >= %d && !document.body.classList.contains("working")
    ? done([...document.querySelectorAll(".lam b")].map(each => each.textContent)) : setTimeout(look, 5);
  look();
})"""


def test_a_slider_moves_lambda_in_a_browser(session, page_server, page):
    address = page_server.address
    page.open(f"{address}#c={session.mean[0] + 0.2},{session.mean[1]}&from=3")
    before = page.evaluate(ANSWERED % 1)
    assert float(before[0]) > 0
    solution = palette.solve(session.flat, session.mean + [0.2, 0.0], groups=session.groups).lam
    assert float(before[0]) == pytest.approx(solution[0], rel=0.01)
    assert page.evaluate("document.querySelector('#examples h3').textContent") == "prompt 3"
    # By the keyboard, as one who sees no slider would.
    page.evaluate("document.querySelector('[type=range]').focus()")
    for _ in range(20):
        page.press("ArrowRight", 39)
    after = page.evaluate(ANSWERED % 2)
    assert float(after[0]) > float(before[0])
    requested = float(page.evaluate("location.hash").partition("c=")[2].partition(",")[0])
    assert requested > session.mean[0] + 0.2
    solution = palette.solve(session.flat, [requested, session.mean[1]], groups=session.groups)
    assert float(after[0]) == pytest.approx(solution.lam[0], rel=0.01)
    assert page.evaluate("document.querySelector('.reached').textContent").startswith("realised")
    # Texts stay texts, and nothing was asked of anybody else.
    assert TRAP in page.evaluate("document.querySelector('.text p').textContent")
    assert page.evaluate("document.querySelectorAll('#examples img').length") == 0
    requested = [
        each["params"]["request"]["url"] for each in page.heard if each["method"] == "Network.requestWillBeSent"
    ]
    assert requested and all(url.startswith((address, "data:")) for url in requested)
    assert not [each for each in page.heard if each["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]


def test_a_palette_out_of_reach_is_one_click_from_the_nearest(session, page_server, page):
    page.open(f"{page_server.address}#c=3,3")
    page.evaluate(ANSWERED % 1)
    verdict = "document.getElementById('verdict').textContent"
    assert page.evaluate(verdict).startswith("Out of reach")
    page.evaluate("document.getElementById('scaled').click()")
    page.evaluate(ANSWERED % 2)
    assert page.evaluate(verdict).startswith("In reach")
    page.evaluate("document.getElementById('joint').click()")
    page.evaluate(ANSWERED % 3)
    assert "dual=joint" in page.evaluate("location.hash")
    # A bookmark of another file's palette is not taken for one of this file's.
    page.evaluate("location.hash = 'c=1,2,3'")
    page.evaluate(ANSWERED % 4)
    assert page.evaluate("[...document.querySelectorAll('.level')].map(each => each.value)") == [
        f"{mean:.2f}" for mean in session.mean
    ]


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_sticks_out_of_the_page(session, page, width, tmp_path):
    names = ["a value with more of a name than anybody would ever want to read", "without_a_blank_" * 5]
    odd = Session(names, session.rewards * [1e7, 1e-5], ["long " * 90 + "l" * 200] * 6, [["l" * 300] * 40] * 6)
    with served(odd) as page_server:
        page.open(f"{page_server.address}#c=2e6,3e-6")
        page.evaluate(ANSWERED % 1)
        page.picture(tmp_path / "page.png", width, 900)
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
