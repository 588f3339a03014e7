"""Makes a raw image a full point of a repository: the base of a chain, without another look at the device."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime

from blockbak.errors import ATTENTION, DamagedRawImage, SourceError, UnreadableStore
from blockbak.flow.backup import Held, Report, make_point
from blockbak.flow.context import Context
from blockbak.flow.rawcheck import check, damage, opened
from blockbak.flow.recording import recorded
from blockbak.flow.source import Circumstances, Request, Seen, Settled, volume_name
from blockbak.host.blockio import Bytes, SourceReader
from blockbak.host.device import Device
from blockbak.host.kernel import Kernel
from blockbak.image.sidecar import Sidecar
from blockbak.model import extent
from blockbak.model.extent import Extents
from blockbak.model.facts import FULL
from blockbak.model.identity import plain
from blockbak.repository.local import Repository


class _Reader(SourceReader):
    """The bytes of a raw image as those of the device they are of: its sectors, and what could not be read."""

    def __init__(self, path: str, said: Sidecar, kernel: Kernel) -> None:
        super().__init__(path, exclusive=False, kernel=kernel)
        self.logical, self.physical = said.logical_sector, said.physical_sector
        self._unread = said.unread

    def read(self, offset: int, into: Bytes, length: int) -> Extents:
        """As a device's. An error of the disk below is damage of the image, and no BAD extent. Raises
        UnreadableStore.
        """
        try:
            lost = super().read(offset, into, length)
        except SourceError as error:
            raise UnreadableStore(file=self.path, offset=offset, reason=str(error).removesuffix(".")) from error
        if len(lost):
            raise UnreadableStore(file=self.path, offset=int(lost[0]["start"]), reason="the disk gives an error")
        return extent.clip(self._unread, offset, offset + length)

    def next_data(self, offset: int) -> int:
        """What could not be read is no hole, though the file has one there."""
        after = extent.clip(self._unread, offset, self.size)
        found = super().next_data(offset)
        return min(found, int(after[0]["start"])) if len(after) else found


class _Adopted:
    """A raw image as the source of a point: what is known of its moment stands in the sidecar."""

    def __init__(self, path: str, said: Sidecar, reader: SourceReader, notes: list[str]) -> None:
        self._path, self._said, self._notes = path, said, notes
        self.reader = reader
        self.circumstances = Circumstances(lvm_metadata=said.lvm_metadata, hooks=dict(said.hooks))
        self.moment: datetime | None = datetime.fromisoformat(said.created)

    def check(self) -> None:
        """Nothing is known before the end."""

    def settle(self) -> Settled:
        """What the sidecar says of it."""
        notes = [f"Adopted from the raw image {plain(os.path.basename(self._path))}.", *self._notes, *self._said.notes]
        if self._said.stopped:
            notes.append(f"Stopped for it: {', '.join(self._said.stopped)}.")
        return Settled(self._said.consistency, notes)


@dataclass(frozen=True, slots=True)
class Wish:
    """What a person asked for."""

    file: str
    name: str | None = None
    compress: str = "zstd"


def adopt(repository: Repository, wish: Wish, context: Context) -> Report:
    """Make the point. Raises NoSuchImage, NoSidecar, DamagedSidecar, DamagedRawImage, VolumeLocked and what making
    an image raises; there is no point then.
    """
    with recorded(repository, "adopted", context, source=wish.file) as doing:
        made = _adopt(repository, wish, context)
        doing.volume, doing.points, doing.exit = made.volume, [made.point], ATTENTION if made.attention else 0
        doing.facts |= made.facts
    return made


def _adopt(repository: Repository, wish: Wish, context: Context) -> Report:
    clock = context.timer()
    with opened(wish.file, context) as raw:
        said = raw.said
        if raw.source.size != said.device_bytes:
            reason = f"it has {raw.source.size} bytes instead of {said.device_bytes}"
            raise DamagedRawImage(file=wish.file, reason=reason)
        # All that is asked of the host is asked of the one where the image was made.
        there = replace(context, host=said.host)
        device = _device(said)
        request = Request(
            wish.file, kind=FULL, mode=said.mode, name=wish.name, block_bytes=said.block_bytes, compress=wish.compress
        )
        with ExitStack() as stack:
            reader = stack.enter_context(_Reader(os.path.realpath(wish.file), said, context.kernel))
            held = _hold(repository, request, Seen(device, said.identity, said.mode, ""), there, stack)
            notes = _out_of_order(held, said)
            for line in notes:
                context.say(line)
            try:
                made = make_point(repository, held, _Adopted(wish.file, said, reader, notes), there, said.root)
            except DamagedRawImage as error:
                # Only now it is worth another reading: which part of it is wrong.
                flaws = check(raw, context).flaws
                raise (damage(wish.file, flaws) if flaws else error) from None
    return replace(made, seconds=round(context.timer() - clock - held.lock.waited, 3))


def _hold(repository: Repository, request: Request, seen: Seen, context: Context, stack: ExitStack) -> Held:
    """The volume that the image belongs to, or a new one, locked until ``stack`` is closed."""
    while True:
        name, before = volume_name(seen.device, seen.identity, repository, context.host, request.name)
        volume = repository.make_volume(name)
        with ExitStack() as holding:
            lock = holding.enter_context(
                volume.locked(exclusive=True, wait=context.wait, check=context.check, say=context.say)
            )
            # While it was waited for, another identity may have taken a name that was free.
            if volume_name(seen.device, seen.identity, repository, context.host, request.name)[0] == name:
                stack.push(holding.pop_all())
                return Held(request, replace(seen, name=name, before=before), volume, lock)


def _out_of_order(held: Held, said: Sidecar) -> list[str]:
    """What whoever adopts an image should know that is older than what the volume has: clocks order no points."""
    for newest in held.volume.catalog().points[-1:]:
        if datetime.fromisoformat(said.created) < datetime.fromisoformat(newest.images[0].opening.created):
            return [f"The image is older than {newest.id}, the newest point so far; 'latest' is the image from now on."]
    return []


def _device(said: Sidecar) -> Device:
    """The device as far as a point tells of it: its name for people, its size and sectors."""
    group, _, volume = said.source.partition("/")
    is_lv = said.identity.kind == "lv-uuid"
    return Device(
        path=said.source, given=said.source, is_block=True, size=said.device_bytes, kind="dm" if is_lv else "disk",
        logical_sector=said.logical_sector, physical_sector=said.physical_sector,
        lv_uuid=said.identity.value if is_lv else "", vg=group if is_lv else "", lv=volume if is_lv else "",
    )  # fmt: skip
