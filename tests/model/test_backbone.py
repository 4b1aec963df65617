"""The shared backbone: only the attention differs, for every size, with a closed form of its cost."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from kitbench.cost.agreement import reconcile
from kitbench.cost.flops import count_module
from kitbench.errors import InputError
from kitbench.model import contract, methods
from kitbench.model.backbone import UNet, pad
from kitbench.spec import loading

QUICK = loading.load_suite("denoise")
SMALL = loading.load_suite("denoise", overrides=["backbone.width=8", "backbone.head_dim=8"]).backbone
NAMES = list(QUICK.methods)


def build(name: str, seed: int = 0, channels: int = 3) -> UNet:
    method = methods.load_method(name)
    return UNet(channels, SMALL, method, method.resolve(QUICK.methods[name].settings), seed)


@pytest.mark.parametrize("name", NAMES)
def test_all_methods_start_from_the_same_shared_weights(name: str) -> None:
    other = dict(build("conv").named_parameters())
    shared = {key: value for key, value in build(name).named_parameters() if ".attention." not in key}
    assert shared.keys() == {key for key in other if ".attention." not in key}
    assert all(torch.equal(value, other[key]) for key, value in shared.items())
    assert not torch.equal(build(name, seed=1).head.weight, build(name).head.weight)


@pytest.mark.parametrize("name", NAMES)
def test_building_a_network_is_repeatable_and_leaves_the_generator_alone(name: str) -> None:
    before = torch.get_rng_state()
    first, second = build(name).state_dict(), build(name).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (37, 50), (3, 70)])
def test_any_size_gives_its_own_size_and_the_untrained_network_its_input(name: str, height: int, width: int) -> None:
    x = torch.rand(1, 3, height, width)
    with torch.no_grad():
        torch.testing.assert_close(build(name).eval()(x), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_closed_form_of_the_whole_network_is_what_runs(name: str) -> None:
    model = build(name).eval()
    for side in (64, 128):
        counted = count_module(model, (1, 3, side, side))
        closed = model.macs(side, side)
        assert closed is not None
        assert reconcile(closed, counted.macs, counted.uncounted) is None


def test_gray_and_colour_differ_in_the_first_and_last_convolution_only() -> None:
    gray, colour = dict(build("window", channels=1).named_parameters()), dict(build("window").named_parameters())
    assert {key for key in colour if colour[key].shape != gray[key].shape} == {
        "head.weight",
        "tail.weight",
        "tail.bias",
    }


def test_padding_reflects_and_repeats_the_edge_where_there_is_too_little_to_reflect() -> None:
    x = torch.arange(6.0).view(1, 1, 2, 3)
    assert pad(x, 3)[0, 0, 2].tolist() == [0, 1, 2]
    assert pad(x[..., :1, :], 4)[0, 0, :, 0].tolist() == [0, 0, 0, 0]
    assert pad(x, 1) is x


GOOD = """
from torch import nn
class Attention(nn.Module):
    def __init__(self, dim, heads, *, shift=False, scale: float = 1.0):
        super().__init__()
        self.scale, self.mix = scale, nn.Linear(dim, dim)
    def forward(self, x):
        return self.scale * self.mix(x)
