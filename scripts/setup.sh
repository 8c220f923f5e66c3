# shellcheck shell=bash
# Find or make a Python that has what the project needs; sourced by run_train.sh and run_tests.sh.
#
#   REPO=<repository root>; source scripts/setup.sh; setup_python [extra ...]     leaves its path in PYTHON
#
# The active Python is used as it is when it has everything; nothing is ever installed into it. Otherwise .venv is made
# in the repository, once. A file in .venv says that this script made it and whether the installation was finished.

setup_say() { echo "setup: $*" >&2; }
setup_fail() { setup_say "$*"; exit 1; }
setup_lacks() { "$1" "$REPO/scripts/check_environment.py" "${@:2}" 2>&1 | tail -n 1; }
setup_has_all() { "$1" "$REPO/scripts/check_environment.py" "${@:2}" >/dev/null 2>&1; }

# The active Python, if it has everything; otherwise .venv's. Sets PYTHON, or fails.
setup_find() {
    local candidate
    for candidate in python python3; do
        candidate=$(command -v "$candidate") && [[ $candidate != "$REPO/.venv/"* ]] || continue
        if setup_has_all "$candidate" "$@"; then
            PYTHON=$candidate
            return 0
        fi
    done
    PYTHON=$REPO/.venv/bin/python
    [[ -x $PYTHON ]] || return 1
    # Made here and interrupted: do not trust it, whatever it seems to have.
    [[ ! -e $REPO/.venv/made_by_setup || $(<"$REPO/.venv/made_by_setup") == complete ]] || return 1
    setup_has_all "$PYTHON" "$@"
}

# A Python that may make .venv, on standard output.
setup_base_python() {
    local name found=""
    for name in python3 python python3.13 python3.12 python3.11 python3.10; do
        command -v "$name" >/dev/null || continue
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$name"
            return
        fi
        found+=" $(command -v "$name") ($("$name" -V 2>&1))"
    done
    setup_fail "Python >= 3.10 is needed to make .venv, and there is none on PATH; found:${found:- no Python at all}"
}

setup_pip() {
    "$REPO/.venv/bin/python" -m pip install -qq --disable-pip-version-check --no-input "$@" \
        || setup_fail "the installation failed (see pip's message above); run the same command again to retry"
}

setup_install() {
    local venv=$REPO/.venv mark=$REPO/.venv/made_by_setup base torch spec began=$SECONDS extras
    if [[ -e $mark && $(<"$mark") != complete ]]; then
        setup_say "removing .venv: its installation was interrupted"
        rm -rf "$venv"
        hash -r
    elif [[ -x $venv/bin/python && ! -e $mark ]]; then
        setup_fail "$venv was not made by this script and lacks: $(setup_lacks "$venv/bin/python" "$@")." \
            "Activate it and install the project into it (pip install -e '.[dev]'), or move it away."
    fi
    if [[ ! -e $mark ]]; then
        base=$(setup_base_python)
        setup_say "[1/3] making .venv with $base, $("$base" -V)"
        mkdir -p "$venv"
        echo installing >"$mark"
        "$base" -m venv "$venv" || setup_fail "$base -m venv failed (on Debian and Ubuntu: apt install python3-venv)"
    else
        setup_say "[1/3] adding to .venv: $(setup_lacks "$venv/bin/python" "$@")"
        echo installing >"$mark"
    fi
    torch="torch>=2.11"
    # Without a GPU: one known version, as other versions may come with gigabytes of CUDA libraries.
    if ! command -v nvidia-smi >/dev/null; then torch="torch==2.13.0"; fi
    setup_say "[2/3] installing $torch (once; minutes, depending on the network)"
    setup_pip "$torch"
    extras=$(IFS=,; echo "$*")
    spec=$REPO${extras:+[$extras]}
    setup_say "[3/3] installing the other dependencies"
    setup_pip -e "$spec"
    setup_has_all "$venv/bin/python" "$@" \
        || setup_fail "something is missing after the installation: $(setup_lacks "$venv/bin/python" "$@")"
    echo complete >"$mark"
    setup_say "done in $((SECONDS - began)) s; from now on .venv is used"
}

# Segments of GPU memory that grow, so that buffers of ever other sizes do not leave holes; unless the user has said
# something about the allocator, under its name since PyTorch 2.9 or under an older one, which still counts.
setup_allocator() {
    if [[ -z ${PYTORCH_ALLOC_CONF:-}${PYTORCH_CUDA_ALLOC_CONF:-}${PYTORCH_HIP_ALLOC_CONF:-} ]]; then
        export PYTORCH_ALLOC_CONF=expandable_segments:True
    fi
}

setup_python() {
    if ! setup_find "$@"; then
        # One installation at a time: run_train.sh and run_tests.sh may be started together on a fresh clone.
        exec 9>"$REPO/.venv.lock"
        if command -v flock >/dev/null && ! flock -n 9; then
            setup_say "waiting for another installation into .venv to end"
            flock 9
        fi
        if ! setup_find "$@"; then setup_install "$@"; fi
        exec 9>&-
    fi
    export PYTHON
    export PYTHONPATH=$REPO${PYTHONPATH:+:$PYTHONPATH}
}
