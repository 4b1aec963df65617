"""Suites, recipes and protocols: strict, named by their nearest key, resolved the same way for everybody."""

from __future__ import annotations

from pathlib import Path

import pytest

from kitbench.errors import InputError
from kitbench.spec import loading, shipped
from tests.conftest import TINY


@pytest.mark.parametrize("preset", ["smoke", "quick", "full"])
def test_every_preset_of_the_shipped_suite_is_valid(preset: str) -> None:
    resolved = loading.load_suite("denoise", preset)
    assert resolved.preset == preset
    assert resolved.recipe.name == preset
    assert list(resolved.methods) == ["kit", "global", "window", "local", "kit-random", "conv"]


def test_quick_is_the_default_and_gives_equal_keys_a_query() -> None:
    resolved = loading.load_suite("denoise")
    assert resolved.preset == "quick"
    assert resolved.methods["kit"].settings == {"patch": 4} == resolved.methods["kit-random"].settings


def test_an_override_changes_one_setting_and_nothing_else() -> None:
    plain, changed = (
        loading.load_suite("denoise"),
        loading.load_suite("denoise", overrides=["recipe.steps=2000", "methods.kit.k=8"]),
    )
    assert changed.recipe.steps == 2000
    assert changed.methods["kit"].settings == {"patch": 4, "k": 8}
    assert changed.methods["kit"].own == {"patch": 4}
    restored = changed.model_copy(
        update={"recipe": changed.recipe.model_copy(update={"steps": plain.recipe.steps}), "methods": plain.methods}
    )
    assert restored == plain


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("recipe.step=3", "did you mean 'recipe.steps'?"),
        ("recpe.steps=3", "did you mean 'recipe'?"),
        ("recipe.steps=0", "recipe.steps is 0"),
        ("recipe.steps=many", "recipe.steps is 'many'"),
        ("recipe.lr=nan", "recipe.lr"),
        ("recipe.warmup=1000000", "warmup"),
        ("recipe.lr=1e-7", "lr (1e-07) is below lr_min (1e-06), to which it falls; set both"),
        ("methods.kit.k=[1]", "methods.kit.k is [1]: expected true, false, a number or text"),
        ("methods.kitt.k=3", "did you mean 'kit'?"),
        ("methods.kit=3", "a method's setting is methods.NAME.SETTING; Known: conv"),
        ("methods.kit=3", "methods.NAME.SETTING"),
        ("protocol.tile=8", "tile must be at least 32"),
        ("protocol=awgn9", "did you mean 'awgn8'?"),
        ("recipe=quik", "did you mean 'quick'?"),
        ("backbone.attention_levels=[4]", "describes 3 levels"),
        ("backbone.head_dim=12", "not a multiple of head_dim"),
        ("task.sigma_train=[50, 10]", "must be [low, high]"),
        ("task.sigma_test=[]", "task.sigma_test"),
        ("data.embedded.modes=['color']", "'color'"),
        ("seeds=[1, 1]", "seeds must differ"),
        ("preset=standard", "would change the name of the preset alone; give --preset standard"),
        ("backbone.attention_levels=[]", "attention_levels is empty, and all methods would be one network"),
        ("backbone.attention_levels=[3,2]", "must name each level once, in rising order, found [3, 2]"),
        ("name=a/b", "'a/b' cannot name a suite or a method"),
        ("recipe.steps", "KEY=VALUE"),
        ("=3", "KEY=VALUE"),
    ],
)
def test_a_bad_override_is_refused_in_one_sentence(override: str, expected: str) -> None:
    with pytest.raises(InputError) as refused:
        loading.load_suite("denoise", overrides=[override])
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"name": "denois"}, "did you mean 'denoise'?"),
        ({"name": "denoise", "preset": "quik"}, "did you mean 'quick'?"),
        ({"name": "denoise", "methods": ["windw"]}, "did you mean 'window'?"),
        ({"name": "missing.toml"}, "cannot be read"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_known_one(arguments: dict, expected: str) -> None:
    with pytest.raises(InputError, match=expected.replace("?", r"\?")):
        loading.load_suite(**arguments)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("width = 8", "widht = 8", "did you mean 'width'?"),
        ("[task]", "[taks]", "task"),
        ("[presets.only]", "[presets]\nonly = 3\n[other]", "must be a table"),
        ("[methods.kit]\npatch = 4", "[methods]\nkit = 3", "must be tables"),
        ('kind = "denoise"', 'kind = "denoize"', "denoise"),
        ("seeds = [0]", "seeds = [0", "not valid TOML"),
        ("[methods.conv]", '[methods."a/b"]\nattention = "conv"', "'a/b' cannot name a suite or a method"),
        ('default_preset = "only"', 'default_preset = "onli"', "did you mean 'only'?"),
        ('default_preset = "only"', "", "names no default_preset; add that key, or give --preset: only."),
        ("[presets.only]\nrecipe", "recip", "has no presets; add a table of changed keys like [presets.quick]"),
        ("recipe = { from", "batch = { from", "unknown key 'batch'"),
        ('protocol = { from = "awgn8", lpips = "none" }', "", "the key 'protocol' is missing; add it."),
        (
            '{ from = "awgn8", lpips = "none" }',
            "3",
            "The protocol is 3; give its name, or a table like { from = 'NAME'",
        ),
        (
            'lpips = "none"',
            'id = "My 8"',
            "protocol.id is 'My 8': a protocol's id consists of a to z, digits and -, and",
        ),
        ('from = "awgn8"', "from = 3", "The protocol is {'from': 3, 'lpips': 'none'}; give its name"),
        ('kind = "denoise"', "", "the key 'task.kind' is missing; give one of denoise, deblur"),
        ("[backbone]", "[backbones]", "unknown key 'backbones'; did you mean 'backbone'?"),
        ("seeds = [0]", "seeds = [true]", "seeds.0 is True: input should be a valid integer."),
        ('["input"]', '["input", "input"]', "references must differ from one another, found ['input', 'input']"),
        ("[methods.conv]", f"[methods.{'a' * 81}]", "'aaaaaaaaaaaaaaaaaaaa...' cannot name a suite or a method"),
        ("[methods.conv]", '[methods."mein kit"]', "'mein kit' cannot name a suite or a method, as files are named"),
        ('name = "tiny"', 'name = "größer"', "'größer' cannot name a suite or a method, as files are named after it"),
    ],
)
def test_a_faulty_suite_file_is_refused(tmp_path: Path, old: str, new: str, expected: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TINY.replace(old, new))
    with pytest.raises(InputError) as refused:
        loading.load_suite(str(path))
    assert expected in str(refused.value)


