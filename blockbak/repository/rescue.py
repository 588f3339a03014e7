"""Restores the points of the blockbak repository this file lies in, on a machine without blockbak.

    python3 rescue.py list
    python3 rescue.py restore POINT TARGET [--yes]

It needs Python 3.6 or later and the program `zstd`, nothing else. POINT is an id from `list`, or its
beginning. TARGET is a block device or a file; what exists is only overwritten with --yes, and a device
in use never. A new file is written as TARGET.partial and renamed when it is complete.

Checked are: every byte of manifests, headers, indexes and closing records, by SHA-256; that each image
stands on the one below it; order, place and length of all frames; and their content, by zstd's own
checksums, which the index repeats. Not checked are the BLAKE3 digests of frames and blocks, for which
Python has no tool: `blockbak verify` does that.

Exit status: 0 done; 1 failed; 2 wrong command line; 3 done, but parts of the source could never be
read and are zeros; 4 damage in the repository; 5 refused for safety; 130 interrupted.

How it works: a point is held by a full image, or by a full and deltas on top of it. The full is written
from the first byte to the last, then each delta over it, oldest first. The names used here are those of
blockbak's docs/format.md.
"""

import argparse
import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import threading
import time
from typing import Any, BinaryIO, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

HEADER = struct.Struct("<II8sHHIQ")  # magic, length, signature, version, reserved, json_bytes, features
SECTION = struct.Struct("<II8sIIII")  # magic, length, signature, number, rows, extents, frames
EXTENT = struct.Struct("<QQB")  # start, length, kind
FRAME = struct.Struct("<IIIQI16s")  # window, content, stored, offset, checksum, digest
CLOSING = struct.Struct("<II8sII32s")  # magic, length, signature, json_bytes, sections, header_sha256
SECTION_ENTRY = struct.Struct("<IIQ32s32s")  # number, length, offset, map_digest, sha256
SEEK_ENTRY = struct.Struct("<II")  # stored, content
SEEK_FOOTER = struct.Struct("<IBI")  # entries, descriptor, magic
SKIPPABLE = struct.Struct("<II")  # magic, length

HEADER_MAGIC, PADDING_MAGIC, SECTION_MAGIC, CLOSING_MAGIC = 0x184D2A50, 0x184D2A51, 0x184D2A52, 0x184D2A53
SEEKABLE_MAGIC, ZSTD_MAGIC = 0x8F92EAB1, 0xFD2FB528
FORMAT_VERSION, HEADER_BYTES, ROW_BYTES, SHA256_BYTES, BLOCKS_PER_SECTION = 1, 4096, 32, 32, 4096
FULL, DATA, BAD = "full", 1, 4

PIECE = 256 * 1024
ZEROS = bytes(PIECE)
MANIFEST = re.compile(r"(\d{8}T\d{6}Z-[0-9a-f]{4}\.(full|incremental|differential)(\.[1-9]\d*)?)\.json")
OWN_DIGEST = re.compile(rb'"sha256": "([0-9a-f]{64})"\n}\n\Z')

Range = Tuple[int, int]  # first byte, and the one after the last
Key = Tuple[str, str, str]


class Trouble(Exception):
    """What ends the program: a sentence, and the exit status."""

    code = 1


class Refused(Trouble):
    """A safety rule forbids it; nothing was changed."""

    code = 5


class Damage(Trouble):
    """Something in the repository is not as it was written; ``image`` cannot be used."""

    code = 4

    def __init__(self, image: str, reason: str) -> None:
        Trouble.__init__(self, f"{image}: {reason}")
        self.image = image


def tell(text: str) -> None:
    """Speak to the person; standard output is for `list` alone."""
    print(plain(text, sys.stderr.encoding), file=sys.stderr, flush=True)


def plain(text: str, encoding: Optional[str]) -> str:
    """What any terminal can show: a name may hold anything."""
    shown = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
    return shown.encode(encoding or "ascii", "backslashreplace").decode(encoding or "ascii")


