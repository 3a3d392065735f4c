"""The harness itself: it reports what Inductor generates, and notices what tests of lowerings look for."""

import pytest
import torch
from fake_gpu import compile_kernels, empty, extern_calls, fake_gpu, generated, kernel_names, launches, symbol, traced

ARCHS = [90, 100]


def norm(x, w):
    xf = x.float()
    return (xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w


@pytest.mark.parametrize("arch", ARCHS)
def test_one_fused_kernel(arch):
    with fake_gpu(arch):
        source, env = traced(norm, lambda: [empty(symbol(512), 4096), empty(4096)])
        built = compile_kernels(source)
    assert launches(source) == kernel_names(source) and len(launches(source)) == 1 and not extern_calls(source)
    assert {b.kernel for b in built} == {*kernel_names(source)}
    assert all(b.registers > 8 and not b.stack and f".target sm_{arch}a" in b.ptx for b in built)
    assert not any("Eq" in str(guard.expr) for guard in env.guards)


def test_what_is_not_generated_is_seen():
    def fn(x):
        return torch.mm(norm(x, x[0]), x.T), torch.linalg.svdvals(x.float())

    with fake_gpu():
        source = generated(fn, lambda: [empty(64, 64)])
    assert "extern_kernels.mm" in extern_calls(source) and any("svd" in call for call in extern_calls(source))


def test_a_kernel_is_counted_each_time_that_it_is_launched():
    def fn(a, b):
        return torch.mm(torch.mm(torch.relu(a), b).relu(), b).relu()

    with fake_gpu():
        source = generated(fn, lambda: [empty(64, 64), empty(64, 64)])
    assert len(launches(source)) == 3 > len(kernel_names(source))


def test_nothing_stays():
    before = torch.cuda.is_available(), torch.version.cuda
    with fake_gpu():
        assert torch.cuda.get_device_capability() == (9, 0)
    assert (torch.cuda.is_available(), torch.version.cuda) == before
