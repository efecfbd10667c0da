"""The lock: one owner, who is named, and whose death frees it."""

import os
import signal
import socket

import pytest

from checkpoint.job_lock import JobLock, read_lock_token
from user_error import UserError


def in_child(body):
    """Fork a child that runs body() and then sleeps; returns its pid when body is done."""
    ready, done = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ready)
        try:
            body()
            os.write(done, b"1")
            os.close(done)
            signal.pause()
        finally:
            os._exit(1)
    os.close(done)
    assert os.read(ready, 1) == b"1", "the child failed"
    os.close(ready)
    return child


def kill(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_second_taker_is_refused_with_the_owners_name_and_kill_9_of_the_owner_frees_the_lock(tmp_path):
    owner = in_child(lambda: JobLock(tmp_path).acquire())
    try:
        with pytest.raises(
            UserError, match=rf"one job at a time .* held by process {owner} of \w+ on {socket.gethostname()}, started at 20"
        ):
            JobLock(tmp_path).acquire()
    finally:
        kill(owner)
    with JobLock(tmp_path):
        pass


def test_a_worker_that_outlives_its_killed_parent_does_not_keep_the_lock(tmp_path):
    def own_and_fork_a_worker():
        JobLock(tmp_path).acquire()
        keep.append(in_child(lambda: (tmp_path / "worker").write_text(str(os.getpid()))))

    keep = []
    kill(in_child(own_and_fork_a_worker))
    try:
        JobLock(tmp_path).acquire().release()
    finally:
        os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)


def test_a_fork_of_the_owner_does_not_free_the_lock(tmp_path):
    with JobLock(tmp_path):
        kill(in_child(lambda: None))
        with pytest.raises(UserError, match=f"held by process {os.getpid()} "):
            JobLock(tmp_path).acquire()


def test_ranks_that_see_the_same_folder_read_the_owners_token(tmp_path):
    assert read_lock_token(tmp_path / "missing") is None
    with JobLock(tmp_path / "run") as lock:
        assert read_lock_token(tmp_path / "run") == lock.token
        assert JobLock(tmp_path / "run").token != lock.token
    with JobLock(tmp_path / "run") as later:
        assert read_lock_token(tmp_path / "run") == later.token != lock.token


def test_a_released_lock_can_be_taken_again(tmp_path):
    lock = JobLock(tmp_path)
    for _ in range(2):
        lock.acquire()
        lock.release()
    lock.release()
