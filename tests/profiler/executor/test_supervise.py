"""Supervision with real processes: a crash, a hang, an interrupt, and workers that will not go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

import meshwright
from meshwright.errors import ExecutionError
from meshwright.profiler.executor.orphans import OrphanKeeper
from meshwright.profiler.executor.report import log_path, now_path
from meshwright.profiler.executor.supervise import Patience, WorkerCommand, supervise

SOURCE = os.path.dirname(os.path.dirname(meshwright.__file__))
QUICK = Patience(silence=0.4, start=5.0, goodbye=0.3)
# Says what it does as a worker does, and lets the test know its process id.
PREAMBLE = """
import os, pathlib, signal, subprocess, sys, time
folder, rank = pathlib.Path(sys.argv[1]), int(os.environ["RANK"])
def say(text):
    temporary = folder / f".now{rank}"
    temporary.write_text(text + chr(10))
    temporary.replace(folder / f"rank{rank}.now")
(folder / f"pid{rank}").write_text(str(os.getpid()))
"""


def worker(folder, rank, body):
    script = folder / f"worker{rank}.py"
    script.write_text(PREAMBLE + textwrap.dedent(body))
    return WorkerCommand(
        rank=rank,
        arguments=(sys.executable, "-S", str(script), str(folder)),
        environment={"RANK": str(rank)},
    )


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pids(folder):
    return [int(path.read_text()) for path in folder.glob("pid*")]


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_workers_that_end_well_are_waited_for_and_logged(tmp_path):
    said = []
    body = 'say("step 1"); print("hello", rank); print("oh", file=sys.stderr); time.sleep(0.1)'
    supervise([worker(tmp_path, rank, body) for rank in range(2)], tmp_path, progress=said.append)
    assert [sorted(log_path(tmp_path, rank).read_text().splitlines()) for rank in range(2)] == [
        ["hello 0", "oh"],
        ["hello 1", "oh"],
    ]
    assert said == ["step 1"]
    assert not any(map(is_running, pids(tmp_path)))


def test_a_crash_ends_all_and_names_rank_operation_and_log(tmp_path):
    waits = worker(tmp_path, 0, 'say("all_reduce over dp"); time.sleep(60)')
    crashes = worker(tmp_path, 1, 'say("backward of layer 3"); time.sleep(0.2); sys.exit("no such tensor")')
    begin = time.monotonic()
    with pytest.raises(ExecutionError) as caught:
        supervise([waits, crashes], tmp_path, patience=QUICK)
    assert time.monotonic() - begin < 10.0
    message = str(caught.value)
    assert "rank 1 failed with exit code 1 in: backward of layer 3" in message
    assert str(log_path(tmp_path, 1)) in message
    assert "no such tensor" in log_path(tmp_path, 1).read_text()
    assert not any(map(is_running, pids(tmp_path)))


def test_of_several_crashes_the_killed_one_is_named(tmp_path):
    # The kernel's out-of-memory killer takes one rank, and its peers complain of a lost connection.
    killed = worker(tmp_path, 1, 'say("optimizer"); os.kill(os.getpid(), signal.SIGKILL)')
    complains = worker(
        tmp_path,
        0,
        """
        say("send")
        while not (folder / "rank1.now").exists():
            time.sleep(0.01)
        sys.exit(3)
        """,
    )
    with pytest.raises(ExecutionError, match=r"rank 1 was killed by SIGKILL in: optimizer"):
        supervise([killed, complains], tmp_path, patience=Patience(silence=5.0, goodbye=0.3))


def test_a_hang_ends_with_what_each_rank_waited_in(tmp_path):
    hangs = [worker(tmp_path, rank, f'say("recv {rank}"); time.sleep(60)') for rank in range(2)]
    with pytest.raises(ExecutionError) as caught:
        supervise(hangs, tmp_path, patience=QUICK)
    assert "rank 0: recv 0\n  rank 1: recv 1" in str(caught.value)
    assert not any(map(is_running, pids(tmp_path)))


def test_one_that_gets_on_keeps_the_waiting_ones_alive(tmp_path):
    works = worker(tmp_path, 0, 'for step in range(12): say(f"step {step}"); time.sleep(0.1)')
    waits = worker(
        tmp_path,
        1,
        'say("recv")\nwhile not (folder / "rank0.now").exists() or "11" not in (folder / "rank0.now").read_text(): time.sleep(0.05)',
    )
    supervise([works, waits], tmp_path, patience=QUICK)
    assert [now_path(tmp_path, rank).read_text() for rank in range(2)] == ["step 11\n", "recv\n"]


def test_a_worker_that_never_says_a_word_is_given_longer(tmp_path):
    silent = worker(tmp_path, 0, "time.sleep(60)")
    begin = time.monotonic()
    with pytest.raises(ExecutionError, match="rank 0: starting"):
        supervise([silent], tmp_path, patience=Patience(silence=0.1, start=0.7, goodbye=0.3))
    assert time.monotonic() - begin >= 0.7


def test_a_worker_that_ignores_requests_and_its_children_are_killed(tmp_path):
    stubborn = """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
        (folder / "pid-child").write_text(str(child.pid))
        say("waiting")
        time.sleep(60)
    """
    with pytest.raises(ExecutionError, match="hangs"):
        supervise([worker(tmp_path, 0, stubborn)], tmp_path, patience=QUICK)
    assert len(pids(tmp_path)) == 2
    wait_for(lambda: not any(map(is_running, pids(tmp_path))))


def test_children_of_a_worker_that_ended_well_do_not_stay(tmp_path):
    leaves = """
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
        (folder / "pid-child").write_text(str(child.pid))
    """
    supervise([worker(tmp_path, 0, leaves)], tmp_path, patience=QUICK)
    assert (tmp_path / "pid-child").exists()
    wait_for(lambda: not any(map(is_running, pids(tmp_path))))
    assert not any(map(is_running, pids(tmp_path)))


def test_a_program_that_is_not_there_is_said(tmp_path):
    sleeper = worker(tmp_path, 0, "time.sleep(60)")
    absent = WorkerCommand(rank=1, arguments=(str(tmp_path / "absent"),), environment={})
    with pytest.raises(ExecutionError, match="rank 1 cannot be started: No such file"):
        supervise([sleeper, absent], tmp_path, patience=QUICK)
    assert not any(map(is_running, pids(tmp_path)))


@pytest.mark.parametrize("text", ["\x1b[31mred\n second line", "x" * 5000], ids=["escape", "long"])
def test_what_a_worker_says_is_printed_harmlessly(tmp_path, text):
    now_path(tmp_path, 0).write_text(text)
    with pytest.raises(ExecutionError) as caught:
        supervise([worker(tmp_path, 0, "sys.exit(1)")], tmp_path, patience=QUICK)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("number", "expected"),
    [(signal.SIGINT, 7), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGHUP, -signal.SIGHUP)],
    ids=["ctrl-c", "sigterm", "sighup"],
)
def test_an_interrupt_leaves_no_process_behind(tmp_path, number, expected):
    stubborn = worker(
        tmp_path, 0, 'signal.signal(signal.SIGTERM, signal.SIG_IGN); say("waiting"); time.sleep(60)'
    )
    polite = worker(tmp_path, 1, 'say("waiting"); time.sleep(60)')
    program = f"""
        import signal
        import sys
        from pathlib import Path
        from meshwright.profiler.executor.supervise import Patience, WorkerCommand, supervise
        # A suite that runs in the background may have been started with Ctrl-C and hang-ups ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        try:
            supervise({[stubborn, polite]!r}, Path({str(tmp_path)!r}), patience=Patience(goodbye=0.2))
        except KeyboardInterrupt:
            sys.exit(7)
    """
    starter = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], env={**os.environ, "PYTHONPATH": SOURCE}
    )
    wait_for(lambda: all(now_path(tmp_path, rank).exists() for rank in range(2)))
    starter.send_signal(number)
    assert starter.wait(timeout=10.0) == expected
    assert len(pids(tmp_path)) == 2
    assert not any(map(is_running, pids(tmp_path)))


def test_the_death_of_the_supervisor_ends_its_workers_and_their_children(tmp_path):
    body = """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
        (folder / f"pid-child{rank}").write_text(str(child.pid))
        say("waiting")
        time.sleep(60)
    """
    commands = [worker(tmp_path, rank, body) for rank in range(2)]
    program = f"""
        from pathlib import Path
        from meshwright.profiler.executor.supervise import WorkerCommand, supervise
        supervise({commands!r}, Path({str(tmp_path)!r}))
    """
    starter = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], env={**os.environ, "PYTHONPATH": SOURCE}
    )
    try:
        wait_for(lambda: all(now_path(tmp_path, rank).exists() for rank in range(2)))
        assert len(pids(tmp_path)) == 4
        assert all(map(is_running, pids(tmp_path)))
    finally:
        starter.kill()
        starter.wait(timeout=10.0)
    wait_for(lambda: not any(map(is_running, pids(tmp_path))))


def test_the_keeper_goes_with_the_run_and_touches_no_one():
    sleeper = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        with OrphanKeeper() as keeper:
            keeper.add(sleeper.pid)
            assert is_running(keeper.pid)
        assert not is_running(keeper.pid)
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()


def test_without_its_keeper_a_run_goes_on():
    with OrphanKeeper() as keeper:
        os.kill(keeper.pid, signal.SIGKILL)
        wait_for(lambda: not is_running(keeper.pid))
        # A broken pipe is no reason to stop.
        keeper.add(os.getpid())
    assert not is_running(keeper.pid)


def test_without_a_process_to_spare_a_run_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent"))
    with pytest.raises(ExecutionError, match="no process can be started"):
        supervise([worker(tmp_path, 0, "time.sleep(60)")], tmp_path)
    assert not pids(tmp_path)
