"""Print the constraints of the Python that runs this: Megatron-Core 0.16.1 on 3.11, 0.19.2 on 3.12 and later.

For `make setup`, before anything is installed: the standard library alone is imported.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST_PYTHON = (3, 11)
# Since which version Megatron-Core needs Python 3.12.
NEEDS_PYTHON_312 = (0, 17)


def constraints_file(python: tuple[int, int]) -> Path:
    """Return the constraints of a Python version.

    Raises:
        SystemExit: it is too old.
    """
    if python < OLDEST_PYTHON:
        raise SystemExit(
            f"error: Python {python[0]}.{python[1]} is too old, 3.11 is the oldest; give PYTHON=python3.12"
        )
    return ROOT / ("constraints.txt" if python < (3, 12) else "constraints-3.12.txt")


def constraints(python: tuple[int, int], megatron_core: str | None) -> str:
    """Return the constraints of a Python version, with another Megatron-Core if one is asked for.

    Raises:
        SystemExit: the version asked for is no version, or needs a newer Python.
    """
    text = constraints_file(python).read_text(encoding="utf-8")
    if not megatron_core:
        return text
    numbers = re.match(r"(\d+)\.(\d+)(\.|$)", megatron_core)
    if numbers is None:
        raise SystemExit(f"error: MEGATRON_CORE is {megatron_core!r}; give a version, such as 0.19.2")
    if (int(numbers[1]), int(numbers[2])) >= NEEDS_PYTHON_312 and python < (3, 12):
        raise SystemExit(
            f"error: megatron-core {megatron_core} needs Python 3.12 or newer, and this is Python"
            f" {python[0]}.{python[1]}; give PYTHON=python3.12"
        )
    exact = megatron_core if megatron_core.count(".") >= 2 else f"{megatron_core}.*"
    return re.sub(r"(?m)^megatron-core==.*$", f"megatron-core=={exact}", text)


def differs(python: tuple[int, int], environment: Path) -> bool:
    """Whether a virtual environment is there and has another Python version."""
    config = environment / "pyvenv.cfg"
    if not config.is_file():
        return False
    found = re.search(r"(?m)^version(?:_info)?\s*=\s*(\d+)\.(\d+)", config.read_text(encoding="utf-8"))
    return found is None or (int(found[1]), int(found[2])) != python


def main(python: tuple[int, int]) -> None:
    """Print what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megatron-core", metavar="VERSION", help="put this version in the place of the file's")
    parser.add_argument("--differs-from", type=Path, metavar="FOLDER", help="only say whether this environment differs")
    options = parser.parse_args()
    if options.differs_from is not None:
        print("yes" if differs(python, options.differs_from) else "")
    else:
        print(constraints(python, options.megatron_core), end="")


if __name__ == "__main__":
    main(sys.version_info[:2])
