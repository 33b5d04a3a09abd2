"""The README.md of an artifact: metadata that the Hub reads, and for people how to load, judge and reproduce the model.

The card depends only on the artifact and on its source's files: no dates, no paths, no machine. So the same run writes the
same bytes. The front matter follows https://huggingface.co/docs/hub/model-cards. The source's card is kept as README.base.md.
"""

import re
import shlex
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from quantkit.checkpoint.files import disk_errors, write_text
from quantkit.checkpoint.locate import hub_id
from quantkit.checkpoint.reader import Checkpoint, read_json
from quantkit.errors import ArtifactError
from quantkit.formats.artifact import PackedReader, bits_per_weight
from quantkit.formats.servers import SERVERS, notes, refusal
from quantkit.methods import METHODS

CARD, BASE_CARD = "README.md", "README.base.md"

#: First line after the front matter of every card that this module writes.
_MARK = "<!-- model card written by quantkit -->"
#: Lines around the measured numbers: what `write_measurements` replaces, and nothing else.
_BEGIN, _END = "<!-- measured by quantkit eval: begin -->", "<!-- measured by quantkit eval: end -->"
_REPRODUCE = "## Reproduce it"

#: Fields that are copied from the source's front matter, as they are stated there.
_COPIED = ("license", "license_name", "license_link", "library_name", "pipeline_tag")
#: Identifier of a licence -> its title, which begins its text (spaces and line breaks count alike).
_LICENCES = {"apache-2.0": "Apache License Version 2.0, January 2004", "mit": "MIT License Copyright"}


def write_model_card(folder: Path, source: Checkpoint) -> None:
    """Write the card of a finished artifact, and keep its source's card.

    Args:
        folder: the artifact, complete but for the card.
        source: the model that was quantized or converted.

    Raises:
        QuantkitError: the artifact cannot be read, or the card not be written.
    """
    original = source.folder / (BASE_CARD if _is_ours(source.folder / CARD) else CARD)
    if original.is_file():
        with disk_errors(folder):
            shutil.copyfile(original, folder / BASE_CARD)
    written = Checkpoint(folder)
    packed = PackedReader(written)
    recipe = read_json(folder / "quantkit.json")["recipe"] if (folder / "quantkit.json").is_file() else {}
    stated = front_matter(source.folder / CARD)
    metadata = _metadata(stated, source, packed, recipe)
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{front}---\n{_MARK}\n",
        _introduction(metadata, written, packed),
        _facts(written, packed, recipe),
        _loading(packed),
        _licence(metadata, folder),
        *([_reproduction()] if recipe else []),
    ]
    write_text(folder / CARD, "\n".join(parts))


def require_measurable(folder: Path) -> None:
    """Refuse, before any work, a folder in whose card no numbers can be written.

    Raises:
        ArtifactError: it is no artifact of quantkit's with its own card, or cannot be written to.
    """
    if not (folder / "quantkit.json").is_file() or not _is_ours(folder / CARD):
        raise ArtifactError(
            f"{folder}: --write-card needs an artifact with quantkit's model card (README.md); quantize or convert it again"
        )
    scratch = folder / (CARD + ".tmp")
    try:
        scratch.touch()
        scratch.unlink()
    except OSError as error:
        raise ArtifactError(f"{folder}: --write-card cannot write there ({error.strerror}); copy the artifact first") from None


def write_measurements(folder: Path, text: str) -> None:
    """Put measured numbers into an artifact's card, in place of earlier ones; the rest of the card stays as it is.

    Args:
        folder: the artifact; see `require_measurable`.
        text: Markdown.
    """
    card = (folder / CARD).read_text(encoding="utf-8")
    section = f"{_BEGIN}\n{text.strip()}\n{_END}\n"
    before, begin, rest = card.partition(_BEGIN + "\n")
    _, end, after = rest.partition(_END + "\n")
    if begin and end:
        card = before + section + after
    else:
        before, heading, after = card.partition(_REPRODUCE + "\n")
        card = f"{before.rstrip()}\n\n{section}" + (f"\n{heading}{after}" if heading else "")
    write_text(folder / CARD, card)


def front_matter(card: Path) -> dict[str, Any]:
    """The YAML block at the beginning of a model card, every scalar as text; empty where there is none that can be read.

    `no` is Norwegian here, not False, and 1.0 keeps its zero.
    """
    try:
        text = card.read_text(encoding="utf-8-sig", errors="replace")
        match = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", text, re.DOTALL | re.MULTILINE)
        found = yaml.load(match[1], yaml.BaseLoader) if match else None
    except (OSError, yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_ours(card: Path) -> bool:
    return card.is_file() and _MARK in card.read_text(encoding="utf-8", errors="replace").splitlines()


def _metadata(
    stated: Mapping[str, Any], source: Checkpoint, packed: PackedReader, recipe: Mapping[str, Any]
) -> dict[str, Any]:
    """The front matter. What is not known is left out."""
    metadata = _base_model(stated, source)
    metadata |= {name: stated[name] for name in _COPIED if isinstance(stated.get(name), str)}
    if "license" not in metadata and (licence := _licence_of(source.folder)):
        metadata["license"] = licence
    if _is_text(stated.get("language")):
        metadata["language"] = stated["language"]
    methods = str(recipe.get("method", "")).split("+") if recipe else []
    tags = ["quantkit", *methods, *(f"{bits}-bit" for bits in _bits(packed)), packed.format.name]
    return metadata | {"tags": list(dict.fromkeys(tags))}


def _base_model(stated: Mapping[str, Any], source: Checkpoint) -> dict[str, Any]:
    """What was quantized, by its name on the Hub; never a path.

    A source that is quantized itself names the model that it was made from. A dense source without a Hub id may name the model
    that it was trained from; then the artifact descends from that one too, but is not a quantization of it.
    """
    base = stated.get("base_model")
    names = [base] if isinstance(base, str) else base if isinstance(base, list) else []
    named = bool(names) and all(isinstance(name, str) and re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) for name in names)
    if named and "quantization_config" in source.config:
        related = "base_model_relation" in stated or not _is_ours(source.folder / CARD)
        return {"base_model": base} | ({"base_model_relation": "quantized"} if related else {})
    if own := hub_id(source.folder):
        return {"base_model": own, "base_model_relation": "quantized"}
    return {"base_model": base} if named else {}


