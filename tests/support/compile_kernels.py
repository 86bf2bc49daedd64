"""Compiles the Triton kernels for a GPU that need not be there, and prints what became of them as JSON.

The interpreter runs Python: it accepts kernels that the compiler refuses, and says nothing about registers and loads. This
is ``python -m tests.support.compile_kernels CAPABILITY``, a process of its own because the tests' process interprets.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pagebrain.kernels.add_norm import add_norm_kernel
from pagebrain.kernels.decode import decode_kernel, merge_kernel
from pagebrain.kernels.decode_plan import DecodeTiling
from pagebrain.kernels.grouped_decode import grouped_decode_kernel
from pagebrain.kernels.prefill import PrefillTiling, prefill_kernel
from pagebrain.kernels.sample import ROW_TILE, ROW_WARPS, SPLIT_TILE, SPLIT_WARPS
from pagebrain.kernels.sample_kernels import best_kernel, choose_kernel, deliver_best_kernel, draw_kernel
from pagebrain.kernels.write import write_kernel

_ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_INTEGERS = {"active_rows_ptr": "*i32", "scale_log2e": "fp32"} | {
    name: "*i64" for name in ("block_tables_ptr", "context_lens_ptr", "query_starts_ptr", "slot_mapping_ptr")
}
_SAMPLING = {"active_rows_ptr": "*i32", "out_ptr": "*i32", "token_ids_ptr": "*i32", "context_lens_ptr": "*i32"} | {
    "temperature_ptr": "*fp32",
    "top_k_ptr": "*i32",
    "top_p_ptr": "*fp64",
    "log_min_p_ptr": "*fp32",
    "stream_key_ptr": "*i64",
    "num_prompt_tokens_ptr": "*i32",
    "best_values_ptr": "*fp32",
    "best_tokens_ptr": "*i32",
    "drawn_values_ptr": "*fp32",
    "drawn_tokens_ptr": "*i32",
}
_PARTIALS = ("partial_acc_ptr", "partial_max_ptr", "partial_sum_ptr")


def compile_for(
    capability: int, kernel: Any, dtype: str, constants: dict[str, Any], types: dict[str, str] = _INTEGERS, **options: int
) -> dict[str, Any]:
    """One kernel as a launch would compile it, with strides that are multiples of 16; pointers in ``constants`` are None.

    ``types`` are those of arguments that are neither pointers to ``dtype`` nor 32-bit integers.
    """
    signature, hints = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in _PARTIALS:
            signature[name] = "*fp32"
        else:
            signature[name] = types.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        if signature[name].startswith("*") or re.match("(query|key|value|pool|logits)_stride|num_readable", name):
            hints[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()}, hints
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {"ptx": compiled.asm["ptx"], **_resources(compiled.asm["cubin"]), "shared_bytes": compiled.metadata.shared}


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and the bytes that it keeps in memory because they found no register."""
    tool = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout + said.stderr)
    assert found is not None, said
    return {"registers": int(found[1]), "stack_bytes": int(found[2])}


def decode(
    capability: int, dtype: str, head_dim: int, block_size: int, group: int = 1, split: bool = False
) -> dict[str, Any]:
    """A decode kernel; with ``split`` also ragged and with active rows, so that each optional pointer is there once."""
    padded = max(16, triton.next_power_of_2(head_dim))
    tiling = DecodeTiling.for_shape(padded, _ITEM_BYTES[dtype], group)
    constants: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded,
        "GROUP": group,
        "BLOCK_SIZE": block_size,
        "TILE": tiling.tile,
        "IS_SPLIT": split,
        "STAGES": tiling.num_stages,
        "UNROLL": tiling.unroll,
    }
    if not split:
        constants |= dict.fromkeys((*_PARTIALS, "query_starts_ptr", "active_rows_ptr"))
    kernel = decode_kernel if group == 1 else grouped_decode_kernel
    return compile_for(capability, kernel, dtype, constants, num_warps=tiling.num_warps)


def merge(capability: int, dtype: str, head_dim: int, num_splits: int) -> dict[str, Any]:
    """The merge of partial results."""
    padded = max(16, triton.next_power_of_2(head_dim))
    constants = {"HEAD_DIM": head_dim, "PADDED_DIM": padded, "PADDED_SPLITS": num_splits}
    return compile_for(capability, merge_kernel, dtype, constants, num_warps=1)


