"""One tree of errors: a sentence, fields, an exit code, advice.

::

    BlockbakError                      1  failed
    ├── Failed                         1
    │   ├── SourceError …              the source cannot be read as asked
    │   ├── RepositoryError …          the repository cannot be used as asked
    │   ├── JobError …                 a job of the configuration cannot be run
    │   └── CommandFailed              another program failed
    ├── Damage                         4  stored bytes are not what they were
    ├── Refused                        5  a safety rule forbids it
    └── Interrupted                  130  a person or the system asked to stop

``message`` and ``advice`` are templates over the keyword arguments given at birth; the
arguments stay on the error as ``fields``. Exit 2 (wrong command line) is click's own, exit 3
(done, with something to look at) is never an error: reports carry it.
"""

from __future__ import annotations

from typing import ClassVar

DONE = 0
ATTENTION = 3
USAGE = 2


class BlockbakError(Exception):
    """Base of all errors a person may meet. Raised only through its subclasses."""

    exit_code: ClassVar[int] = 1
    message: ClassVar[str] = "blockbak failed."
    advice: ClassVar[str] = ""

    def __init__(self, **fields: object) -> None:
        self.fields = fields
        super().__init__(self.message.format(**fields))

    @property
    def name(self) -> str:
        """The class name: what scripts match on."""
        return type(self).__name__

    @property
    def hint(self) -> str:
        """What to do next, or an empty string."""
        return self.advice.format(**self.fields)

    def as_dict(self) -> dict[str, object]:
        """The error as it stands in ``--json`` output."""
        plain = {
            key: value if isinstance(value, str | int | float | bool | None) else str(value)
            for key, value in self.fields.items()
        }
        return {
            "name": self.name,
            "message": str(self),
            "exit": self.exit_code,
            "advice": self.hint,
            "notes": list(getattr(self, "__notes__", ())),
            "fields": plain,
        }


class Failed(BlockbakError):
    """It could not be done; nothing was damaged and nothing was refused."""

    exit_code = 1


# --- sources -------------------------------------------------------------------------------


class SourceError(Failed):
    """The source cannot be read as asked."""


class NoSuchSource(SourceError):
    message = "{path} does not exist."
    advice = "'blockbak devices' lists what can be backed up."


class VolumeInactive(SourceError):
    message = "Logical volume {volume} is inactive."
    advice = "Activate it with 'lvchange {flags} {volume}', then run again."


class NotABlockSource(SourceError):
    message = "{path} is {what}, not a block device or an image file."
    advice = "Name a disk, a partition, a logical volume or a regular file."


class SourceNotOpened(SourceError):
    message = "{path} cannot be opened: {reason}."


class NoPermission(SourceError):
    message = "No permission to {action} {path}."
    advice = "Run as root, or as a member of the group that owns it."


class SourceVanished(SourceError):
    message = "{path} went away while it was read ({reason})."
    advice = "No point was made. Look at the kernel's log, then run again."


class SourceUnreadable(SourceError):
    message = "{path} cannot be read at byte {byte}, sector {sector} of {sector_bytes} bytes ({reason})."
    advice = "No point was made; earlier ones are untouched. Without --strict the rest is read, and the loss is named."


class SourceChangedSize(SourceError):
    message = "{path} changed its size while it was read: {before} bytes became {after}."
    advice = "No point was made. Run again when nothing resizes it."


class SourceEmpty(SourceError):
    message = "{path} holds no bytes: there is nothing to back up."


class SourceTooLarge(SourceError):
    message = "{path} has {size} bytes; an image holds at most {limit}."


class BadBlockSize(Failed):
    message = "{size} is not a usable block size."
    advice = "Take a power of two from 4K to 1M."


class DuplicateIdentity(Failed):
    message = "{first} and {second} both carry the identity {identity}: they cannot be told apart."
    advice = "Detach one of them, or give it an identity of its own."


class NoUsableParent(Failed):
    message = "No {kind} image can be made of {volume}: {reason}."
    advice = "Use '--kind auto' (or 'full') to make a full image now."


# --- repositories --------------------------------------------------------------------------


class RepositoryError(Failed):
    """The repository cannot be used as asked."""


class NoRepositoryNamed(RepositoryError):
    message = "No repository was named."
    advice = "Give '-r REPO' before the verb, set BLOCKBAK_REPO, or name just one in the configuration."


