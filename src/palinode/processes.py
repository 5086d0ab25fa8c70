"""Several processes, one run: process 0 does all of it, and the others help where a model computes.

Under torchrun or `accelerate launch` process 0 decides, speaks and writes as if it were alone. The others
wait: where a model reads rows or is trained, process 0 sends them the call, the live model in it, and each
does its share. So all have the very weights that process 0 has, whatever was done to them there, and nothing
but process 0 decides what is done. Within such a call process 0 does alone what would be another.

A process that fails says why in the common store and closes its connections, which ends the run of all.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from typing import Any, TypeVar, cast

import cloudpickle
import torch
from torch import Tensor, distributed, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from palinode.errors import InputError, PalinodeError, ProcessError, first_line, told_as

Result = TypeVar("Result")
Work = TypeVar("Work", bound=Callable[..., Any])

PATIENCE = timedelta(days=2)
"""How long a process waits for another: process 0 may write, or ask a judge, for hours."""
FAREWELL = 30.0
"""Seconds in which process 0 notices by itself that another one failed."""
SMALL = 2048
"""Bytes up to which a tensor of the processor travels within the message."""

PLAIN = (Tensor, nn.Parameter, nn.Buffer)
"""Kinds of tensors that can be sent: others are quantised, or lie in parts on several devices."""

GO_ON, GIVE_UP, END = "go on", "give up", "end"
"""What process 0 sends where it is no call: that a call goes on, that it is over, that all is over."""


@dataclass
class _Team:
    """The processes of a run, as one of them knows them."""

    rank: int
    count: int
    store: Any
    busy: bool
    """Whether this process is within a call that all have."""


_team: _Team | None = None


class _GivenUp(Exception):  # noqa: N818 - no error: process 0 has said so
    """Ends a call of a process that helps."""


def world() -> tuple[int, int]:
    """Return which process this is and how many share the call; (0, 1) where it is alone."""
    return (_team.rank, _team.count) if _team else (0, 1)


def sharded() -> bool:
    """Return whether processes that train divide the weights as well, as accelerate's setting says."""
    return world()[1] > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1", "yes")


def together(work: Callable[[], Result]) -> Result | None:
    """Do `work` in process 0, with the help of the others where there are several; they return None.

    Every process calls it. Raises ProcessError where another one failed or is gone.
    """
    global _team
    if _team is not None or _announced() < 2:
        return work()
    _team = team = _joined()
    try:
        if not team.rank:
            return _lead(team, work)
        _help(team)
        return None
    finally:
        _team = None
        with suppress(Exception):
            distributed.destroy_process_group()


def _announced() -> int:
    """Return how many processes there shall be, as RANK and WORLD_SIZE say; raises InputError."""
    try:
        rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        raise InputError("RANK and WORLD_SIZE are set, but are not numbers; unset or mend them") from None
    if not 0 <= rank < count:
        raise InputError(f"there is no process {rank} of {count}; number them from 0 (RANK, WORLD_SIZE)")
    return count


def _joined() -> _Team:
    """Join the others: objects go over the processor, tensors of a GPU from one to the other."""
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    advice = "start them with torchrun or accelerate launch, which set RANK, WORLD_SIZE and MASTER_ADDR"
    with told_as(ProcessError, "the other processes cannot be reached", advice, RuntimeError, ValueError):
        store, rank, count = next(rendezvous("env://", timeout=timedelta(minutes=10)))
        store.set_timeout(PATIENCE)
        group = PrefixStore("group", store)
        distributed.init_process_group(backend, store=group, rank=rank, world_size=count, timeout=PATIENCE)
    return _Team(rank, count, PrefixStore("palinode", store), busy=rank > 0)


def _lead(team: _Team, work: Callable[[], Result]) -> Result:
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(team.store, over), daemon=True)
    watch.start()
    try:
        with _connected():
            return work()
    finally:
        over.set()
        watch.join(FAREWELL)  # or Python's end finds it inside of torch, which aborts
        if not team.busy:
            with suppress(Exception):
                _broadcast(END)


def _watch(store: Any, over: threading.Event) -> None:
    """End process 0 where another one failed and nothing tells: a GPU may wait for it without end."""
    while not over.wait(1.0):
        said = _complaint(store)
        if said and not over.wait(FAREWELL):
            print(f"palinode: {said}", file=sys.stderr, flush=True)
            os._exit(2)


