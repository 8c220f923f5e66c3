#!/usr/bin/env bash
# Submit a recipe to Slurm: one job per stage, from the first stage that has not ended on, each after the previous one.
#
#   multinode/submit.sh [--dry-run] [--evaluate] --job.config_file LAST_STAGE.toml [--x.y z ...] [-- SBATCH OPTIONS]
#   multinode/submit.sh --job.config_file train_configs/prolong_8b/512k.toml -- --nodes=4 --gpus-per-node=8 --time=24:00:00
#
# Overrides hold for every stage; job.dump_folder gets a folder for each. SBATCH OPTIONS hold for every stage too, and
# override those of env.sh and of the stage's TOML file (stage.sbatch). A stage starts when the previous stage has ended
# well (afterok); if that has failed, the later jobs are cancelled (--kill-on-invalid-dep). --dry-run prints the commands,
# and on stderr the RoPE that each stage will have, with what training would refuse about it (the exit code is then 2),
# and where its data go on.
# Paths are relative to the current folder. The jobs' numbers are printed in the order of the stages.
#
# --evaluate adds a job with evaluate.sbatch after each stage, also after a stage that has ended and whose newest
# checkpoint has no evaluation/step-N.json; the next stage does not wait for it. It has the stage's sbatch options and
# those given here, which override them: --evaluate="--nodes=1 --time=1:00:00". Its number is printed after the stage's.
set -euo pipefail
REPO=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
set +u # a site's file may use variables that are not set
source "$REPO/multinode/env.sh"
set -u
source "$REPO/scripts/setup.sh"

dry=false evaluate=false evaluation_options=() arguments=()
usage() { sed -n '2,16s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
if [[ $# -eq 0 ]]; then usage >&2; exit 1; fi
while [[ $# -gt 0 && $1 != -- ]]; do
    case $1 in
        --dry-run) dry=true ;;
        --evaluate) evaluate=true ;;
        --evaluate=*) evaluate=true && read -ra evaluation_options <<<"${1#*=}" ;;
        -h | --help) usage; exit ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
if [[ $# -gt 0 ]]; then shift; fi
user_options=("$@")
if ! $dry && ! command -v sbatch >/dev/null; then
    echo "error: there is no sbatch on this machine's PATH: submit from a login node of a Slurm cluster. --dry-run shows" \
        "what would be submitted, ./run_train.sh trains on this machine, multinode/torchrun.sh on plain hosts." >&2
    exit 1
fi
if [[ -z ${PYTHON:-} ]]; then
    setup_find || { echo "error: no Python here has what is needed: activate one, or see multinode/env.sh" >&2; exit 1; }
fi
asking=("${arguments[@]}")
if $evaluate; then asking=(--evaluate "${arguments[@]}"); fi
stages=$(PYTHONPATH=$REPO "$PYTHON" -m torchtitan.extensions.cluster.slurm stages "${asking[@]}")

export TORCHTITAN_REPO=$REPO
previous="" submitted=()
submit() { # WHAT JOB_NAME DUMP_FOLDER AFTER SCRIPT SBATCH_OPTIONS... -- ARGUMENTS...: its number in `job`
    local what=$1 name=$2 folder=$3 after=$4 script=$5 command
    shift 5
    command=(sbatch --parsable --job-name="$name" --output="${folder//%/%%}/slurm/%j.log" --open-mode=append
        ${SBATCH_OPTIONS[@]+"${SBATCH_OPTIONS[@]}"})
    while [[ $1 != -- ]]; do command+=("$1"); shift; done
    shift
    if [[ -n $after ]]; then command+=(--dependency="afterok:$after" --kill-on-invalid-dep=yes); fi
    command+=("$REPO/multinode/$script" "$@")
    if $dry; then
        printf '%q ' "${command[@]}" && echo
        job="JOB_OF_$name"
        return
    fi
    mkdir -p "$folder/slurm"
    if ! job=$("${command[@]}"); then
        echo "error: $what was not submitted${submitted[*]:+; the jobs before it are cancelled: ${submitted[*]}}" >&2
        if [[ ${#submitted[@]} -gt 0 ]]; then scancel "${submitted[@]}"; fi
        exit 1
    fi
    job=${job%%;*}
    submitted+=("$job")
    echo "$what: job $job, log $folder/slurm/$job.log" >&2
    echo "$job"
}
options() { # SBATCH_OPTIONS... -- ARGUMENTS...: sets `sbatch_options` (the stage's and the user's) and `rest`
    sbatch_options=()
    while [[ $1 != -- ]]; do sbatch_options+=("$1"); shift; done
    sbatch_options+=(${user_options[@]+"${user_options[@]}"})
    rest=("$@")
}
stage() { # NAME DUMP_FOLDER HAS_ENDED SBATCH_OPTIONS... -- ARGUMENTS...
    local sbatch_options rest
    options "${@:4}"
    job=""
    if [[ $3 == yes ]]; then
        echo "stage $1 has ended ($2)" >&2
        return
    fi
    submit "stage $1" "$1" "$2" "$previous" train.sbatch ${sbatch_options[@]+"${sbatch_options[@]}"} "${rest[@]}"
    previous=$job
}
evaluation() { # NAME DUMP_FOLDER IS_EVALUATED SBATCH_OPTIONS... -- ARGUMENTS...: of the stage that was submitted last
    local sbatch_options rest
    options "${@:4}"
    if [[ $3 == yes ]]; then
        echo "stage $1 is evaluated ($2/evaluation)" >&2
        return
    fi
    sbatch_options+=(${evaluation_options[@]+"${evaluation_options[@]}"})
    submit "evaluation of stage $1" "$1-evaluation" "$2" "$job" evaluate.sbatch ${sbatch_options[@]+"${sbatch_options[@]}"} "${rest[@]}"
}
eval "$stages"
if $dry; then PYTHONPATH=$REPO "$PYTHON" -m torchtitan.extensions.cluster.rope_report "${arguments[@]}" >&2; fi
