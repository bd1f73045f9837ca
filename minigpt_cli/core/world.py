"""The processes that train one model together: which of them this is, and how they agree. Knows nothing of models.

torchrun starts them and tells each its place through the environment. Whoever is not rank 0 does the same work and
keeps quiet. What a method here asks, every rank must ask at the same point: an answer takes all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from minigpt_cli.core.errors import MinigptError, ToldElsewhere, UserError

if TYPE_CHECKING:  # torch takes a second to import, which one process alone may not need
    from torch import Tensor
    from torch.distributed import Store


@dataclass(frozen=True)
class World:
    """Who this process is among the `size` ranks. The default is a process on its own."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the ranks of this host: which of its devices is ours
    launch: str | None = None  # what the launcher calls this start of all of them
    restarts: int = 0  # how often the launcher had to start them anew

    @property
    def leads(self) -> bool:
        """Whether this rank talks and writes."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """This rank's part of `n` things, which the number of ranks divides."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def any(self, flag: object) -> bool:
        """Whether it is true of any rank."""
        return bool(self.largest(int(bool(flag))))

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if self.size == 1:
            return number
        import torch
        import torch.distributed as dist

        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    def total(self, values: Tensor) -> Tensor:
        """The sum over all ranks, element by element; `values` itself where there is one."""
        if self.size == 1:
            return values
        import torch.distributed as dist

        total = values.clone()
        dist.all_reduce(total)
        return total

    def texts(self, text: str) -> list[str]:
        """What each rank says, by rank."""
        if self.size == 1:
            return [text]
        import torch
        import torch.distributed as dist

        data = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(text.encode())]))
        longest = max(1, *(int(size) for size in sizes))
        padded = torch.nn.functional.pad(data[:longest], (0, max(0, longest - len(data))))
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return [bytes(part[: int(size)].tolist()).decode() for part, size in zip(parts, sizes, strict=True)]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """All ranks come through the block, or none: what is wrong with one is wrong with all, and told once."""
        error: MinigptError | None = None
        try:
            yield
        except MinigptError as raised:
            error = raised
        told = self.texts("" if error is None else str(error))
        first = next((rank for rank, text in enumerate(told) if text), None)
        if error is not None and (first == self.rank or isinstance(error, ToldElsewhere)):
            raise error
        if first is not None:
            raise ToldElsewhere(error.exit_code if error is not None else 1)

    def everyones(self, error: MinigptError) -> MinigptError:
        """An error that every rank has come to, to be told by one."""
        return error if self.leads else ToldElsewhere(error.exit_code)

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Raises UserError where a rank was started with other settings or other data than rank 0."""
        first = json.loads(self.texts(json.dumps(facts))[0])
        for key, ours in json.loads(json.dumps(facts)).items():
            if first.get(key) != ours:
                raise UserError(f"{key} is {ours} here, but {first.get(key)} for rank 0; start all ranks alike")


ALONE = World()


def world_of_environment() -> World:
    """Who torchrun says we are. Raises UserError where it says so in part only."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return ALONE
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        world = World(
            rank, size, int(os.environ.get("LOCAL_RANK", rank)), os.environ.get("TORCHELASTIC_RUN_ID"),
            int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers: {error}") from None
    if not 0 <= rank < size or (size > 1 and "MASTER_ADDR" not in os.environ):
        raise UserError(
            "several ranks are started by torchrun: torchrun --standalone --nproc-per-node 2 -m minigpt_cli"
        )
    return world


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """Inside the block the ranks are connected: through gloo, and for tensors on NVIDIA GPUs through NCCL.

    A rank that dies closes its connections, which the others notice at the next thing that they do together: a
    MinigptError.
    """
    world = world_of_environment()
    if world.size == 1:
        yield world
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank % torch.cuda.device_count())
    try:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=_fresh_store(world), rank=world.rank, world_size=world.size)
        yield world
    except RuntimeError as error:
        if not _is_lost_contact(error):
            raise
        raise MinigptError("lost contact with another rank, which may have died; --resume goes on") from error
    dist.destroy_process_group()  # not after an error: it would wait for ranks that may be gone
    # DDP and FSDP outlive that, and gloo's threads with them: one that is the last to drop a tensor of the last
    # exchange asks for Python's lock, and aborts the process where Python has begun to end (pytorch#179291).
    time.sleep(0.1)


def _fresh_store(world: World) -> Store:
    """A place for the ranks to leave one another their addresses, with nothing in it from before.

    torchrun's own outlives the processes that it starts again, which may then find the addresses of the dead
    (pytorch#135712). So rank 0 opens a room of a new name, and lets in whoever knocks: a rank that came to an old room
    does not find its knock answered there, and looks for another.
    """
    import torch.distributed as dist

    shared: Store = next(iter(dist.rendezvous("env://", world.rank, world.size)))[0]
    if world.leads:
        room = secrets.token_hex(8)
        shared.set("room", room)
        knocks = [shared.get(f"{room}/{rank}").decode() for rank in range(1, world.size)]  # waits for each
        shared.set(f"{room}/guests", ",".join(knocks))
        return dist.PrefixStore(room, shared)
    knock = secrets.token_hex(8)
    while True:
        room = shared.get("room").decode()
        shared.set(f"{room}/{world.rank}", knock)
        with contextlib.suppress(dist.DistStoreError):  # nobody opened within a second
            shared.wait([f"{room}/guests"], timedelta(seconds=1))
            if knock in shared.get(f"{room}/guests").decode():
                return dist.PrefixStore(room, shared)
        time.sleep(0.05)


def _is_lost_contact(error: RuntimeError) -> bool:
    import torch.distributed as dist

    words = ("gloo", "connection closed", "connection reset", "timed out waiting", "nccl")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)
