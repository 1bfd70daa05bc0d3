"""Run the fast tests on the Pythons and at the versions that setup.cfg promises.

    python scripts/try_versions.py [some|all] [PYTEST ARGUMENTS]

Its classifiers name the Pythons; those found on PATH or in pyenv's folder are tried. Its
requirements name the lowest versions of the dependencies. ``some``: the newest and the lowest
versions on the oldest Python, the newest ones on the others, but not on the one that runs this,
which `make check` uses; ``all``: both everywhere. Environments and logs are kept in
build/versions. Exit code 1 if a test fails or an environment cannot be made.
"""

from __future__ import annotations

import argparse
import configparser
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETUP = ROOT / "setup.cfg"
FOLDER = ROOT / "build" / "versions"
LINES_SHOWN = 60


def promised() -> tuple[list[str], list[str]]:
    """The Pythons and the requirements of the package."""
    config = configparser.ConfigParser()
    config.read(SETUP, encoding="utf-8")
    pythons = re.findall(r"Python :: (3\.\d+)$", config["metadata"]["classifiers"], re.M)
    return pythons, config["options"]["install_requires"].split("\n")[1:]


def lowest(requirements: list[str]) -> str:
    """Constraints that allow only the lowest version of each."""
    return "\n".join(line.replace(">=", "==", 1) for line in requirements)


def candidates(python: str) -> Iterator[Path]:
    """Where an interpreter of this version may be."""
    for folder in os.get_exec_path():
        yield Path(folder) / f"python{python}"
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from sorted(pyenv.glob(f"versions/{python}.*/bin/python{python}"))


def interpreter(python: str) -> Path | None:
    """An interpreter of this version that works (pyenv's shims may not) and makes environments."""
    for path in candidates(python):
        if path.exists():
            code = "import ensurepip, venv"
            if subprocess.run([path, "-c", code], capture_output=True, cwd=ROOT).returncode == 0:
                return path
    return None


def environment(name: str, python: Path, constraints: str) -> Path:
    """The interpreter of an environment, set up once, and again when setup.cfg changes."""
    folder, stamp = FOLDER / name, FOLDER / name / "made"
    inner = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if stamp.exists() and stamp.stat().st_mtime > SETUP.stat().st_mtime:
        return inner
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([python, "-m", "venv", folder], check=True)
    limits = folder / "constraints.txt"
    limits.write_text(constraints, encoding="utf-8")
    install: list[str] = [
        str(inner),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--constraint",
        str(limits),
    ]
    subprocess.run([*install, "--editable", ".[fast]"], check=True, cwd=ROOT)
    stamp.touch()
    return inner


def describe(python: Path, requirements: list[str]) -> str:
    """The versions that an environment has of the requirements."""
    names = sorted({re.split(r"[^\w-]", line)[0] for line in requirements})
    code = "import sys, importlib.metadata as m; print(*(n + ' ' + m.version(n) for n in sys.argv"
    done = subprocess.run(
        [python, "-c", f"{code}[1:]), sep=', ')", *names],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def attempt(
    python: str, path: Path, which: str, requirements: list[str], arguments: list[str]
) -> bool:
    """Run the tests on a Python at the ``newest`` or ``lowest`` versions; print a line."""
    name = f"{python}-{which}"
    log = FOLDER / f"{name}.log"
    start = time.monotonic()
    try:
        inner = environment(name, path, lowest(requirements) if which == "lowest" else "")
        versions = describe(inner, requirements)
    except subprocess.CalledProcessError:
        print(f"{name}: the environment cannot be set up", flush=True)
        return False
    cache = ["-o", f"cache_dir={FOLDER / name / 'cache'}"]
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run(
            [inner, "-m", "pytest", *cache, *arguments],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if done.returncode:
        print(*lines[-LINES_SHOWN:], f"(all of it is in {log})", sep="\n")
    result = re.sub(r" in .*|=", "", lines[-1]).strip() if lines else "nothing was run"
    print(f"{name} ({versions}): {result}, {time.monotonic() - start:.0f} s", flush=True)
    return done.returncode == 0


def main() -> int:
    """Try the combinations and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("which", nargs="?", default="some", choices=["some", "all"])
    options, arguments = parser.parse_known_args()
    pythons, requirements = promised()
    found = {python: path for python in pythons if (path := interpreter(python))}
    if not found:
        print(f"none of the Pythons {', '.join(pythons)} is installed")
        return 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    own = ".".join(map(str, sys.version_info[:2]))
    oldest = next(iter(found))
    passed = True
    for python, path in found.items():
        for which in ("lowest", "newest"):
            wanted = python == oldest if which == "lowest" else python != own
            if options.which == "all" or wanted:
                passed &= attempt(python, path, which, requirements, arguments)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
