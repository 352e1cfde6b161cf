"""A gRPC call's life, in this process: keys, deadlines, too much work, a server that loads or ends."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Iterator
from contextlib import asynccontextmanager

import grpc
import msgspec
import pytest
import uvloop
from grpc_calls import TEXTS, request
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from kdexport.serve import grpc as ours
from kdexport.serve.accesslog import AccessLog
from kdexport.serve.app import App
from kdexport.serve.batching import Batcher
from kdexport.serve.registry import Models
from kdexport.serve.settings import Settings

Code = grpc.StatusCode


@pytest.fixture(scope="module")
def models(finished) -> Models:
    found = Models({"news": (finished, None)}, 32, 2048)
    found.load("news")
    return found


@asynccontextmanager
async def listening(models: Models, max_queue: float = 10.0, **settings: object):
    """The app with gRPC alone, in this loop; (app, address, stub)."""
    app = App(models, Settings(**{"access_log": "off"} | settings))
    app.batcher = Batcher(threads=1, max_batch_tokens=2048, max_wait=0, max_queue=max_queue, rate=1e4)
    app.loaded = True
    listener = await ours.listen(app, "127.0.0.1", 0)
    try:
        async with grpc.aio.insecure_channel(listener.address) as channel:
            yield app, listener, GRPCInferenceServiceStub(channel)
    finally:
        await listener.stop(0)
        await app.batcher.close()


def run(main) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)


class Held:
    """Batches that begin and don't end until they are let go."""

    def __init__(self, run) -> None:
        self._run, self._go = run, threading.Event()
        self.ran: list[int] = []

    def run(self, rows):
        self.ran.append(len(rows))
        assert self._go.wait(20)
        return self._run(rows)

    async def begun(self) -> None:
        await until(lambda: self.ran)

    def let_go(self) -> None:
        self._go.set()


@pytest.fixture
def held(models, monkeypatch) -> Iterator[Held]:
    version = models.find("news")
    found = Held(version.run)
    monkeypatch.setattr(version, "run", found.run)
    yield found
    found.let_go()


async def until(met) -> None:
    async with asyncio.timeout(20):
        while not met():
            await asyncio.sleep(0.01)


def test_keys(models):
    async def main() -> None:
        async with listening(models, api_keys=("first-key", "second-key")) as (_, __, stub):
            assert (await stub.ServerLive(pb.ServerLiveRequest())).live
            assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
            for metadata in (
                [],
                [("authorization", "Bearer no")],
                [("authorization", "first-key")],
                [("x-api-key", "")],
            ):
                for call in (
                    stub.ModelInfer(request(TEXTS), metadata=metadata),
                    stub.ModelMetadata(pb.ModelMetadataRequest(name="news"), metadata=metadata),
                    stub.ModelReady(pb.ModelReadyRequest(name="news"), metadata=metadata),
                ):
                    assert await call.code() == Code.UNAUTHENTICATED
                    wrong = metadata == [("authorization", "Bearer no")]
                    assert ("not known here" if wrong else "is needed") in await call.details()
            for metadata in ([("authorization", "Bearer first-key")], [("x-api-key", "second-key")]):
                assert (await stub.ModelInfer(request(TEXTS), metadata=metadata)).outputs

    run(main())


def test_deadlines_and_cancelled_calls(models, held):
    async def main() -> None:
        async with listening(models) as (app, _, stub):
            first = asyncio.ensure_future(stub.ModelInfer(request(TEXTS[:1])))
            await held.begun()  # the one thread is busy now: what follows waits
            late = stub.ModelInfer(request(TEXTS), timeout=0.1)
            inside = request(TEXTS)
            inside.parameters["timeout"].int64_param = 100_000
            later = stub.ModelInfer(inside)
            cancelled = asyncio.ensure_future(stub.ModelInfer(request(TEXTS)))
            await until(lambda: app.running == 4)
            cancelled.cancel()
            for call in (late, later):
                assert await call.code() == Code.DEADLINE_EXCEEDED
            assert "the request's deadline" in await later.details()
            await until(lambda: app.running == 1)
            held.let_go()
            await first
            await stub.ModelInfer(request(TEXTS[:2]))
            assert held.ran == [1, 2]  # nobody waited for the others, so they never ran
            counted = app.metrics.text().decode()
            for code, times in (("200", 2), ("504", 2), ("499", 1)):
                assert re.search(rf'requests_total{{code="{code}",model="news",protocol="grpc"}} {times}\.0', counted)

    run(main())


