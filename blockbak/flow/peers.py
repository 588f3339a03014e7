"""A mirror over a connection: the end that has the source, and the end that has the target.

The receiver hashes its target ahead, at most ``wire.AHEAD_MAX`` messages of rows, and the sender its source; each
piece is answered with what differs. The two never wait for each other: whatever the receiver says, a thread of the
sender takes it in at once, and there is room for all that may be unanswered; so the receiver's writes always end, and
one of its workers always comes back to read.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from blockbak.errors import (
    BlockbakError,
    Interrupted,
    NotInStep,
    PeerFailed,
    PeerGone,
    PeerNotUnderstood,
    PeerRefused,
)
from blockbak.flow import workers
from blockbak.flow.backup import check_block_size
from blockbak.flow.context import Context, Quiet
from blockbak.flow.instep import InStep, blocks_of, length_of, without
from blockbak.flow.mirror import (
    Report,
    Request,
    brought,
    checked,
    incomplete,
    is_older_copy,
    is_resized,
    look,
    members,
    method_of,
    noted,
    notes_on,
    opened,
    opening_of,
    read_all,
    snapshot_notes,
    table_of,
    united,
    volumes_among,
)
from blockbak.flow.rawmap import MapSum
from blockbak.flow.scan import Found
from blockbak.flow.source import Seen, Settled
from blockbak.flow.target import Incoming, check_target, look_at_target
from blockbak.host import channel as ends
from blockbak.host.blockio import PIECE_BYTES, Bytes, aligned
from blockbak.host.channel import Channel
from blockbak.image.format import DEVICE_MAX, window_for
from blockbak.image.writer import Stopped
from blockbak.model import extent, hashmap, wire
from blockbak.model.extent import ABSENT, DATA
from blockbak.model.hashmap import BLOCKS_PER_SECTION, Geometry, Mask, Rows
from blockbak.model.identity import PATH, Identity, ending, plain
from blockbak.model.partition import PartitionTable
from blockbak.model.wire import BLOCKS, DONE, END, FAILED, OPEN, READY, ROWS, SAME, Changes, Message
from blockbak.repository.local import Repository

_MEMBERS_MAX = 256
_WORDS_MAX = 4000
"""Characters of another end's sentence that are passed on."""
_LAST_SECONDS = 2.0
"""How long an end that gives up tries to tell the other one why."""
_NAP_SECONDS = 0.1


def _failure(error: BlockbakError) -> Message:
    """Why this end gives up, for the other one."""
    notes = " ".join(getattr(error, "__notes__", ()))
    said = ending(plain(f"{error} {notes}".strip()), _WORDS_MAX)
    return wire.document(FAILED, wire.Failure(error.name, said, error.exit_code, ending(error.hint, _WORDS_MAX)))


def _theirs(message: Message, host: str) -> BlockbakError:
    """The other end's reason, as an error of ours."""
    said = wire.parse_document(message, wire.Failure)
    kind = PeerRefused if said.exit == PeerRefused.exit_code else PeerFailed
    return kind(host=host or "The other end", stderr=said.message, advice=said.advice, name=said.name)


class _Line:
    """A channel that can be let go of by who waits at it, and one last word through it."""

    def __init__(self, context: Context) -> None:
        self._context, self._over, self._last = context, threading.Event(), 0.0

    def check(self) -> None:
        """Asked while the other end is waited for."""
        if self._last:
            if self._context.timer() > self._last:
                raise Stopped
            return
        if self._over.is_set():
            raise Stopped
        self._context.check()

    def stop(self) -> None:
        """Whoever waits at it waits no more."""
        self._over.set()

    def give_up(self, channel: Channel, error: BlockbakError) -> None:
        """Tell the other end why nothing more comes, if it listens."""
        if not channel.usable or isinstance(error, PeerGone | PeerFailed | PeerRefused):
            return
        self._last = self._context.timer() + _LAST_SECONDS
        try:
            with contextlib.suppress(PeerGone, Stopped):
                channel.send(_failure(error))
        finally:
            self._last = 0.0


# --- the end with the source ---------------------------------------------------------------------------------