class NotARepository(RepositoryError):
    message = "{path} is not a blockbak repository ({reason})."
    advice = "Is its file system mounted? 'blockbak init' makes a repository in a new or empty directory."


class RepositoryExists(RepositoryError):
    message = "{path} cannot become a repository: {reason}."
    advice = "Name a directory that is empty or does not exist yet."


class NewerFormat(RepositoryError):
    message = "{what} was written by a newer blockbak ({detail})."
    advice = "Use a blockbak at least as new as the one that wrote it."


class NoSuchVolume(RepositoryError):
    message = "The repository holds no volume {volume}."
    advice = "'blockbak list' shows its volumes."


class VolumeExists(RepositoryError):
    message = "The name {volume} cannot be used: {reason}."


class NoSuchPoint(RepositoryError):
    message = "There is no restore point {point}."
    advice = (
        "'blockbak list' shows the points; one is named by its id, a beginning of it, 'latest', VOLUME@latest, or "
        "VOLUME@TIME as in web@2026-05-01T03:00."
    )


class AmbiguousPoint(RepositoryError):
    message = "{point} fits several restore points: {candidates}."
    advice = "Give more of the name, or VOLUME@latest."


class NoSuchPartition(RepositoryError):
    message = "Point {point} has no partition {number}; it has: {there}."
    advice = "'blockbak show {point}' lists its partitions."


class NoGroupMetadata(RepositoryError):
    message = "Point {point} holds no volume group's metadata: it is not of a logical volume, or LVM told none."


class VolumeLocked(RepositoryError):
    message = "Volume {volume} is in use by process {pid} on {host}."
    advice = "Wait for it to end, or use '--wait SECONDS'."


class NoSpace(RepositoryError):
    message = "No space is left for {path}."
    advice = "Make room and run again; earlier points are untouched."


class StoreFailed(RepositoryError):
    message = "{path} could not be {action}: {reason}."
    advice = "Earlier points are untouched. Look at the kernel's log for the disk below it."


class NoMergeRoom(RepositoryError):
    message = "Merging what {volume} no longer keeps takes up to {needed} bytes first, and {free} are free."
    advice = "Make room there. What no other point needed is gone already; all points are whole."


class NotPinned(RepositoryError):
    message = "Point {point} is not pinned."


class NothingToMerge(RepositoryError):
    message = "No differential can be composed of {volume} at {point}: the point is a full itself."
    advice = "Name a later point with --at; one that only a full holds needs no other image."


class ComposeFailed(RepositoryError):
    message = "The composed image of {point} does not have that point's root; it was thrown away."
    advice = "Run 'blockbak verify': an image it was made from may be damaged."


# --- images at the next boot ---------------------------------------------------------------


class NextBootOrdered(Failed):
    message = "An image at the next boot is ordered already: of {source}, into {repository}."
    advice = "'blockbak cold --at-next-boot --cancel -r {repository}' takes it back."


class NothingOrdered(Failed):
    message = "No image at the next boot is ordered into {repository}."


class NoSpoolRoom(Failed):
    message = "{path} has {free} bytes free; what {source} holds may need {needed} there until it is a point."
    advice = "Make room there, or name a repository on a larger disk."


class InitramfsFailed(Failed):
    message = "The initramfs could not be made with the image's stage in it: {reason}."
    advice = "Nothing is ordered. Look at what 'update-initramfs -u' says."


# --- snapshots and hooks -------------------------------------------------------------------


class SnapshotError(Failed):
    """No snapshot could be made, or it did not last until it was read. The origin goes on as before."""


class MapperFailed(SnapshotError):
    message = "Device-mapper could not {action} {device}: {reason}."


class NoSnapshotRoom(SnapshotError):
    message = "Volume group {group} has {free} bytes free, a snapshot of {volume} needs {needed}."
    advice = "Make room with lvremove, lvreduce or vgextend, or ask for less with --snapshot-size."


class NoPoolRoom(SnapshotError):
    message = "Thin pool {pool} is {used} % full ({what}): a snapshot of {volume} could fill it."
    advice = (
        "Extend the pool with 'lvextend -L +SIZE {pool}' (metadata: '--poolmetadatasize +SIZE'), or free room in it."
    )


