"""Every configuration compiles for every architecture, without a GPU: no spills, within the chip's shared memory."""

import os
from dataclasses import astuple

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)
pytest.importorskip("triton")

import ahead
import aot
import launches
from aot import SHARED_LIMIT

from moe_ops.backends import triton_plan

CASES = [case for arch in launches.ARCHS for case in (*launches.products(arch), *launches.others(arch))]


@pytest.fixture(scope="session")
def compiled_ahead(request):
    """case -> its result: of the process that conftest.py has started, or made here."""
    started = request.config.stash.get(ahead.STARTED, None)
    return started.result if started else launches.compile_case


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_without_spills(case, compiled_ahead):
    for kernel, stack, shared in compiled_ahead(case):
        assert stack == 0, f"{kernel} spills: {stack} bytes of stack"
        assert shared <= SHARED_LIMIT[case.arch], f"{kernel} needs {shared} bytes of shared memory"


@pytest.mark.parametrize("arch", launches.ARCHS)
def test_every_entry_of_the_tables_is_covered(arch):
    """By one of the architectures that share the tables: not all have fp8, say."""
    sharing = [other for other in launches.ARCHS if launches.tables(other) is launches.tables(arch)]
    assert {case.config for other in sharing for case in launches.products(other)} == launches.listed(arch)


@pytest.mark.skipif(triton_plan.TRITON < (3, 9), reason="see backends/triton_plan.py, _scaled_types")
@pytest.mark.parametrize("arch,name", [
    (100, "mxfp8"), (100, "mxfp4/mxfp8"), (100, "mxfp4/mxfp4"), (100, "nvfp4"), (120, "mxfp8"), (120, "mxfp4/mxfp4"),
    (120, "nvfp4"),
])  # fmt: skip
def test_blackwell_scales_blocks_itself(arch, name):
    """The tensor core takes the stored codes and scales."""
    for gated in (False, True):
        config = next(iter(launches.table(launches.Kind("scaled", gated=gated), arch).values()))
        case = launches.Product(arch, name, "bfloat16", False, gated, False, 256, astuple(config))
        *_, launch = launches.record(case)
        assert "block_scale" in aot.compile_launch(*launch, arch).ptx


@pytest.mark.parametrize("arch", launches.ARCHS)
def test_blocks_do_not_straddle_groups(arch):
    """A step along K has one scale."""
    for case in launches.products(arch):
        for _, bound, _ in launches.record(case):
            assert not bound.get("SCALED") or bound["GROUP_K"] % bound["BLOCK_K"] == 0, str(case)
