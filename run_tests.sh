#!/usr/bin/env bash
# Lint, types and tests, in an environment that is made if need be (docs/contributing.md).
#   ./run_tests.sh                    everything
#   ./run_tests.sh --quick            the test files of tests/quick.txt: under 3 minutes on 2 cores
#   ./run_tests.sh tests/unit -x      other arguments go to pytest
# Two test files run at a time (TEST_PROCESSES=1: one).
set -euo pipefail
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$REPO/scripts/setup.sh"
setup_python dev
cd "$REPO"
arguments=()
for argument; do
    if [[ $argument == --quick ]]; then
        mapfile -t -O "${#arguments[@]}" arguments < <(sed 's/ *#.*//; /^$/d' tests/quick.txt)
    else
        arguments+=("$argument")
    fi
done
echo "== ruff check"
"$PYTHON" -m ruff check .
echo "== ruff format"
"$PYTHON" -m ruff format --check .
echo "== mypy"
"$PYTHON" -m mypy
echo "== pytest"
"$PYTHON" -m pytest -n "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder --durations 25 \
    ${arguments[@]+"${arguments[@]}"}
