#!/usr/bin/env bash
# Everything that needs a GPU, in steps of at most nine minutes, so that short allocations add up to one set of results.
#
#     tools/gpu.sh OUT                 does the next steps that OUT does not hold yet, as long as time is left
#     tools/gpu.sh OUT --dry-run       lists the steps, which are done, and their commands; writes nothing
#     tools/gpu.sh OUT --only PATTERN  only steps whose name matches the shell pattern
#     tools/gpu.sh OUT --smoke         each step as small as it can be, on any device: does all of it run?
#
# A finished step leaves one archive, OUT/STEP.tar.gz, of at most 16 MB: put the archives of all calls into one OUT, and
# the next call goes on behind them. A failed step leaves OUT/STEP.failed.log, and is tried again by the next call.
#
# Environment: KITBENCH_GPU_SECONDS  what a call may take (540); no step is begun that may not end within it
#              KITBENCH_GPU_FILES    files a call may leave (8)
#              KITBENCH_GPU_STEPS    training steps of each run (2000); the same for every method and seed
#              KITBENCH_DATA         folder of data sets; without it the photographs that ship with scikit-image
#              PYTHON                the interpreter (python3)
#
# Afterwards: mkdir RUNS && for a in OUT/train-*.tar.gz; do tar xzf "$a" -C RUNS; done && python -m kitbench table RUNS
set -euo pipefail

usage() { sed -n '2,/^set/p' "$0" | grep '^#' | cut -c3-; }

out="" dry="" only="*" smoke=""
while [ $# -gt 0 ]; do
    case "$1" in
    --dry-run) dry=1 ;;
    --smoke) smoke=1 ;;
    --only)
        shift
        only="${1:?--only takes a pattern}"
        ;;
    -h | --help)
        usage
        exit 0
        ;;
    -*)
        echo "gpu.sh: unknown option $1; see tools/gpu.sh --help" >&2
        exit 2
        ;;
    *) out="$1" ;;
    esac
    shift
done
if [ -z "$out" ]; then
    echo "gpu.sh: where to? tools/gpu.sh OUT" >&2
    exit 2
fi
[ "${out#/}" != "$out" ] || out="$PWD/$out"
cd "$(dirname "$0")/.."

export OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1
python="${PYTHON:-python3}"
limit="${KITBENCH_GPU_SECONDS:-540}"
files="${KITBENCH_GPU_FILES:-8}"
began=$SECONDS

if [ -n "$smoke" ]; then
    device=auto steps="${KITBENCH_GPU_STEPS:-4}" preset=smoke
    sizes=64:128 cases=64 rounds=1 loop="--preset smoke --stretches 3 --methods conv"
else
    device=cuda steps="${KITBENCH_GPU_STEPS:-2000}" preset=full
    sizes=64:4096 cases=64,128,256,512,1024 rounds=5 loop="--preset full --stretches 6 --workers 4"
fi
loop_device="$device"
[ "$loop_device" != auto ] || loop_device=cpu

# What is done, in order: name, seconds that it may take, command. A command runs in the checkout, with its results to go
# to the folder $work.
step_names=() step_seconds=() step_commands=()
step() {
    step_names+=("$1") step_seconds+=("$2") step_commands+=("$3")
}
step machine 60 "{ nvidia-smi; $python -m torch.utils.collect_env; git log -1 --format=%H; } > \$work/machine.txt 2>&1 || true"
step tests 500 "$python -m pytest -q -p no:cacheprovider -m gpu --junitxml=\$work/tests.xml || [ \$? = 5 ]"
step attention 540 "$python benchmarks/attention.py --device $loop_device --sizes $cases --rounds $rounds --json \$work/attention.json"
step loop 300 "$python benchmarks/loop.py --device $loop_device $loop --json \$work/loop.json"
step scale 540 "$python -m kitbench scale --device $device --sizes $sizes --out \$work/scale"
for seed in 0 1 2; do
    for method in kit global window local kit-random conv; do
        [ -z "$smoke" ] || [ "$seed" = 0 ] || continue
        step "train-$method-$seed" 540 "$python -m kitbench run --suite denoise --preset $preset --device $device \
--method $method --seeds $seed --set recipe.steps=$steps --set recipe.warmup=$((steps / 20)) --workers 4 --out \$work/runs"
    done
done

# The results of a step as one archive. Weights are left out: no table, plot or report reads them.
pack() {
    local folder="$1/runs"
    [ -d "$folder" ] || folder="$1"
    cp "$1.log" "$folder/$2.log"
    tar czf "$out/.$2.tmp" -C "$folder" --exclude='*.safetensors' --exclude=.lock --exclude=.launch .
    if [ "$(stat -c %s "$out/.$2.tmp")" -gt 16000000 ]; then
        echo "$2: its archive is larger than 16 MB" >>"$1.log"
        rm "$out/.$2.tmp"
        return 1
    fi
    mv "$out/.$2.tmp" "$out/$2.tar.gz"
}

if [ -z "$dry" ] && ! missing=$("$python" -c 'import kitbench.runs.queue, kitbench.baselines' 2>&1); then
    echo "gpu.sh: kitbench is not installed for $python: ${missing##*$'\n'}" >&2
    echo "gpu.sh: pip install -e . there, or from wheels where it has no network: pip install --no-index -f WHEELS -e ." >&2
    exit 2
fi

left=0 done=0 failed=0
[ -n "$dry" ] || mkdir -p "$out"
# Unfinished work stays here, so that on the same machine the next call goes on from its checkpoints.
scratch="${TMPDIR:-/tmp}/kitbench-gpu$(printf %s "$out" | tr / -)"
[ -n "$dry" ] || mkdir -p "$scratch"
for number in "${!step_names[@]}"; do
    name="${step_names[$number]}"
    # shellcheck disable=SC2053 # a pattern is wanted
    [[ $name == $only ]] || continue
    if [ -e "$out/$name.tar.gz" ]; then
        echo "$name: done before"
        continue
    fi
    if [ -n "$dry" ]; then
        echo "$name: at most ${step_seconds[$number]} s: ${step_commands[$number]}"
        continue
    fi
    rest=$((limit - SECONDS + began))
    # The first step of a call has all the time that there is.
    if [ $((done + failed)) -ge "$files" ] || { [ "$rest" -lt "${step_seconds[$number]}" ] && [ $((done + failed)) -gt 0 ]; }; then
        left=$((left + 1))
        continue
    fi
    work="$scratch/$name"
    mkdir -p "$work"
    start=$SECONDS code=0
    [ "$rest" -le "${step_seconds[$number]}" ] || rest="${step_seconds[$number]}"
    work="$work" timeout --signal=TERM --kill-after=15 "$((rest < 30 ? 30 : rest))" bash -c "${step_commands[$number]}" \
        >"$work.log" 2>&1 || code=$?
    if [ "$code" = 0 ] && pack "$work" "$name"; then
        rm -rf "$out/$name.failed.log" "$work" "$work.log"
        done=$((done + 1))
        echo "$name: $((SECONDS - start)) s"
    else
        failed=$((failed + 1))
        tail -n 200 "$work.log" >"$out/$name.failed.log"
        echo "$name: failed with exit code $code after $((SECONDS - start)) s, see $out/$name.failed.log"
    fi
done
[ -n "$dry" ] || echo "$done done, $failed failed, $left left for the next call"
[ "$failed" = 0 ] || exit 3
