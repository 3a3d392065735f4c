"""Repeated calls (moe_ops/backends/repeat.py): in Triton's interpreter, whose kernels are given numbers as addresses,
and compiled ahead of time, with a launcher that keeps what Triton hands it."""

import ctypes
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from kernel_cases import CUDA, OPS, same
from oracle import takes_static

from moe_ops.backends import repeat
from moe_ops.formats import FORMATS, quantize_weight
from moe_ops.kernels.launch import Launch

ROOT = Path(__file__).resolve().parent.parent
E, WIDTH, TOP_K = 3, 64, 2  # H and I
NAMES = ("bf16", "fp8_tensor", "mxfp4/fp8")  # floats, a torch operation between, words


# ---- interpreted


def interpreter(test):
    """Addresses are the CPU's: on a GPU `test_on_a_gpu` says the same."""
    return pytest.mark.kernels(pytest.mark.skipif(CUDA, reason="runs in the interpreter")(test))


def tensor_at(address, like):
    size = like.untyped_storage().nbytes() - like.storage_offset() * like.element_size()
    memory = torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
    return memory.view(like.dtype).as_strided(like.shape, like.stride(), 0)


def interpreted(launch):
    """As a compiled kernel: what was a tensor comes as a number."""
    given = [launch.arguments[name] for name in launch.kernel.arg_names]

    def run(*arguments, stream):
        assert len(arguments) == len(given)
        tensors = [tensor_at(a, t) if isinstance(t, torch.Tensor) else a for a, t in zip(arguments, given, strict=True)]
        launch.kernel[launch.grid](*tensors)

    return run


@contextmanager
def repeating():
    """Calls are repeated on the CPU too. Gives the names of those that were not."""
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0)
    decided = []

    def call(name, fn, args, kwargs, call=repeat.call):
        def counted(*args, **kwargs):
            decided.append(name)
            return fn(*args, **kwargs)

        return call(name, counted, args, kwargs)

    driver = SimpleNamespace(active=active)
    patches = {"applies": lambda x: True, "_driver": lambda: driver, "call": call}
    with mock.patch.multiple(repeat, **patches), mock.patch.object(Launch, "again", interpreted):
        repeat.forget()
        yield decided
    repeat.forget()


def layer(name, seed=0, width=WIDTH):
    """Weights of experts as the op takes them, of H and I."""
    g = torch.Generator().manual_seed(seed)
    codec = FORMATS[name].weight
    up, down = (torch.randn(E, n, width, generator=g) / width**0.5 for n in (2 * width, width))
    qs = quantize_weight(codec, up, 2), quantize_weight(codec, down)
    parts = [t for part in ("qdata", "scale", "global_scale", "zero_point") for t in (getattr(q, part) for q in qs)]
    return parts + [torch.randn(E, 2 * width, generator=g), torch.randn(E, width, generator=g)]


def tokens(count, seed=0, dtype=torch.float32, width=WIDTH):
    g = torch.Generator().manual_seed(seed)
    weights, ids = torch.rand(count, E, generator=g).topk(TOP_K)
    return torch.randn(count, width, generator=g), ids, weights.to(dtype)


def check(name, calls, again, **options):
    """Every call gives what it gives alone; those of the numbers `again` decide nothing."""
    options = {"format": name, "backend": "triton", **options}
    want = [OPS.experts(*inputs, *weights, **options) for inputs, weights in calls]
    with repeating() as decided:
        results, quick = [], []
        for number, (inputs, weights) in enumerate(calls):
            before = len(decided)
            results.append(OPS.experts(*inputs, *weights, **options))
            quick += [number] * (len(decided) == before)
    assert all(same(a, b) for a, b in zip(results, want, strict=True))  # each, and still at the end
    assert quick == again


@interpreter
@pytest.mark.parametrize("name", NAMES)
def test_calls_alike_are_repeated(name):
    first, other = layer(name), layer(name, 1)
    inputs = [tokens(n, seed) for seed, n in enumerate((1, 1, 2, 1, 1))]
    codec = FORMATS[name].activation
    between = codec is not None and codec.block == (0, 0)  # the largest value of all rows is torch's to find
    calls = list(zip(inputs, (first, first, other, other, first), strict=True))
    check(name, calls, [] if between else [3, 4])


