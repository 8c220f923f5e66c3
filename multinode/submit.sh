#!/usr/bin/env bash
# Submit a recipe to Slurm: a job for each stage that has not ended, each after the one before.
#
#   multinode/submit.sh [--dry-run] --job.config_file LAST_STAGE.toml [--x.y z ...] [-- SBATCH OPTIONS]
#   multinode/submit.sh --job.config_file train_configs/prolong_8b/512k.toml -- --nodes=4 --gpus-per-node=8 --time=24:00:00
#
# Overrides hold for every stage; job.dump_folder gets a folder for each. SBATCH OPTIONS hold for every stage too, and win
# over those of env.sh and of the stage's TOML (stage.sbatch). A stage starts when the one before has ended well (afterok);
# when that has failed, the jobs after it are cancelled (--kill-on-invalid-dep). --dry-run prints the commands. Paths are
# relative to where you stand. The jobs' numbers are printed, the first stage's first.
set -euo pipefail
REPO=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
set +u # a site's file may use what is not set
source "$REPO/multinode/env.sh"
set -u
source "$REPO/scripts/setup.sh"

dry=false arguments=()
usage() { sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
if [[ $# -eq 0 ]]; then usage >&2; exit 1; fi
while [[ $# -gt 0 && $1 != -- ]]; do
    case $1 in
        --dry-run) dry=true ;;
        -h | --help) usage; exit ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
if [[ $# -gt 0 ]]; then shift; fi
said=("$@")
if ! $dry && ! command -v sbatch >/dev/null; then
    echo "error: there is no sbatch on this machine's PATH: submit from a login node of a Slurm cluster. --dry-run shows" \
        "what would be submitted, ./run_train.sh trains on this machine, multinode/torchrun.sh on plain hosts." >&2
    exit 1
fi
if [[ -z ${PYTHON:-} ]]; then
    setup_find || { echo "error: no Python here has what is needed: activate one, or see multinode/env.sh" >&2; exit 1; }
fi
stages=$(PYTHONPATH=$REPO "$PYTHON" -m torchtitan.multinode stages "${arguments[@]}")

export TORCHTITAN_REPO=$REPO
previous="" submitted=()
stage() { # NAME DUMP_FOLDER HAS_ENDED SBATCH_OPTIONS... -- ARGUMENTS...
    local name=$1 folder=$2 ended=$3 command
    local options=(${SBATCH_OPTIONS[@]+"${SBATCH_OPTIONS[@]}"})
    shift 3
    while [[ $1 != -- ]]; do options+=("$1"); shift; done
    shift
    options+=(${said[@]+"${said[@]}"})
    if [[ $ended == yes ]]; then
        echo "stage $name has ended ($folder)" >&2
        return
    fi
    command=(sbatch --parsable --job-name="$name" --output="${folder//%/%%}/slurm/%j.log" --open-mode=append
        ${options[@]+"${options[@]}"})
    if [[ -n $previous ]]; then command+=(--dependency="afterok:$previous" --kill-on-invalid-dep=yes); fi
    command+=("$REPO/multinode/train.sbatch" "$@")
    if $dry; then
        printf '%q ' "${command[@]}" && echo
        previous="JOB_OF_$name"
        return
    fi
    mkdir -p "$folder/slurm"
    if ! previous=$("${command[@]}"); then
        echo "error: stage $name was not submitted${submitted[*]:+; those before it are cancelled: ${submitted[*]}}" >&2
        if [[ ${#submitted[@]} -gt 0 ]]; then scancel "${submitted[@]}"; fi
        exit 1
    fi
    previous=${previous%%;*}
    submitted+=("$previous")
    echo "stage $name: job $previous, log $folder/slurm/$previous.log" >&2
    echo "$previous"
}
eval "$stages"
