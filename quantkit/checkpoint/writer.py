"""Write an artifact so that it appears at once or not at all, and a killed run goes on where it stopped.

Everything is written in OUT.partial beside OUT. A block is finished when its line stands in the journal: its shard and the
activations for the next block were flushed to disk before. At the end the shards are joined into a folder of their own,
which is renamed to OUT.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantkit.errors import ArtifactError, ResourceError

#: Shards of the finished artifact are joined up to this many bytes; it bounds the memory that joining takes.
SHARD_BYTES = 500_000_000

Json = dict[str, Any]


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or an unwritable path into one clear line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        if full:
            raise ResourceError(
                f"{path}: the disk is full; free some space and run the same command again, finished blocks are kept"
            ) from None
        raise ArtifactError(f"{path}: cannot be written ({error})") from None


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, complete and flushed, or not at all."""
    scratch = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch, metadata={"format": "pt"})
        sync(scratch)
        scratch.replace(path)
        sync(path.parent)


def write_json(path: Path, value: Json) -> None:
    """Write indented JSON, complete and flushed, or not at all."""
    scratch = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        scratch.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        sync(scratch)
        scratch.replace(path)


def _looks_like_a_model(folder: Path) -> bool:
    """Whether replacing `folder` replaces a model, not somebody's home."""
    return folder.is_dir() and (not any(folder.iterdir()) or (folder / "config.json").is_file())


class Workspace:
    """OUT.partial: the shards and the journal of one run, locked against a second one.

    Attributes:
        out: the artifact's final path.
        folder: OUT.partial.
        finished: journal entries of finished steps, in order.
    """

    def __init__(self, out: Path, identity: Json, *, overwrite: bool) -> None:
        """Open or create the workspace of the run that `identity` describes.

        Raises:
            ArtifactError: OUT exists, another run is at work, or OUT.partial belongs to a different run.
        """
        self.out, self.folder = out, out.with_name(out.name + ".partial")
        self._overwrite = overwrite
        self.require_free(out, overwrite=overwrite)
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
        stored = self._stored_identity()
        if stored is not None and stored != identity:
            if not overwrite:
                changed = ", ".join(sorted(k for k in identity.keys() | stored.keys() if identity.get(k) != stored.get(k)))
                raise ArtifactError(
                    f"{self.folder}: belongs to an unfinished run with a different {changed}; run that command again to "
                    "finish it, or pass --overwrite to start anew"
                )
            self._clear()
            stored = None
        if stored is None:
            write_json(self.folder / "run.json", identity)
        self.finished = list(self._journal())

    @staticmethod
    def require_free(out: Path, *, overwrite: bool) -> None:
        """Refuse an OUT that is in the way.

        Raises:
            ArtifactError: OUT exists and may not, or must not, be replaced.
        """
        if not out.exists() and not out.is_symlink():
            return
        if not overwrite:
            raise ArtifactError(f"{out}: exists; choose another name or pass --overwrite to replace it")
        if not _looks_like_a_model(out):
            raise ArtifactError(f"{out}: is not a model folder, so --overwrite does not delete it; choose another name")

    def _take_lock(self) -> IO[str]:
        lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtifactError(f"{self.folder}: another run is writing {self.out.name}; wait for it or stop it") from None
        return lock

    def _stored_identity(self) -> Json | None:
        try:
            stored = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return stored if isinstance(stored, dict) else None

    def _journal(self) -> Iterator[Json]:
        """Complete entries whose files are all there; a line torn by a kill, and all behind it, does not count."""
        path = self.folder / "journal.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                entry: Json = json.loads(line)
            except ValueError:
                return
            if not (self.folder / entry["shard"]).is_file():
                return
            yield entry

    def commit(self, entry: Json) -> None:
        """Declare a step finished; its files, among them `entry["shard"]`, must have been flushed."""
        self.finished.append(entry)
        path = self.folder / "journal.jsonl"
        with disk_errors(path):
            text = "".join(json.dumps(done) + "\n" for done in self.finished)
            scratch = path.with_name("journal.tmp")
            scratch.write_text(text, encoding="utf-8")
            sync(scratch)
            scratch.replace(path)
            sync(self.folder)

    def join(self) -> tuple[Path, list[Path]]:
        """Join the journal's shards into the folder that will become OUT; returns it and its shards."""
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
        """Let the joined artifact appear as OUT, replacing an old one only now, and delete the workspace."""
        artifact, old = self.folder / "artifact", self.folder / "replaced"
        with disk_errors(self.out):
            for path in artifact.iterdir():
                sync(path)
            sync(artifact)
            self.require_free(self.out, overwrite=self._overwrite)
            if self.out.exists():
                shutil.rmtree(old, ignore_errors=True)
                self.out.rename(old)
            artifact.rename(self.out)
            sync(self.out.parent)
        self.discard()

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def discard(self) -> None:
        """Delete the workspace."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()
