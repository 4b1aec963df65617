"""Multiply-adds: the counters against closed forms, and against what they are known to miss."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from kitbench.attention.selection import nth_largest
from kitbench.cost.agreement import reconcile
from kitbench.cost.flops import Count, count, count_module
from kitbench.cost.second_counter import count_fvcore
from kitbench.model import methods
from kitbench.model.backbone import UNet
from kitbench.spec.suite import Backbone

METHODS = [
    ("kit", {}),
    ("kit", {"retrieval": "exact"}),
    ("kit", {"support": "aligned"}),
    ("global", {"form": "sdpa"}),
    ("global", {"form": "materialised"}),
    ("window", {}),
    ("local", {}),
    ("kit-random", {}),
    ("conv", {}),
]


def attention(name, dim=32, heads=2, **settings):
    torch.manual_seed(0)
    return methods.load_method(name).build(dim, heads, False, **settings).eval()


@pytest.mark.parametrize(("name", "settings"), METHODS)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 40), (35, 50)])
def test_both_counters_agree_with_the_closed_form(name, settings, height, width):
    module = attention(name, **settings)
    closed = module.macs(height, width)
    found = count_module(module, (1, height, width, 32))
    assert reconcile(closed, found.macs, found.uncounted) is None
    by_fvcore, unsupported = count_fvcore(module, torch.zeros(1, height, width, 32))
    assert reconcile(closed, by_fvcore, dict.fromkeys(unsupported, 0)) is None
    assert not unsupported


class ByPosition(nn.Module):
    """Attention in which each position multiplies with the keys of its own footprint and with nothing else."""

    def __init__(self, dim, size):
        super().__init__()
        self.qkv, self.proj, self.size = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), size

    def forward(self, x):
        q, k, v = (t.flatten(1, 2).flatten(0, 1) for t in self.qkv(x).chunk(3, -1))  # [HW, C]
        chosen = torch.zeros(len(q), self.size**2, dtype=torch.long, device=x.device)
        weights = torch.bmm(k[chosen], q[:, :, None]).softmax(1)  # [HW, s^2, 1]
        return self.proj(torch.bmm(weights.mT, v[chosen])).view(x.shape)


@pytest.mark.parametrize(
    ("name", "settings", "keys"),
    [("local", {}, 49), ("local", {"size": 3}, 9), ("neighbourhood", {"size": 5}, 25),
     ("kit", {"support": "aligned", "retrieval": "random"}, 4 * 9)],
)  # fmt: skip
def test_what_a_definition_needs_is_what_an_attention_position_by_position_executes(name, settings, keys):
    module, size = attention(name, **settings), round(keys**0.5)
    needed = module.needed_macs(32, 40)
    assert needed == count_module(ByPosition(32, size), (1, 32, 40, 32)).macs
    assert needed < module.macs(32, 40)


def test_local_attention_needs_less_than_its_tiles_execute_in_the_network_of_quick():
    method = methods.load_method("local")
    config = Backbone(width=16, head_dim=16, blocks=(1, 1, 1), attention_levels=(2, 3), ffn_ratio=2)
    model = UNet(3, config, method, method.resolve({}), seed=0).eval()
    assert count_module(model, (1, 3, 256, 256)).macs == model.macs(256, 256)
    assert f"{model.macs(256, 256) / 1e9:.2f} {model.needed_macs(256, 256) / 1e9:.2f}" == "1.57 1.19"
    assert model.needed_macs(253, 255) == model.needed_macs(256, 256)  # padded to the stride
    for name in ("window", "kit"):  # the methods that execute what they need
        method = methods.load_method(name)
        assert UNet(3, config, method, method.resolve({}), seed=0).needed_macs(256, 256) is None


@pytest.mark.parametrize(("name", "settings"), METHODS)
def test_fake_and_real_tensors_count_the_same(name, settings):
    module = attention(name, **settings)
    with torch.no_grad():
        assert count(module, torch.randn(1, 40, 48, 32)) == count_module(module, (1, 40, 48, 32))


@pytest.mark.parametrize(("name", "settings"), METHODS)
def test_a_training_step_takes_three_to_three_and_a_half_forward_passes(name, settings):
    module = attention(name, **settings)
    forward = count_module(module, (2, 32, 32, 32)).macs
    assert 2.9 < count_module(module.train(), (2, 32, 32, 32), train=True).macs / forward < 3.55


@pytest.mark.parametrize(("name", "settings"), METHODS)
@pytest.mark.parametrize("train", [False, True])
def test_own_operators_compute_what_their_formulas_say(name, settings, train):
    """Opened, an operator's body is counted product by product: it cannot change unseen by its formula."""
    module = attention(name, **settings).train(train)
    stated = count_module(module, (1, 64, 40, 32), train)
    found = count_module(module, (1, 64, 40, 32), train, inside=True)
    assert reconcile(stated.macs, found.macs, found.uncounted) is None
    assert not any(operator.startswith("kitbench") for operator in found.by_operator)
    assert stated.exponentials == found.exponentials
    assert (stated.exponentials > 0) == (name != "conv")


