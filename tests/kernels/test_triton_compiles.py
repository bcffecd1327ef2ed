"""The kernels compile for real GPUs, which needs none: the interpreter accepts much that the compiler does not."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

TENSORS = {"hidden": "*fp32", "ids": "*i64", "tiles": "*i32", "table": "*i64", "delta": "*i64"}
TARGETS = {"cuda": ("cuda", 90, 32), "hip": ("hip", "gfx942", 64)}


@pytest.mark.parametrize(("target", "dtype"), [("cuda", "bf16"), ("hip", "fp16")])
def test_every_kernel_compiles(target, dtype, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, __file__, target, dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def compile_all(target: str, dtype: str) -> None:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from deltaserve.kernels.triton.linear import delta_linear, project
    from deltaserve.kernels.triton.rows import delta_embedding, swap_columns

    dot = {
        "DOT_TYPE": tl.bfloat16 if dtype == "bf16" else tl.float32,
        "PRECISION": "tf32" if target == "cuda" else "ieee",
    }
    pointers = TENSORS | dict.fromkeys(("x", "y", "weight", "saved"), f"*{dtype}")
    for kernel, constants in (
        (delta_linear, {**dot, "x_column": 1, "y_column": 1}),
        (project, {**dot, "x_column": 1}),
        (delta_embedding, {"y_column": 1}),
        (swap_columns, {"IN": True}),
        (swap_columns, {"IN": False}),
    ):
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
        values = {(names.index(name),): value for name, value in constants.items()}
        triton.compile(ASTSource(kernel, signature, values), target=GPUTarget(*TARGETS[target]))


if __name__ == "__main__":
    compile_all(*sys.argv[1:])
