"""The engine's process ends with the server, at once, whatever it is doing."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.served import ROOT, Served, environment

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes as POSIX has them")

LOADS_FOR_EVER = """
import importlib.abc, pathlib, sys, time

class Stuck(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            pathlib.Path(%r).touch()
            time.sleep(600)

if "--multiprocessing-fork" in sys.orig_argv:
    sys.meta_path.insert(0, Stuck())
"""


@pytest.mark.parametrize("how", ["elsewhere", "loading"])
def test_a_child_ends_with_its_parent(how: str) -> None:
    if how == "loading" and not sys.platform.startswith("linux"):
        pytest.skip("the kernel ends it in Linux only")
    command = [sys.executable, "-m", "tests.support.spawned_child", how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment()) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    try:
        child.wait(20)
    except psutil.TimeoutExpired:
        child.kill()
        raise


def test_when_the_server_is_killed_while_the_engine_imports_its_libraries_the_engine_ends_too(tmp_path: Path) -> None:
    loading = tmp_path / "loading"
    (tmp_path / "sitecustomize.py").write_text(LOADS_FOR_EVER % str(loading))
    settings = environment()
    settings["PYTHONPATH"] = os.pathsep.join([str(tmp_path), settings["PYTHONPATH"]])
    with Served(wait=False, env=settings) as served:
        served.wait_until(loading.exists, "the engine's process imported nothing", 90)
        served.wait_for_engine()
        served.process.kill()
        served.wait_gone()
