"""What runs behind an iteration: threads read blocks into a ring of turns, deal rows out and cut batches, ahead of use."""

import contextlib
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from activation_store.dtypes import ON_DISK, TORCH, decode
from activation_store.errors import InputError
from activation_store.shuffle import SLOTS, Ints, draws_from, turns_from

if TYPE_CHECKING:
    from activation_store.batches import Batches

_AHEAD = 2  # batches made before they are asked for
_PIECE = 1 << 19  # bytes of float32 made at once: memory is what limits reading, and a core's cache holds this much


def drawn_ahead(batches: "Batches", position: int, epochs: int | None) -> Iterator[tuple[Tensor, ...]]:
    """Yield the batches from row number `position` of the stream on, each a tensor for every hook."""
    on_cuda = batches.device is not None and batches.device.type == "cuda"
    maker = _OnCuda(batches, batches.device) if on_cuda and batches.device is not None else _OnCpu(batches)
    ring = _Ring(batches)
    turns: Iterable[Any] = ring.fill(position, epochs)
    draws: Iterable[Any] = ring.deal(turns, position, epochs)
    found: Iterable[Any] = ring.cut(draws, maker)
    if batches.source.in_background:
        turns = _Background(turns, SLOTS, ring.stopped, "batches-fill")
        draws = _Background(ring.deal(turns, position, epochs), 1, ring.stopped, "batches-deal")
        found = _Background(ring.cut(draws, maker), _AHEAD, ring.stopped, "batches-cut")
    try:
        for item in found:
            yield maker.arrived(item)
    finally:
        ring.close()
        for work in (found, draws, turns):
            if isinstance(work, _Background):
                work.thread.join()


class _Stopped(Exception):
    """The consumer has gone: a thread's reason to end."""


def _wait(act: Callable[..., Any], stopped: threading.Event, *args: Any) -> Any:
    """Put to or get from a queue, unless the iteration ends meanwhile."""
    while not stopped.is_set():
        with contextlib.suppress(queue.Full, queue.Empty):
            return act(*args, timeout=0.1)
    raise _Stopped


class _Background:
    """An iterator that is run by a thread of its own, up to `ahead` items before they are asked for."""

    def __init__(self, items: Iterable[Any], ahead: int, stopped: threading.Event, name: str) -> None:
        self.items, self.stopped = items, stopped
        self.queue: queue.Queue[tuple[str, Any]] = queue.Queue(ahead)
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        with contextlib.suppress(_Stopped):
            try:
                for item in self.items:
                    _wait(self.queue.put, self.stopped, ("item", item))
                _wait(self.queue.put, self.stopped, ("end", None))
            except _Stopped:
                raise
            except BaseException as error:
                _wait(self.queue.put, self.stopped, ("error", error))

    def __iter__(self) -> Iterator[Any]:
        while True:
            kind, item = _wait(self.queue.get, self.stopped)
            if kind == "error":
                raise item
            if kind == "end":
                return
            yield item


