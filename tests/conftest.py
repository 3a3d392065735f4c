"""Devices that tests run on, and where the tests of kernels run (see interpreter.py)."""

import os
import sys

import ahead
import interpreter
import pytest
import torch

CUDA = torch.cuda.is_available()


def pytest_configure(config):
    config.addinivalue_line("markers", "kernels: runs Triton kernels, on the GPU or interpreted in their own process")
    torch.set_num_threads(1)  # matrices are small here: threads would only wait for each other


def _compiled(item):
    """Asks for kernels that are compiled in another process (ahead.py)."""
    return "compiled_ahead" in getattr(item, "fixturenames", ())


def _interpreted(item):
    """Runs in another process (interpreter.py)."""
    here = CUDA or os.environ.get("TRITON_INTERPRET") == "1"
    return item.get_closest_marker("kernels") is not None and not here


def _known(item):
    """It will run, and all of its arguments are there now."""
    skipped = any(all(mark.args) for mark in item.iter_markers("skipif")) or item.get_closest_marker("gpu")
    return not skipped and set(item._fixtureinfo.argnames) <= set(item.callspec.params if _parametrized(item) else ())


def _parametrized(item):
    return hasattr(item, "callspec")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """What other processes work on meanwhile is asked for last."""
    items.sort(key=lambda item: 2 * _compiled(item) + _interpreted(item))


def pytest_collection_finish(session):
    """A second core works beside the other tests; workers of xdist do not know which tests will be theirs."""
    config = session.config
    if config.option.collectonly or hasattr(config, "workerinput"):
        return
    for item in filter(_interpreted, session.items):
        if _known(item):
            arguments = dict(item.callspec.params) if _parametrized(item) else {}
            interpreter.start(item.nodeid, item.module.__name__, item.originalname, arguments)
    cases = [item.callspec.params["case"] for item in session.items if _compiled(item)]
    if cases:
        import launches

        config.stash[ahead.STARTED] = ahead.Ahead(launches.compile_case, cases)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not CUDA:
        pytest.skip("needs a GPU")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if not _interpreted(pyfuncitem):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    interpreter.run(pyfuncitem.nodeid, pyfuncitem.module.__name__, pyfuncitem.originalname, arguments)
    return True


def pytest_unconfigure(config):
    interpreter.stop()
    if "rank_pool" in sys.modules:
        sys.modules["rank_pool"].stop()
    if started := config.stash.get(ahead.STARTED, None):
        started.stop()


@pytest.fixture(params=["cpu", "cuda"] if CUDA else ["cpu"])
def device(request):
    """Ops run by whatever `auto` chooses: the reference on the CPU, kernels on a GPU."""
    return request.param