def _help(team: _Team) -> None:
    """Do what process 0 sends until all is over; whatever ends it otherwise, process 0 speaks of it.

    It ends well all the same, lest process 0 be killed before it has spoken.
    """
    with suppress(KeyboardInterrupt, ProcessError):
        try:
            _serve()
        except ProcessError:  # the others are gone
            raise
        except Exception as error:
            with suppress(Exception):
                said = f"process {team.rank} of {team.count} failed: {first_line(error)}"
                team.store.set("failed", said)


def _serve() -> str:
    """Take calls from process 0 until it sends something else, and return that."""
    while not isinstance(message := _receive(), str):
        function, args, others = message
        with suppress(_GivenUp):
            found = function(*args, **others)
            if isinstance(found, Iterator):
                for _ in found:
                    pass
        del message, function, args, others  # a model is not to stay in memory until the next call
    return message


def _complaint(store: Any) -> str | None:
    """Return what a process that failed has said, if one has."""
    with suppress(Exception):
        return store.get("failed").decode() if store.check(["failed"]) else None
    return None


# Calls


def everywhere(
    function: Callable[..., Result],
    *args: Any,
    alone: Mapping[str, Any] | None = None,
    hollow: bool = False,
    **others: Any,
) -> Result:
    """Call a function in all processes with the same arguments, and return what process 0 has of it.

    `alone` are arguments of process 0 only; with `hollow` the others get parameters without their numbers. An
    error ends the run of all, but for what `meanwhile` says.
    """
    own = {**others, **(alone or {})}
    global _team
    if _team is None or _team.busy:
        team, _team = _team, None  # it computes as if there were no other
        try:
            return function(*args, **own)
        finally:
            _team = team
    with calling(function, *args, hollow=hollow, **others):
        return function(*args, **own)


@contextmanager
def calling(function: Callable[..., Any], *args: Any, hollow: bool = False, **others: Any) -> Iterator[None]:
    """Have the others call a function while process 0 calls it within the block; what it yields they take."""
    if team := _team:
        _broadcast((function, args, others), hollow)
        team.busy = True
    yield
    if team:
        team.busy = False  # after an error it stays true: nobody listens any more


@contextmanager
def meanwhile() -> Iterator[None]:
    """Let process 0, within a call of all, do what is within the block with new calls of the others.

    An error there ends the call of all, and nothing else.
    """
    team = _team
    if team is None:
        yield
    elif team.rank:
        if _serve() != GO_ON:
            raise _GivenUp
        yield
    else:
        team.busy = False
        try:
            yield
        except BaseException:
            if not team.busy:
                _broadcast(GIVE_UP)
            raise
        _broadcast(GO_ON)
        team.busy = True


def abandon() -> None:
    """Leave the others, as one of them is gone or this one is told to stop: it goes on by itself."""
    global _team
    _team = None


def divided(work: Work) -> Work:
    """Have a function of (model, rows), one result a row, work on its share of the rows in each process.

    Process r of n takes the rows r, r + n, r + 2n, …; few rows it reads alone, and those of a model that
    cannot be sent (quantised, or over several devices). An error in any process is raised.
    """

    @wraps(work)
    def over_all(model: nn.Module, rows: Sequence[Any], /, **others: Any) -> Any:
        if _team is None or _team.busy or len(rows) < 2 * _team.count or not _can_be_sent(model):
            return work(model, rows, **others)
        heard: dict[str, Any] = {name: others.pop(name) for name in ("on_progress", "say") if name in others}
        listener, left, count = heard.get("on_progress"), len(rows), _team.count

        def told(amount: int) -> None:
            nonlocal left
            step = min(amount * count, left)  # the others are about as far
            left -= step
            if listener and step:
                listener(step)

        if listener:
            heard["on_progress"] = told
        found, failure = everywhere(_own_share, over_all, model, list(rows), others, alone=heard)
        if failure is not None:
            raise failure
        told(len(rows))
        return found

    return cast(Work, over_all)