class NotSnapshotable(SnapshotError):
    message = "{volume} cannot be snapshotted: {reason}."
    advice = "Stop what uses it and take it cold; 'blockbak backup --mode live' takes it as it is."


class SnapshotOverflowed(SnapshotError):
    message = (
        "The snapshot of {volume} overflowed: more was written to the volume than the snapshot's {size} bytes hold."
    )
    advice = "No point was made, the volume is unharmed. Run again at a quieter time, or with a larger --snapshot-size."


class PoolFull(SnapshotError):
    message = "Thin pool {pool} became {used} % full ({what}) while {volume} was read, so its snapshot was given up."
    advice = "No point was made. Extend the pool with lvextend before it is full, then run again."


class SnapshotLost(SnapshotError):
    message = "The snapshot of {volume} is no longer there: {reason}."
    advice = "No point was made. Something else removed it or took it down; run again."


class SnapshotSeen(SnapshotError):
    message = "The snapshot of {volume} is not hidden from scanners: {reason}."
    advice = (
        "A scanner could mistake it for its origin. Look for other rules about {device} in /etc/udev/rules.d, or at "
        "lvm.conf."
    )


class SetVoid(SnapshotError):
    message = "The volumes were let go before all snapshots were made: {reason}."
    advice = "No point was made, all volumes run. Try again with a longer --together-deadline, or fewer volumes."


class NoGuardian(SnapshotError):
    message = "The process that lets go at the deadline, whatever becomes of blockbak, could not be used: {reason}."
    advice = "No point was made; nothing was suspended and no hook was run."


class NoSuchHook(SnapshotError):
    message = "There is no hook {hook}."
    advice = "Give the path of a program, or a ready-made hook's name: {ready}."


class HookFailed(SnapshotError):
    message = "Hook {hook} failed in its phase {phase}: {reason}."
    advice = "No point was made. The hook's own messages stand above; a begin is tried three times within its deadline."


class HookStopped(SnapshotError):
    message = "Hook {hook} said to stop (exit status 63) in its phase {phase}."
    advice = "No point was made."


# --- devices brought to rest --------------------------------------------------------------


class RestError(Failed):
    """A device could not be brought to rest, or not kept there. What had been done was put back."""


class NoSuchUnit(RestError):
    message = "There is no unit {unit} that systemd knows."
    advice = "'systemctl list-units' shows what runs."


class NoSystemd(RestError):
    message = "{unit} cannot be stopped: systemd does not run this machine."
    advice = "Stop it by hand, or end its processes with --kill."


class UnitNotStopped(RestError):
    message = "{unit} could not be stopped: {reason}."
    advice = "'systemctl status {unit}' says more. No point was made."


class UnitRestarted(RestError):
    message = "{unit} was stopped, and runs again: {reason}."
    advice = "Name what starts it with --stop as well, or mask it for as long as the backup takes."


class ProcessStays(RestError):
    message = "Process {pid} ({name}) does not end, not even when it is killed."
    advice = "It hangs in the kernel, as a rule on a disk or a server that does not answer. No point was made."


class NotPutBack(RestError):
    message = "{what} could not be put back: {reason}."
    advice = "'blockbak recover' tries again."


class StateUnusable(RestError):
    message = "{path} cannot hold the journal of what is stopped: {reason}."
    advice = "Mend that, or name another directory in BLOCKBAK_STATE_DIR. What had been stopped was put back."


class RestVoid(RestError):
    message = "{path} was let go before it was read to its end: {reason}."
    advice = "No point was made. Give it more time with a longer deadline, or stop its users instead of freezing it."


# --- mirrors -------------------------------------------------------------------------------


class MirrorError(Failed):
    """A mirror did not come to its end."""


class PeerGone(MirrorError):
    message = "The other end of the mirror is gone: {reason}."
    advice = "Run again once it can be reached: what is equal by then does not move again."


class PeerNotUnderstood(MirrorError):
    message = "What the other end says is not a mirror's language: {reason}."
    advice = "A shell that greets who logs in, or a connection that alters bytes, would do that."


class PeerVersion(MirrorError):
    message = "The other end speaks version {theirs} of the mirror's language, this blockbak version {ours}."
    advice = "Use the same release of blockbak at both ends."


class PeerFailed(MirrorError):
    message = "{host}: {stderr}"
    advice = "{advice}"


