"""A reward given as "module:function": what is wrong with the name or the module is said in one line."""

import pytest

from qinglan.core.errors import InputError
from qinglan.learn.reward_function import load_reward_function


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("rewards_a", None, "No module named 'rewards_a'; run the command where rewards_a.py lies"),
        ("rewards_b", "import absent_library\n", "importing rewards_b raised ModuleNotFoundError: No module named"),
        ("rewards_c", "def f(:\n", "importing rewards_c raised SyntaxError"),
        ("rewards_d", "raise RuntimeError('no key')\n", "importing rewards_d raised RuntimeError: no key"),
        ("rewards_e", "f = 3\n", "rewards_e has no function f"),
    ],
)
def test_modules_that_cannot_be_used(tmp_path, monkeypatch, name, source, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    if source is not None:
        (tmp_path / f"{name}.py").write_text(source)
    with pytest.raises(InputError, match=message):
        load_reward_function(f"{name}:f")


@pytest.mark.parametrize("name", ["rewards", "rewards:", ":f"])
def test_names_without_module_or_function(name):
    with pytest.raises(InputError, match="expected module:function"):
        load_reward_function(name)