@interpreter
@pytest.mark.parametrize("options", [{"batch_invariant": True}, {"limit": 1.0}], ids=str)
def test_another_option_is_another_call(options):
    weights = layer("fp8")
    calls = [(tokens(2, seed), weights) for seed in range(3)]
    with repeating() as decided:
        plain = [OPS.experts(*i, *w, format="fp8", backend="triton") for i, w in calls]
        other = [OPS.experts(*i, *w, format="fp8", backend="triton", **options) for i, w in calls]
    assert len(decided) == 4
    want = [OPS.experts(*i, *w, format="fp8", backend="triton", **options) for i, w in calls]
    assert all(same(a, b) for a, b in zip(other, want, strict=True))
    if "batch_invariant" not in options:
        assert not any(same(a, b) for a, b in zip(plain, other, strict=True))


@interpreter
def test_router_weights_are_cast_again():
    """A torch operation on an input, in front of the launches."""
    weights = layer("fp8")
    check("fp8", [(tokens(2, seed, torch.float64), weights) for seed in range(4)], [2, 3])


@interpreter
def test_operations_between_launches_are_not_repeated():
    weights = layer("fp8")
    calls = [(tokens(1, seed), weights) for seed in range(3)]
    check("fp8", calls, [], router_weight_on_input=True)
    name = next(n for n, f in FORMATS.items() if f.activation is not None and takes_static(f.activation))
    static = [torch.rand(E) + 0.5, torch.rand(E) + 0.5]
    check(name, [(inputs, [*layer(name), *static]) for inputs, _ in calls], [])


@interpreter
def test_alignment_is_part_of_the_kind():
    """Triton's kernels are compiled for addresses that are multiples of 16, or for any."""
    weights, room = layer("bf16"), torch.randn(3, 2 * WIDTH + 1)
    calls = [((room[:1, at : at + WIDTH], *tokens(1)[1:]), weights) for at in (0, 0, 1, 1, 0, 1)]
    assert len({inputs[0].data_ptr() % 16 for inputs, _ in calls}) == 2
    check("bf16", calls, [4, 5])


@interpreter
def test_strides_are_part_of_the_kind():
    """Rows that lie apart are copied first: by torch, again each time."""
    weights, room, (_, *routing) = layer("bf16"), torch.randn(2, 2, WIDTH), tokens(2)
    dense, apart = ((x, *routing) for x in (room[0], room[:, 0]))
    check("bf16", [(inputs, weights) for inputs in (dense, dense, apart, apart, apart, dense)], [4, 5])


@interpreter
def test_one_tensor_twice_is_not_repeated():
    """Which of two an address was could not be told."""
    weights = layer("fp8")
    weights[9] = weights[8].view(-1)[: E * WIDTH].view(E, WIDTH)  # biases in one memory
    check("fp8", [(tokens(2, seed), weights) for seed in range(3)], [])


@interpreter
def test_bad_input_is_refused_as_before():
    weights, (x, ids, w) = layer("fp8"), tokens(2)
    with repeating():
        for _ in range(3):
            OPS.experts(x, ids, w, *weights, format="fp8", backend="triton")
        for bad in ((x[:, :-1], ids, w), (x, ids.float(), w), (x, ids[:1], w), (x.double(), ids, w)):
            for _ in range(3):
                with pytest.raises(ValueError, match="must"):
                    OPS.experts(*bad, *weights, format="fp8", backend="triton")


@interpreter
def test_memory_and_number_of_calls_are_bounded():
    weights, calls = layer("fp8"), [tokens(2, seed) for seed in range(3)]
    for bound in ({"_MOST_BYTES": 100}, {"_MOST_OPERATIONS": -1}):
        held, init = [], repeat._Watch.__init__

        def watching(self, *args, held=held, init=init):
            held.append(self)
            init(self, *args)

        with repeating() as decided, mock.patch.multiple(repeat, **bound), mock.patch.object(
            repeat._Watch, "__init__", watching):  # fmt: skip
            for inputs in calls:
                OPS.experts(*inputs, *weights, format="fp8", backend="triton")
        assert len(decided) == 3
        assert [(watch.alive, watch.empty, watch.operations) for watch in held] == [(None, [], [])]
    with repeating(), mock.patch.object(repeat, "_KINDS", 3):
        for count in range(1, 7):
            OPS.experts(*tokens(count), *weights, format="fp8", backend="triton")
            assert len(repeat._known) == min(count, 3)