def test_what_is_too_much_is_refused_with_the_time_to_come_again(models, held):
    async def main() -> None:
        async with listening(models, max_queue=0.01) as (app, _, stub):
            calls = [stub.ModelInfer(request(TEXTS)) for _ in range(40)]
            await held.begun()
            await until(lambda: sum(call.done() for call in calls) == 40 - app.running)
            refused = [call for call in calls if call.done()]
            assert 30 < len(refused) < 40
            for call in refused:
                assert (await call.code(), await call.details()) == (
                    Code.RESOURCE_EXHAUSTED,
                    "too much work is waiting",
                )
                assert int(dict(await call.trailing_metadata())["retry-after"]) >= 1
            held.let_go()
            assert {await call.code() for call in calls if call not in refused} == {Code.OK}

    run(main())


def test_loading_draining_and_closing(models, held):
    async def main() -> None:
        async with listening(models) as (app, listener, stub):
            app.loaded = False
            assert not (await stub.ServerReady(pb.ServerReadyRequest())).ready
            assert not (await stub.ModelReady(pb.ModelReadyRequest(name="news"))).ready
            assert (await stub.ServerLive(pb.ServerLiveRequest())).live
            early = stub.ModelInfer(request(TEXTS))
            assert await early.code() == Code.UNAVAILABLE
            assert dict(await early.trailing_metadata())["retry-after"] == "1"
            app.loaded = app.draining = True  # as during the drain delay: not ready, and still answering
            assert not (await stub.ServerReady(pb.ServerReadyRequest())).ready
            begun = asyncio.ensure_future(stub.ModelInfer(request(TEXTS)))
            await held.begun()
            app.closing = True
            assert await stub.ModelInfer(request(TEXTS)).code() == Code.UNAVAILABLE
            stopping = asyncio.ensure_future(listener.stop(20.0))
            await asyncio.sleep(0.6)
            assert await stub.ModelInfer(request(TEXTS)).code() == Code.UNAVAILABLE
            assert not stopping.done()
            held.let_go()
            assert len((await begun).outputs) == 4
            await asyncio.wait_for(stopping, 10)

    run(main())


def test_calls_beyond_the_grace_are_ended(models, held):
    async def main() -> None:
        async with listening(models) as (app, listener, stub):
            begun = stub.ModelInfer(request(TEXTS))
            await held.begun()
            app.closing = True
            await listener.stop(0.1)
            assert await begun.code() == Code.UNAVAILABLE
            held.let_go()

    run(main())


def test_unloaded_models(models):
    async def main() -> None:
        async with listening(models) as (_, __, stub):
            version = models.find("news")
            models.unload("news")
            try:
                assert not (await stub.ModelReady(pb.ModelReadyRequest(name="news"))).ready
                with pytest.raises(grpc.aio.AioRpcError) as found:
                    await stub.ModelMetadata(pb.ModelMetadataRequest(name="news"))
                assert found.value.code() == Code.UNAVAILABLE
                with pytest.raises(grpc.aio.AioRpcError) as found:
                    await stub.ModelReady(pb.ModelReadyRequest(name="other"))
                assert found.value.code() == Code.NOT_FOUND
            finally:
                models._current["news"] = version

    run(main())


def test_our_own_faults_are_ours_and_told_to_the_operator_alone(models, monkeypatch):
    def broken(rows):
        raise ZeroDivisionError("a secret")

    async def main(log: int) -> None:
        async with listening(models, access_log="all") as (app, _, stub):
            app.log = AccessLog("all", fd=log)
            with pytest.raises(grpc.aio.AioRpcError) as found:
                await stub.ModelInfer(request(TEXTS))
            assert found.value.code() == Code.INTERNAL
            assert found.value.details() == "the server could not answer this; its log says why"
            app.log.close()

    monkeypatch.setattr(models.find("news"), "run", broken)
    read, write = os.pipe()
    run(main(write))
    os.close(write)
    line = msgspec.json.decode(os.read(read, 100_000))
    os.close(read)
    assert (line["code"], line["protocol"], line["model"], line["rows"]) == (500, "grpc", "news", 3)
    assert (line["path"], line["client"]) == ("/inference.GRPCInferenceService/ModelInfer", "127.0.0.1")
    assert "a secret" in line["fault"]
    assert "striker" not in str(line)