class NotInStep(MirrorError):
    message = "{target} does not have the root of {source}: {have} in place of {need}."
    advice = "Memory or a processor may be failing at one end. Do not use the target; run again."


# --- jobs -----------------------------------------------------------------------------------


class JobError(Failed):
    """A job of the configuration cannot be run as it is."""


class NoConfig(JobError):
    message = "The configuration {path} cannot be read: {reason}."
    advice = "Write it, or name another one with '--config FILE' or BLOCKBAK_CONFIG; blockbak.toml(5) tells how."


class BadConfig(JobError):
    message = "The configuration {path} cannot be used; {count} wrong in it."
    advice = "Nothing was done. Mend it, then look again with 'blockbak config check'."


class NoSuchJob(JobError):
    message = "The configuration has no job {job}; it has: {there}."


class NoSuchZone(JobError):
    message = "This machine knows no time zone {zone}."
    advice = 'Take a name of /usr/share/zoneinfo, as in timezone = "Europe/Berlin".'


class NoSourceFits(JobError):
    message = "Job {job}: nothing that is here now fits the source {source}."
    advice = "'blockbak devices' lists what is here; 'udevadm info --query=property NODE' what udev says of it."


class JobRuns(JobError):
    message = "Job {job} is being run already, by process {pid} on {host}."
    advice = "Wait for it to end, or use '--wait SECONDS'."


class DeadlinePassed(JobError):
    message = "Job {job} was not done within its deadline of {seconds} seconds, so it was ended."
    advice = "Points that it had made before are whole. Give it a longer deadline, or find out what it waited for."


class RunKilled(JobError):
    message = "The run of job {job} that began at {started} did not come to its end."
    advice = (
        "It was stopped or killed, or the machine went down. 'blockbak recover' puts right what it left; the next run "
        "goes on."
    )


class NoTimers(JobError):
    message = "Timers cannot be installed: systemd does not run this machine."
    advice = "'blockbak timers install --cron' prints lines for cron."


class UnitFileTaken(JobError):
    message = "{path} is not of blockbak's making, so it is not overwritten."
    advice = "Move it away, or give the job another name."


# --- the rest of exit 1 ---------------------------------------------------------------------


class BadTarget(Failed):
    message = "{path} cannot be written: {reason}."


class TargetFailed(Failed):
    message = "{action} {path} failed: {reason}."
    advice = "What the target holds is incomplete or unproven; do not use it."


class TargetFull(Failed):
    message = "No space is left for {path}."
    advice = "Make room there and run again."


class NoVolumeRoom(Failed):
    message = "{place} has {free} bytes free; logical volume {volume} needs {needed}."
    advice = "Make room there, or restore to another place."


class PoolFilling(Failed):
    message = "Thin pool {pool} became {used} % full ({what}) while {volume} was written, so writing was stopped."
    advice = "Extend the pool with lvextend, then restore again."


class NotReadBack(Failed):
    message = "{path} does not read back as it was written, in bytes {ranges}."
    advice = "The target cannot be trusted: its disk, cable or memory may be failing."


class NoSidecar(Failed):
    message = "{path} has no sidecar {sidecar}: it was never finished, or blockbak did not make it."
    advice = "Nothing tells whether it is whole. Make it again with 'blockbak cold', or bring its sidecar back."


class NoSuchImage(Failed):
    message = "{path} cannot be read as a raw image: {reason}."
    advice = "A word with a slash in it, or with a sidecar beside it, is a raw image's name; a point has none."


class PipeFailed(Failed):
    message = "Standard output took {written} bytes of the image and no more: {reason}."
    advice = "What the other end has is incomplete; do not use it."


class StreamFailed(Failed):
    message = "Standard input cannot be restored: {reason}."
    advice = "What the target holds is incomplete; do not use it."


class VerificationFailed(Failed):
    message = "{path} does not read back as it was written: {blocks} blocks differ, the first at byte {first}."
    advice = "The target cannot be trusted: its disk, cable or memory may be failing."


class CommandFailed(Failed):
    message = "{program} failed ({status}): {stderr}"


class MissingProgram(Failed):
    message = "The program {program} is needed and not installed."
    advice = "On Debian: apt-get install {package}"


class OutputFailed(Failed):
    message = "Standard output cannot be written: {reason}."
    advice = "What was asked for may have been done all the same; only the answer is lost."