@interpreter
def test_linear_is_repeated():
    q = FORMATS["fp8"].weight.quantize(torch.randn(64, WIDTH))
    calls = [torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    run = lambda x: OPS.linear(x, q.qdata, q.scale, format="fp8", backend="triton")  # noqa: E731
    want = [run(x) for x in calls]
    with repeating() as decided:
        got = [run(x) for x in calls]
    assert len(decided) == 2 and all(same(a, b) for a, b in zip(got, want, strict=True))


# ---- compiled


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in FORMATS if "/" not in name] + ["mxfp4/fp8", "int8/int8"])
def test_on_a_gpu(name, dtype):
    """dtype: of router weights; in bf16 torch casts them first. The last call is captured and replayed."""
    weights = [None if t is None else t.cuda() for t in layer(name, width=128)]
    calls = [[t.cuda() for t in tokens(2, seed, dtype, width=128)] for seed in range(5)]
    calls = [(x.bfloat16(), *routing) for x, *routing in calls]
    with torch.no_grad():
        run = lambda inputs: OPS.experts(*inputs, *weights, format=name, backend="triton")  # noqa: E731
        with mock.patch.object(repeat, "applies", lambda x: False):
            want = [run(inputs) for inputs in calls]
        repeat.forget()
        got = [run(inputs) for inputs in calls[:4]]
        assert any(isinstance(each, repeat.Repeat) for each in repeat._known.values()) == (name != "fp8_tensor")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            last = run(calls[4])
        graph.replay()
    assert all(same(a, b) for a, b in zip([*got, last], want, strict=True))


def host_time():
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import host_time
    finally:
        sys.path.remove(str(ROOT / "examples"))
    return host_time


@pytest.mark.skipif(not (ROOT / "examples").exists(), reason="not a source tree")
def test_triton_is_handed_the_same_launches():
    """Same kernels, grids and numbers as when all is decided; addresses differ one to one, inputs' not at all."""
    module, launches = host_time(), []

    class Launcher:
        def __init__(self, src, metadata):
            self.name = metadata.name

        def __call__(self, *args):
            launches.append((self.name, *args[:6], args[9:]))  # grid, stream, function, metadata; arguments

    with mock.patch.object(module, "CountingLauncher", Launcher), module.stub(), torch.no_grad():
        import _bench_peers as peers

        shape, cpu = peers.SHAPES["tiny"], torch.device("cpu")
        op, _ = module.layers(shape, "fp8", cpu, "triton")
        inputs = peers.random_sets(shape, 1, cpu)[0]
        known = {t.data_ptr() for t in inputs}
        repeat.forget()
        for _ in range(3):
            op(*inputs)
        repeat.forget()
    third = len(launches) // 3
    assert len(launches) == 3 * third >= 12
    to: dict[int, int] = {}
    for decided, repeated in zip(launches[:third], launches[2 * third :], strict=True):
        assert decided[:7] == repeated[:7]
        for a, b in zip(decided[7], repeated[7], strict=True):
            if isinstance(a, torch.Tensor):
                assert to.setdefault(a.data_ptr(), b) == b
                assert b % 16 == 0 and (a.data_ptr() not in known or a.data_ptr() == b)
            else:
                assert a is b or a == b
    assert known & set(to) and len(set(to.values())) == len(to)


def test_every_launch_is_noted():
    """A kernel that is launched past `enqueue` would be missing from what is repeated."""
    for folder in ("kernels", "backends"):
        for path in (ROOT / "moe_ops" / folder).glob("*.py"):
            assert not re.search(r"kernel\[(?!grid\]\(\*args)", path.read_text()), path.name
