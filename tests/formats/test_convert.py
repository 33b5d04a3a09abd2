"""`convert` keeps every weight bit for bit, there and back; a refused conversion leaves no files."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import tiny
from helpers.slow_formats import make_weight
from quantkit.checkpoint import files, writer
from quantkit.checkpoint.reader import Checkpoint, read_json, sha256
from quantkit.errors import ArtifactError, CheckpointError, FormatError, NumericsError, QuantkitError, ResourceError
from quantkit.formats import FORMATS
from quantkit.formats import convert as conversion
from quantkit.formats.artifact import PackedReader, bits_per_weight
from quantkit.formats.convert import convert
from quantkit.methods.scheme import Scheme
from quantkit.quantization.run import QuantizeRequest, quantize_model
from quantkit.recipe import Recipe, Rule
from quantkit.utils.renamed_keys import RENAMED

CT, GPTQ, AWQ = FORMATS

#: Name -> recipe, and the formats that can hold its grid.
GRIDS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "w4 sym": ({"bits": 4, "group_size": 32}, (CT, GPTQ, AWQ)),
    "w4 asym": ({"bits": 4, "group_size": 32, "symmetric": False}, (CT, GPTQ, AWQ)),
    "w4 asym channel": ({"bits": 4, "group_size": -1, "symmetric": False}, (CT, GPTQ, AWQ)),
    "w2 asym": ({"bits": 2, "group_size": 16, "symmetric": False}, (CT, GPTQ)),
    "w3 sym": ({"bits": 3, "group_size": 32}, (CT, GPTQ)),
    "w3 asym": ({"bits": 3, "group_size": 64, "symmetric": False}, (CT, GPTQ)),
    "w8 sym": ({"bits": 8, "group_size": -1}, (CT, GPTQ)),
    "mixed": (
        {"group_size": 32, "rules": (Rule(match=r"layers\.0\.", skip=True), Rule(match="down_proj", bits=8))},
        (CT, GPTQ),
    ),
    "w4 asym skips": (
        {"group_size": 32, "symmetric": False, "rules": (Rule(match=r"layers\.1\.|o_proj", skip=True),)},
        (CT, GPTQ, AWQ),
    ),
}
PAIRS = [(grid, a, b) for grid, (_, held) in GRIDS.items() for a in held for b in held if a != b]

Artifact = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """(grid, format) -> a tiny quantized llama of two blocks in several shards; made once. Read only."""
    root = tmp_path_factory.mktemp("artifacts")
    model = tiny.make_model(root / "model", num_hidden_layers=2)

    @cache
    def made(grid: str, form: str) -> Path:
        recipe = Recipe(method="rtn", format=form, **GRIDS[grid][0])
        out = root / f"{grid} {form}".replace(" ", "-")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writer, "SHARD_BYTES", 40_000)
            quantize_model(
                QuantizeRequest(model, out, recipe, torch.device("cpu"), max_memory=1 << 30, overwrite=False), Mock()
            )
        return out

    return made


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split tiny models into several shards, and skip flushing, which takes most of the time and is not tested here."""
    monkeypatch.setattr(writer, "SHARD_BYTES", 40_000)
    monkeypatch.setattr(writer, "sync", lambda path: None)
    monkeypatch.setattr(files, "sync", lambda path: None)


def dense(folder: Path) -> dict[str, Tensor]:
    """All weights of an artifact in float32 (packed ones dequantized), and all other tensors unchanged."""
    checkpoint = Checkpoint(folder)
    packed = PackedReader(checkpoint)
    plain = [name for name in checkpoint.tensors if name.rpartition(".")[2] not in packed.format.suffixes]
    return checkpoint.read(plain) | {f"{name}.weight": packed.read(name).dequantize() for name in packed.modules}


def plan(folder: Path) -> dict[str, Scheme | None]:
    """The scheme that config.json states for every matrix, packed or not."""
    checkpoint = Checkpoint(folder)
    modules = [name.removesuffix(".weight") for name, tensor in dense(folder).items() if tensor.dim() == 2]
    config = checkpoint.config["quantization_config"]
    return FORMATS[config["quant_method"]].schemes(config, [name for name in modules if "embed" not in name])


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, as stored."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor, b[name]), name


