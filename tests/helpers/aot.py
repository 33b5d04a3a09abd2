"""Compile Triton kernels without a GPU, and count the machine instructions.

Triton's wheel contains ptxas, cuobjdump and nvdisasm, so a cubin can be made and read anywhere. The tests' own process may run
Triton's interpreter, which cannot compile. So a child process does the work for a list of jobs.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

_LABEL = re.compile(r"^(\.L_[\w.]+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


@dataclass(frozen=True)
class Job:
    """One kernel to compile.

    Attributes:
        kernel: "package.module:function", a `triton.jit` function.
        signature: argument -> Triton type ("*fp16", "i32"), for all that are not constexpr, in order. Pointers are taken
            to be 16-byte aligned.
        constexprs: argument -> JSON value.
        divisible: integer arguments that are multiples of 16, as the launcher would find at run time.
        capability: 80 for sm_80, 90 for sm_90.
    """

    kernel: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    divisible: tuple[str, ...] = ()
    capability: int = 90
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel.

    Attributes:
        registers: per thread.
        stack: bytes per thread; more than 0 means that registers spill.
        shared: static plus dynamic bytes of shared memory per program.
        instructions: opcode ("LDG.E.128") -> how often it occurs in the SASS.
        loops: the same for the body of each innermost loop, in the order of the code.
        threads: per program.
    """

    registers: int
    stack: int
    shared: int
    instructions: dict[str, int]
    loops: list[dict[str, int]] = field(default_factory=list)
    threads: int = 128

    def per_element(self, elements: int) -> float:
        """Instructions of one thread per element, where one pass of the largest loop handles `elements` per program.

        ptxas may unroll a loop: derive `elements` from `count` of an instruction whose number per tile is known.
        """
        return max(sum(loop.values()) for loop in self.loops) * self.threads / elements

    def count(self, prefix: str) -> int:
        """Instructions in the largest loop whose opcode begins with `prefix`."""
        loop = max(self.loops, key=lambda loop: sum(loop.values()))
        return sum(count for opcode, count in loop.items() if opcode.startswith(prefix))


def compile_all(jobs: Sequence[Job]) -> list[Compiled]:
    """Compile all jobs in a child process without the interpreter. Needs no GPU; takes 0.5 to 3 s per job.

    Raises:
        subprocess.CalledProcessError: a job does not compile; the compiler's output is on stderr.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # a job may name a kernel of a test
    request = json.dumps([asdict(job) for job in jobs])
    child = subprocess.run(
        [sys.executable, __file__], input=request, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=600
    )
    return [Compiled(**found) for found in json.loads(child.stdout.splitlines()[-1])]


def _compile(job: Job) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = job.kernel.partition(":")
    kernel = getattr(import_module(module), name)
    order = kernel.arg_names
    signature = {arg: job.signature.get(arg, "constexpr") for arg in order}
    assert set(order) == set(job.signature) | set(job.constexprs), sorted(
        set(order) ^ (set(job.signature) | set(job.constexprs))
    )
    aligned = [arg for arg in order if signature[arg].startswith("*") or arg in job.divisible]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(order.index(arg),): value for arg, value in job.constexprs.items()},
        attrs={(order.index(arg),): [["tt.divisibility", 16]] for arg in aligned},
    )
    options = {"num_warps": job.num_warps, "num_stages": job.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", job.capability, 32), options=options)
    return read_cubin(compiled.asm["cubin"], compiled.metadata.shared, job.num_warps * 32)


def read_cubin(cubin: bytes, shared: int, threads: int) -> Compiled:
    """Resources and instructions of a compiled kernel, from the output of NVIDIA's tools."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file))
        sass = _output(knobs.nvidia.nvdisasm.path, "-c", str(file))
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
    code, loops = read_sass(sass)
    return Compiled(found["REG"], found["STACK"], found["SHARED"] + shared, dict(Counter(code)), loops, threads)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_sass(sass: str) -> tuple[list[str], list[dict[str, int]]]:
    """(all opcodes in order, opcode counts of each innermost loop). A loop is what a backward branch encloses."""
    code: list[str] = []
    labels: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(code)
        elif instruction := _INSTRUCTION.match(line):
            code.append(instruction[1])
            target = re.search(r"`\((\.L_[\w.]+)\)", instruction[2])
            # Every kernel ends with a branch to itself, which is not a loop.
            if instruction[1].startswith("BRA") and target and labels.get(target[1], len(code)) < len(code) - 1:
                spans.append((labels[target[1]], len(code)))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return code, [dict(Counter(code[start:end])) for start, end in inner]


if __name__ == "__main__":
    print(json.dumps([asdict(_compile(Job(**job))) for job in json.load(sys.stdin)]))
