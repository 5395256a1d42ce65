"""Coding tasks: the contract, grading by tests that cannot be seen, determinism, and data of the user's own."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import espalier.envs
import gymnasium
import psutil
import pytest
from espalier.envs import Action, ToolCall
from espalier.envs.check import check_agent_env
from espalier.envs.coding import testing
from espalier.envs.coding.datasets import DatasetError, load_tasks
from espalier.envs.coding.env import CodeSandboxEnv
from espalier.envs.coding.families import generate, value_of
from espalier.envs.coding.functions import FUNCTIONS
from espalier.envs.coding.task import CodeTask
from espalier.envs.core import EnvFailure
from espalier.envs.sandbox import Box, BoxError

TASK = CodeTask(
    "one",
    "Repair double in work.py.",
    files={"work.py": "def double(x):\n    return x\n", "test_work.py": "from work import double\n\n\ndef test_it():\n    assert double(2) == 4\n"},
    tests={"test_hidden.py": "from work import double\n\n\ndef test_a():\n    assert double(3) == 6\n\n\ndef test_b():\n    assert double('ab') == 'abab'\n"},
)  # fmt: skip
RIGHT = "def double(x):\n    return x + x\n"


@pytest.fixture(scope="module")
def works() -> None:
    try:
        Box().close()
    except BoxError as error:
        pytest.skip(f"no box here: {error}")


@pytest.fixture
def env(works: None):
    made = CodeSandboxEnv([TASK], seconds=10)
    made.reset(seed=0)
    yield made
    made.close()


def do(env: CodeSandboxEnv, name: str, **arguments: object):
    observation, reward, terminated, truncated, info = env.step(Action("", (ToolCall(name, arguments),)))
    return observation.messages[0]["content"], reward, terminated or truncated, info


def test_the_contract_holds(works: None) -> None:
    assert espalier.envs.CODE_SANDBOX in gymnasium.registry
    made = partial(gymnasium.make, "espalier/CodeSandbox-v0", tasks="generated", count=20)
    passed = check_agent_env(made, episodes=1, turns=4)
    assert {"seeding_again", "rollback_future", "branch_apart"} <= set(passed)


def test_a_repair_is_rewarded_when_all_hidden_tests_pass(env: CodeSandboxEnv) -> None:
    assert "test_it: failed" in do(env, "run_tests")[0]
    assert do(env, "edit_file", path="work.py", old="return x", new="return 2 * x")[0] == "replaced"
    assert do(env, "run_tests")[0] == "test_it: passed\n1 of 1 passed"
    assert do(env, "submit")[1:3] == (1.0, True)


def test_half_a_repair_is_none(env: CodeSandboxEnv) -> None:
    do(
        env,
        "write_file",
        path="work.py",
        content="def double(x):\n    return int(x) * 2 if isinstance(x, int) else ''\n",
    )
    _, reward, over, info = do(env, "submit")
    assert (reward, over, info["tests"], info["soft"]) == (0.0, True, (1, 2), 0.5)


def test_an_episode_that_changes_nothing_scores_nothing(env: CodeSandboxEnv) -> None:
    assert env.step(Action("I give up."))[1:3] == (0.0, True)
    with pytest.raises(RuntimeError, match="over"):
        env.step(Action())


@pytest.mark.parametrize(
    "attack",
    [
        "open('conftest.py', 'w').write('import pytest\\n@pytest.hookimpl(tryfirst=True)\\ndef pytest_runtest_call(item): pytest.skip()')",
        "open('pytest.py', 'w').write('def main(*a, **k): return 0')",
        "open('pytest.ini', 'w').write('[pytest]\\naddopts = --collect-only')",
        "import os; os.makedirs('/tmp/hidden-tests', exist_ok=True); open('/tmp/hidden-tests/conftest.py', 'w').write('raise SystemExit(0)')",
        "import os; os.symlink('/workspace', '/tmp/hidden-tests')",
        "open('work.py', 'w').write('import os; os._exit(0)')",
        "open('work.py', 'w').write('raise SystemExit(0)')",
        "import subprocess; subprocess.Popen('while true; do rm -f /tmp/hidden-tests/*; done', shell=True); 0",
        "import pytest; pytest.main = lambda *a, **k: 0",
        "open('work.py', 'w').write('while True: pass')",
    ],
)
def test_what_is_not_a_repair_earns_nothing(works: None, attack: str) -> None:
    env = CodeSandboxEnv([TASK], seconds=8)
    try:
        env.reset(seed=0)
        do(env, "python", code=attack)
        assert do(env, "submit")[1] == 0.0
        env.reset(seed=0)  # and the next episode is untouched
        do(env, "write_file", path="work.py", content=RIGHT)
        assert do(env, "submit")[1] == 1.0
    finally:
        env.close()


TWO_FILES = CodeTask(
    "two",
    "Repair double and half in work.py and more.py.",
    files={"work.py": "def double(x):\n    return x\n", "more.py": "def half(x):\n    return x // 2\n"},
    tests={
        "test_one.py": "from more import half\n\n\ndef test_half():\n    assert half(4) == 2\n",
        "test_two.py": "import pytest\nfrom work import double\n\n\n@pytest.fixture\ndef four():\n    return double(2)\n\n\n"
        "class TestIt:\n    def test_double(self, four):\n        assert four == 4\n\n"
        "    @pytest.mark.skip\n    def test_some_day(self):\n        assert False\n",
    },
)  # fmt: skip
WRITE = "import os, stat\nfor fd in map(int, os.listdir('/proc/self/fd')[:-1]):\n    if stat.S_ISFIFO(os.fstat(fd).st_mode):\n        os.write(fd, {})\nos._exit(0)\n"


@pytest.mark.parametrize(
    "forged",
    [
        WRITE.format("""b'[["a","passed",""]]'"""),
        WRITE.format("""b'["test_two.py::TestIt::test_double", "passed", "call", ""]\\n[0]\\n'"""),
        "import pytest\npytest.skip('not today', allow_module_level=True)\n",
        "import unittest\ndef double(x):\n    raise unittest.SkipTest('not today')\n",
        "import pytest\ndef double(x):\n    pytest.exit('done', 0)\n",
        "def double(x):\n    raise KeyboardInterrupt\n",
    ],
)
def test_a_forged_result_and_an_end_before_the_end_earn_nothing(works: None, forged: str) -> None:
    """Each of these passes where what stands in the pipe is believed."""
    env = CodeSandboxEnv([TWO_FILES], seconds=10)
    try:
        env.reset(seed=0)
        do(env, "write_file", path="work.py", content=forged)
        assert do(env, "submit")[1] == 0.0
        env.reset(seed=0)
        do(env, "write_file", path="work.py", content=RIGHT)
        assert do(env, "submit")[1] == 1.0
    finally:
        env.close()


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("test_a.py", "def test_a(): pass\ndef helper(): pass", {"test_a.py::test_a"}),
        ("a_test.py", "async def test_b(): pass\ndef test_a(): pass", {"a_test.py::test_a"}),
        ("helper.py", "def test_a(): pass", set()),
        ("test_a.py", "@fixture\ndef test_client(): pass", set()),
        ("test_a.py", "@pytest.mark.skipif(True, reason='')\ndef test_a(): pass", set()),
        ("test_a.py", "@pytest.mark.parametrize('x', [1])\ndef test_a(x): pass", {"test_a.py::test_a"}),
        (
            "test_a.py",
            "class Tools:\n    def test_a(self): pass\nclass TestA(Base):\n    def test_a(self): pass",
            set(),
        ),
        ("test_a.py", "class A(unittest.TestCase):\n    def test_a(self): pass", {"test_a.py::A::test_a"}),
        ("test_a.py", "x = pytest.importorskip('numpy')\ndef test_a(): pass", set()),
        ("test_a.py", "@fixture\ndef gcc():\n    pytest.skip('no gcc')\ndef test_a(gcc): pass", set()),
        ("test_a.py", "def test_a(:", set()),
    ],
)
def test_only_tests_that_are_certain_to_run_have_to(name: str, text: str, named: set[str]) -> None:
    assert testing._named({name: text}) == named
    for chooses in ("collect_ignore = ['test_a.py']", "def pytest_runtest_setup(item):\n    pytest.skip('not here')"):
        assert testing._named({name: text, "conftest.py": chooses}) == set()


MANY = "import pytest\nfrom work import double\n@pytest.mark.parametrize('x', range(2000), ids=lambda x: 'number-%d' % x * 3)\ndef test_many(x):\n    assert double(x) == 2 * x, 'no' * 500\n"
NEARLY = "def double(x):\n    return 2 * x if x < 1800 else x\n"


def test_thousands_of_tests_are_all_counted(works: None) -> None:
    """A folder of one's own may have as many; what is listed is bounded, what is counted is not."""
    task = CodeTask(
        "many",
        "Repair double.",
        files={
            "work.py": NEARLY,
            "test_work.py": "from work import double\ndef test_it():\n    assert double(2) == 4\n",
            "test_many.py": MANY,
        },
        tests={"test_hidden.py": MANY},
    )
    env = CodeSandboxEnv([task], seconds=120)
    try:
        env.reset(seed=0)
        told = do(env, "run_tests")[0]
        assert "AssertionError" in told and told.endswith("\n1801 of 2001 passed")
        assert "more are not listed" in told and len(told) < 2 * testing.MOST_SHOWN
        do(env, "write_file", path="work.py", content=RIGHT)
        assert do(env, "run_tests")[0].endswith("\n2001 of 2001 passed")
        _, reward, _, info = do(env, "submit")
        assert (reward, info["tests"], info["soft"]) == (1.0, (2000, 2000), 1.0)
    finally:
        env.close()


