"""What activations in 4 or 6 bits cost: not more than the formats themselves do, as plain torch simulates them."""

import pytest
import simulation
import torch
from trained_model import MODELS, needs_model, quickstart

import moe_ops

MXTensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor").MXTensor
ScaleCalculationMode = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor").ScaleCalculationMode
NVFP4Tensor = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor").NVFP4Tensor
WINDOWS = 64 if torch.cuda.is_available() else 12
TORCHAO = {"mxfp8": torch.float8_e4m3fn, "mxfp6_e2m3": "fp6_e2m3", "mxfp6_e3m2": "fp6_e3m2",
           "mxfp4": torch.float4_e2m1fn_x2}  # fmt: skip
FEW_BITS = [n for n, f in moe_ops.FORMATS.items() if f.activation is not None and f.activation.element.bits in (4, 6)]


def load(device=quickstart.DEVICE):
    return quickstart.load(str(MODELS / "tiny-qwen3-moe"))[0].to(device)


def simulated(name):
    """On the CPU, whatever ours runs on."""
    fmt = moe_ops.FORMATS[name]
    inputs = fmt.activation and simulation.GRIDS[fmt.activation.name]
    return simulation.simulate_(load("cpu"), simulation.GRIDS[fmt.weight.name], inputs)


@pytest.mark.parametrize("name", simulation.GRIDS)
def test_grid_is_torchao(name):
    """The simulation itself; for nvfp4 torchao multiplies by a reciprocal, which moves ties."""
    grid = simulation.GRIDS[name]
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    if grid.fp8_scales:
        theirs = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=x.abs().max() / (6 * 448))
    else:
        mode = ScaleCalculationMode.RCEIL if grid.rceil else ScaleCalculationMode.EVEN
        theirs = MXTensor.to_mx(x, TORCHAO[name], 32, mode)
    differ = (theirs.dequantize(torch.float32) - simulation.weight(x, grid)).abs() > 1e-5
    assert differ.float().mean() < (0.003 if grid.fp8_scales else 1e-9)


@pytest.fixture(scope="module")
def windows():
    text = quickstart.read_text(str(MODELS / "val.bin"), WINDOWS * quickstart.WINDOW)
    return quickstart.cut(text, quickstart.Bytes())[0]


def quantized_modules(model):
    layers = enumerate(model.model.layers)
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    return {
        f"{i}.{name}": module
        for i, layer in layers
        for name, module in [("experts", layer.mlp.experts), *((n, getattr(layer.self_attn, n)) for n in names)]
    }


@pytest.fixture(scope="module")
def recorded(windows):
    """What every quantized module of the float model is called with on one window, and what it returns."""
    model, calls = load("cpu"), {}
    for name, module in quantized_modules(model).items():
        module.register_forward_hook(lambda m, args, out, name=name: calls.update({name: (args, out)}))
    with torch.no_grad():
        model(windows[:1])
    return calls


@pytest.fixture(scope="module", params=FEW_BITS)
def pair(request):
    """The model in a format: ours, and the simulation's."""
    return moe_ops.quantize_(load(), request.param), simulated(request.param)


@needs_model
@torch.no_grad()
def test_modules(pair, recorded):
    """On the same inputs each errs as its simulation does: both make the same codes, but for a few at an edge.

    Measured on a CPU: errors up to 1.003 of the simulation's, apart by up to 0.11 of them, which is rounding to bf16.
    """
    ours, theirs = (quantized_modules(model) for model in pair)
    for key, (args, exact) in recorded.items():
        got = ours[key](*(t.to(quickstart.DEVICE) for t in args)).cpu().double()
        expected = theirs[key].forward(*args).double()
        cost = (expected - exact.double()).norm()
        assert (got - exact.double()).norm() <= 1.01 * cost, key
        assert (got - expected).norm() <= 0.2 * cost, key


@needs_model
def test_bits_per_byte(pair, windows):
    """The difference of windows is noise: a code that turns over early changes the routes of everything after it."""
    ours, theirs = (simulation.bits_per_byte(model, windows) for model in pair)
    more = ours - theirs  # (B,)
    noise = more.std() / len(more) ** 0.5
    assert noise < 0.01 * theirs.mean()
    assert more.mean() <= 3 * noise, f"{ours.mean():.4f}, simulated {theirs.mean():.4f}, noise {noise:.4f}"
