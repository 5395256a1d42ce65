"""An environment that breaks in every way, in a module that another process can import: `faulty:Faulty-v0`."""

import ctypes
import os
import signal
import subprocess
import sys
import time

import gymnasium
from espalier.envs.core import AgentEnv, EnvFailure, Observation
from espalier.envs.tools import tool


@tool(effect="reads", context=False)
def look() -> str:
    """Look around."""
    return "nothing"


class Faulty(AgentEnv):
    """`step` does what the action's text says; `reset` what the task's instruction says."""

    def __init__(self, greeting="hello"):
        self.greeting = greeting
        self.steps = 0

    @property
    def tools(self):
        return (look,)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        task = options["task"]
        self.steps = 0
        self._do(task.instruction)
        messages = ({"role": "user", "content": f"{self.greeting} {task.id} {int(self.np_random.integers(1000))}"},)
        return Observation(messages), {"task": task, "pid": os.getpid()}

    def step(self, action):
        self.steps += 1
        said = self._do(action.text)
        info = {"tool_errors": 0, "pid": os.getpid(), "said": said, "odd": object(), "pair": (1, 2)}
        if action.text == "ungraded":
            info["ungraded"] = {"not": object()}
        messages = ({"role": "tool", "content": f"{self.steps} {said}", "tool_call_id": "1", "name": "look"},)
        return Observation(messages), float(self.steps), action.text == "end", False, info

    def _do(self, what):
        match what.split():
            case ["die"]:
                print("my last words", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            case ["leave"]:
                os._exit(7)
            case ["hang", seconds]:  # PyDLL keeps the interpreter lock while it waits
                ctypes.PyDLL(None).usleep(int(float(seconds) * 1e6))
            case ["sleep", seconds]:
                time.sleep(float(seconds))
            case ["fail"]:
                raise EnvFailure("engine_crashed", "the engine is gone")
            case ["bug"]:
                raise ZeroDivisionError("a bug of the environment's")
            case ["modules"]:
                return " ".join(name for name in ("torch", "transformers", "trl", "datasets") if name in sys.modules)
            case ["import", name]:
                __import__(name)
            case ["child"]:
                return str(subprocess.Popen(["sleep", "600"]).pid)
        return what


gymnasium.register("Faulty-v0", entry_point=Faulty, order_enforce=False, disable_env_checker=True)