def test_a_result_that_cannot_be_read_is_no_reward(env: CodeSandboxEnv, monkeypatch) -> None:
    cut = testing._RUN.replace('"total": len(found)', '"sum": 0')
    assert cut != testing._RUN
    monkeypatch.setattr(testing, "_RUN", cut)
    do(env, "write_file", path="work.py", content=RIGHT)
    assert "cannot be read" in do(env, "run_tests")[0]
    with pytest.raises(EnvFailure, match=r"cannot be read") as failure:
        do(env, "submit")
    assert failure.value.kind == "grading_failed"


def test_tests_that_are_ended_from_within_say_so(env: CodeSandboxEnv) -> None:
    do(env, "write_file", path="work.py", content="import os\nos._exit(0)\n")
    assert "ended before their end" in do(env, "run_tests")[0]


def test_hidden_tests_are_nowhere_while_the_agent_works(env: CodeSandboxEnv) -> None:
    found = do(
        env,
        "shell",
        command="grep -rl 'def test_b' / --include=*.py -s | grep -v -e /usr/ -e site-packages -e /lib/; ls /tmp",
    )
    assert "test_hidden" not in found[0] and "hidden-tests" not in found[0]


def test_the_same_episode_with_and_without_rollbacks_between(works: None) -> None:
    calls = [
        ("shell", {"command": "echo 1 > n; cat n"}),
        ("python", {"code": "import random; random.seed(1); x = [random.random()]; x"}),
        ("edit_file", {"path": "work.py", "old": "return x", "new": "return x * 2"}),
        ("python", {"code": "x.append(random.random()); x"}),
        ("run_tests", {}),
        ("submit", {}),
    ]
    records = []
    for detours in (False, True):
        env = CodeSandboxEnv([TASK], seconds=10)
        env.reset(seed=0)
        record = []
        for name, arguments in calls:
            if detours:
                here, digest = env.snapshot(), env.state_digest()
                do(env, "shell", command="rm -rf *; echo spoiled > work.py")
                do(env, "python", code="x = None; import os; os.chdir('/tmp')")
                env.rollback(here)
                assert env.state_digest() == digest
            record.append(do(env, name, **arguments))
        records.append((record, env.state_digest()))
        env.close()
    assert records[0] == records[1]
    assert records[0][0][-1][1] == 1.0


