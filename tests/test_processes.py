"""Forked workers, other Python threads, and Ctrl-C: in processes of their own, which cannot hang the tests."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

SETUP = """
import threading, time, warnings
import torch, dlrm_rs

torch.manual_seed(0)
dlrm_rs.set_num_threads(2)
"""


def start(script: str) -> "subprocess.Popen[str]":
    """Another Python, with warnings as errors."""
    # Newer versions of Python warn about every fork of a process that has threads.
    command = [sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning", "-c"]
    source = SETUP + textwrap.dedent(script)
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, source], stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def run(script: str, seconds: float) -> str:
    """What the script prints; it must end well, and in time."""
    process = start(script)
    try:
        out, error = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with its children, which hold the pipes too
        pytest.fail(f"still running after {seconds} s: {process.communicate()}")
    assert process.returncode == 0, error
    return out


def test_large_calls_run_on_torchs_threads_while_these_are_enough() -> None:
    out = run(
        """
        import os, pathlib

        def own_threads():
            names = [task.joinpath("comm").read_text() for task in pathlib.Path("/proc/self/task").iterdir()]
            return sum(name.startswith("dlrm-rs") for name in names)

        bags = dlrm_rs.EmbeddingBag(5000, 64, mode="sum")
        ids = torch.randint(0, 5000, (2000, 8))
        dlrm_rs.set_num_threads(2)
        torch.set_num_threads(2)
        expected = bags(ids)
        assert dlrm_rs.info()["threads_of"] == "torch"
        assert own_threads() == 0
        child = os.fork()
        if child == 0:  # torch's threads are not here, so its operators need to be told, as its DataLoader does
            torch.set_num_threads(1)
            same = torch.equal(bags(ids), expected)
            os._exit(0 if same and own_threads() == 1 and dlrm_rs.info()["threads_of"] == "dlrm_rs" else 1)
        assert os.waitpid(child, 0)[1] == 0
        torch.set_num_threads(1)
        assert torch.equal(bags(ids), expected)
        assert own_threads() == 1
        print("done")
        """,
        seconds=30,
    )
    assert out == "done\n"


def test_a_child_that_loads_the_engine_after_torch_ran_in_its_parent() -> None:
    script = """
        import os, torch
        torch.set_num_threads(2)
        torch.ones(1000, 1000).exp()
        child = os.fork()
        if child == 0:
            import dlrm_rs
            assert dlrm_rs.info()["threads_of"] == "dlrm_rs"
            dlrm_rs.set_num_threads(2)
            bags = dlrm_rs.EmbeddingBag(1, 64, mode="sum")
            bags(torch.zeros(2000, 8, dtype=torch.int64))
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        assert process.wait(timeout=60) == 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def test_there_are_as_many_threads_as_torch_has_unless_it_is_said_otherwise() -> None:
    script = """
        import threading, torch, dlrm_rs
        for n in (3, 1):
            torch.set_num_threads(n)
            print(dlrm_rs.get_num_threads())
        thread = threading.Thread(target=lambda: print(dlrm_rs.get_num_threads()))
        thread.start()
        thread.join()
        dlrm_rs.set_num_threads(2)
        print(dlrm_rs.get_num_threads())
    """
    for environment, expected in (({}, "3 1 1 2"), ({"DLRM_RS_NUM_THREADS": "5"}, "5 5 5 2")):
        command = [sys.executable, "-c", textwrap.dedent(script)]
        done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
        assert done.stdout.split() == expected.split()


def test_forked_workers_look_up_while_the_parent_trains() -> None:
    out = run(
        """
        rows = dlrm_rs.Embedding(5000, 64)
        bags = dlrm_rs.EmbeddingBag(5000, 64, mode="sum", optimizer=dlrm_rs.optim.Adagrad(lr=0.1))
        # Calls that are large enough for the pool, in the parent before the fork, in the workers, and in the parent.
        ids = torch.randint(0, 5000, (2000, 8))
        bags(ids).sum().backward()
        expected = rows(ids).sum(1).detach()

        class Looks(torch.utils.data.Dataset):
            def __len__(self):
                return 12

            def __getitem__(self, i):
                dlrm_rs.set_num_threads(1 + i % 3)
                with torch.no_grad():
                    return rows(ids).sum(1)

        loader = torch.utils.data.DataLoader(Looks(), batch_size=2, num_workers=2, multiprocessing_context="fork")
        for epoch in range(2):
            for looked_up in loader:
                bags(ids).square().sum().backward()
                assert all(torch.equal(one, expected) for one in looked_up)
        print("done")
        """,
        seconds=60,
    )
    assert out == "done\n"


def test_a_lookup_and_an_update_let_other_threads_run() -> None:
    run(
        """
        bags = dlrm_rs.EmbeddingBag(1000, 256, mode="sum", optimizer=dlrm_rs.optim.SGD(lr=0.1))
        ids = torch.randint(0, 1000, (2, 4_000_000), dtype=torch.int32)  # a tenth of a second or more
        longest_pause, stop = [0.0], threading.Event()

        def watch():
            last = time.perf_counter()
            while not stop.is_set():
                now = time.perf_counter()
                longest_pause[0] = max(longest_pause[0], now - last)
                last = now

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            for call in (lambda: bags(ids), bags(ids).sum().backward):
                longest_pause[0] = 0
                started = time.perf_counter()
                call()
                seconds = time.perf_counter() - started
                time.sleep(0.1)  # so that the watch sees the end of a pause
                assert longest_pause[0] < seconds / 2, (longest_pause[0], seconds)
                assert seconds > 0.05
        finally:
            stop.set()
            thread.join()
        """,
        seconds=60,
    )


