"""Processes end with the one that uses them, also when that is killed."""

import os
import signal
import subprocess
import sys

import psutil
from espalier.rollouts.samplers.orphans import Guard

OWNER = """
import subprocess, sys, time
import psutil
from espalier.rollouts.samplers.orphans import Guard
sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
guard = Guard()
guard.watch([psutil.Process(sleeper.pid)])
print(sleeper.pid, flush=True)
if sys.argv[1] == "close":
    guard.close()
else:
    time.sleep(300)
"""


def owner(how):
    return subprocess.Popen([sys.executable, "-P", "-c", OWNER, how], stdout=subprocess.PIPE, text=True)


def test_what_was_watched_dies_with_a_killed_owner():
    process = owner("wait")
    sleeper = psutil.Process(int(process.stdout.readline()))
    os.kill(process.pid, signal.SIGKILL)
    process.wait(20)
    assert not psutil.wait_procs([sleeper], timeout=30)[1]


def test_control_what_was_let_go_of_lives():
    process = owner("close")
    sleeper = psutil.Process(int(process.stdout.readline()))
    assert process.wait(30) == 0
    assert psutil.wait_procs([sleeper], timeout=1)[1] == [sleeper]
    sleeper.kill()


def test_a_guard_is_closed_once_or_twice():
    guard = Guard()
    guard.close()
    guard.close()