def test_a_suite_file_of_the_users_own_takes_part_of_a_shipped_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TINY)
    resolved = loading.load_suite(str(path), methods=["conv", "path/to/my_attention.py"], seeds=[3, 4])
    assert (resolved.recipe.steps, resolved.recipe.lr) == (12, 2e-3)
    assert list(resolved.methods) == ["conv", "my-attention"]
    assert resolved.methods["my-attention"].attention == "path/to/my_attention.py"
    assert resolved.seeds == (3, 4)


@pytest.mark.parametrize(
    ("name", "override", "expected"),
    [
        ("derain", "task.densty=[0, 1]", "did you mean 'task.density'?"),
        ("derain", "task.density=[0.5, 0.1]", "density must be [low, high], found [0.5, 0.1]"),
        ("deblur", "task.length=[1, 99]", "task.length.1 is 99"),
        ("deblur", "task.kind=deblurr", "task.kind is 'deblurr'; give one of denoise, deblur, derain, denoise-real"),
        ("deblur", "task.kind=derain", "unknown key 'task.sigma'"),
        ("denoise-real", "data.folder.colour.protocol=rain", "Unknown protocol 'rain'"),
        ("deblur", "data.folder.gray.protocol.shfit=3", "did you mean 'data.folder.gray.protocol.shift'?"),
    ],
)
def test_a_fault_in_any_task_is_told_by_the_name_that_people_write(name: str, override: str, expected: str) -> None:
    with pytest.raises(InputError) as refused:
        loading.load_suite(name, overrides=[override])
    assert expected in str(refused.value)


def test_a_mode_may_have_a_protocol_of_its_own() -> None:
    resolved = loading.load_suite("deblur", overrides=["data.folder.gray.protocol.shift=3"])
    gray = resolved.data.folder.gray
    assert gray is not None
    assert gray.protocol is not None
    assert (gray.protocol.id, gray.protocol.shift) == ("levin-gray8-shift5", 3)
    assert gray.protocol.stamp.startswith("levin-gray8-shift5.v1+")
    assert resolved.protocol.id == "blur-rgb8-ssim3d-tile"


@pytest.mark.parametrize("name", shipped.suite_names())
def test_every_shipped_suite_trains_all_methods_alike_in_every_preset(name: str) -> None:
    for preset in loading.read_toml(name, "suites", Path())["presets"]:
        resolved = loading.load_suite(name, preset)
        assert resolved.name == name
        assert "kit" in resolved.methods


