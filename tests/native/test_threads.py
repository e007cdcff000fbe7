"""OpenMP beside torch's, and in a forked child (csrc/cpu/parallel.cpp)."""

from __future__ import annotations

from tests.native.cases import run_python


def test_one_openmp_runtime_with_torch():
    done = run_python("""
        import re, torch
        def runtimes():
            return set(re.findall(r"\\S*lib(?:gomp|omp|iomp)\\S*", open("/proc/self/maps").read()))
        before = runtimes()
        import importlib.util
        from importlib.machinery import PathFinder
        package = importlib.util.find_spec("ifnd_fast")
        spec = PathFinder.find_spec("_cpu", package.submodule_search_locations)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        print(len(before), runtimes() == before)
    """)
    assert done.stdout.split() == ["1", "True"], done.stdout + done.stderr


# Without torch and numpy, whose own threads would hide what is tested.
FORK = """
    import array, importlib.util, os, signal
    from importlib.machinery import PathFinder
    package = importlib.util.find_spec("ifnd_fast")
    spec = PathFinder.find_spec("_cpu", package.submodule_search_locations)
    _cpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(_cpu)
    x, c = (array.array("f", [(7 * i + i * i) % 11 - 5 for i in range(n * 8)]) for n in (500, 20))
    address = lambda a: a.buffer_info()[0]

    def work():  # labels, and the number of threads that the process has after it
        labels = array.array("i", [-1] * 500)
        _cpu.assign_clusters(address(x), address(c), 500, 20, 8, 0, 0, 1.0, address(labels), 0, 2)
        return labels, len(os.listdir("/proc/self/task"))

    def in_child():
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)  # a hang ends the child, and the test fails
            labels, threads = work()
            os._exit(threads if min(labels) >= 0 else 99)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    fresh = in_child()
    mine, threads = work()
    print(fresh, threads, in_child(), work() == (mine, threads))
"""


def test_a_forked_child_does_not_hang():
    """Forked before any thread started it uses threads, afterwards one; the parent is unharmed."""
    done = run_python(FORK)
    assert done.stdout.split() == ["2", "2", "1", "True"], done.stdout + done.stderr