def sha256(data: bytes) -> bytes:
    """What every piece of metadata is proved by."""
    return hashlib.sha256(data).digest()


# --- manifests and images ------------------------------------------------------------------------


class Section(NamedTuple):
    """What an image says about one range of the volume, and where in the file its frames lie."""

    number: int
    start: int
    end: int
    extents: List[Tuple[int, int, int]]
    frames: List[Tuple[int, int, int, int, int, bytes]]
    region: int  # frames lie in the file from here up to ``offset``
    offset: int


class Image:
    """One image, as its manifest describes it."""

    def __init__(self, repository: str, volume: str, stem: str) -> None:
        # The image is the file beside the manifest, whatever the manifest says.
        self.volume, self.name = volume, f"{volume}/{stem}.zst"
        self.path = os.path.join(repository, volume, stem)
        self.checked = False
        try:
            with open(self.path + ".json", "rb") as file:
                data = file.read(16 << 20)
        except OSError as error:
            raise self.damage(f"its manifest cannot be read ({error.strerror})") from error
        found = OWN_DIGEST.search(data)
        if not found or sha256(data[: found.start(1)] + b"0" * 64 + data[found.end(1) :]).hex() != found[1].decode():
            raise self.damage("its manifest does not have its own digest")
        manifest = json.loads(data.decode())
        if manifest["blockbak_manifest"] != FORMAT_VERSION:
            raise Trouble(f"{self.name} is of a newer blockbak; use a newer rescue.py")
        self.bytes: int = manifest["image_bytes"]
        self.closing_sha256: str = manifest["closing_sha256"]
        self.opening: Dict[str, Any] = manifest["opening"]
        self.closing: Dict[str, Any] = manifest["closing"]
        self.point: str = self.opening["point"]
        self.place = f"{volume}/{self.point}"
        self.full: bool = self.opening["kind"] == FULL
        self.device_bytes: int = self.opening["device_bytes"]
        self.block, self.window = self.opening["block_bytes"], self.opening["window_bytes"]
        own = self.point + "." + self.opening["kind"]
        if manifest["image_file"] != stem + ".zst" or stem.split(".")[:2] != own.split("."):
            raise self.damage("its manifest is that of another image")
        # What a delta asks of the image below it, and what this one offers.
        geometry = f"{self.device_bytes}/{self.block}/{self.window}/"
        self.key: Key = (volume, self.point, geometry + self.closing["root"])
        self.parent_key: Key = (volume, self.opening["parent"], geometry + str(self.opening["parent_root"]))

    def damage(self, reason: str) -> Damage:
        """The error that says what is wrong with this image."""
        return Damage(self.name, reason)

    def open(self) -> BinaryIO:
        """Its file, of the length that the manifest names. Raises Damage."""
        try:
            if os.path.exists(self.path + ".zst") and not os.path.isfile(self.path + ".zst"):
                raise self.damage("it is not a file")
            file = open(self.path + ".zst", "rb")  # noqa: SIM115 - whoever asks for it closes it
        except OSError as error:
            raise self.damage(f"it cannot be opened ({error.strerror})") from error
        have = os.fstat(file.fileno()).st_size
        if have != self.bytes:
            file.close()
            raise self.damage(f"it has {have} bytes instead of {self.bytes}")
        return file

    def read(self, file: BinaryIO, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes. Raises Damage."""
        try:
            file.seek(offset)
            data = file.read(length)
        except OSError as error:
            raise self.damage(f"it cannot be read at byte {offset} ({error.strerror})") from error
        if len(data) != length:
            raise self.damage(f"it ends before byte {offset + length}")
        return data

    def read_closing(self, file: BinaryIO) -> Tuple[int, bytes]:
        """Check header and closing record; the latter's offset, and the section list."""
        header = self.read(file, 0, HEADER_BYTES)
        if sha256(header[:-SHA256_BYTES]) != header[-SHA256_BYTES:]:
            raise self.damage("its header does not have its digest")
        magic, _, signature, version, _, text, features = HEADER.unpack_from(header)
        if magic != HEADER_MAGIC or signature != b"blockbak":
            raise self.damage("it does not begin as an image")
        if version != FORMAT_VERSION or features:
            raise Trouble(f"{self.name} is of a newer blockbak; use a newer rescue.py")
        # The seek table at the end of the file is for other programs; here it only tells where the
        # closing record lies, which the manifest's digest then proves.
        tail = SEEK_ENTRY.size + SEEK_FOOTER.size
        last = self.read(file, self.bytes - tail, tail)
        length = SEEK_ENTRY.unpack_from(last)[0]
        entries, descriptor, magic = SEEK_FOOTER.unpack_from(last, SEEK_ENTRY.size)
        offset = self.bytes - SEEK_FOOTER.size - entries * SEEK_ENTRY.size - SKIPPABLE.size - length
        if magic != SEEKABLE_MAGIC or descriptor or offset < HEADER_BYTES or length < CLOSING.size:
            raise self.damage("it does not end with a seek table")
        # The record says its length too: one wrong bit of the table must not have gigabytes read for one.
        if self.read(file, offset, SKIPPABLE.size) != SKIPPABLE.pack(CLOSING_MAGIC, length - SKIPPABLE.size):
            raise self.damage("its seek table does not lead to a closing record")
        record = self.read(file, offset, length)
        if sha256(record).hex() != self.closing_sha256:
            raise self.damage("its closing record is not the one its manifest names")
        magic, _, _, closing_text, sections, header_sha256 = CLOSING.unpack_from(record)
        end = CLOSING.size + closing_text
        if magic != CLOSING_MAGIC or end + sections * SECTION_ENTRY.size + SHA256_BYTES != length:
            raise self.damage("its closing record contradicts itself")
        if header_sha256 != sha256(header):
            raise self.damage("its header and closing record are not of one image")
        said = json.loads(header[HEADER.size : HEADER.size + text].decode())
        if said != self.opening or json.loads(record[CLOSING.size : end].decode()) != self.closing:
            raise self.damage("it and its manifest do not say the same")
        return offset, record[end:-SHA256_BYTES]

    def sections(self, file: BinaryIO) -> Iterator[Section]:
        """The index, section by section, each checked by its SHA-256 and for order."""
        closing_offset, listed = self.read_closing(file)
        region, before, reach = HEADER_BYTES, -1, BLOCKS_PER_SECTION * self.block
        for number, length, offset, _, digest in SECTION_ENTRY.iter_unpack(listed):
            data = self.read(file, offset, length)
            if sha256(data) != digest:
                raise self.damage(f"section {number} does not have its digest")
            magic, _, _, own, rows, extents, frames = SECTION.unpack_from(data)
            first = SECTION.size + rows * ROW_BYTES
            second = first + extents * EXTENT.size
            if (magic, own, second + frames * FRAME.size) != (SECTION_MAGIC, number, length):
                raise self.damage(f"section {number} contradicts itself")
            section = Section(
                number, number * reach, min(number * reach + reach, self.device_bytes),
                list(EXTENT.iter_unpack(data[first:second])), list(FRAME.iter_unpack(data[second:])),
                region, offset,
            )  # fmt: skip
            if number <= before or (self.full and number != before + 1) or not self.in_order(section):
                raise self.damage(f"the parts of section {number} are not in order")
            yield section
            region, before = offset + length, number
        if self.full and (before + 1) * reach < self.device_bytes:
            raise self.damage("its last sections are missing")
        self.padding(file, region, closing_offset)

    def in_order(self, section: Section) -> bool:
        """Whether the frames follow each other in file and volume, and hold what the extents say."""
        window, place, total = -1, section.region, 0
        for own_window, content, stored, offset, _, _ in section.frames:
            start = own_window * self.window
            wanted = section.start + total if self.full else max(start, section.start)
            if own_window <= window or start != wanted or offset < place:
                return False
            window, place, total = own_window, offset + stored, total + content
        return place <= section.offset and total == sum(end - start for start, end in self.stored_ranges(section))

    def stored_ranges(self, section: Section) -> List[Range]:
        """Where the content of the section's frames belongs: all of a full, the DATA blocks of a delta."""
        if self.full:
            return [(section.start, section.end)]
        ranges: List[Range] = []
        for start, length, kind in section.extents:
            if kind == DATA:
                low, high = self.in_blocks(start, length)
                if ranges and low <= ranges[-1][1]:
                    low = ranges.pop()[0]
                ranges.append((low, high))
        return ranges

    def in_blocks(self, start: int, length: int) -> Range:
        """The range widened to whole blocks: a block is the unit of change."""
        end = -(-(start + length) // self.block) * self.block
        return start // self.block * self.block, min(end, self.device_bytes)

    def padding(self, file: BinaryIO, start: int, end: int) -> None:
        """What lies between frames must be nothing, or one padding frame."""
        size = end - start
        if size and self.read(file, start, size) != SKIPPABLE.pack(PADDING_MAGIC, max(size - 8, 0)) + bytes(size - 8):
            raise self.damage(f"its bytes {start} to {end} are no padding")

    def check(self) -> None:
        """Check everything but the frames themselves."""
        if not self.checked:
            with contextlib.closing(self.open()) as file:
                for _ in self.sections(file):
                    pass
            self.checked = True


def find_manifests(repository: str, damaged: List[Damage]) -> Iterator[Tuple[str, str]]:
    """Volume and stem of each manifest. What the disk cannot tell of is damage, and never absence."""
    for volume in sorted(os.listdir(repository)):
        directory = os.path.join(repository, volume)
        try:
            names = set(os.listdir(directory))
        except NotADirectoryError:
            continue
        except PermissionError:
            raise
        except OSError as error:
            damaged.append(Damage(volume, f"its directory cannot be read ({error.strerror})"))
            continue
        for name in sorted(names):
            found, path = MANIFEST.fullmatch(name), os.path.join(directory, name)
            if found and os.path.exists(path) and not os.path.isfile(path):
                # A pipe would be waited for. Without an image beside it, it is nothing of ours.
                if found[1] + ".zst" in names:
                    damaged.append(Damage(f"{volume}/{name}", "it is not a file"))
            elif found:
                yield volume, found[1]


def find_images(repository: str) -> Tuple[List[Image], List[Damage]]:
    """All images with a sound manifest, in the order of their points, and what is wrong with the others."""
    images: List[Image] = []
    damaged: List[Damage] = []
    for volume, stem in find_manifests(repository, damaged):
        try:
            images.append(Image(repository, volume, stem))
        except Damage as error:
            damaged.append(error)
        except Trouble as error:
            tell(str(error))  # of a newer blockbak: the others are no worse for it
        except (KeyError, TypeError, ValueError):
            damaged.append(Damage(f"{volume}/{stem}.json", "it is not a manifest"))
    return sorted(images, key=lambda image: (image.volume, image.opening["sequence"], not image.full)), damaged


def find_chains(images: List[Image], without: Set[str]) -> Dict[str, List[Image]]:
    """For each point that can be restored its shortest chain: a full, then deltas, oldest first.

    Images named in ``without`` do not count. A parent comes before its children in ``images``.
    """
    best: Dict[Key, List[Image]] = {}
    points: Dict[str, List[Image]] = {}  # by VOLUME/POINT
    for image in images:
        below = [] if image.full else best.get(image.parent_key)
        if below is None or image.name in without:
            continue
        chain = [*below, image]
        if image.key not in best or len(chain) < len(best[image.key]):
            best[image.key] = chain
        if image.place not in points or len(chain) < len(points[image.place]):
            points[image.place] = chain
    return points


# --- content --------------------------------------------------------------------------------------


def zero_frame(length: int) -> bytes:
    """The one frame that may stand for ``length`` zeros. It has no checksum, so it is compared."""
    head = struct.pack("<IBBI", ZSTD_MAGIC, 0x80, 0x38, length)
    whole, rest = divmod(length - 1, 1 << 17)
    return head + struct.pack("<I", 1 << 20 | 2) * whole + struct.pack("<I", rest + 1 << 3 | 3)


def frame_flaw(frame: bytes, content: int, checksum: int) -> Optional[str]:
    """Why a frame cannot be left to zstd's own check, or None.

    That the frame ends with the checksum that the index names, and zstd finds it right, proves that it is
    the frame of this place. See RFC 8878, 3.1.1.1: bit 2 of the descriptor says that there is one.
    """
    if len(frame) < 9 or int.from_bytes(frame[:4], "little") != ZSTD_MAGIC:
        return "is not where the index says"
    if not frame[4] & 0x04:
        return None if frame == zero_frame(content) else "has no checksum"
    return None if int.from_bytes(frame[-4:], "little") == checksum else "is not the one the index names"


class Content:
    """The content of all frames of an image, one after the other, out of one zstd process."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.flaw: Optional[BaseException] = None
        pipe = subprocess.PIPE
        start: Any = subprocess.Popen  # its pipes are there, whatever their type says
        self.zstd = start(["zstd", "-dcq"], bufsize=0, stdin=pipe, stdout=pipe, stderr=pipe)
        self.into, self.out, self.said = self.zstd.stdin, self.zstd.stdout, self.zstd.stderr
        for end in (self.into, self.out):
            with contextlib.suppress(OSError):
                fcntl.fcntl(end, 1031, 1 << 20)  # F_SETPIPE_SZ: a longer pipe is quicker, no more
        self.feeder = threading.Thread(target=self.feed)
        self.feeder.start()

    def feed(self) -> None:
        """In a thread of its own: hand zstd the frames in the order of the index."""
        try:
            # zstd takes an input without any frame for a cut one, and a delta may have none.
            self.into.write(SKIPPABLE.pack(PADDING_MAGIC, 0))
            with contextlib.closing(self.image.open()) as file:
                for section in self.image.sections(file):
                    self.feed_section(file, section)
        except BrokenPipeError:
            pass  # zstd has ended, and says why itself
        except BaseException as error:  # noqa: BLE001 - the thread that reads raises it again
            self.flaw = error
        finally:
            self.into.close()

    def feed_section(self, file: BinaryIO, section: Section) -> None:
        """The frames of one section, each the one that the index names. Raises Damage."""
        at = section.region
        for window, content, stored, offset, checksum, _ in section.frames:
            self.image.padding(file, at, offset)
            rest = memoryview(self.image.read(file, offset, stored))
            flaw = frame_flaw(rest.tobytes(), content, checksum)
            if flaw:
                raise self.image.damage(f"the frame of window {window} {flaw}")
            while rest:
                rest = rest[self.into.write(rest) :]
            at = offset + stored
        self.image.padding(file, at, section.offset)

    def read(self, view: memoryview) -> None:
        """Fill ``view``. Raises Damage where there is no more."""
        while view:
            data = self.out.read(len(view))
            if not data:
                self.finish()
                raise self.image.damage("its frames hold less than its index says")
            view[: len(data)] = data
            view = view[len(data) :]

    def finish(self) -> None:
        """There must be nothing more, and neither zstd nor the feeder may have found anything wrong."""
        if self.out.read(1):
            raise self.image.damage("its frames hold more than its index says")
        said = self.said.read().decode("utf-8", "replace")
        self.feeder.join()
        if self.flaw:
            raise self.flaw
        if self.zstd.wait():
            raise self.image.damage("zstd says: " + " ".join(said.split()))

    def close(self) -> None:
        """End zstd and the feeder, wherever they are."""
        if self.zstd.poll() is None:
            self.zstd.kill()
        self.zstd.wait()
        self.feeder.join()
        self.out.close()
        self.said.close()


# --- the target -----------------------------------------------------------------------------------


class Target:
    """What is written to, open. Nothing of it has changed before ``begin``."""

    def __init__(self, path: str, repository: str, need: int, yes: bool) -> None:
        self.path, self.real, self.need = path, os.path.realpath(path), need
        self.new = not os.path.lexists(path)
        self.file = self.real + ".partial" if self.new else self.real
        self.check_place(repository)
        mode = stat.S_IFREG if self.new else os.stat(path).st_mode
        self.block = stat.S_ISBLK(mode)
        if not self.block and not stat.S_ISREG(mode):
            raise Trouble(f"{path} is neither a block device nor a file")
        if not self.new:
            self.check_loops()
            self.check_links(repository)
            if not yes:
                raise Refused(f"{path} exists; say --yes to overwrite all it holds")
        self.fd = self.open()
        have = os.lseek(self.fd, 0, os.SEEK_END) if self.block else need
        if have < need:
            os.close(self.fd)
            raise Refused(f"{path} has {have} bytes, {need} are needed")
        if have > need:
            tell(f"{path} is larger than the point: its last {have - need} bytes stay as they are.")

    def check_place(self, repository: str) -> None:
        """Where it lies, or would lie: not in a repository, and not where only devices are."""
        directory = above = os.path.dirname(self.real)
        while above != os.path.dirname(above):
            if above == repository or os.path.isfile(os.path.join(above, "repository.json")):
                raise Refused(f"{self.path} lies in a repository")
            above = os.path.dirname(above)
        # Where device nodes live, a name that is not there is a slip of the pen; /dev/shm is another place.
        node = (
            os.path.isdir(directory)
            and (directory + "/").startswith("/dev/")
            and os.stat(directory).st_dev == os.stat("/dev").st_dev
        )
        if not os.path.isdir(directory) or (self.new and node):
            raise Trouble(f"there is no device and no directory for {self.path}")

    def open(self) -> int:
        """A descriptor to write to. Raises Refused where another uses it, and OSError."""
        # With O_EXCL the kernel refuses a block device that is mounted, swapped on, or part of another
        # one (LVM, RAID, encryption), and a new file that is there already.
        exclusive = os.O_EXCL if self.new or self.block else 0
        try:
            return os.open(self.file, os.O_RDWR | exclusive | (os.O_CREAT if self.new else 0), 0o600)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise Refused(f"{self.path} is in use: mounted, swapped on, or part of another device") from error
            if error.errno == errno.EEXIST:
                raise Refused(f"{self.file} exists; remove it first") from error
            raise

    def check_links(self, repository: str) -> None:
        """A file of the repository may have another name elsewhere."""
        own = self.real
        if self.block:
            with contextlib.suppress(OSError), open(f"/sys/block/{os.path.basename(own)}/loop/backing_file") as file:
                own = file.read().rstrip("\n")
        for directory, _, names in os.walk(repository):
            for name in names:
                # What cannot be looked at is not the target, which was.
                with contextlib.suppress(OSError):
                    if os.path.samefile(os.path.join(directory, name), own):
                        raise Refused(f"{self.path} is another name of {name} in the repository")

    def check_loops(self) -> None:
        """A file that a loop device stands on is in use; and so is a loop device whose file another one has,
        if that is used: to the kernel they are two devices.
        """
        files = {}
        for name in os.listdir("/sys/block") if os.path.isdir("/sys/block") else []:
            with contextlib.suppress(OSError), open(f"/sys/block/{name}/loop/backing_file") as file:
                files[name] = file.read().rstrip("\n")
        own = files.pop(os.path.basename(self.real), self.real) if self.block else self.real
        for name, backing in files.items():
            if not (os.path.exists(backing) and os.path.exists(own) and os.path.samefile(backing, own)):
                continue
            if not self.block:
                raise Refused(f"{self.path} is the file behind /dev/{name}")
            for node in glob.glob(f"/dev/{name}") + glob.glob(f"/dev/{name}p*"):
                try:
                    os.close(os.open(node, os.O_RDONLY | os.O_EXCL))
                except OSError as error:
                    raise Refused(f"{self.path} has one file with {node}, which is in use") from error

    def begin(self) -> None:
        """Before the first byte, and again before another chain is tried."""
        if not self.block:
            if self.new:
                os.ftruncate(self.fd, 0)
            os.ftruncate(self.fd, self.need)

    def write(self, start: int, data: memoryview) -> None:
        """All of ``data`` at byte ``start``. Raises OSError."""
        while data:
            written = os.pwrite(self.fd, data, start)
            start, data = start + written, data[written:]

    def write_zeros(self, start: int, end: int) -> None:
        """Zeros are written like anything else: what was there before must go."""
        for at in range(start, end, PIECE):
            self.write(at, memoryview(ZEROS)[: min(PIECE, end - at)])

    def finish(self) -> None:
        """The content must be on the disk before a file gets its name."""
        os.fsync(self.fd)
        if self.new:
            if os.path.lexists(self.real):
                raise Refused(f"{self.path} was made by someone else meanwhile")
            os.rename(self.file, self.real)
            directory = os.open(os.path.dirname(self.real), os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)

    def close(self) -> None:
        """After a failure a new file goes; anything else stays as far as it was written."""
        os.close(self.fd)
        if self.new and os.path.lexists(self.file):
            os.unlink(self.file)


# --- the two verbs --------------------------------------------------------------------------------


def apply(image: Image, target: Target, bad: Dict[int, List[Range]], fresh: bool) -> None:
    """Write one image over what is there. ``bad`` gathers by section what could not be read from the
    source; ``fresh`` says that the target is a new file, which reads as zeros.
    """
    tell(f"Writing {image.name} ({image.bytes} bytes).")
    buffer, next_word = memoryview(bytearray(PIECE)), time.time() + 5
    content = Content(image)
    try:
        with contextlib.closing(image.open()) as file:
            for section in image.sections(file):
                follow_bad(image, section, bad)
                for start, length, kind in section.extents if not image.full else []:
                    if kind != DATA:
                        target.write_zeros(start, start + length)
                # After the zeros: a block that is part BAD and part data is whole in its frame.
                for start, end in image.stored_ranges(section):
                    for at in range(start, end, PIECE):
                        view = buffer[: min(PIECE, end - at)]
                        content.read(view)
                        if not fresh or view.tobytes() != ZEROS[: len(view)]:
                            target.write(at, view)
                if time.time() > next_word:
                    next_word = time.time() + 5
                    tell(f"  {section.end * 100 // image.device_bytes} %")
        content.finish()
    finally:
        content.close()


def follow_bad(image: Image, section: Section, bad: Dict[int, List[Range]]) -> None:
    """What a newer image says about a block replaces what an older one said, BAD ranges too."""
    ranges = bad.pop(section.number, [])
    for start, length, _ in section.extents if ranges else []:
        low, high = image.in_blocks(start, length)
        cut = [((begin, min(end, low)), (max(begin, high), end)) for begin, end in ranges]
        ranges = [part for parts in cut for part in parts if part[0] < part[1]]
    ranges += [(start, start + length) for start, length, kind in section.extents if kind == BAD]
    if ranges:
        bad[section.number] = sorted(ranges)


def find_point(images: List[Image], damaged: List[Damage], name: str) -> str:
    """The one point of that name: its id, or the beginning of it, with its volume before it if need be."""
    points = sorted({image.place for image in images if name and f"/{image.place}".find(f"/{name}") >= 0})
    for flaw in damaged:
        if not points and f"/{name}" in flaw.image:
            raise flaw
        # What cannot be read may be what was meant: only a whole id is clear then.
        directory, _, file = flaw.image.rpartition("/")
        hidden = directory + "/" + file.split(".")[0] if directory else file + "/" + name.rsplit("/", maxsplit=1)[-1]
        if f"/{name}" in f"/{hidden}" and hidden not in points and not any(one.endswith(name) for one in points):
            points.append(hidden)
    if len(points) != 1:
        raise Trouble(f"{name} may be " + ", ".join(points) if points else f"there is no point {name}; see list")
    return points[0]


def do_restore(repository: str, name: str, path: str, yes: bool) -> int:
    """Restore by the shortest whole chain, and by another where one proves damaged; the exit status.

    Raises Trouble, and OSError of the target.
    """
    images, damaged = find_images(repository)
    point = find_point(images, damaged, name)
    if not shutil.which("zstd"):
        raise Trouble("the program zstd is needed; it is in the package of that name")
    without: Set[str] = set()
    chain = find_chains(images, without).get(point)
    target, begun = Target(path, repository, chain[-1].device_bytes, yes) if chain else None, False
    try:
        while chain and target:
            bad: Dict[int, List[Range]] = {}
            try:
                for image in chain:
                    image.check()
                begun = True
                target.begin()
                for image in chain:
                    apply(image, target, bad, target.new and image is chain[0])
                target.finish()
                break
            except Damage as error:
                tell(str(error))
                without.add(error.image)
                chain = find_chains(images, without).get(point)
                if chain or begun:
                    tell("Trying without it." if chain else f"{path} is not complete: do not use it.")
    except (OSError, KeyboardInterrupt):
        if begun and target and not target.new:
            tell(f"{path} is not complete: do not use it.")
        raise
    finally:
        if target:
            target.close()
    if not chain:
        for flaw in damaged:
            tell(str(flaw))
        raise Damage(point, "no whole chain of images holds this point")
    tell(f"{point} is on {path}, {chain[-1].device_bytes} bytes: metadata checked by SHA-256, data by zstd.")
    if chain[-1].closing["consistency"] == "none":
        tell("The source was in use or written while it was read: the point may be torn.")
    for start, end in (part for number in sorted(bad) for part in bad[number]):
        tell(f"Could not be read from the source, so zeros instead: bytes {start} to {end}.")
    return 3 if bad else 0


def do_list(repository: str) -> int:
    """Print a line for each image; the exit status."""
    images, damaged = find_images(repository)
    chains = find_chains(images, set())
    for image in images:
        word = "ok" if image.place in chains else f"CANNOT BE RESTORED, {image.opening['parent']} is missing"
        try:
            image.open().close()
        except Damage as error:
            damaged.append(error)
            word = "DAMAGED"
        kind, size, source = image.opening["kind"], image.device_bytes, image.opening["source"]
        line = f"{image.volume:24} {image.point}  {kind:12} {size:>16} bytes  {source}  {word}"
        print(plain(line, sys.stdout.encoding))
    for flaw in damaged:
        tell(str(flaw))
    return 4 if damaged or any(image.place not in chains for image in images) else 0


def main() -> int:
    """Do what the command line says; the exit status."""
    parser = argparse.ArgumentParser(description="Restores points of the repository this file lies in.")
    verbs = parser.add_subparsers(dest="verb", metavar="list | restore")
    verbs.required = True
    verbs.add_parser("list", help="the images, oldest first")
    verb = verbs.add_parser("restore", help="bring a point onto a device or into a file")
    verb.add_argument("point", metavar="POINT", help="its id, or the beginning of it")
    verb.add_argument("target", metavar="TARGET", help="a block device or a file")
    verb.add_argument("--yes", action="store_true", help="overwrite what TARGET holds")
    given = parser.parse_args()
    repository = os.path.dirname(os.path.realpath(__file__))
    try:
        if given.verb == "list":
            return do_list(repository)
        return do_restore(repository, given.point, given.target, given.yes)
    except Trouble as error:
        tell(f"rescue.py: {error}")
        return error.code
    except OSError as error:
        tell(f"rescue.py: {error}")
        return 1
    except KeyboardInterrupt:
        tell("rescue.py: interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