class _Ring:
    """SLOTS slots, each one turn of blocks of every hook, as they lie on disk.

    `fill` reads turns into free slots, `deal` works out which rows make a draw, `cut` gathers them; a slot is free again
    once the last draw that needs it has been given out.
    """

    def __init__(self, batches: "Batches") -> None:
        self.batches = batches
        self.stopped = threading.Event()
        source = batches.source
        self.slot_rows = batches.layout.turn_blocks * source.block_rows
        rows = SLOTS * self.slot_rows
        dtypes = [source.dtype(hook) for hook in batches.hooks]
        self.raw = [  # pages take memory when they are first written
            np.empty((rows, source.width(hook)), ON_DISK[dtype]) for hook, dtype in zip(batches.hooks, dtypes, strict=True)
        ]
        self.scales = [np.empty(rows, np.float32) if dtype == "int8" else None for dtype in dtypes]
        self.scout = ThreadPoolExecutor(1, thread_name_prefix="batches-expect") if source.in_background else None
        self.free: queue.Queue[int] = queue.Queue()
        for slot in range(SLOTS):
            self.free.put(slot)

    def fill(self, position: int, epochs: int | None) -> Iterator[int]:
        """Read turns into free slots, in the order in which draws need them; yield the slot of each."""
        batches, source = self.batches, self.batches.source
        for order, turn in turns_from(batches.kept, batches.layout, batches.seed, position, epochs):
            slot = _wait(self.free.get, self.stopped)
            if turn + 1 < order.turns:  # the disk fetches one turn while the one before is copied and summed
                self._expect(order.blocks(turn + 1))
            blocks = order.blocks(turn)
            room = slice(slot * self.slot_rows, slot * self.slot_rows + len(blocks) * source.block_rows)
            rooms = [(x[room], None if s is None else s[room]) for x, s in zip(self.raw, self.scales, strict=True)]
            source.fill(blocks, dict(zip(batches.hooks, rooms, strict=True)))
            yield slot

    def deal(self, turns: Iterable[int], position: int, epochs: int | None) -> Iterator[Any]:
        """Yield draws from row `position` of the stream on: (places in the ring, slots that are free afterwards)."""
        batches = self.batches
        slots = iter(turns)
        at: dict[int, int] = {}  # turn -> slot
        epoch = -1
        for order, draw, skip in draws_from(batches.kept, batches.layout, batches.seed, position, epochs):
            if order.number != epoch:
                epoch, at = order.number, {}  # the old epoch's slots come back with its last draw
            window = order.window(draw)
            for turn in window:
                if turn not in at:
                    at[turn] = next(slots)
            rows, turn_of, places = order.draw(draw)
            index = np.array([at[turn] for turn in window])[turn_of - window.start] * self.slot_rows + places
            done = [at.pop(turn) for turn in window if turn == draw or draw == order.draws - 1]
            if batches.late_limits:
                self._replace_loud(index, rows, skip)
            yield index[skip:], done

    def _expect(self, blocks: Ints) -> None:
        if self.scout is not None:
            self.scout.submit(self.batches.source.expect, blocks, self.batches.hooks)

    def close(self) -> None:
        """End whatever runs in the background."""
        self.stopped.set()
        if self.scout is not None:
            self.scout.shutdown(cancel_futures=True)

    def _replace_loud(self, index: Ints, rows: Ints, skip: int) -> None:
        """Put other rows of the draw in the places of those above a limit, which is only known now."""
        batches = self.batches
        loud = batches.source.loud(batches.late_limits, rows)
        if len(rows) and loud.all():
            raise InputError(f"max_norm_multiple: every one of {len(rows)} rows is above the limit; allow more")
        batches.left_out["norm_outliers"] += int(loud[skip:].sum())
        index[loud] = np.resize(index[~loud], int(loud.sum()))

    def cut(self, draws: Iterable[Any], maker: "_OnCpu | _OnCuda") -> Iterator[Any]:
        """Yield batches cut out of draws; the last one may be short."""
        size = self.batches.batch_size
        batch: Any = None
        filled = 0
        for index, done in draws:
            begin = 0
            while begin < len(index):
                if batch is None:
                    batch, filled = maker.new(), 0
                end = min(len(index), begin + size - filled)
                for number, (raw, scales) in enumerate(zip(self.raw, self.scales, strict=True)):
                    maker.take(batch, number, filled, raw, scales, index[begin:end])
                filled, begin = filled + end - begin, end
                if filled == size:
                    yield maker.done(batch, size)
                    batch = None
            for slot in done:
                self.free.put(slot)
        if batch is not None:
            yield maker.done(batch, filled)