def test_threads_that_look_up_and_train_all_finish() -> None:
    # A thread that waits for the engine must not keep the other Python threads waiting for it.
    out = run(
        """
        bags = dlrm_rs.EmbeddingBag(2000, 256, mode="sum", optimizer=dlrm_rs.optim.SGD(lr=0.1))
        many, few = torch.randint(0, 2000, (40_000, 100)), torch.randint(0, 2000, (8, 4))
        trained, failed = [0, 0], []

        def looks():
            with torch.no_grad():
                for _ in range(5):  # a tenth of a second each, or more
                    bags(many)

        def trains(thread):
            while looking.is_alive():
                bags(few).sum().backward()
                trained[thread] += 1

        threading.excepthook = lambda failure: failed.append(failure.exc_value)
        looking = threading.Thread(target=looks)
        threads = [looking, *(threading.Thread(target=trains, args=[thread]) for thread in range(2))]
        for thread in threads:
            thread.start()
        ran = 0
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.001)
            ran += 1
        assert not failed, failed
        assert ran > 10 and all(trained), (ran, trained)
        print("done")
        """,
        seconds=60,
    )
    assert out == "done\n"


def test_a_weight_that_was_replaced_is_adopted_by_one_of_many_threads() -> None:
    out = run(
        """
        torch.set_num_threads(1)
        failed = []
        threading.excepthook = lambda failure: failed.append(failure.exc_value)
        for optimizer in (None, dlrm_rs.optim.SGD(lr=0.1)):
            bags = dlrm_rs.EmbeddingBag(20_000, 64, mode="sum", optimizer=optimizer)
            ids = torch.arange(20_000).view(-1, 4)
            for repeat in range(20):
                rows = torch.full((20_000, 64), float(repeat + 1))
                viewed = bags.weight.detach() if repeat % 2 else None  # then the tables move to new memory
                bags.weight.data = rows.clone()
                start, outs = threading.Barrier(4), []

                def look():
                    start.wait()
                    with torch.no_grad():
                        outs.append(bags(ids))

                threads = [threading.Thread(target=look) for _ in range(4)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                assert not failed, failed
                assert all((out == 4 * (repeat + 1)).all() for out in outs)
                assert torch.equal(bags.weight, rows)
                assert bags.weight.data_ptr() == bags._tables.handle.weight(0).ctypes.data
        print("done")
        """,
        seconds=60,
    )
    assert out == "done\n"


def test_a_child_forked_while_a_thread_adopts_can_adopt() -> None:
    out = run(
        """
        import os
        from dlrm_rs import tables

        bags = dlrm_rs.EmbeddingBag(5, 2, mode="sum")
        bags.weight.data = torch.ones(5, 2)
        adopting = threading.Event()

        def adopt():
            with tables._ADOPTING:
                adopting.set()
                time.sleep(0.5)

        thread = threading.Thread(target=adopt)
        thread.start()
        adopting.wait()
        child = os.fork()
        assert bags(torch.tensor([[1, 2]])).tolist() == [[2, 2]]
        if child == 0:
            os._exit(0)
        thread.join()
        assert os.waitpid(child, 0)[1] == 0
        print("done")
        """,
        seconds=30,
    )
    assert out == "done\n"


# Seconds of work for one thread: reading 4 KB per id, and putting ids in order. After that an update writes, and since
# it must not end half-way, it does not end early.
@pytest.mark.parametrize(("call", "dim", "repeats"), [("lookup", 1024, 10_000), ("update", 16, 15_000)])
def test_ctrl_c_ends_a_long_call_and_changes_nothing(call: str, dim: int, repeats: int) -> None:
    process = start(
        f"""
        import signal
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        dlrm_rs.set_num_threads(1)
        bags = dlrm_rs.EmbeddingBag(2000, {dim}, mode="sum", optimizer=dlrm_rs.optim.Adagrad(lr=0.1))
        ids = torch.arange(2000, dtype=torch.int32).repeat({repeats}).view(1000, -1)
        grad = torch.ones(1000, {dim}).numpy()
        groups = bags.fused_optimizer.begin_step()
        before, out = bags.weight.detach().clone(), bags(ids[:, :1])

        def lookup(batch):
            bags(ids[:batch])

        def update(batch):
            call = (ids[:batch].view(-1).numpy(), None, batch, None, None, grad[:batch])
            bags._tables.handle.update(*call, [True], [False], 1.0, groups)

        started = time.perf_counter()
        lookup(50)
        seconds = 20 * (time.perf_counter() - started)
        print("ready", flush=True)
        started = time.perf_counter()
        try:
            {call}(1000)
            print("finished")
        except KeyboardInterrupt:
            print("interrupted")
        # Python itself would interrupt after a lookup; an update that ran to its end would have changed the rows.
        assert "{call}" == "update" or time.perf_counter() - started < seconds / 2, seconds
        assert torch.equal(bags.weight, before)
        assert not bags._tables.handle.optimizer_state(0)["sum"].any()
        assert torch.equal(bags(ids[:, :1]), out)
        """
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, error
    assert out == "interrupted\n"
