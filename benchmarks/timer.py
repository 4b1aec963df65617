"""The suite's own timer, set against itself: the same function twice must give the ratio 1.

    python benchmarks/timer.py

Prints the error of the ratio for interleaved rounds (how the suite times) and for one after the other.
"""

from __future__ import annotations

import torch

from kitbench.cost.timing import compare_times, ratio, sampler

REPETITIONS, ROUNDS = 12, 15


def main() -> None:
    cpu = torch.device("cpu")
    x = torch.randn(256, 256)
    conv = torch.nn.Conv2d(16, 16, 3, padding=1)
    image = torch.randn(1, 16, 128, 128)

    def multiply() -> object:
        return x @ x

    def convolve() -> object:
        with torch.no_grad():
            return conv(image)

    print(f"{torch.get_num_threads()} threads, {ROUNDS} rounds, {REPETITIONS} repetitions; error of A/A in per cent")
    for name, fn in (("matrix product", multiply), ("convolution", convolve)):
        errors: dict[str, list[float]] = {"interleaved": [], "one after the other": []}
        dropped = 0
        for seed in range(REPETITIONS):
            first, second = sampler(fn, cpu), sampler(fn, cpu)
            both = compare_times({"a": first, "b": second}, ROUNDS, seed=seed)
            dropped += both["a"].dropped
            errors["interleaved"].append(abs(ratio(both["a"], both["b"]) - 1))
            alone = [compare_times({"a": take}, ROUNDS)["a"].median for take in (first, second)]
            errors["one after the other"].append(abs(alone[0] / alone[1] - 1))
        for how, found in errors.items():
            middle = sorted(found)[len(found) // 2]
            print(f"{name:>15}, {how:<19}: median {100 * middle:5.2f}, worst {100 * max(found):5.2f}")
        print(f"{name:>15}: {dropped} of {REPETITIONS * ROUNDS + dropped} interleaved rounds dropped")


if __name__ == "__main__":
    main()
