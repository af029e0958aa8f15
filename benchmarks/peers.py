"""The peers' environments.

TRL 1.16 runs beside the pinned transformers, by the extra `bench`. TRL 0.24 is the last line with a usable PPO and
wants transformers 4.57, so it gets a virtual environment of its own under the user's cache, made on first use.
"""

import os
import subprocess
import sys
from pathlib import Path

OLD_TRL = ("torch==2.13.0", "trl==0.24.0", "transformers==4.57.6", "accelerate==1.15.0", "datasets==5.0.1", "rich")


def python_of_this_environment() -> str:
    """Return this interpreter, after checking that the extra `bench` is installed in it."""
    try:
        import trl
    except ImportError as error:
        raise SystemExit("benchmarks: TRL is missing; install the peers with: pip install -e '.[bench]'") from error
    if not trl.__version__.startswith("1."):
        raise SystemExit(f"benchmarks: found TRL {trl.__version__}, expected 1.16; pip install -e '.[bench]'")
    return sys.executable


def python_with_old_trl() -> str:
    """Return the interpreter of the environment with TRL 0.24, made first where there is none.

    QINGLAN_OLD_TRL names the interpreter of an environment that holds these versions already.
    """
    given = os.environ.get("QINGLAN_OLD_TRL")
    if given:
        return given
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "qinglan" / "trl-0.24"
    python = folder / "bin" / "python"
    if not (folder / "ready").is_file():
        print(f"benchmarks: making an environment with {', '.join(OLD_TRL)} in {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        for packages in (OLD_TRL[:1], OLD_TRL):  # torch first and by itself, so that no other build is chosen
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
        (folder / "ready").touch()
    return str(python)