def test_a_state_that_cannot_be_kept_is_a_typed_failure(env: CodeSandboxEnv) -> None:
    do(env, "shell", command="sleep 60 & true")
    with pytest.raises(EnvFailure, match="snapshot_incomplete"):
        env.snapshot()


def test_mistakes_are_told_so_that_they_can_be_mended(env: CodeSandboxEnv) -> None:
    assert '"not_found"' in do(env, "read_file", path="missing.py")[0]
    assert '"ambiguous"' in do(env, "edit_file", path="work.py", old="x", new="y")[0]
    assert '"not_found"' in do(env, "edit_file", path="work.py", old="zzz", new="y")[0]
    assert '"is_a_folder"' in do(env, "read_file", path=".")[0]
    assert "exit status 3" in do(env, "shell", command="exit 3")[0]
    assert do(env, "list_files")[0].splitlines()[0].startswith("test_work.py")


def test_a_file_too_large_to_edit_is_left_as_it_is(env: CodeSandboxEnv) -> None:
    do(env, "shell", command="(echo first; head -c 5000000 /dev/zero | tr '\\0' a; echo last) > large")
    before = do(env, "shell", command="cksum large")[0]
    assert '"too_large"' in do(env, "edit_file", path="large", old="first", new="second")[0]
    assert do(env, "shell", command="cksum large")[0] == before