def test_counting_is_exact_at_any_size_and_computes_nothing():
    module = attention("global", 32, 1)
    assert count_module(module, (1, 4096, 4096, 32)).macs == module.macs(4096, 4096)


N, S, D = 64, 49, 32
FORMS = {
    "products and sum": lambda q, k: (q[:, None] * k).sum(-1),
    "products and sum through views": lambda q, k: (q[:, None] * k).view(-1, D).sum(1),
    "products and mean": lambda q, k: (q[:, None] * k).mean(-1),
    "matmul": lambda q, k: k @ q[:, :, None],
    "einsum": lambda q, k: torch.einsum("nd,nsd->ns", q, k),
    "bmm": lambda q, k: torch.bmm(k, q[:, :, None]),
    "a loop of additions": lambda q, k: sum((q[:, i : i + 1] * k[:, :, i] for i in range(D)), torch.zeros(N, S)),
    "addcmul": lambda q, k: [torch.zeros(N, S, D).addcmul(q[:, None].expand_as(k), k)],
    "cdist": lambda q, k: torch.cdist(q[:, None], k),
    "conv1d": lambda q, k: F.conv1d(k.reshape(1, N * S, D), q.repeat_interleave(S, 0)[:, None], groups=N * S),
}


@pytest.mark.parametrize("form", FORMS)
def test_one_product_written_in_many_ways_counts_the_same(form):
    q, k = torch.randn(N, D), torch.randn(N, S, D)
    assert count(FORMS[form], q, k).macs == N * S * D


def test_large_euclidean_distances_count_one_multiply_add_a_coordinate():
    assert count(torch.cdist, torch.randn(100, 32), torch.randn(200, 32)).macs == 100 * 200 * 32


