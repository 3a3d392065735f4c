"""Devices that tests run on, and where the tests of kernels run (see interpreter.py)."""

import os

import ahead
import interpreter
import pytest
import torch

CUDA = torch.cuda.is_available()


def pytest_configure(config):
    config.addinivalue_line("markers", "kernels: runs Triton kernels, on the GPU or interpreted in their own process")
    torch.set_num_threads(1)  # matrices are small here: threads would only wait for each other


def _compiled(item):
    return "compiled" in getattr(item, "fixturenames", ())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """What a second process works on meanwhile is asked for last."""
    items.sort(key=_compiled)


def pytest_collection_finish(session):
    """Kernels are compiled beside the other tests; workers of xdist do not know which ones they will be asked for."""
    cases = [item.callspec.params["case"] for item in session.items if _compiled(item)]
    if cases and not session.config.option.collectonly and not hasattr(session.config, "workerinput"):
        import launches

        session.config.stash[ahead.STARTED] = ahead.Ahead(launches.compile_case, cases)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not CUDA:
        pytest.skip("needs a GPU")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if not pyfuncitem.get_closest_marker("kernels") or CUDA or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    interpreter.run(pyfuncitem.module.__name__, pyfuncitem.originalname, arguments)
    return True


def pytest_unconfigure(config):
    interpreter.stop()
    if started := config.stash.get(ahead.STARTED, None):
        started.stop()


@pytest.fixture(params=["cpu", "cuda"] if CUDA else ["cpu"])
def device(request):
    """Ops run by whatever `auto` chooses: the reference on the CPU, kernels on a GPU."""
    return request.param