class NoCheckCommand(Failed):
    message = "The check command {program} is not there, or is no program."
    advice = "Nothing was restored. Name it by its whole path, and make it executable."


class NoDrillRoom(Failed):
    message = "{path} has {free} bytes free; a drill of {point} may take {needed} there."
    advice = "Make room there, name another directory with --scratch, or a logical volume with --target."


class NoPlaceApart(Failed):
    message = "No namespaces of its own could be made for the drill: {reason}."
    advice = "It takes root with CAP_SYS_ADMIN: in a container that has not, drill on its host."


class LoopFailed(Failed):
    message = "No loop device could be made of {path}: {reason}."
    advice = "'modprobe loop' brings the kernel's module for them; it takes Linux 5.8 or later."


class DemoFailed(Failed):
    message = "The demo proved that something is wrong: {what}."
    advice = "Please report it: this must never happen."


# --- damage ---------------------------------------------------------------------------------


class Damage(BlockbakError):
    """Stored bytes are not what they were, or not there."""

    exit_code = 4


class DamagedImage(Damage):
    message = "The image {file} is damaged: {reason}."
    advice = "'blockbak verify' shows what is affected; other points may be whole."


class DamagedManifest(Damage):
    message = "The manifest {file} is damaged: {reason}."
    advice = "If its image is whole, move the manifest away and run 'blockbak recover'."


class Misplaced(Damage):
    message = "{file} belongs to volume {belongs}, but lies in {here}."
    advice = (
        "Nothing is lost: move the files, or the directory, back to where they were; rescue.py restores them here too."
    )


class DamagedSidecar(Damage):
    message = "The sidecar {file} is damaged: {reason}."
    advice = "Bring it back from a copy: without it nothing tells whether its image is whole."


class DamagedRawImage(Damage):
    message = "The raw image {file} is damaged: {reason}."
    advice = "'blockbak verify' names the damaged ranges. Another copy of it, with this sidecar, would do."


class DamagedStream(Damage):
    message = "What came from standard input is not what the sidecar {file} tells of: {reason}."
    advice = "What the target holds is incomplete or wrong; do not use it."


class DamagedRepository(Damage):
    message = "{file} is damaged: {reason}."
    advice = "Bring it back from a copy; rescue.py beside it restores without it."


class DamagedHistory(Damage):
    message = "The history {file} is damaged: {reason}."
    advice = (
        "Every point is as it was. Bring the file back from a copy; or move history.jsonl and history.head away, and "
        "keep them: a new history begins with what is done next."
    )


class DamagedPin(Damage):
    message = "The pin {file} is damaged: {reason}."
    advice = "Its point stays as if it were immutable. Bring the file back from a copy, or move it away."


class MissingImage(Damage):
    message = "The image {file} is missing, though its manifest is there."
    advice = "Bring it back from a copy, or delete the point."


class Gap(Damage):
    message = "Point {point} cannot be restored: its parent {parent} is missing."
    advice = (
        "If its image is there without a manifest, 'blockbak recover' mends it; else restore a point before the gap "
        "or after the next full."
    )


class SpoolDamaged(Damage):
    message = "The spool {file} is damaged: {reason}."
    advice = "It was never a point; earlier points are untouched. 'blockbak cold --at-next-boot --cancel' removes it."


class UnreadableStore(Damage):
    message = "{file} cannot be read at byte {offset}: {reason}."
    advice = "The disk that holds the repository may be failing."


# --- refusals -------------------------------------------------------------------------------


class Refused(BlockbakError):
    """A safety rule forbids it; nothing was changed."""

    exit_code = 5


class SourceInUse(Refused):
    message = "{path} is in use ({holders})."
    advice = (
        "Bring it to rest with '--mode cold' ('--dry-run' tells how), or read it as it is with '--mode live' "
        "(consistency: none)."
    )


class SourceTwice(Refused):
    message = "{path} is named twice."
    advice = "Name it once: another name of the same device counts too."


class SourceInner(Refused):
    message = "{path} is an inner part of logical volumes, which LVM keeps for itself."
    advice = "Name the logical volume; 'blockbak backup --mode live' takes the part as it is (consistency: none)."


class RootInUse(Refused):
    message = "{path} carries the running system ({what}): it cannot be unmounted while that runs."
    advice = "{ways}"


