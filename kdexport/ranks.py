"""Several processes that share one run, as torchrun and accelerate launch start them.

The first one, rank 0, runs the commands as a single process does. The others wait: when it calls a function that is
marked `together`, they get its name and arguments and run it too, each its part; else they do nothing.
"""

import os
import pickle
import re
import secrets
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from kdexport.errors import ElsewhereError, Interrupted, KdexportError, RunError, first_line
from kdexport.files import TEMPORARY

P = ParamSpec("P")
T = TypeVar("T")

# The launcher's variables, which no process that this one starts may inherit.
_LAUNCHED = re.compile("(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCH(ELASTIC|_NCCL)_.*")
_WAIT = timedelta(days=30)  # followers wait while rank 0 exports and measures
_PASS = timedelta(hours=2)  # the longest step, or difference between ranks, in what they do together
_SEEN_S, _GRACE_S = 10.0, 10.0  # for a file of another machine to show; for a process to end by itself after another
_KEY = "end"  # in the store: who failed first, and the exit code

_begun = 0  # worlds of this process
_world: "_World | None" = None


@dataclass
class _World:
    rank: int
    size: int
    local: int
    store: Any  # of keys, shared by all
    group: Any  # of the calls
    links: list[socket.socket]  # of rank 0 to each other, of the others to it: they show who ended, and how
    owned: bool  # whether the process group is ours
    variables: dict[str, str]
    leads: bool = False  # rank 0 runs the command, the others wait for calls
    inside: bool = False  # a call that all run
    over: threading.Event = field(default_factory=threading.Event)
    watcher: threading.Thread | None = None
    heard: int | None = None  # the exit code of a rank that failed
    lost: bool = False  # whether one ended without a word

    @property
    def alone(self) -> bool:
        return self.leads and not self.inside

    def sent(self, value: Any = None) -> Any:
        """Return rank 0's value on every rank."""
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def run(self, call: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Run a call that all ranks run, in the environment that the launcher made."""
        self.inside = True
        os.environ.update(self.variables)
        try:
            return call(*arguments, **options)
        finally:
            self.inside = False
            _take_variables()

    def claim(self, code: int) -> int | None:
        """Be the rank that failed, and return None; or return the exit code of the one that was first."""
        mine = f"{self.rank} {code}"
        try:
            first = self.store.compare_set(_KEY, "", mine).decode()
        except RuntimeError:  # the store's process ended too
            seen(lambda: self.heard is not None, 2.0)
            return self.heard
        return None if first == mine else int(first.split()[1])

    def end(self) -> None:
        """End this process because of another, with a line unless one was printed."""
        code = self.claim(2)
        if code is None:
            os.write(2, f"error: {_lost(self.size)}\n".encode())
        os._exit(code or 2)

    def tell(self, code: int) -> None:
        """Let the others know how this rank ends."""
        for link in self.links:
            with suppress(OSError):
                link.sendall(bytes([code]))


def size() -> int:
    """Return the number of processes."""
    launched = int(os.environ.get("WORLD_SIZE") or 1) if os.environ.get("RANK") else 1
    return _world.size if _world else launched


def leads() -> bool:
    """Return whether this is rank 0, or the only process."""
    return _world.rank == 0 if _world else size() == 1 or os.environ["RANK"] == "0"


def together(function: Callable[P, T]) -> Callable[P, T]:
    """Mark a function of a module that all ranks run when rank 0 calls it; its arguments are pickled."""

    @wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> T:
        world = _world
        if world is None or world.inside:
            return function(*arguments, **options)
        world.sent(pickle.dumps((function.__module__, function.__name__, arguments, options)))
        return world.run(function, *arguments, **options)

    return call


# --- in a call that all run; where one process is alone it gets all


def share(items: Sequence[T], chunk: int = 1, one_a_machine: bool = False) -> list[T]:
    """Return this rank's part of items that are dealt out in chunks."""
    if _world is None or _world.alone:
        return list(items)
    members = [i for i, local in enumerate(gathered(_world.local)) if local == 0 or not one_a_machine]
    if _world.rank not in members:
        return []
    starts = range(members.index(_world.rank) * chunk, len(items), len(members) * chunk)
    return [item for start in starts for item in items[start : start + chunk]]


def gathered(value: T) -> list[T]:
    """Return every rank's value, in order, on every rank."""
    if _world is None or _world.alone:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * _world.size
    dist.all_gather_object(found, value, group=_world.group)
    return found


def agreed(decide: Callable[[], T]) -> T:
    """Return what rank 0 decides."""
    if _world is None or _world.alone:
        return decide()
    found: T = _world.sent(decide() if _world.rank == 0 else None)
    return found


def part() -> tuple[int, int]:
    """Return this rank and the number of ranks."""
    return (0, 1) if _world is None or _world.alone else (_world.rank, _world.size)


def check_shared(folder: Path, what: str, fix: str) -> None:
    """Raise RunError unless every process sees in a folder what rank 0 writes there."""
    if _world is None:
        return
    token = folder / f".{secrets.token_hex(6)}{TEMPORARY}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        token.touch()
        blind = _blind(token)
    except OSError as error:
        raise RunError(f"{what} {folder} can't be written: {error.strerror}", fix) from None
    finally:
        with suppress(OSError):
            token.unlink(missing_ok=True)
    if blind:
        raise RunError(f"{what} {folder} is not the same folder for process {blind[0]} of {size()}", fix)


@together
def _blind(token: Path) -> list[int]:
    """Return the ranks that don't see a file."""
    return [rank for rank, sees in enumerate(gathered(seen(token.exists))) if not sees]


def seen(is_there: Callable[[], bool], seconds: float = _SEEN_S) -> bool:
    """Return whether something is there, after a while if need be: shared folders show others' files late."""
    until = time.monotonic() + seconds
    while not (found := is_there()) and time.monotonic() < until:
        time.sleep(0.1)
    return found


# --- joining, leading and following


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes, if there are any, and end with them: one prints its error, the others nothing."""
    global _world
    if _world is not None or size() == 1:
        yield
        return
    world = _world = _join()
    before = _on_terminate(world)
    try:
        with _silent() if world.rank else nullcontext():
            yield
        world.tell(0)
    except SystemExit:
        world.tell(0)
        raise
    except BaseException as error:
        before = None  # the launcher may end this process before it has printed its line
        raise _ending(world, error) from (error if "--debug" in sys.argv else None)
    finally:
        world.over.set()
        _world = None
        os.environ.update(world.variables)
        if before is not None:
            signal.signal(signal.SIGTERM, before)
        _leave(world)


@contextmanager
def led(facts: Callable[[], Mapping[str, str]]) -> Iterator[bool]:
    """Yield True on rank 0; on the others do its calls until it is done, then yield False.

    Raises:
        RunError: `facts` (name → value), such as the spec's keys, differ between the processes.
    """
    world = _world
    if world is None:
        yield True
        return
    _compare(dict(facts()))
    if world.rank == 0:
        world.leads = True
        yield True
        world.leads = False
        world.sent(None)
        return
    while call := world.sent():
        module, name, arguments, options = pickle.loads(call)
        world.run(getattr(import_module(module), name).__wrapped__, *arguments, **options)
    yield False


def _compare(mine: dict[str, str]) -> None:
    every = gathered(mine)
    for rank, theirs in enumerate(every):
        for name in [*every[0], *theirs]:
            if (first := every[0].get(name)) != (other := theirs.get(name)):
                both = f"{name} is {first} for process 0, {other} for process {rank}"
                fix = "Start all of them with the same command, in the same folder"
                raise RunError(f"the processes were not started alike: {both}", fix)


def _join() -> _World:
    global _begun
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings would come from every process
    import torch
    import torch.distributed as dist
    from torch.distributed import distributed_c10d
    from torch.distributed.rendezvous import rendezvous

    local, cuda = int(os.environ.get("LOCAL_RANK") or 0), torch.cuda.is_available()
    try:
        if owned := not dist.is_initialized():
            shared, rank, size = next(rendezvous("env://"))
            if cuda:
                torch.cuda.set_device(local % torch.cuda.device_count())
            store = distributed_c10d.PrefixStore(f"kdexport/{_begun}", shared)
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PASS)
        else:
            store = distributed_c10d.PrefixStore(f"kdexport/{_begun}", distributed_c10d._get_default_store())
        _begun += 1
        rank, size = dist.get_rank(), dist.get_world_size()
        group = dist.new_group(backend="gloo", timeout=_WAIT)
        links = _connected(store, rank, size)
    except (RuntimeError, ValueError, OSError) as error:
        what = f"the processes that were started together don't reach each other: {first_line(error)}"
        raise RunError(what, "Look at the launcher's address and port, and at the firewall") from None
    world = _World(rank, size, local, store, group, links, owned, _take_variables())
    world.watcher = threading.Thread(target=_watch, args=(world,), name="watch", daemon=True)
    world.watcher.start()
    return world


def _connected(store: Any, rank: int, size: int) -> list[socket.socket]:
    """Connect rank 0 with each of the others."""
    if rank:
        port, token = store.get("link").decode().split()
        link = socket.create_connection((os.environ.get("MASTER_ADDR") or "localhost", int(port)), timeout=60.0)
        link.sendall(token.encode())
        return [link]
    token, links = secrets.token_hex(16), list[socket.socket]()
    dual = socket.has_dualstack_ipv6()
    with socket.create_server(("", 0), family=[socket.AF_INET, socket.AF_INET6][dual], dualstack_ipv6=dual) as server:
        server.settimeout(300.0)
        store.set("link", f"{server.getsockname()[1]} {token}")
        while len(links) < size - 1:
            link, _ = server.accept()
            link.settimeout(10.0)
            with suppress(OSError):
                if link.recv(len(token), socket.MSG_WAITALL) == token.encode():
                    links.append(link)
                    continue
            link.close()
    return links


def _take_variables() -> dict[str, str]:
    return {name: os.environ.pop(name) for name in list(os.environ) if _LAUNCHED.fullmatch(name)}


@contextmanager
def _silent() -> Iterator[None]:
    with Path(os.devnull).open("w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        yield


# --- how it ends


def _watch(world: _World) -> None:
    """Hear how the others end; where one ended without a word, end this process unless it does so itself."""
    links = list(world.links)
    with suppress(OSError, ValueError):  # of links that are closed, as this process ends
        while links and not world.over.is_set():
            for link in select.select(links, [], [], 0.5)[0]:
                said = b""
                with suppress(OSError):
                    said = link.recv(1)
                links.remove(link)
                if said != b"\0":
                    world.heard, world.lost = (said[0], False) if said else (None, True)
                    if not world.over.wait(_GRACE_S):
                        world.end()


def _leave(world: _World) -> None:
    """Close the connections, so that ranks that still wait see the end of this one."""
    import torch.distributed as dist

    if world.watcher:  # a thread that is there when Python ends may abort it
        world.watcher.join(5.0)
    for link in world.links:
        link.close()
    with suppress(RuntimeError, ValueError):
        dist.destroy_process_group(None if world.owned else world.group)


def _ending(world: _World, error: BaseException) -> BaseException:
    """Return the error to raise: the rank's own where it is the first to fail."""
    interrupted = isinstance(error, KeyboardInterrupt | Interrupted)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, *([signal.SIGINT] if interrupted else [])):
            signal.signal(number, signal.SIG_IGN)
    lost = isinstance(error, RuntimeError) and _is_of_connection(error)
    code = 130 if interrupted else 2 if lost or isinstance(error, KdexportError | OSError) else 1
    first = world.claim(code)
    world.tell(code if first is None else first)
    if first is not None:
        return ElsewhereError(first)
    return _lost(world.size) if lost else error


def _is_of_connection(error: RuntimeError) -> bool:
    import torch.distributed as dist

    words = ("onnection closed", "onnection reset", "Broken pipe", "gloo", "Socket", "NCCL")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def _lost(size: int) -> RunError:
    what = f"one of the {size} processes of this run ended without a word, killed or out of memory"
    return RunError(what, "Run the same command again: finished stages are kept")


def _on_terminate(world: _World) -> Any:
    """Let SIGTERM, by which a launcher ends all when one has failed, end this process as that one's end does."""
    if threading.current_thread() is not threading.main_thread():
        return None

    def end(number: int, _: Any) -> None:
        if seen(lambda: world.lost or world.store.check([_KEY]), 1.0):
            world.end()
        os._exit(128 + number)

    return signal.signal(signal.SIGTERM, end)
