"""Recipes: what is read, what is refused and in which words, and that saving loses nothing."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molcli.config.ranges import validate
from molcli.config.recipe import (
    RECIPE_FILE,
    RENAMED_KEYS,
    bundled_recipes,
    find_recipe,
    load_recipe,
    recipe_keys,
    save_recipe,
)
from molcli.config.sections import Recipe, StageConfig, TrainConfig, UpcycleConfig
from molcli.config.stages import Stage, resolve
from molcli.errors import MolError


def refusal(*overrides: str) -> MolError:
    with pytest.raises(MolError) as caught:
        load_recipe(None, overrides)
    return caught.value


def write(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_no_recipe_gives_the_defaults() -> None:
    assert load_recipe(None) == Recipe()


def test_a_file_changes_only_what_it_names(tmp_path: Path) -> None:
    path = write(tmp_path, "upcycle:\n  d_thin: 192\n  layers: [0, 2]\ntrain:\n")
    assert load_recipe(path) == Recipe(upcycle=UpcycleConfig(d_thin=192, layers=[0, 2]))


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, "")) == Recipe()


def test_set_wins_over_the_file_and_the_last_set_wins(tmp_path: Path) -> None:
    path = write(tmp_path, "upcycle: {d_thin: 192}")
    recipe = load_recipe(path, ["upcycle.d_thin=64", "upcycle.d_thin=128"])
    assert recipe.upcycle.d_thin == 128


@pytest.mark.parametrize(
    "override, section, key, expected",
    [
        ("upcycle.d_thin=null", "upcycle", "d_thin", None),
        ("upcycle.layers=all", "upcycle", "layers", "all"),
        ("upcycle.layers=[3]", "upcycle", "layers", [3]),
        ("calibrate.tokens=0x10", "calibrate", "tokens", 16),
        ("calibrate.data=2024-01-01", "calibrate", "data", "2024-01-01"),
        ("calibrate.data=1:30", "calibrate", "data", "1:30"),
        ("calibrate.data=010", "calibrate", "data", "010"),
        ("calibrate.data=!!str 10", "calibrate", "data", "10"),
        ("train.compile=yes", "train", "compile", True),
        ("train.learning_rate=1_0.5", "train", "learning_rate", 10.5),
        ("upcycle.gated_deltanet=[1, 3]", "upcycle", "gated_deltanet", [1, 3]),
        ("train.learning_rate=1e-4", "train", "learning_rate", 1e-4),
        ("train.learning_rate=1", "train", "learning_rate", 1.0),
        ("train.betas=[0, .5]", "train", "betas", (0.0, 0.5)),
        ("train.gradient_checkpointing=true", "train", "gradient_checkpointing", True),
        ("calibrate.data=a=b.txt", "calibrate", "data", "a=b.txt"),
        ("train.data={a.txt: 2, b.txt: 0.5}", "train", "data", {"a.txt": 2.0, "b.txt": 0.5}),
        ("calibrate.tokens=1_000", "calibrate", "tokens", 1000),
    ],
)
def test_values_are_yaml(override: str, section: str, key: str, expected: object) -> None:
    value = getattr(getattr(load_recipe(None, [override]), section), key)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    "override, found, hint",
    [
        ("upcyle.d_thin=1", "no section `upcyle`", "upcycle"),
        ("upcycle.d_thinn=1", "`upcycle` has no key `d_thinn`", "upcycle.d_thin"),
        ("d_thin=1", "sets nothing", "--set upcycle.d_thin=192"),
        ("upcycle.d_thin", "sets nothing", "--set upcycle.d_thin=192"),
        ("upcycle.gated_deltanet=al", "'al'", "upcycle.gated_deltanet=all"),
        ("upcycle.gated_deltanet=no", "is false", "upcycle.gated_deltanet=none"),
        ("train.tokens=1e6", "1000000.0", "train.tokens=1000000"),
    ],
)
def test_a_slip_is_answered_with_the_nearest_valid_name(
    override: str, found: str, hint: str
) -> None:
    error = refusal(override)
    assert found in error.found
    assert error.hint == hint
    assert error.allowed


@pytest.mark.parametrize("old, new", RENAMED_KEYS.items())
def test_a_renamed_key_is_refused_with_its_new_name(tmp_path: Path, old: str, new: str) -> None:
    assert new in recipe_keys()
    error = refusal(f"{old}=1")
    assert (error.found, error.hint) == (f"`{old}` is now `{new}`", new)
    section, key = old.split(".")
    path = write(tmp_path, f"{section}: {{{key}: 1}}")
    with pytest.raises(MolError) as caught:
        load_recipe(path)
    assert caught.value.found == error.found
    assert str(path) in caught.value.hint


DATA = "text or a mapping to numbers such as {a.jsonl: 0.7, b.txt: 0.3} or null"


@pytest.mark.parametrize(
    "override, allowed",
    [
        ("upcycle.num_blocks=true", "an integer"),
        ("upcycle.num_blocks=2.5", "an integer"),
        ("calibrate.tokens=010", "an integer"),
        ("calibrate.tokens=1:30", "an integer"),
        ("calibrate.tokens=2024-01-01", "an integer"),
        ("calibrate.tokens=" + "9" * 50, "an integer"),
        ("upcycle.num_blocks='9'", "an integer"),
        ("upcycle.num_blocks=", "an integer"),
        ("upcycle.d_thin=wide", "an integer or null"),
        ("upcycle.layers=[0, true]", "all, middle, auto or a list of integers such as [0, 2]"),
        ("upcycle.layers=3", "all, middle, auto or a list of integers such as [0, 2]"),
        ("train.data={a.txt: much}", DATA),
        ("calibrate.data=7", DATA),
        ("train.learning_rate=true", "a finite number"),
        ("train.learning_rate=.inf", "a finite number"),
        ("train.learning_rate=.nan", "a finite number"),
        ("train.learning_rate='0.1'", "a finite number"),
        ("train.betas=[0.9]", "two numbers such as [0.9, 0.95]"),
        ("train.gradient_checkpointing=1", "true or false"),
        ("train.precision=fp16", "auto, bf16, fp32"),
    ],
)
def test_an_ill_typed_value_is_refused(override: str, allowed: str) -> None:
    error = refusal(override)
    assert error.allowed == allowed
    assert f"`{override.partition('=')[0]}`" in error.found


@pytest.mark.parametrize(
    "override, allowed",
    [
        ("upcycle.num_blocks=0", "1 or more"),
        ("train.data={}", "at least one source and its weight"),
        ("train.data={a.txt: 1, b.txt: 0}", "more than 0"),
        ("upcycle.num_shared_blocks=10", "0 to 9"),
        ("upcycle.num_shared_blocks=-1", "0 to 9"),
        ("upcycle.top_k=9", "1 to 8 routed blocks"),
        ("upcycle.top_k=0", "1 to 8 routed blocks"),
        ("upcycle.top_k=-1", "1 to 8 routed blocks"),
        ("upcycle.d_thin=0", "1 or more"),
        ("upcycle.num_heads_shared=0", "1 or more"),
        ("upcycle.layers=[0, -1]", "layer numbers from 0"),
        ("upcycle.layers=[2, 2]", "each layer once"),
        ("upcycle.gated_deltanet=[1, 1]", "each layer once"),
        ("upcycle.layers=[]", "at least one layer"),
        ("upcycle.gated_deltanet=[]", "at least one layer"),
        ("convert.gated_deltanet=[]", "at least one layer"),
        ("upcycle.ridge=0", "more than 0"),
        ("upcycle.shrinkage=1.5", "0 to 1"),
        ("calibrate.tokens=0", "1 or more"),
        ("calibrate.seed=-1", "0 or more"),
        ("sample.temperature=0", "more than 0"),
        ("sample.prompt_length=0", "1 or more"),
        ("sample.prompt_length=512", "prompts shorter than documents, 1 to 511 tokens"),
        ("train.micro_batch_size=3", "a batch_size that is a multiple of micro_batch_size"),
        ("train.betas=[0.9, 1.0]", "0 to 0.999999"),
        ("train.kl_weight=0", "at least one above 0, else nothing is learned"),
        ("inspect.dead_share=2", "0 to 1"),
        ("model.d_thin=100", "a multiple of 64 (model.head_dim)"),
        ("model.top_k=15", "1 to 14 routed blocks"),
    ],
)
def test_a_value_out_of_range_is_refused(override: str, allowed: str) -> None:
    assert refusal(override).allowed == allowed


@pytest.mark.parametrize("key", ["d_thin_shared", "d_ff_thin_shared", "num_heads_shared"])
def test_where_no_block_is_shared_none_has_a_shape(key: str) -> None:
    error = refusal("upcycle.num_shared_blocks=0", f"upcycle.{key}=64")
    assert error.found == f"`upcycle.{key}` is 64, but no block is shared"
    assert error.hint == f"upcycle.{key}=null"


def test_nothing_can_be_routed_where_all_blocks_are_shared() -> None:
    error = refusal("upcycle.num_shared_blocks=9", "upcycle.top_k=2")
    assert error.allowed == "0: no block is routed"
    assert error.hint == "upcycle.top_k=0"


def test_gated_deltanet_may_not_name_a_dense_layer() -> None:
    error = refusal("upcycle.layers=[0, 2]", "upcycle.gated_deltanet=[2, 3]")
    assert "[3]" in error.found


@pytest.mark.parametrize("layers", ["middle", "auto"])
def test_gated_deltanet_may_not_name_a_layer_that_may_stay_dense(layers: str) -> None:
    error = refusal(f"upcycle.layers={layers}", "upcycle.gated_deltanet=[2, 3]")
    assert "may keep these dense" in error.found
    assert error.hint is not None
    load_recipe(None, [f"upcycle.layers={layers}", error.hint])


@pytest.mark.parametrize("method", ["random", "svd", "pca"])
@pytest.mark.parametrize("key", ["layers", "gated_deltanet"])
def test_auto_needs_fits_to_compare(key: str, method: str) -> None:
    error = refusal(f"upcycle.method={method}", f"upcycle.{key}=auto")
    assert "auto compares fits" in error.found
    settings = [f"upcycle.method={method}", error.hint]
    assert load_recipe(None, settings).upcycle.method == method


def test_one_shared_block_is_a_recipe() -> None:
    one = ["upcycle.num_blocks=1", "upcycle.num_shared_blocks=1", "upcycle.top_k=0"]
    assert load_recipe(None, one).upcycle.top_k == 0


@pytest.mark.parametrize(
    "text, found",
    [
        ("upcycle: 3", "section `upcycle` is 3"),
        ("- upcycle", "holds no sections"),
        ("upcycle: {d_thin: 1", "is not YAML, line 1"),
        ("upcycle:\n  d_thin: 64\n  d_thin: 128", "r.yaml, line 3, the key `d_thin` comes twice"),
        ("upcycle: {[a]: 1}", "a key is not a word"),
        ("1: {a: 2}", "no section `1`"),
        ("upcycle: {when: 2020-01-01}", "`upcycle` has no key `when`"),
        ("upcycle: !!python/object:os.system {}", "is not YAML"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, text: str, found: str) -> None:
    with pytest.raises(MolError) as caught:
        load_recipe(write(tmp_path, text))
    assert found in caught.value.found


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MolError, match="is not text"):
        load_recipe(path)


STAGES = """
train:
  tokens: 1000
  learning_rate: 3e-4
  stages:
    - {kind: align, tokens: 100, temperature: 2}
    - {kind: distill, data: b.jsonl, trainable: mol}