class NotAtNextBoot(Refused):
    message = "{path} cannot be imaged at the next boot: {reason}."
    advice = "{way}"


class SourceHoldsRepository(Refused):
    message = "{path} holds {what}: an image of it would contain itself."
    advice = "Keep the repository on another disk."


class SourceHoldsImage(Refused):
    message = "{path} holds {file}: the image would contain itself."
    advice = "Write the image to a file on another disk."


class ImageInRepository(Refused):
    message = "{path} lies in the repository {repository}, where only blockbak's own files belong."
    advice = "Write it elsewhere, or make a point of the device with 'blockbak backup'."


class MirrorSourceInUse(Refused):
    message = "{path} is in use ({holders})."
    advice = (
        "A logical volume is mirrored while it is used with --from-snapshot. Stop what uses anything else first, or "
        "make a point of it with 'blockbak backup --mode cold'."
    )


class MirrorOntoItself(Refused):
    message = "{target} and {source} share bytes: a copy of the one cannot lie on the other."
    advice = "Name a target on another disk."


class PeerRefused(Refused):
    message = "{host}: {stderr}"
    advice = "{advice}"


class TargetInUse(Refused):
    message = "{path} is in use ({holders})."
    advice = "Unmount or stop what uses it first."


class TargetHolds(Refused):
    message = "{path} holds {what}; it is never overwritten."


class TargetUnsafe(Refused):
    message = "{path} cannot be overwritten safely: {reason}."
    advice = "{way}"


class VolumeNameTaken(Refused):
    message = "Logical volume {volume} exists; --create-lv only ever makes a new one."
    advice = "Name another one, or give it as TARGET to overwrite it."


class TargetTooSmall(Refused):
    message = "{path} has {have} bytes; at least {need} are needed."


class TargetSectorSize(Refused):
    message = (
        "{path} has {have}-byte sectors, and the partition table that is to lie there is for {need}-byte sectors: "
        "it would not be readable."
    )
    advice = "Restore it to a file, or to a device with {need}-byte sectors."


class CannotGrow(Refused):
    message = "The GPT cannot be moved to the end of {path}: {reason}."
    advice = "Restore without --grow, then look at the table with 'sgdisk --verify'."


class TargetExists(Refused):
    message = "{path} exists; it is overwritten only when told so."
    advice = "Give '--yes' to overwrite it."


class PointNeeded(Refused):
    message = "Point {point} is needed by {needed_by}, and no other image serves them."
    advice = "Compose a synthetic full first ('blockbak synthesize'), or delete those points too."


class PointPinned(Refused):
    message = "Point {point} is {reason}."
    advice = "'blockbak unpin {point}' takes that back."


class PointImmutable(Refused):
    message = "Point {point} is not touched before its time: {reason}."
    advice = "Nobody takes that back before then; a later end can be set with 'blockbak pin'."


class NotConfirmed(Refused):
    message = "{action} was not confirmed."
    advice = "Give '--yes', or type the name at the prompt."


class NotTogether(Refused):
    message = "{volume} cannot be suspended together with others: {reason}."
    advice = "Leave --together out: each volume then has a snapshot of its own; --freeze-with rests applications."


class UnsafeHook(Refused):
    message = "Hook {path} is not run: {reason}."
    advice = "A hook runs as root, so root must own it and its directories, and nobody else may write them."


class UnsafeConfig(Refused):
    message = "The configuration {path} is not used: {reason}."
    advice = "It names programs that are run, so only its owner, who must be root or you, may write it."


class CannotRest(Refused):
    message = "{path} cannot be brought to rest: {who}."
    advice = "{ways}"


class StillInUse(Refused):
    message = "{path} is still in use ({holders})."
    advice = "Everything was put back. Stop what uses it (--stop, --stop-users, --kill), then run again."


class NotAtRest(Refused):
    message = "{path} is not at rest: {what}."
    advice = "Everything was put back. Stop what uses it, then run again."


class FrozenAlready(Refused):
    message = "{path} is frozen already, by somebody else."
    advice = "Let whoever froze it end, or thaw it with 'fsfreeze --unfreeze {path}'."


class Interrupted(BlockbakError):
    """SIGINT, SIGTERM or SIGHUP. Nothing is left half-made, unless ``state`` says so."""

    exit_code = 130
    message = "Interrupted; {state}."