class _TheirRows:
    """The receiver's rows, from when they come until they are compared; the thread that takes them in fills it.

    ``done`` is what it said last; ``error`` why nothing comes any more.
    """

    def __init__(self, channel: Channel, geometry: Geometry, host: str) -> None:
        self._channel, self._geometry, self._host = channel, geometry, host
        self._rows: dict[int, tuple[npt.NDArray[np.uint64], Mask] | None] = {}
        self._came: npt.NDArray[np.bool_] = np.zeros(-(-geometry.device_bytes // PIECE_BYTES), bool)
        self._most = wire.AHEAD_MAX * max(1, geometry.section_bytes // PIECE_BYTES)
        self._stored = 0
        self._turn = threading.Condition()
        self.ended = False
        self.done: wire.Done | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._listen, name="listener", daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def _listen(self) -> None:
        try:
            self._take_in()
        except BaseException as error:  # noqa: BLE001 - raised again by who waits for rows
            self.error = error
        finally:
            with self._turn:
                self._turn.notify_all()

    def _take_in(self) -> None:
        while self.done is None:
            message, _ = self._channel.receive((ROWS, DONE, FAILED))
            if message.kind == ROWS:
                self._add(message)
                continue
            if message.kind == FAILED:
                raise _theirs(message, self._host)
            if not self.ended:
                raise PeerNotUnderstood(reason="it is done before all was sent")
            self.done = wire.parse_document(message, wire.Done)

    def _add(self, message: Message) -> None:
        """Keep rows. Raises PeerNotUnderstood unless they are of whole pieces, once each, and not too many."""
        block, size = self._geometry.block_bytes, self._geometry.device_bytes
        end = message.start + message.blocks * block
        if message.start % PIECE_BYTES or end - size >= block or (end < size and end % PIECE_BYTES):
            raise PeerNotUnderstood(reason=f"rows of {message.blocks} blocks at byte {message.start}")
        if message.head and message.blocks * block > PIECE_BYTES:
            raise PeerNotUnderstood(reason="rows of more than a piece")
        known = wire.unpack_rows(message.head, message.blocks) if message.head else None
        pieces = range(message.start, min(end, size), PIECE_BYTES)
        with self._turn:
            self._stored += known is not None
            if self._stored > wire.AHEAD_MAX or len(self._rows) + len(pieces) > self._most:
                raise PeerNotUnderstood(reason="more rows than may be unanswered")
            for start in pieces:
                if self._came[start // PIECE_BYTES]:
                    raise PeerNotUnderstood(reason=f"the rows at byte {start} come twice")
                self._came[start // PIECE_BYTES] = True
                self._rows[start] = known
            self._turn.notify_all()

    def take(self, start: int, blocks: int, look: Callable[[], None]) -> tuple[npt.NDArray[np.uint64], Mask]:
        """The rows of a piece, once they came. Raises what ended the listening, and what ``look`` raises."""
        with self._turn:
            while start not in self._rows:
                if self.error is not None:
                    raise self.error
                look()
                self._turn.wait(_NAP_SECONDS)
            known = self._rows.pop(start)
            self._stored -= known is not None
        return wire.unpack_rows(b"", blocks) if known is None else known

    def finish(self, check: Callable[[], None]) -> wire.Done:
        """What became of the target. Raises what ended the listening, and what ``check`` raises."""
        with self._turn:
            while self.done is None:
                if self.error is not None:
                    raise self.error
                check()
                self._turn.wait(_NAP_SECONDS)
        return self.done

    def last_words(self) -> BaseException | None:
        """What the other end said before it was gone, if it is."""
        self._thread.join(_LAST_SECONDS)
        return self.error if isinstance(self.error, PeerFailed | PeerRefused) else None

    def close(self) -> None:
        """The thread ends with the channel."""
        if self._thread.ident is not None:
            self._thread.join()


class _Sink:
    """Compares each piece with the receiver's rows, and sends what differs."""

    def __init__(
        self, channel: Channel, geometry: Geometry, theirs: _TheirRows, look: Callable[[], None], *, dry_run: bool
    ) -> None:
        self.geometry, self.known = geometry, MapSum(geometry)
        self.unread = [extent.empty()]
        self.differing_bytes = 0
        self._channel, self._theirs, self._look, self._dry_run = channel, theirs, look, dry_run
        self._guard = threading.Lock()
        self._over = threading.Event()

    def hand(self) -> Callable[[Found], None]:
        """Safe from several threads."""
        return self._take

    def stop(self) -> None:
        """Release who waits for rows."""
        self._over.set()

    def _check(self) -> None:
        if self._over.is_set():
            raise Stopped
        self._look()

    def _take(self, found: Found) -> None:
        geometry, block = self.geometry, self.geometry.block_bytes
        first, count = found.first_block * block, len(found.kinds)
        left = extent.touched(found.bad, first, block, count)
        nonzero = (found.kinds == DATA) & ~left
        rows = without(found.rows, left, found.first_block, geometry)
        self.known.add(found.first_block, rows, nonzero, blocks_of(left, first, geometry))
        if len(found.bad):
            self.unread.append(found.bad)
        step = PIECE_BYTES // block
        for low in range(0, count, step):
            part, start = slice(low, min(low + step, count)), first + low * block
            blocks = part.stop - low
            theirs, their_nonzero = self._theirs.take(start, blocks, self._check)
            differing = wire.differing(rows[part], nonzero[part], theirs, their_nonzero) & ~left[part]
            # What counts as changed is what is still marked afterwards.
            found.kinds[part][~differing] = ABSENT
            with self._guard:
                self.differing_bytes += length_of(start, differing, geometry)
            if self._dry_run or not (differing.any() or left[part].any()):
                self._channel.send(Message(SAME, start, blocks))
                continue
            changes = Changes(differing & nonzero[part], differing & ~nonzero[part], left[part])
            data = found.data[low * block : low * block + PIECE_BYTES]
            runs = zip(*(edges.tolist() for edges in extent.true_runs(changes.data)), strict=True)
            sent = [memoryview(data[one * block : two * block]) for one, two in runs]
            self._channel.send(Message(BLOCKS, start, blocks, changes.pack()), sent)


@contextlib.contextmanager
def _connected(through: tuple[str, ...], fds: tuple[int, int], line: _Line) -> Iterator[Channel]:
    """The channel to a program that is the other end; without one, over descriptors to read and to write."""
    if not through:
        with Channel(*fds, wire.ROLE_SENDER, line.check) as channel:
            yield channel
        return
    with (
        ends.started(through) as program,
        Channel(program.read_fd, program.write_fd, wire.ROLE_SENDER, line.check, program.ended) as channel,
    ):
        yield channel


def send(
    request: Request, through: tuple[str, ...], context: Context, fds: tuple[int, int] = (0, 1),
    repository: Repository | None = None,
) -> Report:  # fmt: skip
    """Bring the target of the other end in step: that of the program ``through`` (an argument list), or, without one,
    of who is at standard input and output, or at other descriptors to read and to write. The target of ``request`` is
    not looked at. ``repository`` is one whose history tells of it.

    Raises every error of the source and snapshot trees, MirrorError, PeerRefused, MissingProgram, CommandFailed,
    Interrupted.
    """
    with noted(request, " ".join(through) or "-", repository, context) as reports:
        reports.append(_send(request, through, fds, context))
    return reports[0]


def _send(request: Request, through: tuple[str, ...], fds: tuple[int, int], context: Context) -> Report:
    clock = context.timer()
    seen = look(request, context)
    notes = snapshot_notes(seen, request, context)
    line = _Line(context)
    with _connected(through, fds, line) as channel:
        try:
            channel.greet()
            channel.send(wire.document(OPEN, _opening(seen, request, context)))
            message, _ = channel.receive((READY, FAILED))
            if message.kind == FAILED:
                raise _theirs(message, "")
            ready = wire.parse_document(message, wire.Ready)
        except BlockbakError as error:
            line.give_up(channel, error)
            raise
        for note in ready.notes:
            context.say(f"{ready.host}: {note}")
        sending = _Sending(request, seen, ready, channel, line, context)
        report = sending.run(clock)
    return replace(report, notes=[*notes, *ready.notes, *report.notes])


def _opening(seen: Seen, request: Request, context: Context) -> wire.Open:
    table = table_of(seen.device)
    return wire.Open(
        program=context.program, host=plain(context.host), source=plain(seen.device.label),
        device_bytes=seen.device.size, block_bytes=request.block_bytes, logical_sector=seen.device.logical_sector,
        physical_sector=seen.device.physical_sector, table_sector=table.sector_bytes if table else 0,
        members=members(seen.device)[:_MEMBERS_MAX], verify=request.verify, dry_run=request.dry_run,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Sending:
    """A mirror to the other end, which is ready."""

    request: Request
    seen: Seen
    ready: wire.Ready
    channel: Channel
    line: _Line
    context: Context

    def run(self, clock: float) -> Report:
        """Do it. Raises as ``send``."""
        size, block = self.seen.device.size, self.request.block_bytes
        geometry = Geometry(size, block, window_for(size, block))
        theirs = _TheirRows(self.channel, geometry, self.ready.host)
        sink = _Sink(self.channel, geometry, theirs, self.line.check, dry_run=self.request.dry_run)
        try:
            with opened(self.seen, self.request, self.context) as source:
                theirs.start()
                read_bytes, settled = read_all(source, self.seen, sink, self.request, checked(self.context, source))
            root = "" if self.request.dry_run else sink.known.root
            theirs.ended = True
            self.channel.send(wire.document(END, wire.End(root)))
            done = theirs.finish(self.context.check)
            if root and done.root != root:
                raise NotInStep(target=self.ready.target, source=self.seen.device.label, have=done.root, need=root)
        except BlockbakError as error:
            told = self._why(error, theirs)
            self.line.give_up(self.channel, told)
            if told is error:
                raise
            raise told from error
        finally:
            self.line.stop()
            theirs.close()
        return self._report(sink, done, settled, read_bytes, clock)

    def _why(self, error: BlockbakError, theirs: _TheirRows) -> BlockbakError:
        """What to tell a person: the other end's reason for being gone, where it has one, and what becomes of the
        target.
        """
        said = theirs.last_words() if isinstance(error, PeerGone) else None
        if isinstance(said, BlockbakError):
            return said
        place = f"{self.ready.target} on {self.ready.host}"
        told = f"{place} may be incomplete; run again, and what is equal by then does not move again"
        try:
            # Ctrl-C is for ssh too, which may have been the quicker one.
            self.context.check()
        except Interrupted:
            return Interrupted(state="nothing was written" if self.request.dry_run else told)
        if isinstance(error, Interrupted):
            return Interrupted(state=told)
        if not self.request.dry_run and not isinstance(error, PeerFailed | PeerRefused):
            error.add_note(f"{told}.")  # it begins with a name
        return error

    def _report(self, sink: _Sink, done: wire.Done, settled: Settled, read_bytes: int, clock: float) -> Report:
        unread = united(sink.unread)
        return Report(
            source=self.seen.device.label, target=self.ready.target, host=self.ready.host, method=self.ready.method,
            mode=self.seen.mode, dry_run=self.request.dry_run, device_bytes=self.seen.device.size,
            target_bytes=self.ready.target_bytes, block_bytes=self.request.block_bytes, read_bytes=read_bytes,
            differing_bytes=sink.differing_bytes,
            moved_bytes=self.channel.sent_bytes + self.channel.received_bytes, written_bytes=done.written_bytes,
            zeroed_bytes=done.zeroed_bytes, verified_bytes=done.verified_bytes, root=sink.known.root,
            consistency=settled.consistency, unreadable=unread, seconds=round(self.context.timer() - clock, 3),
            notes=settled.notes, attention=settled.attention or bool(unread),
        )  # fmt: skip


# --- the end with the target ---------------------------------------------------------------------------------


@dataclass(slots=True)
class _Group:
    """A message of rows: how many of its pieces are not answered yet."""

    pieces: int


@dataclass(frozen=True, slots=True)
class _Unanswered:
    """A piece whose rows were sent: its rows, and which blocks hold anything. None: it is all zeros."""

    blocks: int
    rows: Rows | None
    nonzero: Mask | None
    group: _Group


@dataclass(frozen=True, slots=True)
class _Look:
    """A range of the target to be hashed: a piece, or a section that is all hole."""

    start: int
    blocks: int
    hole: bool


@dataclass(frozen=True, slots=True)
class _Bring:
    """A piece to be written, with its data in a buffer."""

    message: Message
    known: _Unanswered
    buffer: Bytes
    length: int


class _Receiving:
    """The receiver at work. One of its workers at a time hands out what is next to do: what came, before anything
    else is hashed.
    """

    def __init__(self, channel: Channel, step: InStep, host: str, context: Context, *, dry_run: bool) -> None:
        self._channel, self._step, self._host, self._context = channel, step, host, context
        self._dry_run = dry_run
        self._geometry = step.geometry
        self._unanswered: dict[int, _Unanswered] = {}
        self._messages = 0
        self._guard = threading.Lock()
        self._free: queue.SimpleQueue[Bytes] = queue.SimpleQueue()
        # One for each worker, and one that is being filled.
        for _ in range(context.workers + 1):
            self._free.put(aligned(wire.DATA_MAX))
        self.root = ""

    def run(self, stop: Callable[[], None]) -> None:
        """Until the sender has sent all. ``stop`` has whoever waits for the sender wait no more. Raises TargetFailed,
        TargetFull, MirrorError, PeerRefused, Interrupted.
        """
        workers.run(
            self._jobs(), lambda: self._hand(stop), workers=self._context.workers, check=self._context.check, stop=stop
        )

    def _looks(self) -> Iterator[_Look]:
        geometry, block = self._geometry, self._geometry.block_bytes
        for number in range(geometry.sections):
            start, end = geometry.section_range(number)
            blocks = geometry.section_blocks(number)
            if self._step.is_hole(start, end - start):
                yield _Look(start, blocks, hole=True)
                continue
            for low in range(0, blocks, PIECE_BYTES // block):
                begin = start + low * block
                count = min(PIECE_BYTES // block, blocks - low)
                yield _Look(begin, count, self._step.is_hole(begin, min(PIECE_BYTES, end - begin)))

    def _jobs(self) -> Iterator[_Look | _Bring]:
        looks = self._looks()
        upcoming = next(looks, None)
        while True:
            if upcoming is not None and not self._channel.ready() and self._may_ask():
                yield upcoming
                upcoming = next(looks, None)
                continue
            buffer = self._free.get()
            message, length = self._channel.receive((SAME, BLOCKS, END, FAILED), buffer)
            if message.kind == FAILED:
                raise _theirs(message, self._host)
            if message.kind == END:
                with self._guard:
                    if upcoming is not None or self._unanswered:
                        raise PeerNotUnderstood(reason="it ends before all was answered")
                self.root = wire.parse_document(message, wire.End).root
                return
            known = self._answered(message)
            if message.kind == BLOCKS:
                yield _Bring(message, known, buffer, length)
                continue
            rows, nonzero = self._whole(message, known)
            self._step.known.add(message.start // self._geometry.block_bytes, rows, nonzero, extent.empty())
            self._free.put(buffer)

    def _may_ask(self) -> bool:
        """Whether one more message of rows may be unanswered; it is counted then."""
        with self._guard:
            may = self._messages < wire.AHEAD_MAX
            self._messages += may
        return may

    def _answered(self, message: Message) -> _Unanswered:
        """The piece that a message is the answer to. Raises PeerNotUnderstood."""
        with self._guard:
            known = self._unanswered.pop(message.start, None)
            if known is None or known.blocks != message.blocks:
                raise PeerNotUnderstood(reason=f"an answer of {message.blocks} blocks at byte {message.start}")
            known.group.pieces -= 1
            self._messages -= not known.group.pieces
        return known

    def _whole(self, message: Message, known: _Unanswered) -> tuple[Rows, Mask]:
        """The rows of a piece as it was."""
        if known.rows is not None and known.nonzero is not None:
            return known.rows, known.nonzero
        number, low = divmod(message.start // self._geometry.block_bytes, BLOCKS_PER_SECTION)
        return self._geometry.zero_rows(number)[low : low + known.blocks], np.zeros(known.blocks, bool)

    def _hand(self, stop: Callable[[], None]) -> Callable[[_Look | _Bring], None]:
        buffer = aligned(PIECE_BYTES)

        def work(job: _Look | _Bring) -> None:
            try:
                if isinstance(job, _Look):
                    self._send_rows(job, buffer)
                else:
                    self._bring(job)
                    self._free.put(job.buffer)
            except BaseException:
                # Another worker may be waiting for a sender that has nothing more to say, and holds all others up.
                stop()
                raise

        return work

    def _send_rows(self, job: _Look, buffer: Bytes) -> None:
        geometry, block = self._geometry, self._geometry.block_bytes
        length = min(job.start + job.blocks * block, geometry.device_bytes) - job.start
        rows: Rows | None = None
        nonzero: Mask | None = None
        head = b""
        if not job.hole:
            if not self._step.held(job.start, buffer, length):
                # What cannot be read equals nothing, and is written: the digest of nothing says so.
                rows, nonzero = hashmap.empty_rows(job.blocks), np.ones(job.blocks, bool)
            else:
                nonzero = hashmap.nonzero_blocks(buffer[:length], block)
                rows = hashmap.digest_blocks(buffer[:length], block, nonzero)
            head = wire.pack_rows(rows, nonzero)
        group = _Group(-(-length // PIECE_BYTES))
        with self._guard:
            for begin in range(job.start, job.start + length, PIECE_BYTES):
                blocks = -(-min(PIECE_BYTES, job.start + length - begin) // block)
                self._unanswered[begin] = _Unanswered(blocks, rows, nonzero, group)
        self._channel.send(Message(ROWS, job.start, job.blocks, head))

    def _bring(self, job: _Bring) -> None:
        geometry, block, start = self._geometry, self._geometry.block_bytes, job.message.start
        if self._dry_run:
            raise PeerNotUnderstood(reason="it sends blocks in a dry run")
        changes = wire.unpack_changes(job.message.head, job.known.blocks)
        length = length_of(start, changes.data, geometry)
        if length != job.length:
            raise PeerNotUnderstood(reason=f"{job.length} bytes of data, where {length} belong")
        rows, nonzero = self._whole(job.message, job.known)
        rows, nonzero = rows.copy(), (nonzero | changes.data) & ~changes.zero & ~changes.left
        packed = job.buffer[:length]
        every = np.ones(int(np.count_nonzero(changes.data)), bool)
        rows[changes.data] = hashmap.digest_blocks(packed, block, every)
        rows = without(rows, changes.zero | changes.left, start // block, geometry)
        self._step.known.add(start // block, rows, nonzero, blocks_of(changes.left, start, geometry))
        differing = changes.data | changes.zero
        if differing.any():
            self._step.differs(length_of(start, differing, geometry))
            self._step.bring(start, rows, changes.data, changes.zero, packed, packed=True)


def receive(
    target: str,
    context: Context,
    *,
    overwrite: bool,
    repository: Repository | None = None,
    fds: tuple[int, int] = (0, 1),
) -> wire.Done:
    """Be the other end for a mirror to ``target``: on standard input and output, or other descriptors to read and to
    write. ``overwrite`` stands for ``--yes``. ``repository`` is one that is known of.

    Raises a Refused for a target that must not be written, TargetFailed, TargetFull, NotReadBack, MirrorError,
    PeerRefused, Interrupted; the other end is told.
    """
    # The terminal is the other end's.
    context = replace(context, progress=Quiet())
    line = _Line(context)
    with Channel(*fds, wire.ROLE_RECEIVER, line.check) as channel:
        try:
            channel.greet()
            message, _ = channel.receive((OPEN, FAILED))
            if message.kind == FAILED:
                raise _theirs(message, "")
            said = wire.parse_document(message, wire.Open)
            _check_opening(said)
            done = _received(target, said, channel, line, repository, context, overwrite=overwrite)
            channel.send(wire.document(DONE, done))
        except BlockbakError as error:
            line.give_up(channel, error)
            raise
    return done


def _check_opening(said: wire.Open) -> None:
    """Raises PeerNotUnderstood, BadBlockSize, for what cannot be."""
    sizes = (said.logical_sector, said.physical_sector, said.table_sector)
    if not 0 < said.device_bytes <= DEVICE_MAX or any(not 0 <= one <= PIECE_BYTES for one in sizes):
        raise PeerNotUnderstood(reason=f"a source of {said.device_bytes} bytes, in sectors of {said.logical_sector}")
    check_block_size(said.block_bytes)


def _received(
    path: str, said: wire.Open, channel: Channel, line: _Line, repository: Repository | None, context: Context, *,
    overwrite: bool,
) -> wire.Done:  # fmt: skip
    target = look_at_target(path)
    sectors = said.logical_sector, said.physical_sector
    opening = opening_of(said.device_bytes, said.block_bytes, sectors, Identity(PATH, ""), said.host)
    table = PartitionTable("gpt", "", said.table_sector, ()) if said.table_sector else None
    incoming = Incoming(
        opening, lambda _, __: b"", table, volumes_among(said.members), copied=is_older_copy(target, said.members)
    )  # fmt: skip
    overwrite = overwrite or said.dry_run
    check_target(path, target, incoming, repository, context, overwrite=overwrite)
    method, notes = method_of(target, path), notes_on(target, incoming, path)
    with brought(
        path, target, incoming, repository, context, overwrite=overwrite, dry_run=said.dry_run
    ) as (place, permit):  # fmt: skip
        step = InStep(place, opening.geometry, permit, resized=is_resized(target, incoming, said.dry_run))
        ready = wire.Ready(
            context.program, plain(context.host), plain(path), target.size if target else 0, method, notes
        )
        with incomplete(step):
            channel.send(wire.document(READY, ready))
            receiving = _Receiving(channel, step, said.host, context, dry_run=said.dry_run)
            receiving.run(line.stop)
            place.flush()
            root = step.known.root
            if not said.dry_run and root != receiving.root:
                raise NotInStep(target=path, source=said.source, have=root, need=receiving.root)
            verified = step.prove(context) if said.verify and not said.dry_run else 0
    return wire.Done(step.read_bytes, step.written_bytes, step.zeroed_bytes, verified, root)
