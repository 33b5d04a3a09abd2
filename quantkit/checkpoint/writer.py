"""Write an artifact so that it appears complete or not at all, and a killed run can continue where it stopped.

Everything is written to OUT.partial, next to OUT. A block is finished when the journal has a line for it; its shard and the
activations for the next block are flushed to disk before. At the end, the shards are merged into a new folder, which is
renamed to OUT.

A lock file marks OUT.partial as ours: it is created first, and deleted last.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO

from safetensors import safe_open

from quantkit.checkpoint.files import Json, disk_errors, sync, write_json, write_tensors
from quantkit.errors import ArtifactError, QuantkitError, ResourceError

#: Shards of the finished artifact have at most this many bytes, which bounds the memory that merging needs.
SHARD_BYTES = 200_000_000


def _looks_like_a_model(folder: Path) -> bool:
    """Whether `folder` is a model or empty, so that --overwrite may replace it (and not somebody's home)."""
    whole = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    return whole or (folder.is_dir() and not any(folder.iterdir()))


def _take_lock(folder: Path) -> IO[str]:
    """Create or take over `folder`, and lock it against a second run.

    Raises:
        ArtifactError: another run has locked it, or quantkit did not create it.
    """
    path = folder / "lock"
    while True:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if not path.exists() and any(folder.iterdir()):
                raise ArtifactError(f"{folder}: was not made by quantkit and is in the way; move it, or choose another name")
            lock = path.open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # If a run ended between our `open` and our lock, it has deleted the file that we locked.
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        except BlockingIOError:
            lock.close()
            raise ArtifactError(f"{folder}: another run is writing there; wait for it or stop it") from None
        except FileNotFoundError:
            pass
        lock.close()


def _clear(folder: Path) -> None:
    """Delete everything except the lock. The journal goes first, so that a kill never leaves what looks like finished work."""
    (folder / "journal.jsonl").unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


class Workspace:
    """OUT.partial: the shards and the journal of one run, locked against a second one.

    Attributes:
        out: the artifact's final path.
        folder: OUT.partial.
        finished: journal entries of finished steps, in order.
        settings: those of the run's first start.
    """

    def __init__(
        self,
        out: Path,
        identity: Json,
        *,
        source: Path,
        overwrite: bool,
        settings: Json | None = None,
        upgrade: Callable[[Json], Json] = dict,
    ) -> None:
        """Open or create the workspace of the run that `identity` describes.

        Args:
            out: the artifact's final path.
            identity: an unfinished run is continued only if its identity is equal.
            source: the model folder that is read; it is never overwritten.
            overwrite: replace OUT, or an unfinished run with another identity.
            settings: settings of the run. An unfinished run keeps those of its first start; they are not compared.
            upgrade: brings an identity that an earlier version stored up to date before it is compared.

        Raises:
            ArtifactError: OUT exists, another run is at work, or OUT.partial belongs to a different run.
        """
        self.out, self.folder = out, self.folder_of(out)
        self._source, self._overwrite = source, overwrite
        self.require_free(out, source, overwrite=overwrite)
        self._lock = _take_lock(self.folder)
        try:
            self.settings = self._open(identity, settings or {}, upgrade)
            self.finished = self._journal()
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> "Workspace":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Release the lock. Discard the workspace after an error that the same command would meet again."""
        if isinstance(error, QuantkitError) and not isinstance(error, ResourceError | ArtifactError):
            self.discard()
        self._lock.close()

    def _open(self, identity: Json, settings: Json, upgrade: Callable[[Json], Json]) -> Json:
        """Continue the run of this workspace, or start a new one. Returns its settings."""
        stored = self._stored()
        if stored is not None:
            stored["identity"] = upgrade(stored["identity"])
        if stored is not None and stored["identity"] == identity:
            known: Json = stored["settings"]
            return known
        if stored is not None and not self._overwrite:
            before = stored["identity"]
            changed = ", ".join(sorted(k for k in before.keys() | identity.keys() if before.get(k) != identity.get(k)))
            raise ArtifactError(
                f"{self.folder}: belongs to an unfinished run with a different {changed}; run that command again to finish "
                "it, or pass --overwrite to start anew"
            )
        with disk_errors(self.folder):
            _clear(self.folder)
        write_json(self.folder / "run.json", {"identity": identity, "settings": settings})
        return settings

    @staticmethod
    def folder_of(out: Path) -> Path:
        """OUT.partial."""
        out = Path(os.path.abspath(out))  # "." has no name
        return out.with_name(out.name + ".partial")

    @staticmethod
    def delete_leftovers(out: Path) -> None:
        """Delete the workspace of a run whose artifact is complete.

        Raises:
            ArtifactError: a run is at work in it.
        """
        folder = Workspace.folder_of(out)
        with _take_lock(folder):
            _clear(folder)
            shutil.rmtree(folder)

    @staticmethod
    def require_free(out: Path, source: Path, *, overwrite: bool) -> None:
        """Refuse to write to an existing OUT, unless it may be overwritten.

        Raises:
            ArtifactError: OUT exists, and it must not be replaced without --overwrite, is not a model, or is the source.
        """
        if not out.exists() and not out.is_symlink():
            return
        if not overwrite:
            raise ArtifactError(f"{out}: exists; choose another name or pass --overwrite to replace it")
        if not _looks_like_a_model(out):
            raise ArtifactError(f"{out}: is not a model folder, so --overwrite does not delete it; choose another name")
        if source.exists() and out.samefile(source):
            raise ArtifactError(f"{out}: is the source itself, which --overwrite does not replace; choose another name")

    def _stored(self) -> Json | None:
        try:
            stored = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        whole = isinstance(stored, dict) and all(isinstance(stored.get(key), dict) for key in ("identity", "settings"))
        return stored if whole else None

    def _journal(self) -> list[Json]:
        """The journal entries from which the run can continue. A damaged line and all lines after it are ignored."""
        path = self.folder / "journal.jsonl"
        entries: list[Json] = []
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                entry = json.loads(line)
                present = (self.folder / entry["shard"]).is_file()
            except (ValueError, KeyError, TypeError):
                break
            if not present:
                break
            entries.append(entry)
        while entries and "state" in entries[-1] and not (self.folder / entries[-1]["state"]).is_file():
            entries.pop()
        return entries

    def commit(self, entry: Json) -> None:
        """Declare a step finished.

        Its files must have been flushed: `entry["shard"]`, and `entry["state"]` if it names one, which the next step needs
        and may delete once it is finished itself.
        """
        self.finished.append(entry)
        path = self.folder / "journal.jsonl"
        with disk_errors(path):
            text = "".join(json.dumps(done) + "\n" for done in self.finished)
            scratch = path.with_name("journal.tmp")
            scratch.write_text(text, encoding="utf-8")
            sync(scratch)
            scratch.replace(path)
            sync(self.folder)

    def merge_shards(self) -> tuple[Path, list[Path]]:
        """Merge the shards of all steps into the folder that will become OUT. Returns the folder and its shards."""
        artifact = self.folder / "artifact"
        with disk_errors(artifact):
            shutil.rmtree(artifact, ignore_errors=True)
            artifact.mkdir()
        batches: list[list[Path]] = [[]]
        for shard in (self.folder / entry["shard"] for entry in self.finished):
            if batches[-1] and sum(p.stat().st_size for p in [*batches[-1], shard]) > SHARD_BYTES:
                batches.append([])
            batches[-1].append(shard)
        weight_map: dict[str, str] = {}
        paths = []
        for number, batch in enumerate(batches, start=1):
            single = len(batches) == 1
            name = "model.safetensors" if single else f"model-{number:05}-of-{len(batches):05}.safetensors"
            with ExitStack() as stack:
                opened = [stack.enter_context(safe_open(path, framework="pt")) for path in batch]
                tensors = {key: shard.get_tensor(key) for shard in opened for key in shard.keys()}  # noqa: SIM118
                write_tensors(artifact / name, tensors)
            weight_map |= dict.fromkeys(tensors, name)
            paths.append(artifact / name)
        if len(paths) > 1:
            total = sum(path.stat().st_size for path in paths)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(artifact / "model.safetensors.index.json", index)
        return artifact, paths

    def publish(self) -> None:
        """Rename the merged artifact to OUT, which replaces an old OUT only now, and delete the workspace."""
        artifact, old = self.folder / "artifact", self.folder / "replaced"
        with disk_errors(self.out):
            for path in artifact.iterdir():
                sync(path)
            sync(artifact)
            self.require_free(self.out, self._source, overwrite=self._overwrite)
            if self.out.exists():
                shutil.rmtree(old, ignore_errors=True)
                self.out.rename(old)
            artifact.rename(self.out)
            sync(self.out.parent)
        self.discard()

    def discard(self) -> None:
        """Delete the workspace."""
        with self._lock, suppress(OSError):
            _clear(self.folder)
            shutil.rmtree(self.folder)