"""


def test_a_stage_has_the_train_sections_values_but_for_its_own(tmp_path: Path) -> None:
    config = load_recipe(write(tmp_path, STAGES), ["train.stages.1.tokens=70"]).train
    base = replace(config, stages=None)
    assert resolve(config, has_parent=True) == [
        Stage("align", replace(base, tokens=100, temperature=2.0)),
        Stage("distill", replace(base, tokens=70, data="b.jsonl", trainable="mol")),
    ]


def test_cached_logits_serve_the_stages_without_data_of_their_own() -> None:
    shared = "train.stages=[{kind: distill}, {kind: pretrain, data: {a.txt: 1, b.txt: 3}}]"
    config = load_recipe(None, [shared, "train.logits=cache"]).train
    kept, own = (stage.settings for stage in resolve(config, has_parent=False))
    assert (kept.data, kept.logits) == (None, "cache")
    assert (own.data, own.logits) == ({"a.txt": 1.0, "b.txt": 3.0}, None)
    assert resolve(replace(config, stages=None), has_parent=False)[0].kind == "distill"


def test_without_stages_the_train_section_is_the_one() -> None:
    config = TrainConfig(tokens=5)
    assert resolve(config, has_parent=True) == [Stage("distill", config)]
    assert resolve(config, has_parent=False) == [Stage("pretrain", config)]


@pytest.mark.parametrize(
    "override, found, allowed",
    [
        ("train.stages.2.tokens=1", "no `train.stages.2.tokens`", "NUMBER of 0, 1"),
        ("train.stages.0=1", "no `train.stages.0`", "NUMBER of 0, 1"),
        ("train.data.0.a=1", "no `train.data.0.a`", "a recipe with a list of train.data"),
        ("train.stages.0.token=1", "`train.stages.0` has no key `token`", "kind, data, tokens"),
        ("train.stages.1.kind=lign", "`train.stages.1.kind` is 'lign'", "align, distill, pretrain"),
        ("train.stages.0.tokens=0", "`train.stages.0.tokens` is 0", "1 or more"),
        ("train.stages.0.micro_batch_size=3", "`train.stages.0.batch_size` is 16", "a multiple"),
        ("train.stages.0.temperature=0", "`train.stages.0.temperature` is 0.0", "more than 0"),
        ("train.stages.0.data={a.txt: 0}", "`train.stages.0.data: a.txt` is 0.0", "more than 0"),
        ("train.stages=[]", "`train.stages` is empty", "at least one stage"),
        ("train.stages=[{tokens: 1}]", "`train.stages.0` has no `kind`", "align, distill"),
        ("train.stages=[align]", "`train.stages.0` is 'align'", "`key: value` lines"),
        ("train.stages=align", "`train.stages` is 'align'", "auto or a list with a mapping"),
    ],
)
def test_a_slip_in_a_stage_is_named(
    tmp_path: Path, override: str, found: str, allowed: str
) -> None:
    with pytest.raises(MolError) as caught:
        load_recipe(write(tmp_path, STAGES), [override])
    assert found in caught.value.found
    assert allowed in caught.value.allowed


# Text that YAML could take for something else is the risk: numbers, booleans, dates, nulls.
texts = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(
    [
        "1e5",
        "1.5",
        "no",
        "null",
        "~",
        "2020-01-01",
        "1:30",
        "",
        " a: b #",
        "'",
        "0x1f",
        "<<",
        "\x85",
    ]
)
positive = st.floats(min_value=1e-12, max_value=1e12)
layers = st.sampled_from(["all", "auto"]) | st.lists(
    st.integers(0, 99), unique=True, min_size=1, max_size=4
)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    num_blocks = draw(st.integers(1, 20))
    shared = draw(st.integers(0, num_blocks))
    routed = num_blocks - shared
    upcycle = UpcycleConfig(
        num_blocks=num_blocks,
        num_shared_blocks=shared,
        top_k=draw(st.integers(1, routed)) if routed else 0,
        d_thin=draw(st.none() | st.integers(1, 4096)),
        layers=draw(layers),
        gated_deltanet=draw(st.sampled_from(["all", "none", "auto"])),
        ridge=draw(positive),
    )
    train = TrainConfig(
        data=draw(st.none() | texts | st.dictionaries(texts, positive, min_size=1, max_size=3)),
        learning_rate=draw(positive),
        betas=(draw(st.floats(0, 0.99)), draw(st.floats(0, 0.99))),
        gradient_checkpointing=draw(st.booleans()),
    )
    stages = st.lists(
        st.builds(
            StageConfig,
            kind=st.sampled_from(["align", "distill", "pretrain"]),
            data=st.none() | texts,
            tokens=st.none() | st.integers(1, 10**12),
            temperature=st.none() | positive,
        ),
        min_size=1,
        max_size=3,
    )
    train = replace(train, stages=draw(st.none() | st.just("auto") | stages))
    return replace(Recipe(), upcycle=upcycle, train=train)


@given(recipe=recipes())
def test_saving_and_loading_gives_the_same_recipe(
    tmp_path_factory: pytest.TempPathFactory, recipe: Recipe
) -> None:
    path = tmp_path_factory.mktemp("recipe") / RECIPE_FILE
    save_recipe(recipe, path)
    assert load_recipe(path) == recipe


def test_every_field_can_be_set_and_is_saved(tmp_path: Path) -> None:
    save_recipe(Recipe(), tmp_path / RECIPE_FILE)
    saved = (tmp_path / RECIPE_FILE).read_text()
    for name in recipe_keys():
        section, key = name.split(".")
        assert f"\n  {key}:" in saved, name
        default: Any = getattr(getattr(Recipe(), section), key)
        shown = (
            "null"
            if default is None
            else str(list(default) if isinstance(default, tuple) else default)
        )
        assert load_recipe(None, [f"{name}={shown}"]) == Recipe(), name
    assert len(recipe_keys()) == sum(len(fields(getattr(Recipe(), f.name))) for f in fields(Recipe))


def test_a_bundled_recipe_is_found_by_name_and_as_written_in_the_readme() -> None:
    names = bundled_recipes()
    assert "demo" in names
    for spelling in ("demo", "demo.yaml", "recipes/demo.yaml"):
        # In a source checkout the third is a file of its own, with the same content.
        assert find_recipe(spelling).read_bytes() == names["demo"].read_bytes()


def test_an_unknown_recipe_names_the_nearest_and_all() -> None:
    with pytest.raises(MolError) as caught:
        find_recipe("smolm2-135m")
    assert caught.value.hint == "--recipe smollm2-135m"
    assert "demo" in caught.value.allowed


@pytest.mark.parametrize("name", ["/nowhere/demo.yaml", "."])
def test_a_path_elsewhere_is_not_taken_for_a_bundled_name(name: str) -> None:
    with pytest.raises(MolError):
        find_recipe(name)


@pytest.mark.parametrize("name", list(bundled_recipes()))
def test_every_bundled_recipe_is_valid(name: str) -> None:
    validate(load_recipe(name))


def test_a_recipe_that_an_earlier_release_saved_is_read_with_the_new_names(tmp_path: Path) -> None:
    old = "model:\n  layer_kind: softmax\nevaluate:\n  prompts: 3\nconvert:\n  budget: 0.25\n"
    saved = write(tmp_path, "# Resolved by molcli 0.1.0: every value that was in force.\n" + old)
    recipe = load_recipe(saved)
    assert recipe.model.layer_mixer == "attention"
    assert (recipe.evaluate.num_prompts, recipe.convert.gated_deltanet_budget) == (3, 0.25)
    with pytest.raises(MolError, match="is now"):  # one that somebody wrote is refused
        load_recipe(write(tmp_path, old))
