"""What generated code computes on a GPU, and how much of it is launched. What it is made of: test_lowering.py."""

import subprocess
import sys

import pytest
import torch
import torch._dynamo
from test_gpu import FORMATS, experts, routed
from torch._dynamo.utils import counters
from torch.nn.functional import silu

import moe_ops
import moe_ops.lowering

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)


def truth(layer, x, ids, weights):
    """The layer in float64 on its dequantized weights, slot by slot; ids of no expert add nothing."""
    up, down = layer.dequantize(torch.float64)
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for e in ids.unique().tolist():
        if 0 <= e < up.shape[0]:
            share = (weights * (ids == e)).sum(-1, keepdim=True).double()
            gate, u = (x.double() @ up[e].T).chunk(2, -1)
            out += share * ((silu(gate) * u) @ down[e].T)
    return out


def error(out, expected):
    return ((out.double() - expected).norm() / expected.norm()).item()


def assert_as_good(compiled, eager, expected):
    """Fused arithmetic rounds elsewhere, not more."""
    assert error(compiled, expected) <= 1.1 * error(eager, expected) + 1e-3


def without_dropped(ids):
    ids = ids.clone()
    ids[::3, 1] = -1
    ids[1::5, 0] = 10**6
    return ids


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", list(moe_ops.FORMATS))
def test_compiled_is_as_good_as_eager(name, mode):
    layer = experts(name)
    compiled = torch.compile(layer, mode=mode, fullgraph=True)
    with torch.no_grad():
        for tokens in (1, 4, 4, 100, 100, 7, 7, 700):
            x, ids, weights = routed(tokens)
            ids = without_dropped(ids)
            out = compiled(x, ids, weights).clone()
            assert_as_good(out, layer(x, ids, weights), truth(layer, x, ids, weights))
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", FORMATS)
def test_max_autotune(name):
    layer = experts(name)
    compiled = torch.compile(layer, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)
    with torch.no_grad():
        for tokens in (4, 700):
            args = routed(tokens)
            assert_as_good(compiled(*args), layer(*args), truth(layer, *args))


def test_two_graphs_serve_two_and_more_tokens():
    layer = experts("fp8")
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        for tokens in (2, 64, 65, 3000, 30, 500, 33):
            args = routed(tokens)
            torch._dynamo.mark_dynamic(args[0], 0), torch._dynamo.mark_dynamic(args[1], 0)
            torch._dynamo.mark_dynamic(args[2], 0)
            assert_as_good(compiled(*args), layer(*args), truth(layer, *args))
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("name", FORMATS)
def test_linear_with_what_follows(name):
    linear = torch.nn.Linear(512, 384).cuda().bfloat16()
    q = moe_ops.QuantizedLinear.from_float(linear, name)
    fn = lambda x, y: y + torch.nn.functional.gelu(q(x))  # noqa: E731
    compiled = torch.compile(fn, fullgraph=True)
    with torch.no_grad():
        for rows in (1, 9, 300):
            x, y = (torch.randn(rows, n, device="cuda", dtype=torch.bfloat16) for n in (512, 384))
            product = x.double() @ q.dequantize(torch.float64).T + q.bias.double()
            assert_as_good(compiled(x, y), fn(x, y), y.double() + torch.nn.functional.gelu(product))


class Block(torch.nn.Module):
    """From the residual stream in to the residual stream out, as Qwen3-MoE writes it."""

    def __init__(self, layer, h, e, top_k):
        super().__init__()
        self.layer, self.top_k = layer, top_k
        self.norm = torch.nn.Parameter(torch.ones(h, device="cuda", dtype=torch.bfloat16))
        self.gate = torch.nn.Parameter(torch.randn(e, h, device="cuda", dtype=torch.bfloat16) / h**0.5)

    def forward(self, x):
        xf = x.float()
        h = self.norm * (xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        weights, ids = torch.topk(torch.softmax((h @ self.gate.T).float(), -1), self.top_k)
        return x + self.layer(h, ids, (weights / weights.sum(-1, keepdim=True)).to(x.dtype))


def launched(fn, *args):
    """Names of the kernels that a call launches."""
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        fn(*args)
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [e.name for e in kernels if "Mem" not in e.name]


@pytest.mark.parametrize("tokens", [1, 8])
def test_launches_of_a_layer(tokens):
    """Six of ours; the router is its linear, softmax, top-k, and the kernel that makes its weights sum to one."""
    block = Block(experts("fp8", e=32, h=2048, i=768), 2048, 32, 4)
    compiled = torch.compile(block, fullgraph=True)
    x = torch.randn(tokens, 2048, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        compiled(x)
    names = launched(compiled, x)
    router = [n for n in names if not n.startswith(("triton_red", "triton_per", "triton_poi", "triton_tem", "_sort"))]
    router += [n for n in names if "softmax" in n or "div" in n]
    ours = [n for n in names if n not in router]
    assert len(ours) + sum("tem" in n for n in router if n not in ours) <= 6, names
    assert len(names) < len(launched(block, x)) / 2


def test_exported_and_compiled_ahead_of_time(tmp_path):
    plain = f"""
import torch
program = torch.export.export(torch.nn.Linear(8, 8).cuda(), (torch.ones(2, 8, device="cuda"),))
path = torch._inductor.aoti_compile_and_package(program, package_path={str(tmp_path / "plain.pt2")!r})
torch._inductor.aoti_load_package(path)"""
    if subprocess.run([sys.executable, "-c", plain], capture_output=True).returncode:
        pytest.skip("this installation of torch does not load a Linear that was compiled ahead of time")
    layer, args = experts("fp8"), routed(16)
    with torch.no_grad():
        program = torch.export.export(layer, args)
        assert "moe_ops.experts" in program.graph_module.code
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
        loaded = torch._inductor.aoti_load_package(path)
        assert_as_good(loaded(*args), layer(*args), truth(layer, *args))


@pytest.mark.parametrize("name", ["fp8", "mxfp4", "bf16"])
def test_the_same_bits_where_the_compiler_rounds_as_eager_does(name):
    if torch.torch_version.TorchVersion(torch.__version__) < (2, 13):
        pytest.skip("emulate_precision_casts drops some round trips before 2.13")
    block = Block(experts(name, e=32, h=512, i=384), 512, 32, 4)
    x = torch.randn(16, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad(), torch._inductor.config.patch(emulate_precision_casts=True):
        assert torch.equal(torch.compile(block, fullgraph=True)(x), block(x))