def test_every_mistake_of_the_table_is_one_and_every_task_can_be_solved() -> None:
    import random

    for function in FUNCTIONS:
        rng = random.Random(0)
        inputs = [function.draw(rng) for _ in range(200)]
        for right, wrong in function.mistakes:
            bad = function.source.replace(right, wrong)
            assert bad != function.source
            assert any(value_of(bad, "NAME", a) != value_of(function.source, "NAME", a) for a in inputs), (right, wrong)
    for split in ("train", "test"):
        for number in range(60):
            task = generate(split, 0, number)
            assert task == generate(split, 0, number) and task.files and task.tests
    names = [
        {t.instruction.split(" in ")[0] for n in range(200) for t in [generate(s, 0, n)]} for s in ("train", "test")
    ]
    assert not names[0] & names[1]


def test_generated_tasks_are_solved_by_a_correct_text(works: None) -> None:
    env = CodeSandboxEnv("generated", count=8, split="test")
    try:
        for task in env.tasks:
            env.reset(options={"task": task})
            module = next(name for name in task.files if not name.startswith("test_"))
            name = task.files[f"test_{module}"].split("import ")[1].split("\n")[0]
            function = next(f for f in FUNCTIONS if name.endswith(f.stem))
            do(env, "write_file", path=module, content=function.source.replace("NAME", name))
            assert do(env, "submit")[1] == 1.0, task.id
            env.reset(options={"task": task})
            assert do(env, "submit")[1] == 0.0, task.id
    finally:
        env.close()


def test_folders_of_ones_own(works: None, tmp_path) -> None:
    folder = tmp_path / "tasks" / "first"
    for name in ("workspace", "tests"):
        (folder / name).mkdir(parents=True)
    (folder / "instruction.md").write_text("Repair double.\n")
    (folder / "workspace" / "work.py").write_text("def double(x):\n    return x\n")
    (folder / "tests" / "test_it.py").write_text(
        "from work import double\n\n\ndef test_it():\n    assert double(2) == 4\n"
    )
    (task,) = load_tasks(tmp_path / "tasks", split="all", seed=0, count=9)
    env = CodeSandboxEnv([task])
    env.reset(seed=0)
    do(env, "write_file", path="work.py", content=RIGHT)
    assert do(env, "submit")[1] == 1.0
    env.close()
    assert (folder / "workspace" / "work.py").read_text() == "def double(x):\n    return x\n"
    (folder / "tests" / "test_it.py").unlink()
    with pytest.raises(DatasetError, match="first has no test_"):
        load_tasks(tmp_path / "tasks", split="all", seed=0, count=9)
    with pytest.raises(DatasetError, match="neither"):
        load_tasks(tmp_path / "none", split="all", seed=0, count=9)


def test_what_only_reads_leads_to_the_same_state_and_a_met_limit_is_said():
    env = CodeSandboxEnv([TASK], seconds=5)
    env.reset(seed=0)
    start = env.state_digest()
    for name, arguments in (("read_file", {"path": "work.py"}), ("list_files", {}), ("no_such_tool", {})):
        do(env, name, **arguments)
        assert env.state_digest() == start
    *_, info = env.step(Action("", (ToolCall("shell", {"command": "sleep 20"}),)))
    assert "time" in info["unrepeatable"] and env.state_digest() != start
    *_, info = env.step(Action("", (ToolCall("shell", {"command": "ls"}),)))
    assert "unrepeatable" not in info
    env.close()


def test_a_box_without_pytest_is_a_failure_and_no_reward(works: None, monkeypatch) -> None:
    """Negative control: without this check the right solution would be scored 0."""
    monkeypatch.setattr("espalier.envs.coding.testing._PRELOAD", "import pytest_of_another_house")
    env = CodeSandboxEnv([TASK])
    with pytest.raises(EnvFailure, match=r"pytest cannot be loaded.*another_house") as failure:
        env.reset(seed=0)
    assert failure.value.kind == "box_failed"
    env.close()


def test_a_box_lost_between_two_episodes_costs_neither(works: None) -> None:
    before = set(psutil.Process().children(recursive=True))
    env = CodeSandboxEnv([TASK], seconds=10)
    try:
        env.reset(seed=0)
        assert do(env, "submit")[1] == 0.0
        killed = set(psutil.Process().children(recursive=True)) - before
        for process in killed:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(killed, timeout=10)
        env.reset(seed=0)
        do(env, "write_file", path="work.py", content=RIGHT)
        assert killed and do(env, "submit")[1] == 1.0
    finally:
        env.close()


