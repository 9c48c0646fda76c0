"""For Colab, where nothing is installed: what the first cell of every notebook runs after cloning.

The standard library alone. The kernel there lives in the environment that it installs into, so its
own torch and Jupyter stay as they are (another torch would not fit its torchvision), and only what
is missing or too old is installed; `doctor` says what differs from the lock.
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAY = {"ipykernel", "ipywidgets", "jupyterlab", "nbval", "torch"}  # no notebook needs nbval there


def wanted(root: Path = ROOT) -> list[str]:
    """The dependencies of pyproject.toml, without those that stay as they are."""
    table = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [line for line in table["dependencies"] if re.split(r"[^\w.-]", line)[0] not in STAY]


def main() -> None:
    """Install, then make this checkout the working folder and importable; a failing pip stops."""
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *wanted()], check=True)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))


if __name__ == "__main__":
    main()