def _own_share(
    over_all: Any, model: nn.Module, rows: Sequence[Any], others: Mapping[str, Any], **heard: Any
) -> tuple[list[Any], Exception | None]:
    rank, count = world()
    own: tuple[Sequence[Any], Exception | None]
    try:
        own = over_all.__wrapped__(model, rows[rank::count], **others, **heard), None
    except PalinodeError as error:
        own = (), error
    shares = said_by_all(own)
    failure = next((error for _, error in shares if error is not None), None)
    if failure is not None or rank:
        return [], failure
    return [shares[place % count][0][place // count] for place in range(len(rows))], None


# Values


@contextmanager
def _connected() -> Iterator[None]:
    """Raise ProcessError, of what another process said, where it failed or is gone."""
    team = _team
    try:
        yield
    except RuntimeError as error:
        said = _complaint(team.store) if team else None
        signs = "onnect", "peer", "closed"
        if not (
            said or isinstance(error, distributed.DistBackendError) or any(s in str(error) for s in signs)
        ):
            raise
        said = said or "another process of this run is gone"
        raise ProcessError(f"{said}; the same command goes on where this one stopped") from error


def summed(value: Tensor, *, most: bool = False) -> Tensor:
    """Return the sum, or the maximum, of a tensor over all processes that share a call."""
    if _team is None:
        return value
    with _connected():
        distributed.all_reduce(value, distributed.ReduceOp.MAX if most else distributed.ReduceOp.SUM)
    return value


def said_by_all(value: Result) -> list[Result]:
    """Return what each process says, in all of them."""
    found: list[Any] = [value] * world()[1]
    if _team is None:
        return found
    with _connected():
        distributed.all_gather_object(found, value)
    return found


def _broadcast(message: Any, hollow: bool = False) -> None:
    stream = io.BytesIO()
    packer = _Pickler(stream, hollow)
    packer.dump(message)
    tensors = packer.tensors
    own = [isinstance(one, nn.Parameter) for one in tensors]
    facts = [
        (one.shape, one.dtype, "meta" if hollow and yes else one.device.type, yes, one.requires_grad)
        for one, yes in zip(tensors, own, strict=True)
    ]
    with _connected():
        distributed.broadcast_object_list([stream.getvalue(), facts], src=0)
        for one, (*_, device, _, _) in zip(tensors, facts, strict=True):
            _exchange(one.detach().contiguous(), device)


def _receive() -> Any:
    found: list[Any] = [None, None]
    with _connected():
        distributed.broadcast_object_list(found, src=0)
        message, facts = found
        tensors: list[Tensor] = []
        for shape, dtype, device, is_parameter, trained in facts:
            one = torch.empty(shape, dtype=dtype, device=device)
            _exchange(one, device)
            tensors.append(nn.Parameter(one, requires_grad=trained) if is_parameter else one)
    reader = pickle.Unpickler(io.BytesIO(message))
    reader.persistent_load = tensors.__getitem__  # type: ignore[method-assign]
    return reader.load()


def _exchange(one: Tensor, device: str) -> None:
    """Send a tensor, or receive into it, as bytes."""
    if one.numel() and device != "meta":
        distributed.broadcast(one.view(-1).view(torch.uint8), src=0)


def _can_be_sent(model: nn.Module) -> bool:
    return all(
        type(one) in PLAIN and not one.is_meta and one.layout == torch.strided
        for one in (*model.parameters(), *model.buffers())
    ) and not hasattr(model, "hf_device_map")


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Packs a call: tensors lie apart, and functions made within others go with what they enclose."""

    def __init__(self, stream: io.BytesIO, hollow: bool) -> None:
        super().__init__(stream, pickle.HIGHEST_PROTOCOL)
        self.hollow = hollow
        self.tensors: list[Tensor] = []
        self.places: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        """Return the place of a tensor that lies apart, one for all that is the same tensor."""
        if not isinstance(obj, Tensor):
            return None
        if type(obj) not in PLAIN:
            raise ProcessError(f"a model with {type(obj).__name__} cannot be sent; start one process")
        empty = self.hollow and isinstance(obj, nn.Parameter)
        if obj.device.type == "cpu" and obj.nbytes <= SMALL and not empty:
            return None
        if id(obj) not in self.places:
            self.places[id(obj)] = len(self.tensors)
            self.tensors.append(obj)
        return self.places[id(obj)]