def refused(source: Path, out: Path, form: str, kind: type[QuantkitError], *, overwrite: bool = False) -> str:
    """The error line of a refused conversion, which must leave no files."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(kind) as caught:
        convert(source, out, form, overwrite=overwrite)
    assert sorted(out.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change_tensor(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> Path:
    """Replace one tensor; return its shard."""
    shard = Checkpoint(folder).tensors[name].file
    tensors = load_file(shard)
    save_file(tensors | {name: change(tensors[name]).contiguous()}, shard)
    return shard


def convert_until(shard: int, source: Path, out: Path, form: str, error: type[BaseException] = KeyboardInterrupt) -> None:
    """Run a conversion that fails with `error` when it writes shard number `shard`."""
    write = files.write_tensors

    def stopping(path: Path, tensors: dict[str, Tensor]) -> None:
        if path.name == f"shard-{shard:05}.safetensors":
            raise error
        write(path, tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "write_tensors", stopping)
        with pytest.raises(error):
            convert(source, out, form, overwrite=False)
    assert len(list(out.with_name("out.partial").glob("shard-*"))) == shard


@pytest.mark.parametrize(("grid", "a", "b"), PAIRS)
def test_there_and_back(artifact: Artifact, tmp_path: Path, grid: str, a: str, b: str) -> None:
    source = artifact(grid, a)
    count = convert(source, tmp_path / "there", b, overwrite=False)
    assert count == len(PackedReader(Checkpoint(source)).modules) > 0
    assert read_json(tmp_path / "there" / "config.json")["quantization_config"]["quant_method"] == b
    assert_identical(dense(tmp_path / "there"), dense(source))

    convert(tmp_path / "there", tmp_path / "back", a, overwrite=False)
    if b == AWQ and GRIDS[grid][0].get("symmetric", True):
        # AWQ does not record symmetry, so the way back stores the zero points.
        assert_identical(dense(tmp_path / "back"), dense(source))
    else:
        assert_identical(stored(tmp_path / "back"), stored(source))
        assert plan(tmp_path / "back") == plan(source)


@pytest.mark.parametrize(("grid", "form"), [("w4 sym", GPTQ), ("w3 asym", GPTQ), ("mixed", GPTQ), ("w4 asym", AWQ)])
def test_converting_is_quantizing_to_that_format(artifact: Artifact, tmp_path: Path, grid: str, form: str) -> None:
    convert(artifact(grid, CT), tmp_path / "out", form, overwrite=False)
    assert_identical(stored(tmp_path / "out"), stored(artifact(grid, form)))
    assert plan(tmp_path / "out") == plan(artifact(grid, form))


def test_everything_else_of_the_folder(artifact: Artifact, tmp_path: Path) -> None:
    source = shutil.copytree(artifact("w4 sym", GPTQ), tmp_path / "in")
    (source / "LICENSE").write_text("free")
    (source / "quant_config.json").write_text("of another tool")
    convert(source, tmp_path / "out", CT, overwrite=False)
    names = {path.name for path in source.iterdir() if not path.name.endswith((".safetensors", ".index.json"))}
    kept = {path.name for path in (tmp_path / "out").iterdir() if not path.name.endswith((".safetensors", ".index.json"))}
    assert kept == names - {"quantize_config.json", "quant_config.json"}
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    convert(tmp_path / "out", tmp_path / "again", GPTQ, overwrite=False)
    config = read_json(tmp_path / "again" / "config.json")["quantization_config"]
    assert read_json(tmp_path / "again" / "quantize_config.json") == config


def test_the_report_says_what_is_there_now(artifact: Artifact, tmp_path: Path) -> None:
    convert(artifact("w4 asym", CT), tmp_path / "out", GPTQ, overwrite=False)
    report, before = read_json(tmp_path / "out" / "quantkit.json"), read_json(artifact("w4 asym", CT) / "quantkit.json")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    assert report["output_sha256"] == {path.name: sha256(path) for path in shards}
    assert report["recipe"] == before["recipe"] | {"format": GPTQ}
    assert [engine["loads"] for engine in report["engines"]] == [False, False, True]
    assert report["totals"]["size_bytes"] == sum(path.stat().st_size for path in shards)
    assert report["totals"]["bits_per_weight"] == bits_per_weight(Checkpoint(tmp_path / "out"))
    assert report["matrices"] == before["matrices"]


def test_the_report_is_written_with_current_keys(artifact: Artifact, tmp_path: Path) -> None:
    source = shutil.copytree(artifact("w4 sym", CT), tmp_path / "in")
    report = read_json(source / "quantkit.json")
    current = {new: old for old, new in RENAMED.items()}
    old = {current.get(key, key): value for key, value in report["recipe"].items()}
    assert old != report["recipe"]
    (source / "quantkit.json").write_text(json.dumps(report | {"recipe": old}))
    convert(source, tmp_path / "out", GPTQ, overwrite=False)
    assert read_json(tmp_path / "out" / "quantkit.json")["recipe"] == report["recipe"] | {"format": GPTQ}


# Refusals.


def test_three_bits_do_not_go_into_awq(artifact: Artifact, tmp_path: Path) -> None:
    source = artifact("w3 sym", CT)
    message = refused(source, tmp_path / "out", AWQ, FormatError)
    assert message.startswith(f"{source}: model.layers.0.")
    assert message.endswith("the awq format holds 4 bits, not 3; use compressed-tensors")


def test_mixed_schemes_do_not_go_into_awq(artifact: Artifact, tmp_path: Path) -> None:
    source = shutil.copytree(artifact("w4 asym", CT), tmp_path / "in")
    config = read_json(source / "config.json")
    group = config["quantization_config"]["config_groups"]["group_0"]
    other = json.loads(json.dumps(group)) | {"targets": [r"re:.*layers\.0\.self_attn\.q_proj"]}
    other["weights"]["symmetric"] = True
    config["quantization_config"]["config_groups"]["group_1"] = other
    (source / "config.json").write_text(json.dumps(config))
    for form in (AWQ, GPTQ):
        message = refused(source, tmp_path / "out", form, FormatError)
        assert message.startswith(f"{source}: the {form} format ")
        assert "; use compressed-tensors" in message


def test_an_unquantized_source(llama: Path, tmp_path: Path) -> None:
    message = refused(llama, tmp_path / "out", GPTQ, FormatError)
    assert message == f"{llama}: is not quantized; use `quantkit quantize`"


def test_out_is_in_the_way(artifact: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    source = artifact("w4 sym", CT)
    assert refused(source, out, GPTQ, ArtifactError).startswith(f"{out}: exists; choose another name or pass --overwrite")
    assert "is not a model folder" in refused(source, out, GPTQ, ArtifactError, overwrite=True)
    assert (out / "mine.txt").read_text() == "mine"


def test_overwrite_replaces_a_model(artifact: Artifact, tmp_path: Path) -> None:
    out = shutil.copytree(artifact("w2 asym", CT), tmp_path / "out")
    convert(artifact("w4 sym", CT), out, GPTQ, overwrite=True)
    assert_identical(stored(out), stored(artifact("w4 sym", GPTQ)))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_source_is_not_overwritten(artifact: Artifact, tmp_path: Path) -> None:
    source = shutil.copytree(artifact("w4 sym", CT), tmp_path / "in")
    assert "is the source itself" in refused(source, source, GPTQ, ArtifactError, overwrite=True)
    assert_identical(stored(source), stored(artifact("w4 sym", CT)))


def test_an_unfinished_run_of_another_kind_is_kept(artifact: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_until(1, artifact("w3 sym", CT), out, GPTQ)
    left = sorted(path.name for path in (tmp_path / "out.partial").iterdir())
    message = refused(artifact("w4 sym", CT), out, GPTQ, ArtifactError)
    assert message.startswith(f"{tmp_path / 'out.partial'}: belongs to an unfinished run")
    assert sorted(path.name for path in (tmp_path / "out.partial").iterdir()) == left


def test_scales_that_bfloat16_cannot_hold(artifact: Artifact, tmp_path: Path) -> None:
    """A GPTQ model of another tool, with float16 scales and bfloat16 weights."""
    source = shutil.copytree(artifact("w4 sym", GPTQ), tmp_path / "in")
    config = read_json(source / "config.json")
    (source / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    shard = change_tensor(source, "model.layers.1.mlp.up_proj.scales", lambda scales: scales * (1 + 2**-9))
    message = refused(source, tmp_path / "out", CT, FormatError)
    assert message.startswith(f"{shard}: 'model.layers.1.mlp.up_proj': scales are not exact in bfloat16, ")
    convert(source, tmp_path / "out", AWQ, overwrite=False)
    assert_identical(dense(tmp_path / "out"), dense(source))


@pytest.mark.parametrize(
    ("suffix", "change", "kind", "message"),
    [
        ("scales", lambda t: t * float("nan"), NumericsError, "holds NaN or Inf"),
        ("scales", lambda t: t[:, :-8], FormatError, "scales is float16 "),
        ("g_idx", lambda t: t.flip(0), FormatError, "g_idx is permuted"),
    ],
    ids=["nan", "shape", "act-order"],
)
def test_damage_in_the_last_shard(
    artifact: Artifact, tmp_path: Path, suffix: str, change: Any, kind: type[QuantkitError], message: str
) -> None:
    """The error is found after other shards were written; these are deleted as well."""
    source = shutil.copytree(artifact("w4 sym", GPTQ), tmp_path / "in")
    shard = change_tensor(source, f"model.layers.1.mlp.up_proj.{suffix}", change)
    assert shard.name > min(path.name for path in source.glob("*.safetensors"))
    assert message in refused(source, tmp_path / "out", CT, kind)


def test_a_report_that_is_none(artifact: Artifact, tmp_path: Path) -> None:
    source = shutil.copytree(artifact("w4 sym", CT), tmp_path / "in")
    (source / "quantkit.json").write_text("{}")
    message = refused(source, tmp_path / "out", GPTQ, CheckpointError)
    assert message.startswith(f"{source / 'quantkit.json'}: is not a report that quantkit wrote; delete it")


def test_rows_that_only_seem_to_fill_their_words(tmp_path: Path) -> None:
    """88 columns of 3 bits take as many words as 96, and gptq could not tell them apart."""
    scheme = Scheme(3, -1, True)
    source, name = tmp_path / "in", "model.layers.0.mlp.up_proj"
    source.mkdir()
    tensors = FORMATS[CT].encode(make_weight(scheme, 32, 88), torch.float16)
    save_file({f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}, source / "model.safetensors")
    config = {"model_type": "llama", "dtype": "float16", "quantization_config": FORMATS[CT].config({name: scheme})}
    (source / "config.json").write_text(json.dumps(config))
    message = refused(source, tmp_path / "out", GPTQ, FormatError)
    assert "32 x 88 is not a multiple of 32 both ways" in message
    convert(source, tmp_path / "out", CT, overwrite=False)
    assert_identical(dense(tmp_path / "out"), dense(source))


# Artifacts of other tools, and conversions that end early.


def test_what_others_leave_out(artifact: Artifact, tmp_path: Path) -> None:
    """A GPTQ model without report, g_idx, qzeros and checkpoint_format."""
    source = shutil.copytree(artifact("w4 sym", GPTQ), tmp_path / "in")
    (source / "quantkit.json").unlink()
    (source / "model.safetensors.index.json").unlink()
    kept = {name: tensor for name, tensor in stored(source).items() if not name.endswith((".g_idx", ".qzeros"))}
    for shard in source.glob("*.safetensors"):
        shard.unlink()
    save_file(kept, source / "model.safetensors")
    config = read_json(source / "config.json")
    del config["quantization_config"]["checkpoint_format"]
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "out", CT, overwrite=False)
    assert_identical(stored(tmp_path / "out"), stored(artifact("w4 sym", CT)))
    assert not (tmp_path / "out" / "quantkit.json").exists()


def test_a_conversion_goes_on_where_it_was_stopped(artifact: Artifact, tmp_path: Path) -> None:
    source, out = artifact("w4 sym", CT), tmp_path / "out"
    convert_until(1, source, out, GPTQ)
    first = tmp_path / "out.partial" / "shard-00000.safetensors"
    before = first.stat().st_mtime_ns
    convert_until(2, source, out, GPTQ)
    assert first.stat().st_mtime_ns == before
    convert(source, out, GPTQ, overwrite=False)
    assert_identical(stored(out), stored(artifact("w4 sym", GPTQ)))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_source_that_changed_since_is_not_gone_on_with(artifact: Artifact, tmp_path: Path) -> None:
    source, out = shutil.copytree(artifact("w4 sym", CT), tmp_path / "in"), tmp_path / "out"
    convert_until(1, source, out, GPTQ)
    change_tensor(source, "model.layers.1.mlp.up_proj.weight_scale", lambda scales: scales * 2)
    message = refused(source, out, GPTQ, ArtifactError)
    assert "belongs to an unfinished run with a different source" in message
    convert(source, out, GPTQ, overwrite=True)
    assert_identical(dense(out), dense(source))


def test_a_full_disk_keeps_what_is_done(artifact: Artifact, tmp_path: Path) -> None:
    source, out = artifact("w4 sym", CT), tmp_path / "out"
    convert_until(1, source, out, GPTQ, ResourceError)
    assert (tmp_path / "out.partial" / "shard-00000.safetensors").is_file()
    convert(source, out, GPTQ, overwrite=False)
    assert_identical(stored(out), stored(artifact("w4 sym", GPTQ)))


def test_a_bfloat16_model_keeps_its_scales(tmp_path: Path) -> None:
    """Scales of bfloat16 models are exact in float16 too, so nothing is lost on the way through gptq."""
    model = tiny.make_model(tmp_path / "model", dtype=torch.bfloat16, num_hidden_layers=1)
    recipe = Recipe(method="rtn", group_size=32, symmetric=False)
    quantize_model(
        QuantizeRequest(model, tmp_path / "ct", recipe, torch.device("cpu"), max_memory=1 << 30, overwrite=False), Mock()
    )
    convert(tmp_path / "ct", tmp_path / "gptq", GPTQ, overwrite=False)
    convert(tmp_path / "gptq", tmp_path / "back", CT, overwrite=False)
    assert_identical(stored(tmp_path / "back"), stored(tmp_path / "ct"))
    kinds = {name.rpartition(".")[2]: tensor.dtype for name, tensor in stored(tmp_path / "back").items()}
    assert kinds["weight_scale"] == torch.bfloat16