"""


def load_text(tmp_path, text: str) -> methods.Loaded:
    path = tmp_path / "mine.py"
    path.write_text(text)
    return methods.load_method(str(path), "mine")


def test_a_file_of_the_users_own_is_a_method_like_any_other(tmp_path) -> None:
    loaded = load_text(tmp_path, GOOD)
    assert loaded.resolve({"scale": 2}) == {"scale": 2.0}
    contract.check_method(loaded, {1: (8, 1, 16)}, {"scale": 2.0})
    model = UNet(3, SMALL, loaded, {"scale": 2.0}, 0)
    assert model.macs(64, 64) is None
    assert model(torch.rand(1, 3, 16, 16)).shape == (1, 3, 16, 16)


def test_a_file_that_is_changed_within_a_second_is_not_taken_from_the_cache(tmp_path, monkeypatch) -> None:
    """Python's cached bytecode is told apart by whole seconds and the size of the file."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    before = load_text(tmp_path, GOOD)
    second = (tmp_path / "mine.py").stat().st_mtime
    (tmp_path / "mine.py").write_text(GOOD.replace("scale: float = 1.0", "scale: float = 2.0"))
    os.utime(tmp_path / "mine.py", (second, second))
    after = methods.load_method(str(tmp_path / "mine.py"))
    assert (before.resolve({}), after.resolve({})) == ({"scale": 1.0}, {"scale": 2.0})
    assert before.source_sha256 != after.source_sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.py"]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("from torch", "from torhc", "cannot be imported: ModuleNotFoundError"),
        ("class Attention(", "class Attention[", "cannot be imported: SyntaxError"),
        ("class Attention", "class Attn", "defines no method; define one of `class Attention`"),
        ("*, shift=False", "*, shft=False", "must take \\(dim, heads, \\*, shift=False"),
        ("return self.scale * self.mix(x)", "return x.mean(-1)", "returned \\(2, 16, 17\\)"),
        ("return self.scale * self.mix(x)", "return x.double()", "torch.float64"),
        ("return self.scale * self.mix(x)", "return x / 0", "not finite"),
        ("return self.scale * self.mix(x)", "return x @ x", "failed: RuntimeError"),
        ("return self.scale * self.mix(x)", "raise SystemExit(0)", "failed: SystemExit"),
        (
            "return self.scale * self.mix(x)",
            "return self.mix(x) * self.scale * x.clone().uniform_()",
            "no score could be",
        ),
        (
            "self.mix = scale,",
            "self.idle, self.mix = scale, nn.Linear(2, 2),",
            "reaches idle.weight, idle.bias; remove",
        ),
        ("super().__init__()", "super().__init__(); raise ValueError('scale must be even')", "scale must be even"),
    ],
)
def test_a_faulty_method_file_is_refused_before_training(tmp_path, old: str, new: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        contract.check_method(load_text(tmp_path, GOOD.replace(old, new)), {1: (8, 1, 16)}, {})


BUFFER = "self.register_buffer('seen', torch.zeros(dim), persistent={})"
TRAINED_MEAN = "if self.training: self.seen += y.detach().mean((0, 1, 2))"


@pytest.mark.parametrize(
    ("built", "forward", "fault"),
    [
        (BUFFER.format(True), f"{TRAINED_MEAN}\n        return y - self.seen", None),
        (BUFFER.format(False), f"{TRAINED_MEAN}\n        return y - self.seen", "it returns other values"),
        ("self.seen = 0.0", f"{TRAINED_MEAN}\n        return y - self.seen", "it returns other values"),
        ("self.random = np.random.random()", "return y * self.random", "it returns other values"),
        (
            "self.register_buffer('random', torch.randn(dim), persistent=False)",  # seeded with the network
            "return y * self.random",
            None,
        ),
        (
            "self.seen = {}",
            "return y * self.seen.setdefault(y.shape[1:], 1 + x[0, 0, 0, 0].item())",
            "of earlier calls",
        ),
        (
            "self.register_buffer('seen', torch.tensor(9.0))",
            "self.seen = self.seen.minimum(y.abs().amax().detach())\n        return y * self.seen",
            "of its batch",
        ),
        ("self.seen = 0.0", "self.seen = self.seen + y.detach().mean()\n        return y + self.seen", "two calls"),
        ("pass", "x.data.mul_(0.5)\n        return y + x", "do not write into the input"),
        ("pass", "return y - y.mean(0, keepdim=True)", "depends on the others of its batch"),
        ("self.seen = torch.zeros(dim)", "return y + self.seen", "seen is a plain tensor, which stays behind when"),
        ("self.norm = nn.BatchNorm2d(dim)", "return y + self.norm(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)", None),
    ],
)
def test_what_evaluation_depends_on_besides_input_and_stored_weights_is_refused(
    tmp_path, built: str, forward: str, fault: str | None
) -> None:
    text = GOOD.replace("from torch import nn", "import numpy as np\nimport torch\nfrom torch import nn")
    text = text.replace("super().__init__()\n", f"super().__init__()\n        {built}\n")
    text = text.replace("return self.scale * self.mix(x)", f"y = self.scale * self.mix(x)\n        {forward}")
    loaded = load_text(tmp_path, text)
    with pytest.raises(InputError, match=fault) if fault else nullcontext():
        contract.check_method(loaded, {1: (8, 1, 16)}, {})


@pytest.mark.parametrize("name", [name for name, (kind, _) in methods.method_cards().items() if kind == "trained"])
def test_every_shipped_attention_keeps_the_contract(name: str) -> None:
    loaded = replace(methods.load_method(name), source_sha256="as if it were a file")
    contract.check_method(loaded, {1: (16, 2, 24)}, loaded.resolve({}))


def test_a_training_free_method_that_draws_anew_is_refused(tmp_path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("import numpy as np\ndef restore(image, sigma):\n    return image + np.random.rand(*image.shape)\n")
    with pytest.raises(InputError, match="different values for one image in two calls"):
        contract.check_restore(methods.load_method(str(path), "mine"), 1, 25.0)


def test_an_unknown_or_wrong_setting_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="did you mean 'retrieval'"):
        methods.load_method("kit").resolve({"retreival": "exact"})
    with pytest.raises(InputError, match="k is 'four'"):
        methods.load_method("kit").resolve({"k": "four"})
    with pytest.raises(InputError, match="k is True"):
        methods.load_method("kit").resolve({"k": True})
    with pytest.raises(InputError, match="did you mean 'window'"):
        methods.load_method("windw")
    with pytest.raises(InputError, match="does not exist"):
        methods.load_method(str(tmp_path / "none.py"))


@pytest.mark.parametrize("name", QUICK.references)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sigma", [25.0, None])
def test_training_free_methods_keep_the_shape_of_gray_and_of_colour(
    name: str, channels: int, sigma: float | None
) -> None:
    contract.check_restore(methods.load_method(name), channels, sigma)


def test_a_training_free_method_that_changes_the_shape_is_refused(tmp_path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def restore(image, sigma):\n    return image[..., 0]\n")
    with pytest.raises(InputError, match=r"returned \(32, 33\), expected"):
        contract.check_restore(methods.load_method(str(path), "mine"), 1, 25.0)


def test_every_shipped_method_opens_with_a_card() -> None:
    for name, (_, text) in methods.method_cards().items():
        assert "Operator:" in text, name
        assert "Cost:" in text, name
        assert "Departures:" in text, name
