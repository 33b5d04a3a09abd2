"""Peak memory of `quantkit quantize` against the number of blocks and the size of the checkpoint.

Random Llama checkpoints are written block by block in shards of about 200 MB. For each, quantkit runs in a process of its
own and its largest resident set is compared with the bound: embeddings + 3 blocks + calibration activations + 1.5 GiB.
The first two have equal blocks and a different number of them: their peaks should be equal.

usage: python -m benchmarks.memory [--recipe gptq-w4] [--samples 16] [--json FILE]
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from benchmarks.machine import describe_machine
from benchmarks.quality import run
from quantkit.checkpoint.demo import demo_folder

SHARD = 200_000_000
VOCAB = 49152  # the demo tokenizer's
#: name -> (hidden, intermediate, blocks)
MODELS = {"0.3B, 12 blocks": (1024, 2816, 12), "0.3B, 24 blocks": (1024, 2816, 24), "1.1B, 22 blocks": (2048, 5632, 22)}


def block_shapes(hidden: int, wide: int) -> dict[str, tuple[int, ...]]:
    """Tensors of one decoder block with 64-wide heads, a quarter of them for keys and values."""
    return {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (hidden // 4, hidden),
        "self_attn.v_proj.weight": (hidden // 4, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (wide, hidden),
        "mlp.up_proj.weight": (wide, hidden),
        "mlp.down_proj.weight": (hidden, wide),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }


def random_tensor(shape: tuple[int, ...]) -> torch.Tensor:
    """Norms are ones, matrices normal with a standard deviation that keeps activations in range."""
    return torch.ones(shape).bfloat16() if len(shape) == 1 else (torch.randn(shape) / shape[1] ** 0.5).bfloat16()


def make_checkpoint(folder: Path, hidden: int, wide: int, blocks: int, *, tokenizer: bool = True) -> None:
    """Write a random checkpoint; never more than one shard in memory. Its tokenizer is the demo model's, which is fetched."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json") if tokenizer else ():
        shutil.copyfile(demo_folder() / name, folder / name)
    shapes = {"model.embed_tokens.weight": (VOCAB, hidden), "model.norm.weight": (hidden,)}
    for index in range(blocks):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in block_shapes(hidden, wide).items()}
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    number = 0
    for name, shape in shapes.items():
        shard[name] = random_tensor(shape)
        weight_map[name] = f"model-{number:05}.safetensors"
        if sum(t.nbytes for t in shard.values()) > SHARD or name == list(shapes)[-1]:
            save_file(shard, folder / weight_map[name], metadata={"format": "pt"})
            shard, number = {}, number + 1
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def measure(folder: Path, recipe: str, samples: int, hidden: int, wide: int) -> dict[str, float]:
    """Peak and bound of one run, MB."""
    text = folder.parent / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60_000)
    arguments = ["quantize", str(folder), "-o", str(folder.parent / "out"), "--recipe", recipe, "--overwrite"]
    _, wall, peak = run([*arguments, "--calib", str(text), "--samples", str(samples), "--seq-len", "512"])
    block = 2 * sum(torch.Size(shape).numel() for shape in block_shapes(hidden, wide).values())
    tokens = samples * 512
    bound = 2 * VOCAB * hidden + 3 * block + tokens * hidden * 2 + 1.5 * 2**30
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {"checkpoint MB": size / 1e6, "peak MB": peak, "bound MB": bound / 1e6, "wall s": wall}


def main() -> None:
    """Print a row a model, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="gptq-w4")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = {}
    print("model | checkpoint MB | peak MB | bound MB | wall s")
    for name, (hidden, wide, blocks) in MODELS.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            folder.mkdir()
            make_checkpoint(folder, hidden, wide, blocks)
            rows[name] = measure(folder, options.recipe, options.samples, hidden, wide)
            print(" | ".join([name, *(f"{value:.0f}" for value in rows[name].values())]), flush=True)
    result = json.dumps(
        {"machine": describe_machine(), "recipe": options.recipe, "samples": options.samples, "models": rows}, indent=2
    )
    print(result)
    if options.json:
        options.json.write_text(result + "\n")


if __name__ == "__main__":
    main()
