"""Run many random programs in a process of its own (perhaps as another user): many.py COUNT FOLDER [PYTHON]."""

import importlib.util
import sys
import types
from pathlib import Path

here = Path(__file__).parent
package = types.ModuleType("model_tests")
package.__path__ = [str(here)]
sys.modules["model_tests"] = package
spec = importlib.util.find_spec("model_tests.test_model")
module = importlib.util.module_from_spec(spec)
sys.modules["model_tests.test_model"] = module
spec.loader.exec_module(module)

total, seed = int(sys.argv[1]), 0
done = 0
while done < total:
    folder = Path(sys.argv[2]) / f"run{seed}"
    folder.mkdir(parents=True)
    done += module.run(seed, 200, folder, *sys.argv[3:])
    seed += 1
print(f"{done} operations, 0 differences")