LOOKS = (
    "cat work.py",
    "ls -la; grep -n def work.py | wc -l",
    "cd /tmp && pwd",
    "exit 3",
    "cat none",
    "export A=1; x=2",
)
CHANGES = (
    "touch new", "touch work.py", "mkdir -p a/b", "echo 1 > /tmp/x", "chmod 600 work.py", "rm work.py", "ln -s work.py l",
    "echo '#' >> work.py", "sleep 30 &",
)  # fmt: skip


@pytest.mark.parametrize("kept", [True, False])
def test_a_command_that_only_looks_leads_to_the_same_state_and_one_that_changes_anything_to_another(works, kept):
    """Whatever was written before, and whether or not the states between are kept."""
    env = CodeSandboxEnv([TASK], seconds=10)
    env.reset(seed=0)
    for before in ({}, {"path": "more.py", "content": "y = 2\n"}):
        if before:
            do(env, "write_file", **before)
        state = env.state_digest()
        for command in LOOKS:
            here = env.snapshot() if kept else None
            do(env, "shell", command=command)
            assert env.state_digest() == state, command
            assert here is None or env.snapshot().digest == here.digest
    here = env.snapshot()
    for command in CHANGES:
        do(env, "shell", command=command)
        assert env.state_digest() != state, command
        env.rollback(here)
    both = (ToolCall("shell", {"command": "ls"}), ToolCall("write_file", {"path": "z", "content": ""}))
    env.step(Action("", both))
    assert env.state_digest() != state
    env.close()


def test_a_command_that_only_looks_leaves_no_trace_in_the_interpreter(env):
    """So that it may be left out of the name of the state: not even who watches for programs remembers it."""
    code = """
import os, sys
count = []
def watch(event, _):
    if event == "subprocess.Popen":
        count.append(1)
sys.addaudithook(watch)
os.chdir("/tmp")"""
    do(env, "python", code=code)
    do(env, "shell", command="ls")
    do(env, "shell", command="cat /workspace/work.py")
    assert "(0, '/tmp')" in str(do(env, "python", code="len(count), os.getcwd()"))
    do(env, "shell", command="echo 1 > /tmp/x")
    assert "(1, '/tmp')" in str(do(env, "python", code="len(count), os.getcwd()"))


@pytest.mark.parametrize(
    ("name", "arguments", "varies"),
    [
        ("shell", {"command": "date +%N"}, True),
        ("shell", {"command": "ls -la"}, True),
        ("shell", {"command": "echo $$"}, True),
        ("python", {"code": "import time; time.time()"}, True),
        ("python", {"code": "import random; random.random()"}, True),
        ("shell", {"command": "ls && cat work.py"}, False),
        ("python", {"code": "update = [1]; update"}, False),
    ],
)
def test_a_call_that_names_a_clock_or_chance_is_not_kept_for_others(env, name, arguments, varies):
    *_, info = env.step(Action("", (ToolCall(name, arguments),)))
    assert ("unrepeatable" in info) == varies


def test_how_long_tests_took_is_not_shown(env):
    do(env, "write_file", path="test_slow.py", content="import time\n\n\ndef test_it():\n    time.sleep(0.2)\n")
    answer, *_ = do(env, "shell", command="python3 -m pytest -q test_slow.py")
    assert "1 passed in 0.00s" in answer


def test_tests_that_a_limit_stops_say_which(works: None) -> None:
    hoard = "import time\n\n\ndef test_it():\n    held = [b'x' * (8 << 20) for _ in range(60)]\n    time.sleep(60)\n"
    env = CodeSandboxEnv([TASK], seconds=30, memory="200M")
    env.reset(seed=0)
    do(env, "write_file", path="test_hoard.py", content=hoard)
    observation, *_, info = env.step(Action("", (ToolCall("run_tests", {}),)))
    said = observation.messages[0]["content"]
    by = "memory" if "[stopped: it used too much memory]" in said else "crash"  # as the kernel bounds it, or as we do
    assert by == "memory" or "[stopped: it crashed]" in said
    assert info["unrepeatable"] == f"a limit was met: {by}"
    do(env, "write_file", path="work.py", content=hoard.replace("def test_it():", "if True:"))
    *_, info = env.step(Action("", (ToolCall("submit", {}),)))
    assert info["tests_stopped"] in ("memory", "crash")
    assert info["unrepeatable"] == f"a limit was met: {info['tests_stopped']}"
    env.close()
