#!/usr/bin/env bash
# Train a stage on this machine.
#
#   ./run_train.sh                                        the demo: builds its corpus, trains both stages
#   ./run_train.sh --training.steps 50                    the demo with an override
#   ./run_train.sh --job.config_file my.toml [--x.y z]    another stage; paths are relative to where you stand
#   ./run_train.sh --job.config_file 512k.toml --stage.run_chain   the previous stages that have not ended, then this one
#   ./run_train.sh --help                                 every option; --job.print_config: what would be run
#
# NGPU=4 sets the number of processes (default: one for each GPU, 2 without). CONFIG_FILE=my.toml does as the flag.
set -euo pipefail
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$REPO/scripts/setup.sh"

gpus=0
if command -v nvidia-smi >/dev/null; then gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true); fi
if [[ $gpus -gt 0 && -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    gpus=$(awk -F, '{print NF}' <<<"$CUDA_VISIBLE_DEVICES")
fi
if [[ -z ${NGPU+set} ]]; then NGPU=$((gpus > 0 ? gpus : 2)) default_ngpu=true; else default_ngpu=false; fi
if ! [[ $NGPU =~ ^[1-9][0-9]*$ ]]; then
    echo "NGPU=$NGPU is not a number of processes: it must be 1 or more" >&2
    exit 1
fi
setup_python

has_file=false plain=false help=false chain=false
for arg in "$@"; do
    case $arg in
        --job.config_file | --job.config-file | --job.config_file=* | --job.config-file=*) has_file=true ;;
        -h | --help) plain=true help=true ;;
        --stage.run_chain | --stage.run-chain) chain=true ;;
        --job.print_config | --job.print-config) plain=true ;;
    esac
done
if ! $has_file && [[ -n ${CONFIG_FILE:-} ]]; then
    set -- --job.config_file "$CONFIG_FILE" "$@"
    has_file=true
fi
if ! $has_file && ! $help; then
    cd "$REPO"
    if $default_ngpu && [[ $NGPU -gt 2 ]]; then NGPU=2; fi # a step of the demo has rows for two
    demo=(--job.config_file train_configs/demo/4k.toml --stage.run_chain)
    if [[ $NGPU -eq 1 ]]; then demo+=(--parallelism.context_parallel_degree 1); fi # no two to share a row
    set -- "${demo[@]}" "$@"
    chain=true
fi
if $plain; then exec "$PYTHON" -m torchtitan.train "$@"; fi

"$PYTHON" -m torchtitan.extensions.cluster.check_config "$NGPU" "$@"
$has_file || "$PYTHON" scripts/build_demo_corpus.py
if [[ $gpus -gt 0 ]]; then setup_allocator; fi
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=$((cores > NGPU ? cores / NGPU : 1))
fi
if $chain; then exec "$PYTHON" -m torchtitan.extensions.cluster.chain "$NGPU" "$@"; fi
exec "$PYTHON" -m torchtitan.extensions.cluster.launch --nproc "$NGPU" -- "$@"