class _Memory:
    """Arrays that are used again once no tensor of them is left: page faults of fresh ones cost more than the copy."""

    KEPT = 16

    def __init__(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        self.shape, self.dtype = shape, dtype
        self.arrays: list[NDArray[Any]] = [np.empty(shape, dtype)]
        self.idle = sys.getrefcount(self.arrays[0])  # of an array that nobody else holds

    def next(self) -> NDArray[Any]:
        """Return an array that nobody holds; a tensor made of it, or of a view of it, holds it until it is gone itself."""
        for number in range(len(self.arrays)):
            if sys.getrefcount(self.arrays[number]) == self.idle:
                return self.arrays[number]
        fresh = np.empty(self.shape, self.dtype)
        if len(self.arrays) < self.KEPT:
            self.arrays.append(fresh)
        return fresh


class _OnCpu:
    """Makes batches in ordinary memory; a device that is neither CPU nor CUDA gets copies of them."""

    def __init__(self, batches: "Batches") -> None:
        self.device, self.as_stored = batches.device, batches.as_stored
        shapes = [(batches.batch_size, batches.source.width(hook)) for hook in batches.hooks]
        self.dtypes = [batches.source.dtype(hook) for hook in batches.hooks]
        made = [ON_DISK[dtype] if self.as_stored else np.dtype(np.float32) for dtype in self.dtypes]
        self.memory = [_Memory(shape, dtype) for shape, dtype in zip(shapes, made, strict=True)]
        self.scratch = [
            np.empty((max(1, _PIECE // (4 * width)), width), ON_DISK[dtype])
            for (_, width), dtype in zip(shapes, self.dtypes, strict=True)
        ]

    def new(self) -> list[NDArray[Any]]:
        return [memory.next() for memory in self.memory]

    def take(
        self, batch: list[NDArray[Any]], number: int, filled: int, raw: NDArray[Any],
        scales: NDArray[np.float32] | None, index: Ints,
    ) -> None:  # fmt: skip
        """Write rows `index` of the ring into rows `filled`... of a batch, a piece that fits the cache at a time."""
        out = batch[number][filled : filled + len(index)]
        if self.as_stored:
            np.take(raw, index, axis=0, out=out, mode="clip")
            return
        step = len(self.scratch[number])
        for start in range(0, len(index), step):
            rows = index[start : start + step]
            scratch = self.scratch[number][: len(rows)]
            np.take(raw, rows, axis=0, out=scratch, mode="clip")  # the indices are ours; any other mode would copy twice
            decode(scratch, self.dtypes[number], None if scales is None else scales[rows], out[start : start + step])

    def done(self, batch: list[NDArray[Any]], rows: int) -> tuple[Tensor, ...]:
        found = [torch.from_numpy(x[:rows]) for x in batch]
        return tuple(x.view(TORCH[dtype]) if self.as_stored else x for x, dtype in zip(found, self.dtypes, strict=True))

    def arrived(self, item: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return item if self.device is None else tuple(x.to(self.device) for x in item)


class _OnCuda:
    """Makes batches on a CUDA device: rows go as they lie on disk through pinned memory, on a stream of their own.

    The copy of one batch runs beside the training step on another; float32 is made on the device, so that the bus
    carries two bytes (int8: one) an entry and not four.
    """

    def __init__(self, batches: "Batches", device: torch.device) -> None:
        self.device, self.as_stored = device, batches.as_stored
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.dtypes = [batches.source.dtype(hook) for hook in batches.hooks]
        self.pinned = []
        for _ in range(_AHEAD + 1):
            arrays = [
                torch.empty((batches.batch_size, batches.source.width(hook)), dtype=TORCH[dtype], pin_memory=True)
                for hook, dtype in zip(batches.hooks, self.dtypes, strict=True)
            ]
            scales = [torch.empty(batches.batch_size, pin_memory=True) if dtype == "int8" else None for dtype in self.dtypes]
            self.pinned.append((arrays, scales, torch.cuda.Event()))  # type: ignore[no-untyped-call]
        self.turn = 0

    def new(self) -> Any:
        self.turn = (self.turn + 1) % len(self.pinned)
        staged = self.pinned[self.turn]
        staged[2].synchronize()  # its last copy has left; only this thread waits
        return staged

    def take(
        self, batch: Any, number: int, filled: int, raw: NDArray[Any], scales: NDArray[np.float32] | None, index: Ints
    ) -> None:
        bits = batch[0][number].view(torch.uint16) if self.dtypes[number] == "bfloat16" else batch[0][number]
        np.take(raw, index, axis=0, out=bits.numpy()[filled : filled + len(index)], mode="clip")
        if scales is not None:
            np.take(scales, index, out=batch[1][number].numpy()[filled : filled + len(index)], mode="clip")

    def done(self, batch: Any, rows: int) -> tuple[Tensor, ...]:
        arrays, scales, event = batch
        with torch.cuda.stream(self.stream):
            found = []
            for raw, scale in zip(arrays, scales, strict=True):
                x = raw[:rows].to(self.device, non_blocking=True)
                x = x if self.as_stored else x.float()
                found.append(x if scale is None else x * scale[:rows].to(self.device, non_blocking=True)[:, None])
            event.record(self.stream)
        return (*found, event)

    def arrived(self, item: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Make the caller's stream wait for the copies, not the caller."""
        *found, event = item
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)
        for x in found:
            x.record_stream(current)
        return tuple(found)