def test_fused_and_materialised_attention_count_the_same():
    q, k, v = torch.randn(2, 3, 40, 16), torch.randn(2, 3, 56, 16), torch.randn(2, 3, 56, 16)
    bias = torch.zeros(40, 56, requires_grad=True)  # a bias that needs a gradient takes the materialising path
    fused = count(F.scaled_dot_product_attention, q, k, v)
    plain = count(F.scaled_dot_product_attention, q, k, v, bias)
    assert fused.macs == plain.macs == 2 * 2 * 3 * 40 * 56 * 16
    assert fused.exponentials == plain.exponentials == 2 * 3 * 40 * 56
    assert not any("dot_product" in name for name in plain.by_operator)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_counts_the_blocks_of_its_mask():
    q, k, v = (torch.randn(2, 3, 256, 16) for _ in range(3))
    mask = create_block_mask(lambda b, h, i, j: i // 128 == j // 128, None, None, 256, 256, device="cpu")
    assert count(flex_attention, q, k, v).macs == 2 * 2 * 3 * 256 * 256 * 16
    found = count(lambda: flex_attention(q, k, v, block_mask=mask))
    assert (found.macs, found.exponentials) == (2 * 2 * 3 * 256 * 128 * 16, 2 * 3 * 256 * 128)


def test_grouped_convolutions_count_their_groups_backwards_too():
    layer = nn.Conv2d(32, 32, 3, padding=1, groups=32)
    forward = 16 * 16 * 32 * 9
    assert count_module(layer, (1, 32, 16, 16)).macs == forward
    assert count_module(layer, (1, 32, 16, 16), train=True).macs == 3 * forward


def test_sorts_and_gathers_are_listed_apart():
    x = torch.randn(10, 1024)
    assert count(lambda: x.sort(-1)).comparisons == 10 * 1024 * 10
    assert count(lambda: x.topk(8, -1)).comparisons == 10 * 1024 * 4
    assert count(lambda: x.argmax(-1)).comparisons == 10 * 1024
    assert count(nth_largest, x, torch.full((10, 1), 3)).comparisons == 10 * 1024 * 10
    assert count(lambda: x.index_select(1, torch.arange(4))).gathered_bytes == 10 * 4 * 4
    assert count(lambda: x.sort(-1)).macs == 0


class Scaled(nn.Module):
    """A gate: products that are never added."""

    def forward(self, x):
        return x * x.flip(1)


def test_products_that_are_never_added_are_reported_not_counted():
    found = count(Scaled(), torch.randn(4, 8))
    assert found.macs == 0
    assert found.uncounted == {"aten.mul": 32}


@torch.library.custom_op("kitbench_test::hidden_product", mutates_args=())
def hidden_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b


@hidden_product.register_fake
def _(a, b):
    return a.new_empty(a.shape[0], b.shape[1])


class Hidden(nn.Module):
    """An operator that changed to something that no counter sees."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        return hidden_product(x, self.weight.detach())

    def macs(self, height):
        return height * 16 * 16


def test_an_operator_that_nobody_counts_is_named():
    module = Hidden()
    found = count_module(module, (4, 16))
    note = reconcile(module.macs(4), found.macs, found.uncounted)
    assert note is not None
    assert "kitbench_test.hidden_product" in note
    assert count_fvcore(module, torch.randn(4, 16)) == (0, {"kitbench_test::hidden_product"})


def test_a_wrong_closed_form_is_said_to_be_wrong():
    note = reconcile(200, 100, {})
    assert note is not None
    assert "the closed form is wrong" in note
    assert reconcile(1000, 1009, {}) is None
    assert reconcile(1000, 989, {}) is not None


def test_macs_and_flops_are_told_apart():
    assert Count(macs=5_000_000_000).gmacs == 5
    assert Count(macs=5_000_000_000).gflops == 10


class ViT(nn.Module):
    """ViT-B/16 (Dosovitskiy et al., ICLR 2021)."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 768, 16, 16)
        self.blocks = nn.Sequential(*[ViTBlock(768, 12) for _ in range(12)])
        self.head = nn.Linear(768, 1000)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([x[:, :1], x], 1)  # in the place of the class token
        return self.head(self.blocks(x)[:, 0])


class ViTBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def test_vit_base_counts_its_published_figure():
    """timm's vit_base_patch16_224: 17.58 GMAC; 16.87 by fvcore, without attention's products, 0.02 for layer norms."""
    with torch.device("meta"):
        model = ViT()
    found = count_module(model, (1, 3, 224, 224))
    assert found.gmacs == pytest.approx(17.58, abs=0.02)
    attention_products = found.by_operator["aten.bmm"]  # on the meta device the fused kernel is not chosen
    assert (found.macs - attention_products) / 1e9 == pytest.approx(16.85, abs=0.01)


def test_importing_fvcore_warns_of_nothing():
    code = "from kitbench.cost.second_counter import count_fvcore; from torch import nn, zeros; "
    code += "assert count_fvcore(nn.Linear(2, 3), zeros(1, 2))[0] == 6"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


class SwinBlock(nn.Module):
    def __init__(self, dim, heads, shift):
        super().__init__()
        self.attention = methods.load_method("window").build(dim, heads, shift, window=7)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class SwinMerge(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        return self.reduce(self.norm(torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)))


class SwinTiny(nn.Module):
    """Swin-T (Liu et al., ICCV 2021), its window attention ours; [B, 3, 224, 224] to [B, 1000]."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 96, 4, 4), nn.LayerNorm(96)
        stages = []
        for stage, (depth, heads) in enumerate(((2, 3), (2, 6), (6, 12), (2, 24))):
            stages += [SwinMerge(48 << stage)] if stage else []
            stages += [SwinBlock(96 << stage, heads, number % 2 == 1) for number in range(depth)]
        self.stages = nn.Sequential(*stages)
        self.last, self.head = nn.LayerNorm(768), nn.Linear(768, 1000)

    def forward(self, x):
        return self.head(self.last(self.stages(self.norm(self.embed(x).permute(0, 2, 3, 1)))).mean((1, 2)))


def test_swin_tiny_with_our_window_attention_counts_its_published_figures():
    """Table 1 of the paper: 29 M parameters, "4.5 G FLOPs" (multiply-adds); timm and torchvision: 28,288,354."""
    model = SwinTiny()
    assert sum(p.numel() for p in model.parameters()) == 28_288_354
    assert count_module(model, (1, 3, 224, 224)).gmacs == pytest.approx(4.5, abs=0.02)