def _is_text(value: object) -> bool:
    """Whether a field holds text, or a list of texts."""
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value))


def _licence_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("LICENSE*") if path.is_file())


def _licence_of(folder: Path) -> str | None:
    """The identifier of the licence whose text lies in the folder; None where there is none that is known."""
    for path in _licence_files(folder):
        text = " ".join(path.read_text(encoding="utf-8", errors="replace").split())
        for identifier, title in _LICENCES.items():
            if text.startswith(title):
                return identifier
    return None


def _bits(packed: PackedReader) -> list[int]:
    return sorted({packed.scheme(module).bits for module in packed.modules})


def _introduction(metadata: Mapping[str, Any], written: Checkpoint, packed: PackedReader) -> str:
    bits = " and ".join(f"{bits}-bit" for bits in _bits(packed))
    quantized = metadata.get("base_model_relation") == "quantized" and isinstance(metadata["base_model"], str)
    if quantized:
        base = metadata["base_model"]
        name, what = base.partition("/")[2], f"[{base}](https://huggingface.co/{base})"
    else:
        name = what = f"a `{written.config.get('model_type', 'language')}` model"
    kept = f"\nThe original's own model card is [{BASE_CARD}]({BASE_CARD})." if (written.folder / BASE_CARD).is_file() else ""
    return (
        f"# {name[0].upper() + name[1:] if not quantized else name}, {bits} weights\n\n"
        f"This is {what} whose weights were quantized with quantkit.\n"
        f"Tokenizer, chat template and generation settings are the original's.{kept}\n"
    )


def _facts(written: Checkpoint, packed: PackedReader, recipe: Mapping[str, Any]) -> str:
    """What was done, as a table."""
    schemes = Counter(str(packed.scheme(module)) for module in packed.modules)
    size = sum(path.stat().st_size for path in written.files)
    rows = {"Quantized": ", ".join(f"{count} matrices: {scheme}" for scheme, count in sorted(schemes.items()))}
    if recipe:
        rows["Method"] = str(recipe["method"]) + (", rotated (Hadamard)" if packed.online else "")
    rows["Format"] = f"`{packed.format.name}`"
    rows["Bits per weight"] = f"{bits_per_weight(written):.2f} (quantized matrices, scales and zero points included)"
    rows["Size"] = f"{size / 1e6:,.1f} MB"
    if recipe and METHODS[recipe["method"]].calibrates:
        rows["Calibration"] = _calibration(recipe["calibration"])
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""])


def _calibration(calibration: Mapping[str, Any]) -> str:
    source = str(calibration["source"])
    named = re.fullmatch(r"[\w-]+|hf:[\w./-]+", source)
    text = f"`{source}`" if named else "a text file"
    return f"{calibration['samples']} rows of {calibration['seq_len']} tokens from {text}"


def _loading(packed: PackedReader) -> str:
    """Which engines load the artifact, and how."""
    servers = {server.name: server for server in SERVERS.values()}
    rows = ["| quantkit | yes | `quantkit serve PATH` or `quantkit generate PATH PROMPT` |"]
    for engine in packed.engines():
        server = servers.get(engine.name)
        reason = refusal(packed, server) if server else "" if engine.loads else engine.note
        known = notes(packed, server) if server else [engine.note] if engine.note else []
        how = shlex.join(server.command("PATH", 1)) if server else 'AutoModelForCausalLM.from_pretrained("PATH")'
        loads = f"no: {reason}" if reason else ", ".join(["yes", *known])
        rows.append(f"| {engine.name} | {loads} | {'' if reason else f'`{how}`'} |")
    where = "`PATH` is this folder, or the model's id on the Hub."
    return "\n".join(["## Load it", "", where, "", "| Engine | Loads it | Command |", "|---|---|---|", *rows, ""])


def _licence(metadata: Mapping[str, Any], folder: Path) -> str:
    stated = [f"`{metadata[name]}`" for name in ("license_name", "license") if name in metadata][:1]
    links = [f"[{path.name}]({path.name})" for path in _licence_files(folder)]
    found = ", ".join([*stated, *links])
    return f"## Licence\n\nThe original model's{': ' + found if found else ', which its files do not name'}.\n"


def _reproduction() -> str:
    return (
        f"{_REPRODUCE}\n\n    quantkit quantize MODEL -o OUT --recipe quantkit.json\n\n"
        "`MODEL` is the original; `quantkit.json` in this folder has the SHA-256 of its files, the recipe, the versions that\n"
        "decide the last bits, and the error of every matrix.\n"
    )
