"""What generated products compute, without a GPU: Inductor's kernels for a fake one, run by Triton's interpreter.

Only the templates: operands that other kernels make are made here. The interpreter multiplies in fp32.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_gpu import fake_gpu, generated, kernels

import moe_ops.lowering
from moe_ops.formats import FORMATS
from moe_ops.lowering.parts import in_nibbles

ROOT = Path(__file__).parents[1]
_RUN = """
import sys, torch
import kernel
tensors = torch.load("tensors.pt")
getattr(kernel, next(name for name in dir(kernel) if name.startswith("triton_tem")))[{grid}](*tensors)
torch.save(tensors[-1], "out.pt")
"""


def generate(fn, tensors, folder):
    """Writes the one template in the code for fn(*tensors) as a kernel; names of what it is launched with."""
    moe_ops.lowering.register()
    with fake_gpu(90):
        source = generated(fn, lambda: [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in tensors])
    (text,) = [text for name, text in kernels(source) if "_tem_" in name]
    (launch,) = re.findall(r"triton_tem\w+\.run\((.*), stream=", source)
    *names, x, y, z = launch.split(", ")
    before, _, after = text.partition("@triton_heuristics.template(")
    text = before + after[after.index("@triton.jit") :]  # Inductor's launcher, taken off
    text = text.replace("MMA : tl.constexpr = tl.bfloat16", "MMA : tl.constexpr = tl.float32")
    (folder / "kernel.py").write_text(text)
    (folder / "run.py").write_text(_RUN.format(grid=f"({x}, {y}, {z})"))
    return names


def run(folder, tensors):
    torch.save(tensors, folder / "tensors.pt")
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "run.py"], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "out.pt")


def random(*size):
    return torch.randn(size).bfloat16()


@pytest.mark.parametrize("name,rows", [("bf16", 300), ("bf16", 20), ("mxfp4", 400)])
def test_linear_with_bias_and_residual(name, rows, tmp_path):
    """Whole tiles are stored in pieces of their columns, with the rows first (bf16) or last (4 bits)."""
    torch.manual_seed(0)
    k, n, codec = 256, 200, FORMATS[name].weight
    x, w, b, y = random(rows, k), random(n, k) / 16, random(n), random(rows, n)
    q = codec.quantize(w)
    stored = [t for t in (q.qdata, q.scale) if t is not None]

    def fn(x, b, y, w, scale=None):
        return y + torch.relu(torch.ops.moe_ops.linear(x, w, scale, bias=b, format=name))

    assert len(generate(fn, [x, b, y, *stored], tmp_path)) == 5 + (q.scale is not None)
    arranged = in_nibbles(x).float() if codec.packed else x
    scales = [] if q.scale is None else [q.scale.view(torch.uint8)]
    out = run(tmp_path, [arranged, q.qdata, *scales, b, y, torch.full((rows, n), float("nan")).bfloat16()])
    product = x.float() @ codec.dequantize(q).T + b.float()
    torch.testing.assert_close(out.float(), y.float() + product.relu(), rtol=2**-6, atol=2**-5)


def test_experts_of_many_and_few_rows_and_none(tmp_path):
    """Tall tiles, their last few rows, an expert without rows, and rows that no expert owns: those are zero."""
    torch.manual_seed(0)
    e, n, k, sizes, dropped = 3, 200, 128, (700, 0, 230), 60
    rows = sum(sizes) + dropped
    offsets = torch.tensor([0, *sizes]).cumsum(0).int()
    x, w, y, order = random(rows, k), random(e, n, k) / 11, random(rows, n), torch.randperm(rows).int()

    def fn(x, w, offsets, order, y):
        return y + torch.ops.moe_ops.grouped_mm(x, w, offsets, rows_out=order, format="bf16")

    assert len(generate(fn, [x, w, offsets, order, y], tmp_path)) == 6
    assert "SHORT : tl.constexpr = 64" in (tmp_path / "kernel.py").read_text()
    out = run(tmp_path, [x, w, offsets, order, y, torch.full((rows, n), float("nan")).bfloat16()])
    product = torch.zeros(rows, n)
    for i in range(e):
        mine = slice(offsets[i], offsets[i + 1])
        product[order[mine].long()] = x[mine].float() @ w[i].float().T
    torch.testing.assert_close(out.float(), y.float() + product, rtol=2**-6, atol=2**-5)
