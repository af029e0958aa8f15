"""A reward given as a Python function: `--reward module:function`.

The function takes `prompts` (each a list of {"role", "content"}) and `completions` (texts), and gives a number each.
"""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from qinglan.core.errors import InputError
from qinglan.core.records import Completion, Prompt, Scorer


def load_reward_function(name: str) -> Scorer:
    """Return the scorer that "module:function" names; the current folder is searched too.

    Raises `InputError` where there is no such module or function, or the module itself raises. What the function
    returns is checked where it is called (`learn/scoring.py`).
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise InputError(f"--reward {name}: expected module:function, such as my_rewards:brevity")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's own code: whatever it raises is for the user to read
        if isinstance(error, ModuleNotFoundError) and error.name == module_name:
            advice = f"run the command where {module_name}.py lies, or install it"
            raise InputError(f"--reward {name}: {error}; {advice}") from error
        raise InputError(
            f"--reward {name}: importing {module_name} raised {type(error).__name__}: {error}; correct the module"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"--reward {name}: {module_name} has no function {function_name}")

    def score(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        messages = [[turn.model_dump() for turn in prompt.messages] for prompt in prompts]
        return list(function(messages, [completion.text for completion in completions]))

    return score
