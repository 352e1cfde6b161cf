"""Load on a real server: what is counted, and that waiting is not hidden."""

import json
import threading
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec
import numpy as np
import pytest
from server import serving

from kdexport import spec
from kdexport.bench.engine import bench
from kdexport.bench.generator import Connection, LoadError, LoadJob, body_of, load
from kdexport.bench.subjects import Target
from kdexport.serve.protocols import huggingface, tei
from kdexport.tasks import task_class
from kdexport.tasks.inputs.media import inline

TEXTS = [{"text": f"Shares of the airline rose by {n} percent"} for n in range(40)]


@pytest.fixture
def texts_file(tmp_path):
    (tmp_path / "rows.json").write_bytes(msgspec.json.encode(TEXTS))
    return str(tmp_path / "rows.json")


def job(url, texts_file, **changes):
    values = {"connections": 4, "rate": None, "poisson": False, "seconds": 1.5, "seed": 0} | changes
    return LoadJob(url=url, rows=texts_file, **values)


@pytest.mark.parametrize("path", ["/predict", "/", "/v2/models/m/infer"])
@pytest.mark.parametrize("chunked", [False, True])
def test_the_three_protocols_are_spoken(finished, path, chunked):
    with serving(finished / "artifact", chunked=chunked) as url:
        connection = Connection(url + path)
        one = json.loads(connection.post(body_of(url + path, TEXTS[:1])))
        three = json.loads(connection.post(body_of(url + path, TEXTS[:3])))
    assert len(one) == 1
    assert len(three) == 3
    assert one[0]["label"] == three[0]["label"]


def test_pairs_pictures_and_sound_are_sent_as_our_server_reads_them(tmp_path):
    pairs = [{"text": "a", "text_pair": "b"}, {"text": "c", "text_pair": "d"}]
    for rows in (pairs[:1], pairs, TEXTS[:1], TEXTS[:2]):
        plain = [{key: row[key] for key in ("text", "text_pair") if key in row} for row in rows]
        assert tei.parse(body_of("http://x/predict", rows)).rows == plain
        parse = huggingface.parser(task_class("text-classification"))
        assert parse(body_of("http://x/", rows)).rows == plain
        tensors = json.loads(body_of("http://x/v2/models/m/infer", rows))["inputs"]
        assert {t["name"]: t["data"] for t in tensors} == {key: [row[key] for row in plain] for key in plain[0]}
    (tmp_path / "sound.wav").write_bytes(b"RIFF, say")
    for url in ("http://x/", "http://x/predict"):
        body = body_of(url, [{"audio": str(tmp_path / "sound.wav")}])
        assert huggingface.parser(task_class("audio-classification"))(body).rows == [{"audio": b"RIFF, say"}]
    with pytest.raises(LoadError, match=r"/v2/models/m/infer takes arrays, .*\. Name http://x/predict"):
        body_of("http://x/v2/models/m/infer", [{"image": str(tmp_path / "sound.wav")}])


def test_a_server_of_pictures_is_measured(tmp_path):
    """One picture a request, in base64; batches are left out, since no request holds one."""
    picture = b"a picture"
    rows = [{"id": str(i), "image": inline(picture)} for i in range(5)]
    seen = set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version, wbufsize = "HTTP/1.1", -1

        def do_POST(self):
            seen.add(b64decode(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["inputs"]))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        target = Target("server", "http", "", f"http://127.0.0.1:{server.server_port}/predict")
        how = spec.Bench(rounds=1, round_seconds=0.2, precision=None, batch_sizes=(8,))
        found = bench(how, [target], rows, "server", 0, tmp_path)
        server.shutdown()
    assert found.latency["server"].samples > 5
    assert found.cells["server"] == []
    assert seen == {picture}


def test_a_closed_loop_asks_as_fast_as_it_is_answered(finished, texts_file):
    with serving(finished / "artifact") as url:
        found = load(job(url + "/predict", texts_file, connections=2))
    assert found.errors == 0
    # two clients that never pause: the time they waited is the time there was, twice
    assert sum(found.latency_ms) / 1e3 == pytest.approx(2 * found.seconds, rel=0.3)


@pytest.mark.parametrize("poisson", [False, True])
def test_an_open_loop_keeps_its_rate(finished, texts_file, poisson):
    with serving(finished / "artifact") as url:
        found = load(job(url + "/predict", texts_file, rate=60.0, poisson=poisson, seconds=2.0))
    assert len(found.latency_ms) == pytest.approx(120, rel=0.02 if not poisson else 0.35)


def test_an_open_loop_charges_a_stall_to_every_request_that_was_due_in_it(finished, texts_file):
    """A closed loop asks once in a stall of 0.6 s and sees one slow answer; 100 a second were due in truth."""
    slow = {}
    for name, rate in (("closed", None), ("open", 100.0)):
        with serving(finished / "artifact", stall_at=1.0, stall_s=0.6) as url:
            found = load(job(url + "/predict", texts_file, connections=1 if rate is None else 8, rate=rate))
        slow[name] = int((np.array(found.latency_ms) > 150).sum())
    assert slow["closed"] <= 2
    assert slow["open"] >= 25


def test_errors_are_counted_and_are_no_latency(finished, texts_file):
    with serving(finished / "artifact") as url:
        with pytest.raises(LoadError, match="answers 404"):
            load(job(url + "/elsewhere", texts_file))
    with pytest.raises(LoadError, match=r"does not answer: .*Is the server up"):
        load(job(url + "/predict", texts_file))
    with pytest.raises(LoadError, match="is no http address"):
        Connection("ftp://127.0.0.1/x")


def test_bench_puts_loads_on_a_server_and_compares_it_with_the_bare_file(kdexport, finished, tmp_path):
    flags = ["--rounds", 2, "--round-seconds", 0.2, "--precision", 0, "--batch-sizes", 0, "--out", tmp_path / "out"]
    flags += ["--connections", "1,4", "--rate", "50%", "--load-seconds", 0.5, "--json"]
    with serving(finished / "artifact") as url:
        found = kdexport("bench", f"{finished}:int8", url + "/predict", *flags)
    assert found.returncode == 0, found.stderr
    file, server = json.loads(found.stdout)["variants"]
    assert server["runtime"] == "http"
    assert server["latency_ms"]["p50"] > file["latency_ms"]["p50"]
    assert server["footprint"] is None  # that would be the client's
    cells = {(cell["scenario"], cell["at"]): cell for cell in server["cells"]}
    assert {("closed", 1.0), ("closed", 4.0)} <= set(cells)
    (opened,) = (cell for cell in server["cells"] if cell["scenario"] == "open")
    peak = max(cell["per_second"] for cell in server["cells"] if cell["scenario"] == "closed")
    assert opened["at"] == pytest.approx(peak / 2, rel=0.01)
    assert all(cell["errors"] == 0 for cell in server["cells"])
    assert "Open loop: p50 by rate" in (tmp_path / "out" / "report.html").read_text()
