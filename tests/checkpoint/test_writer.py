"""The workspace of a run: who may enter it, what counts as finished, and how the artifact appears."""

import fcntl
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantkit.checkpoint import writer
from quantkit.checkpoint.files import write_json, write_tensors
from quantkit.checkpoint.writer import Workspace
from quantkit.errors import ArtifactError

IDENTITY = {"recipe": {"bits": 4}, "source": {"model.safetensors": "00"}}
SOURCE = Path("model")


def tensors(number: int) -> dict[str, torch.Tensor]:
    return {f"t{number}": torch.full((100,), float(number))}


def filled(out: Path, count: int = 3) -> Workspace:
    """A workspace with `count` finished steps, none of which needs a state."""
    workspace = Workspace(out, IDENTITY, source=SOURCE, overwrite=False)
    for number in range(count):
        write_tensors(workspace.folder / f"{number}.safetensors", tensors(number))
        workspace.commit({"shard": f"{number}.safetensors"})
    return workspace


def published(workspace: Workspace) -> dict[str, torch.Tensor]:
    folder, _ = workspace.merge_shards()
    write_json(folder / "config.json", {})
    workspace.publish()
    return {name: tensor for path in workspace.out.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_nothing_stands_under_the_name_until_published(tmp_path: Path) -> None:
    workspace = filled(tmp_path / "out")
    workspace.merge_shards()
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert set(published(workspace)) == {"t0", "t1", "t2"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_goes_on_where_it_was(tmp_path: Path) -> None:
    with filled(tmp_path / "out") as first:
        entries = first.finished
    with Workspace(tmp_path / "out", IDENTITY, source=SOURCE, overwrite=False) as second:
        assert second.finished == entries


def test_settings_are_those_of_the_first_start(tmp_path: Path) -> None:
    with Workspace(tmp_path / "out", IDENTITY, source=SOURCE, overwrite=False, settings={"threads": 3}) as first:
        assert first.settings == {"threads": 3}
    with Workspace(tmp_path / "out", IDENTITY, source=SOURCE, overwrite=False, settings={"threads": 5}) as second:
        assert second.settings == {"threads": 3}


def test_every_difference_is_named(tmp_path: Path) -> None:
    filled(tmp_path / "out").__exit__(None, None, None)
    other = {"recipe": {"bits": 3}, "source": IDENTITY["source"], "device": "cpu"}
    with pytest.raises(ArtifactError, match="different device, recipe;"):
        Workspace(tmp_path / "out", other, source=SOURCE, overwrite=False)
    with Workspace(tmp_path / "out", other, source=SOURCE, overwrite=True) as anew:
        assert anew.finished == []
        assert sorted(path.name for path in anew.folder.iterdir()) == ["lock", "run.json"]


def test_one_at_a_time(tmp_path: Path) -> None:
    with filled(tmp_path / "out"), pytest.raises(ArtifactError, match="another run"):
        Workspace(tmp_path / "out", IDENTITY, source=SOURCE, overwrite=True)
    Workspace(tmp_path / "out", IDENTITY, source=SOURCE, overwrite=False).__exit__(None, None, None)


def test_a_refused_workspace_is_not_kept_locked(tmp_path: Path) -> None:
    filled(tmp_path / "out").__exit__(None, None, None)
    for _ in range(2):
        with pytest.raises(ArtifactError, match="different"):
            Workspace(tmp_path / "out", {}, source=SOURCE, overwrite=False)
    with (tmp_path / "out.partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_lock_on_a_deleted_file_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run ends, and deletes its workspace, just before we lock the file that we opened."""
    first, flock = filled(tmp_path / "out"), fcntl.flock

    def end_then_lock(*arguments: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        first.discard()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", end_then_lock)
    with Workspace(tmp_path / "out", IDENTITY, source=SOURCE, overwrite=False) as second:
        assert second.finished == []
        with pytest.raises(ArtifactError, match="another run"):
            Workspace(tmp_path / "out", IDENTITY, source=SOURCE, overwrite=False)


def test_state_that_is_gone_takes_its_steps_along(tmp_path: Path) -> None:
    with Workspace(tmp_path / "out", IDENTITY, source=SOURCE, overwrite=False) as workspace:
        for number in range(3):
            write_tensors(workspace.folder / f"{number}.safetensors", tensors(number))
            (workspace.folder / f"{number}.state").touch()
            workspace.commit({"shard": f"{number}.safetensors", "state": f"{number}.state"})
        (workspace.folder / "0.state").unlink()

    def finished() -> int:
        with Workspace(tmp_path / "out", IDENTITY, source=SOURCE, overwrite=False) as again:
            return len(again.finished)

    assert finished() == 3
    (tmp_path / "out.partial" / "2.state").unlink()
    assert finished() == 2
    (tmp_path / "out.partial" / "1.state").unlink()
    assert finished() == 0


def test_steps_count_up_to_the_first_missing_shard(tmp_path: Path) -> None:
    filled(tmp_path / "out").__exit__(None, None, None)
    (tmp_path / "out.partial" / "1.safetensors").unlink()
    with Workspace(tmp_path / "out", IDENTITY, source=SOURCE, overwrite=False) as again:
        assert again.finished == [{"shard": "0.safetensors"}]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"identity": 3, "settings": {}}'])
def test_a_journal_without_its_run_does_not_count(tmp_path: Path, text: str) -> None:
    filled(tmp_path / "out").__exit__(None, None, None)
    (tmp_path / "out.partial" / "run.json").write_text(text)
    with Workspace(tmp_path / "out", IDENTITY, source=SOURCE, overwrite=False) as again:
        assert again.finished == []


def test_small_shards_are_joined_and_large_ones_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = published(filled(tmp_path / "one"))
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors")] == ["model.safetensors"]
    monkeypatch.setattr(writer, "SHARD_BYTES", 1200)
    many = published(filled(tmp_path / "many"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "many" / file)
    assert one.keys() == many.keys() == index["weight_map"].keys()
    assert all(one[name].equal(many[name]) for name in one)


def test_publishing_does_not_replace_what_came_in_between(tmp_path: Path) -> None:
    workspace = filled(tmp_path / "out")
    workspace.merge_shards()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with workspace, pytest.raises(ArtifactError, match="exists"):
        workspace.publish()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    assert (tmp_path / "out.partial" / "journal.jsonl").is_file()


def test_overwrite_of_a_link_keeps_what_it_points_to(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").touch()
    (model / "model.safetensors").touch()
    (tmp_path / "out").symlink_to(model)
    workspace = Workspace(tmp_path / "out", IDENTITY, source=SOURCE, overwrite=True)
    write_tensors(workspace.folder / "0.safetensors", tensors(0))
    workspace.commit({"shard": "0.safetensors"})
    assert set(published(workspace)) == {"t0"}
    assert not (tmp_path / "out").is_symlink()
    assert sorted(path.name for path in model.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["out", "out.partial"])
def test_a_file_in_the_way(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ArtifactError, match=name):
        Workspace(tmp_path / "out", IDENTITY, source=SOURCE, overwrite=True)
    assert (tmp_path / name).read_text() == "mine"
