"""set_experts_implementation("moe_ops"): float experts on our kernels, against the class's own loop over experts."""

import copy
import json
import warnings

import pytest
import tiny_models as tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moe_ops
from moe_ops.huggingface import experts

pytestmark = pytest.mark.swap
ONE_EACH = ["qwen3_moe", "deepseek_v4", "inkling2", "aria", "gpt_oss", "nemotron_h", "muse_spark"]


class Ops(TorchDispatchMode):
    """Names of our ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "moe_ops":
            self.names.append(func.name().removeprefix("moe_ops::"))
        return out


def routed(name):
    if name not in tiny.INSTALLED:
        pytest.skip("not in this transformers")
    model = tiny.build(name).requires_grad_(False)
    if not tiny.routed_experts(model):
        pytest.skip("not decorated in this transformers")
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.ROUTED)
def test_every_family(name):
    model = routed(name)
    want = tiny.run(model)
    model.set_experts_implementation("moe_ops")
    with Ops() as ops:
        got = tiny.run(model)
    used = {"experts", "grouped_mm"} & set(ops.names)
    assert len(used) == 1, "one op, or its parts"
    assert tiny.relative_error(got, want) < 2e-5
    model.set_experts_implementation("eager")
    with Ops() as ops:
        assert torch.equal(tiny.run(model), want) and not ops.names


@torch.no_grad()
@pytest.mark.parametrize("name", ONE_EACH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    """Each module by itself: between modules routing may flip."""
    model = routed(name)
    for module in tiny.routed_experts(model).values():
        e, h = experts.spec_of(module).num_experts, experts.spec_of(module).hidden_size
        exact, half = copy.deepcopy(module).double(), module.to(dtype)
        exact.__dict__["config"].__dict__["_experts_implementation_internal"] = "eager"
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(9, h, generator=generator).to(dtype)
        ids = torch.stack([torch.randperm(e, generator=generator)[:2] for _ in range(9)])
        weights = torch.rand(9, 2, generator=generator)
        if name == "inkling2":  # its gate reads fp32 parameters only in fp32
            exact = copy.deepcopy(module).float()
        with Ops() as ops:
            got = experts.experts_forward(half, x, ids, weights.to(dtype))
        want = type(exact).forward(exact, x.to(next(exact.parameters()).dtype), ids, weights.to(exact.down_proj.dtype))
        assert ops.names and got.dtype == dtype
        assert tiny.relative_error(got, want) < (0.02 if dtype == torch.bfloat16 else 0.003)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_moe", "aria", "gpt_oss", "muse_spark"])
def test_ids_of_no_expert_add_nothing(name):
    """Expert parallelism marks them by ids >= num_experts; a batch of only such, and of no tokens."""
    model = routed(name)
    module = next(iter(tiny.routed_experts(model).values()))
    e, h = module.num_experts, experts.spec_of(module).hidden_size
    x, ids = torch.randn(6, h), torch.randint(0, e, (6, 2))
    weights = torch.rand(6, 2)
    keep = torch.rand(6, 2) < 0.5
    got = experts.experts_forward(module, x, torch.where(keep, ids, e), weights)
    assert torch.allclose(got, experts.experts_forward(module, x, ids, weights * keep), atol=1e-6)
    assert not experts.experts_forward(module, x, torch.full_like(ids, e), weights).any()
    assert experts.experts_forward(module, x[:0], ids[:0], weights[:0]).shape == (0, h)


@pytest.mark.parametrize("name", ["qwen3_moe", "aria", "gpt_oss", "muse_spark"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name, dtype):
    """Products in autocast's type, output in that of the rows, as good as the class's own loop under autocast."""
    module = next(iter(tiny.routed_experts(routed(name)).values()))
    e, h = module.num_experts, experts.spec_of(module).hidden_size
    generator = torch.Generator().manual_seed(0)
    x, ids = torch.randn(64, h, generator=generator), torch.randint(0, e, (64, 2), generator=generator)
    weights, given = torch.rand(64, 2, generator=generator), []

    class Rows(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.moe_ops.experts.default, torch.ops.moe_ops.grouped_mm.default):
                given.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        with Rows():
            got = experts.experts_forward(module, x, ids, weights)
        theirs = module(x, ids, weights)
    with torch.no_grad():
        exact = copy.deepcopy(module).double()(x.double(), ids, weights.double())
        plain = experts.experts_forward(module, x, ids, weights)
    assert given and set(given) == {dtype} and got.dtype == theirs.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    assert tiny.relative_error(plain, exact) < 1e-5 < eps / 8 < tiny.relative_error(got, exact)
    rounded = eps / 2  # the sum over a token's experts, which the loop keeps in fp32
    assert tiny.relative_error(got, exact) < tiny.relative_error(theirs, exact) + rounded


def test_gradients_under_autocast():
    """Of rows and router weights through frozen experts: in their own types, with the values of the loop's."""
    module = next(iter(tiny.routed_experts(routed("qwen3_moe")).values()))
    generator = torch.Generator().manual_seed(0)
    x, ids = torch.randn(64, 64, generator=generator), torch.randint(0, module.num_experts, (64, 2))
    weights, grad = torch.rand(64, 2, generator=generator), torch.randn(64, 64, generator=generator)

    def gradients(run):
        leaves = [t.clone().requires_grad_() for t in (x, weights)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = run(leaves[0], ids, leaves[1])
        return torch.autograd.grad(y, leaves, grad)

    exact = torch.autograd.grad(module(x.requires_grad_(), ids, weights.requires_grad_()), [x, weights], grad)
    ours, theirs = gradients(lambda *a: experts.experts_forward(module, *a)), gradients(module)
    for got, loop, true in zip(ours, theirs, exact):
        assert got.dtype == torch.float32 and tiny.relative_error(got, loop) < 0.02
        assert tiny.relative_error(got, true) > 1e-4, "of products in fp32"


@torch.no_grad()
@pytest.mark.parametrize("name, read_before", [
    ("qwen3_moe", True), ("qwen3_moe", False), ("gpt_oss", True), ("nemotron_h", False), ("muse_spark", False),
])  # fmt: skip
def test_fullgraph(name, read_before):
    """Also where it was chosen in the config, so that nothing has looked at the experts before."""
    if not read_before and torch.__version__ < (2, 12):
        pytest.skip("torch 2.11 traces no function whose result is taken as a constant if its argument is a module")
    model = routed(name)
    model.set_experts_implementation("moe_ops")
    want = tiny.run(model)
    if not read_before:
        for module in tiny.routed_experts(model).values():
            del module.__dict__[experts._SPEC]
    torch._dynamo.reset()
    got = tiny.run(torch.compile(model, backend="aot_eager", fullgraph=True), **tiny.inputs(model))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["aria", "gpt_oss", "qwen3_moe"])
