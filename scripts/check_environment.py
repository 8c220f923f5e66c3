"""Print which dependencies of pyproject.toml this Python lacks; exit code 0 if it lacks none.

    python scripts/check_environment.py [extra ...]

It looks at the metadata of installed packages and imports nothing heavy, so that every start of run_train.sh can afford
it.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path


def missing(extras: list[str]) -> list[str]:
    """Requirements of the project and of its `extras` that are missing or have another version, as text."""
    from packaging.requirements import Requirement

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    file = Path(__file__).resolve().parents[1] / "pyproject.toml"
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    result = []
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            result.append(requirement.name)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            result.append(f"{requirement.name}{requirement.specifier} (has {version})")
    return result


def main() -> int:
    if sys.version_info < (3, 10):  # noqa: UP036 (any Python on PATH may be asked)
        print(f"Python >= 3.10 (it is {sys.version.split()[0]})")
        return 1
    try:
        lacking = missing(sys.argv[1:])
    except ImportError as error:  # packaging or tomli, dependencies themselves
        print(error.name)
        return 1
    print(", ".join(lacking))
    return 1 if lacking else 0


if __name__ == "__main__":
    sys.exit(main())
