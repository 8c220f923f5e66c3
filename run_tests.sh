#!/usr/bin/env bash
# Lint, types and tests, in an environment that is made if need be. Arguments go to pytest: ./run_tests.sh tests/unit -x
# Two test files at a time (TEST_PROCESSES=1: one).
set -euo pipefail
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$REPO/scripts/setup.sh"
setup_python dev
cd "$REPO"
echo "== ruff check"
"$PYTHON" -m ruff check .
echo "== ruff format"
"$PYTHON" -m ruff format --check .
echo "== mypy"
"$PYTHON" -m mypy
echo "== pytest"
"$PYTHON" -m pytest -n "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder --durations 25 "$@"