def test_standard_is_the_same_network_and_training_for_every_task() -> None:
    reference = loading.load_suite("denoise", "standard")
    for name in ("derain", "deblur", "denoise-real"):
        resolved, quick = loading.load_suite(name, "standard"), loading.load_suite(name, "quick")
        assert (resolved.backbone, resolved.recipe) == (reference.backbone, reference.recipe), name
        assert (resolved.protocol, resolved.data) == (quick.protocol, quick.data), name
        assert {m: own.settings for m, own in resolved.methods.items()} == {
            m: own.settings for m, own in reference.methods.items()
        }, name


def test_a_changed_protocol_never_carries_the_stamp_of_the_shipped_one() -> None:
    shipped = loading.load_suite("denoise", overrides=["protocol=awgn8"]).protocol
    changed = loading.load_suite("denoise", overrides=["protocol=awgn8", "protocol.border=8"]).protocol
    assert shipped.stamp == "awgn8.v1"
    assert changed.stamp.startswith("awgn8.v1+")
    assert (
        changed.stamp != loading.load_suite("denoise", overrides=["protocol=awgn8", "protocol.border=4"]).protocol.stamp
    )


def test_a_file_with_the_name_of_a_method_of_the_suite_is_refused() -> None:
    for file in ("kit.py", "elsewhere/kit_random.py", "global_.py"):
        with pytest.raises(InputError, match="bears the name of the method"):
            loading.load_suite("denoise", methods=[file])
    assert list(loading.load_suite("denoise", methods=["mine.py", "kit"]).methods) == ["mine", "kit"]


@pytest.mark.parametrize(
    ("preset", "patches"),
    [("quick", [1024, 256]), ("standard", [1024, 256]), ("crops64", [256, 64]), ("crops256", [4096, 1024]),
     ("levels123", [1024, 256, 64]), ("levels23", [256, 64])],
)  # fmt: skip
def test_the_suite_reach_trains_the_hashing(preset: str, patches: list[int]) -> None:
    resolved = loading.load_suite("reach", preset)
    recipe, kit = resolved.recipe, resolved.methods["kit"].settings
    found = [(recipe.crop // 2 ** (level - 1) // kit["patch"]) ** 2 for level in resolved.backbone.attention_levels]
    assert found == patches
    assert max(found) > 96  # of three chunks of 32, up to which the search is exact
    if preset != "quick":  # equal pixels in all
        assert recipe.steps * recipe.batch * recipe.crop**2 == 8000 * 128**2
    assert resolved.task.sigma_train == (25, 25)
    assert resolved.task.sigma_test == (25,)


def test_the_rows_of_the_suite_reach_have_equal_keys_or_as_equal_as_squares_are() -> None:
    methods = loading.load_suite("reach").methods
    settings = {name: method.settings for name, method in methods.items()}

    def keys(name: str) -> int:
        own = settings[name]
        return own["k"] * own["patch"] ** 2 if "k" in own else 4 * own["patch"] ** 2  # 4 is the default

    assert [keys(name) for name in ("kit", "kit-exact", "kit-random", "kit-nonadjacent")] == [64] * 4
    assert [keys(name) for name in ("kit-k8", "kit-patch8", "kit-patch8-k8")] == [128, 256, 512]
    assert settings["window"]["window"] ** 2 == 64
    assert settings["window-11"]["window"] == settings["local-11"]["size"] == round(128**0.5)
    assert settings["local"]["size"] == 9  # the odd side next above 8


@pytest.mark.parametrize("given", ["embedded", "folder"])
def test_a_suite_file_with_one_source_of_data_uses_it_for_both(tmp_path: Path, given: str) -> None:
    path, other = tmp_path / "mine.toml", {"embedded": "folder", "folder": "embedded"}[given]
    lines = TINY.splitlines(keepends=True)
    start = lines.index(f"[data.{other}]\n")
    end = next(place for place in range(start + 1, len(lines)) if lines[place].startswith("["))
    text = "".join(lines[:start] + lines[end:])
    path.write_text(text.replace('references = ["input"]\n', ""))
    chosen = loading.load_suite(str(path), overrides=['data.test=["CBSD68"]'])
    assert chosen.data.embedded == chosen.data.folder
    assert chosen.data.folder.colour is not None
    assert chosen.data.folder.colour.test == ("CBSD68",)
    assert chosen.references == ()