def test_no_weight_is_copied(name):
    """Transposed and interleaved weights go to the op as they are: the tensors themselves, or views of them."""
    model = routed(name)
    model.set_experts_implementation("moe_ops")
    stored = {p.untyped_storage().data_ptr() for p in model.parameters()}
    given = []

    class Weights(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "moe_ops":
                given.extend(t for t in args if isinstance(t, torch.Tensor) and t.ndim == 3)
            return func(*args, **(kwargs or {}))

    with Weights():
        tiny.run(model)
    assert given and all(t.untyped_storage().data_ptr() in stored for t in given)


@pytest.mark.parametrize("name", ["qwen3_moe", "aria", "gpt_oss"])
def test_gradients_are_those_of_transformers(name):
    """Weights train through transformers' own kernels, with a word about it; frozen ones through ours where we can."""
    model = routed(name).requires_grad_(True)
    model.set_experts_implementation("grouped_mm")
    tiny.run(model).square().sum().backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.set_experts_implementation("moe_ops")
    experts._warn.cache_clear()
    with pytest.warns(UserWarning, match="needs gradients that its kernels do not have"), Ops() as ops:
        tiny.run(model).square().sum().backward()
    assert not ops.names
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(got) == set(want) and all(torch.equal(got[n], g) for n, g in want.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.run(model)  # said once
    for module in tiny.routed_experts(model).values():
        module.requires_grad_(False)
    model.zero_grad()
    with Ops() as ops:
        tiny.run(model).square().sum().backward()
    assert bool(ops.names) == (name == "qwen3_moe")
    for n, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, want[n], rtol=2e-3, atol=2e-4)


def test_one_line_that_is_not_saved(tmp_path):
    model = routed("qwen3_moe")
    cls, before = type(model), model.config._experts_implementation
    model.set_experts_implementation("moe_ops")
    model.save_pretrained(tmp_path)
    assert "moe_ops" not in (tmp_path / "config.json").read_text()
    assert "experts_implementation" not in json.loads((tmp_path / "config.json").read_text())
    again = cls.from_pretrained(tmp_path, experts_implementation="moe_ops")
    assert again.config._experts_implementation == "moe_ops"
    with torch.no_grad(), Ops() as ops:
        assert torch.equal(tiny.run(again), tiny.run(model))
    assert ops.names
    assert cls.from_pretrained(tmp_path).config._experts_implementation != "moe_ops"
    model.set_experts_implementation(before)
    ids = tiny.inputs(again)["input_ids"]
    again.generation_config.pad_token_id = 0
    assert torch.equal(again.generate(ids, max_new_tokens=3), model.generate(ids, max_new_tokens=3))
    assert again.config._experts_implementation == "moe_ops"  # generate replaces only what it knows


@pytest.mark.parametrize("name", [n for n in tiny.OTHER if n in ("llama4", "jetmoe", "dbrx", "longcat_flash")])
def test_models_that_would_not_use_it(name):
    """transformers takes the name, and nothing changes; we say so."""
    model = tiny.build(name)
    with pytest.raises(ValueError, match=r"no experts that take an implementation.*quantize_"):
        model.set_experts_implementation("moe_ops")
    model.set_experts_implementation("eager")


def test_quantized_experts_keep_their_own_forward():
    model = moe_ops.quantize_(routed("qwen3_moe"), {"experts": "int8"})
    with torch.no_grad():
        want = tiny.run(model)
        model.set_experts_implementation("moe_ops")
        assert torch.equal(tiny.run(model), want)


def test_other_types_are_refused():
    model = routed("qwen3_moe").double()
    with pytest.raises(ValueError, match=r"gate_up_proj is torch\.float64"):
        model.set_experts_implementation("moe_ops")