def prefill(capability: int, dtype: str, head_dim: int, block_size: int, group: int = 1) -> dict[str, Any]:
    """The prefill kernel."""
    padded = max(16, triton.next_power_of_2(head_dim))
    tiling = PrefillTiling.for_shape(padded, _ITEM_BYTES[dtype])
    constants = {
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded,
        "GROUP": group,
        "BLOCK_SIZE": block_size,
        "BLOCK_M": tiling.block_m,
        "BLOCK_N": tiling.block_n,
        "SKIP_DECODES": True,
    }
    stages = tiling.num_stages
    return compile_for(capability, prefill_kernel, dtype, constants, num_warps=tiling.num_warps, num_stages=stages)


def write(capability: int, dtype: str) -> dict[str, Any]:
    """The write kernel, for GPT-2 small."""
    constants = {"HEAD_DIM": 64, "PADDED_HEADS": 16, "PADDED_DIM": 64, "BLOCK_SIZE": 16}
    return compile_for(capability, write_kernel, dtype, constants, num_warps=4)


def norm(capability: int, dtype: str, gathers: bool) -> dict[str, Any]:
    """The norm and the addition before it, of activations or of rows that it gathers."""
    indices = ("hidden_indices_ptr", "residual_indices_ptr")
    constants: dict[str, Any] = {"WIDTH": 768, "PADDED": 1024} | ({} if gathers else dict.fromkeys(indices))
    types = {"eps": "fp32"} | dict(zip(indices, ("*i32", "*i64")))
    return compile_for(capability, add_norm_kernel, dtype, constants, types, num_warps=4)


def sampling(capability: int, dtype: str, kernel: Any) -> dict[str, Any]:
    """A sampling kernel."""
    constants: dict[str, Any] = {}
    num_warps = 1
    if kernel is choose_kernel:
        constants, num_warps = {"TILE": ROW_TILE}, ROW_WARPS
    elif kernel is not deliver_best_kernel:
        constants, num_warps = {"TILE": SPLIT_TILE}, SPLIT_WARPS
    return compile_for(capability, kernel, dtype, constants, _SAMPLING, num_warps=num_warps)


def main() -> None:
    """Compile what GPT-2 needs and the corners of what the kernels promise."""
    capability = int(sys.argv[1])
    compiled = {
        "decode": decode(capability, "bf16", 64, 16),
        "decode float16, half a tile in a block": decode(capability, "fp16", 64, 8),
        "decode float32": decode(capability, "fp32", 64, 32),
        "decode split": decode(capability, "bf16", 64, 16, split=True),
        "decode head of 80": decode(capability, "bf16", 80, 16),
        "decode head of 128": decode(capability, "bf16", 128, 64),
        "grouped decode": decode(capability, "bf16", 64, 16, group=4),
        "grouped decode float32 split": decode(capability, "fp32", 64, 16, group=4, split=True),
        "merge": merge(capability, "bf16", 64, 16),
        "prefill": prefill(capability, "bf16", 64, 16),
        "prefill head of 128": prefill(capability, "fp16", 128, 16, group=4),
        "prefill float32": prefill(capability, "fp32", 64, 16),
        "prefill float32 head of 128": prefill(capability, "fp32", 128, 16),
        "write": write(capability, "bf16"),
        "norm": norm(capability, "bf16", gathers=False),
        "norm of embeddings": norm(capability, "bf16", gathers=True),
        "sample best": sampling(capability, "bf16", best_kernel),
        "sample best float32": sampling(capability, "fp32", best_kernel),
        "sample deliver best": sampling(capability, "bf16", deliver_best_kernel),
        "sample draw": sampling(capability, "bf16", draw_kernel),
        "sample draw float32": sampling(capability, "fp32", draw_kernel),
        "sample choose": sampling(capability, "bf16", choose_kernel),
        "sample choose float32": sampling(capability, "fp32", choose_kernel),
    }
    print(json.dumps(compiled))


if __name__ == "__main__":
    main()
