"""What a config may say, what it may not, and what a user is told. Values in, values out; the file as an enemy."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from minigpt_cli.core.config import (
    Config,
    DataConfig,
    ModelConfig,
    RuntimeConfig,
    TrainConfig,
    config_difference,
    load_config,
    parse_config,
    parse_override,
    shipped_configs,
)
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.plain_yaml import Plain, parse_yaml


def parse(text: str) -> Config:
    return parse_config(parse_yaml(text, "test.yaml"), "test.yaml")


def assert_readable(error: pytest.ExceptionInfo[UserError]) -> str:
    """A message of one line, of a length that a person reads, and in no library's words."""
    message = str(error.value)
    assert message.splitlines() == [message]
    assert len(message) < 600
    for word in ("pydantic", "Traceback", "NoneType", "object at 0x"):
        assert word not in message
    return message


def plain(read: object) -> object:
    """What a scalar is where it may be anything."""
    return read.value() if isinstance(read, Plain) else read


def refusal(text: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(text)
    return assert_readable(caught)


def file_refusal(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(str(path))
    return assert_readable(caught)


# ------------------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-3", 1e-3), ("1E-3", 1e-3), ("1.0e-3", 1e-3), ("1.e-3", 1e-3), (".5", 0.5), ("5e-4", 5e-4), ("+5e-4", 5e-4),
        ("2e3", 2000.0), ("0.1", 0.1), ("3", 3), ("-.5e-1", -0.05),
        ("1e", "1e"), ("e3", "e3"), ("1e-", "1e-"), (".", "."), ("1-3", "1-3"), ('"1e-3"', "1e-3"),
    ],
)  # fmt: skip
def test_a_number_is_read_as_people_write_it(written: str, value: object) -> None:
    read = plain(parse_yaml(f"key: {written}", "test")["key"])
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("written", ["1e-3", "1E-3", ".001", "0.001", "1.0e-3", "10e-4"])
def test_every_way_to_write_a_learning_rate_is_the_same_rate(written: str) -> None:
    assert parse(f"train: {{learning_rate: {written}}}").train.learning_rate == 0.001
    assert load_config(None, [parse_override(f"train.learning_rate={written}")]).train.learning_rate == 0.001


@pytest.mark.parametrize(("written", "value"), [("12", 12), ("007", 7), ("010", 10), ("0", 0), ("1_000", 1000)])
def test_an_integer_stays_an_integer(written: str, value: int) -> None:
    seed = parse(f"train: {{seed: {written}}}").train.seed
    assert seed == value
    assert type(seed) is int


@pytest.mark.parametrize(("written", "value"), [("1e4", 10_000), ("2.5e3", 2500), ("100.0", 100), ("1_000", 1000)])
def test_a_count_may_be_written_as_a_number_without_a_fraction(written: str, value: int) -> None:
    for config in (
        parse(f"train: {{max_iters: {written}, batch_size: {written}}}"),
        load_config(None, [parse_override(f"train.{key}={written}") for key in ("max_iters", "batch_size")]),
    ):
        assert (config.train.max_iters, config.train.batch_size) == (value, value)
        assert type(config.train.max_iters) is type(config.train.batch_size) is int


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("train.batch_size", "train.batch_size: should be a valid integer, not 1.5"),
        ("train.max_iters", "train.max_iters: should be a valid integer or 'auto', not 1.5"),
    ],
)
def test_a_count_of_one_and_a_half_is_refused(key: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_config(None, [parse_override(f"{key}=1.5")])


TEXTS = ["data/set #2", "no", "2024", "1e3", "null", "~", "a: b", " x ", "010", "0x1F", "true", "1:30", "[a]", "{a: b}",
         "'a'", '"a"', "*a", "&a b", "!!int 5", "# a", "- a", "2001-01-01", "C:\\data", "=", "<<", "-x"]  # fmt: skip


@pytest.mark.parametrize("typed", TEXTS)
@pytest.mark.parametrize("key", ["data.path", "out_dir"])
def test_a_path_after_set_is_the_text_as_it_was_typed(key: str, typed: str, tmp_path: Path) -> None:
    config = load_config(None, [parse_override(f"{key}={typed}")])
    assert {"data.path": config.data.path, "out_dir": config.out_dir}[key] == typed
    (tmp_path / "again.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(str(tmp_path / "again.yaml")) == config


@pytest.mark.parametrize("written", ["no", "2024", "1e3", "null", "~", "010", "true", "1:30", "2001-01-01", "0x1F"])
def test_an_unquoted_path_in_a_file_is_text(written: str, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(f"data: {{path: {written}}}\nout_dir: {written}\n")
    config = load_config(str(tmp_path / "my.yaml"))
    assert (config.data.path, config.out_dir) == (written, written)


def test_a_choice_of_words_is_text_too() -> None:
    for key in ("model.norm", "runtime.precision", "runtime.device"):
        with pytest.raises(UserError, match="not 'no'"):
            load_config(None, [parse_override(f"{key}=no")])


def test_python_and_checkpoints_convert_nothing() -> None:
    for section, key, value in (
        ("train", "max_iters", "100"), ("train", "max_iters", 100.0), ("train", "batch_size", "010"),
        ("data", "path", 2024), ("data", "path", None), ("model", "bias", "yes"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"{section}.{key}"):
            parse_config({section: {key: value}}, "header")
        with pytest.raises(UserError, match=f"{section}.{key}"):
            load_config(None, [(f"{section}.{key}", value)])


@pytest.mark.parametrize("section", ["train: {learning_rate: 1}", "train: {grad_clip: 1}", "model: {dropout: 0}"])
def test_an_integer_will_do_for_a_fraction(section: str) -> None:
    parse(section)


WRONG_TYPES = {
    "train: {max_iters: many}": "train.max_iters",
    'train: {max_iters: "100"}': "train.max_iters",
    'train: {seed: "007"}': "train.seed",
    "train: {max_iters: 100.5}": "train.max_iters",
    "train: {max_iters: 1e-3}": "train.max_iters",
    "train: {max_iters: 1e300}": "train.max_iters",
    "train: {max_iters: 1:30}": "train.max_iters",
    "train: {max_iters: 0x1F}": "train.max_iters",
    "train: {max_iters: true}": "train.max_iters",
    "train: {max_iters: [100]}": "train.max_iters",
    "train: {max_iters: null}": "train.max_iters",
    "train: {learning_rate: fast}": "train.learning_rate",
    'train: {learning_rate: "1e-3"}': "train.learning_rate",
    "train: {learning_rate: yes}": "train.learning_rate",
    "model: {bias: 1}": "model.bias",
    'model: {bias: "yes please"}': "model.bias",
    "model: {mlp: tanh}": "model.mlp",
    "data: {path: [7]}": "data.path",
    "data: {path: }": "data.path",
    "data: {sampling: sometimes}": "data.sampling",
    "out_dir: !!int 7": "out_dir",
    'out_dir: ""': "out_dir",
    "runtime: {device: gpu}": "runtime.device",
    "runtime: {device: 'cuda:'}": "runtime.device",
    "runtime: {device: 'cuda:\u0663'}": "runtime.device",
    "runtime: {compile: maybe}": "runtime.compile",
    "model: 6": "model",
    "model: [n_layer, 6]": "model",
}


@pytest.mark.parametrize(("text", "key"), WRONG_TYPES.items(), ids=WRONG_TYPES)
def test_a_wrong_type_or_choice_is_refused_by_its_key(text: str, key: str) -> None:
    assert key in refusal(text)


OUT_OF_BOUNDS = {
    "train: {learning_rate: -0.001}": "train.learning_rate",
    "train: {learning_rate: 0}": "train.learning_rate",
    "train: {learning_rate: .nan}": "train.learning_rate",
    "train: {learning_rate: .inf}": "train.learning_rate",
    "train: {learning_rate: 1e999}": "train.learning_rate",
    "train: {weight_decay: -1}": "train.weight_decay",
    "train: {beta2: 1}": "train.beta2",
    "train: {grad_clip: 0}": "train.grad_clip",
    "train: {batch_size: 0}": "train.batch_size",
    "train: {max_iters: -5}": "train.max_iters",
    "train: {max_minutes: 0}": "train.max_minutes",
    "train: {seed: -1}": "train.seed",
    "train: {seed: 99999999999999999999}": "train.seed",
    "train: {log_interval: 0}": "train.log_interval",
    "model: {dropout: 1.0}": "model.dropout",
    "model: {dropout_attn: -0.1}": "model.dropout_attn",
    "model: {block_size: 0}": "model.block_size",
    "model: {n_layer: -1}": "model.n_layer",
    "model: {n_head: 0}": "model.n_head",
    "model: {n_embd: 1000000000000}": "model.n_embd",
}


@pytest.mark.parametrize(("text", "key"), OUT_OF_BOUNDS.items(), ids=OUT_OF_BOUNDS)
def test_a_value_out_of_bounds_is_refused_by_its_key_and_shown(text: str, key: str) -> None:
    message = refusal(text)
    assert key in message
    assert str(plain(parse_yaml(text, "test")[key.split(".")[0]][key.split(".")[1]])) in message


@pytest.mark.parametrize(
    ("n_embd", "n_head", "nearest"), [(100, 6, ["96", "102"]), (385, 6, ["384", "390"]), (5, 8, ["8"])]
)
def test_a_width_that_the_heads_do_not_divide_is_refused_with_the_nearest(
    n_embd: int, n_head: int, nearest: list[str]
) -> None:
    message = refusal(f"model: {{n_embd: {n_embd}, n_head: {n_head}}}")
    assert all(word in message for word in (f"n_embd {n_embd}", f"n_head {n_head}"))
    assert message.split("nearest n_embd: ")[1].split(" or ") == nearest


def test_without_blocks_the_heads_need_not_divide_the_width() -> None:
    parse("model: {n_layer: 0, n_embd: 7, n_head: 3}")


@pytest.mark.parametrize(
    ("batch", "micro", "nearest"), [(64, 7, ["4", "8"]), (64, 100, ["64"]), (7, 2, ["1", "7"]), (12, 5, ["4", "6"])]
)
def test_a_batch_that_cannot_be_split_is_refused_with_the_nearest(batch: int, micro: int, nearest: list[str]) -> None:
    message = refusal(f"train: {{batch_size: {batch}, micro_batch_size: {micro}}}")
    assert f"batch_size {batch}" in message
    assert message.split("try ")[1].split(" or ") == nearest


@pytest.mark.parametrize(("micro", "passes"), [(None, 1), (64, 1), (32, 2), (1, 64)])
def test_accumulation_is_how_often_a_micro_batch_fits(micro: int | None, passes: int) -> None:
    assert TrainConfig(batch_size=64, micro_batch_size=micro).accumulation == passes


def test_a_batch_beyond_reason_is_refused_at_once() -> None:
    began = time.process_time()
    refusal("train: {batch_size: 1000000000000001, micro_batch_size: 2}")
    assert time.process_time() - began < 0.5


def test_a_floor_above_the_rate_is_refused_with_both() -> None:
    message = refusal("train: {learning_rate: 1e-4, min_lr: 1e-3}")
    assert "0.0001" in message
    assert "0.001" in message


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().train.seed = 1  # type: ignore[misc]


# -------------------------------------------------------------------------------------------------------------- keys


UNKNOWN_KEYS = {
    "train: {learning_rat: 1}": "unknown key train.learning_rat; did you mean learning_rate?",
    "model: {n_layers: 1}": "unknown key model.n_layers; did you mean n_layer?",
    "model: {batch_size: 1}": "unknown key model.batch_size; it belongs at train.batch_size",
    "trian: {}": "unknown key trian; did you mean train?",
    "batch_size: 1": "unknown key batch_size; it belongs at train.batch_size",
    "train: {n_layer: 1}": "unknown key train.n_layer; it belongs at model.n_layer",
    "data: {zzz: 1}": "unknown key data.zzz; known: path, sampling",
}


@pytest.mark.parametrize(("text", "message"), UNKNOWN_KEYS.items(), ids=UNKNOWN_KEYS)
def test_an_unknown_key_is_refused_with_the_nearest_or_its_home(text: str, message: str) -> None:
    assert refusal(text) == f"test.yaml: {message}"


@pytest.mark.parametrize(
    "text", ["train: {seed: 1, seed: 2}", "train: {}\nmodel: {}\ntrain: {}", "train:\n  seed: 1\n  'seed': 1"]
)
def test_a_key_that_stands_twice_is_refused(text: str) -> None:
    assert "stands twice" in refusal(text)


def test_the_line_of_a_duplicate_key_is_named() -> None:
    assert "line 3" in refusal("train:\n  seed: 1\n  seed: 2\n")


ODD_KEYS = ["1: 2", "data: {1: 2}", "null: 1", "true: 1", "? [a, b]\n: 1", "? {a: b}\n: 1", "?", "2001-01-01: x"]


@pytest.mark.parametrize("text", ODD_KEYS)
def test_a_key_that_is_no_word_is_refused(text: str) -> None:
    assert ": :" not in refusal(text)  # the message names a key, or says that there is none


@pytest.mark.parametrize("key", ['"a\\nb"', '"a\\e[31mb"', '"a\\rb"', "x" * 900, '"' + "y" * 100_000 + '"'], ids=len)
def test_a_key_made_to_upset_the_message_does_not(key: str) -> None:
    refusal(f"{key}: 1")
    refusal(f"train: {{{key}: 1}}")


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "{}"])
def test_a_file_without_settings_is_the_defaults(text: str, tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text(text)
    assert load_config(str(tmp_path / "empty.yaml")) == Config()


# -------------------------------------------------------------------------------------------------- the file as enemy


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_an_alias_bomb_is_refused_before_it_goes_off() -> None:
    tracemalloc.start()
    began = time.process_time()
    assert "alias" in refusal(BOMB)
    assert time.process_time() - began < 1
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("text", ["a: &a [*a]", "&a {b: *a}", "train: &t {seed: 1}\nmodel: *t", "<<: *nothing"])
def test_no_alias_is_followed(text: str) -> None:
    assert "alias" in refusal(text)


TAGS = [
    "!!python/object/apply:os.system ['exit 3']", "!!python/name:os.system", "!!python/object:collections.Counter {}",
    "!!python/tuple [1]", "!mine x", "!!int x", '!!int ""', "!!float x", '!!float ""', "!!bool x", "!!timestamp x",
    '!!timestamp ""', "!!binary x", "!!map [1]", "!!map [[1, 2]]", "!!seq {a: 1}", "!!set [a]", "!!omap [1]",
    "!!omap [{a: 1}]", "!!pairs [[1]]", "!!null x", "!!merge x", "!!value x", "2001-99-99", "2001-01-01", "0b_", "0x_",
    "1:99", "=", "<<", "2001-01-01T00:00:00+99:99",
]  # fmt: skip


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("place", ["{}", "train: {}", "train: {{seed: {}}}", "? {}\n: 1", "[{}]"])
def test_no_tag_runs_code_or_raises_anything_but_a_user_error(place: str, tag: str) -> None:
    try:
        parse(place.format(tag))
    except UserError:
        refusal(place.format(tag))


@pytest.mark.parametrize("depth", [50, 200, 300, 330, 400, 1000, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ("{a: ", "}"), ("- ", ""), ("!!seq [", "]")])
def test_no_depth_of_nesting_raises_anything_but_a_user_error(depth: int, opening: str, closing: str) -> None:
    refusal(opening * depth + closing * depth)
    refusal("data: {path: " + opening * depth + closing * depth + "}")


@pytest.mark.parametrize(
    "number", ["9" * 5000, "-" + "9" * 5000, "0x" + "F" * 5000, "0" + "7" * 9000, "-0x" + "F" * 5000, "1e" + "9" * 99]
)
@pytest.mark.parametrize(
    "place",
    ["{}", "out_dir: [{}]", "train: {{seed: {}}}", "train: {{max_iters: {}}}", "model: {{n_embd: {}}}", "{}: 1"],
)
def test_no_size_of_number_raises_anything_but_a_user_error(number: str, place: str) -> None:
    refusal(place.format(number))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"out_dir: caf\xe9\n", "not UTF-8 text (byte 12)"),
        (bytes(range(256)), "not UTF-8"),
        ("out_dir: x\n".encode("utf-16"), "not UTF-8"),
        (b"out_dir: \x00\n", "not YAML"),
        (b"- a\n- b\n", "mapping"),
        (b"just words\n", "mapping"),
        (b"7\n", "mapping"),
        (b"a: 1\n---\nb: 2\n", "line 2"),
        (b"train: {seed: 1\n", "line"),
        (b"train:\n\tseed: 1\n", "line 2"),
        (b"%YAML 9.9\n---\na: 1\n", "line 1"),
        (b"a: b: c\n", "line 1"),
        (b"\x80\x04\x95", "not UTF-8"),
    ],
    ids=repr,
)
def test_a_file_that_is_no_config_is_refused_by_its_name(raw: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(raw)
    message = file_refusal(path)
    assert message.startswith(str(path))
    assert reason in message


def test_a_byte_order_mark_is_no_part_of_a_config(tmp_path: Path) -> None:
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfout_dir: here\n")
    assert load_config(str(tmp_path / "bom.yaml")).out_dir == "here"


@pytest.mark.parametrize("start", ["# ", "#"])  # the limit cuts a character in half, or does not
def test_a_file_of_two_megabytes_is_refused_unparsed(start: str, tmp_path: Path) -> None:
    (tmp_path / "big.yaml").write_text(start + "é" * 1_000_000, encoding="utf-8")
    began = time.process_time()
    assert "larger than" in file_refusal(tmp_path / "big.yaml")
    assert time.process_time() - began < 1


@pytest.mark.parametrize("name", ["nothing.yaml", "folder", "x" * 300, ""])
def test_what_is_no_file_is_refused_by_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert file_refusal(name).startswith(f"{name}: ")


@pytest.mark.parametrize(("name", "meant"), [("gtp", "gpt"), ("bigrm", "bigram"), ("configs/gpt3.yaml", "gpt")])
def test_an_unknown_config_is_refused_with_the_nearest_and_all_there_are(name: str, meant: str) -> None:
    message = file_refusal(name)
    assert f"did you mean {meant}?" in message
    assert all(shipped in message for shipped in ("gpt", "v2", "bigram"))


@given(st.text() | st.text(alphabet="ab:-[]{},&*!|>'\"%@`#?<=~ \n\t01.eE_xtru", max_size=60))
def test_any_text_is_a_config_or_a_user_error(text: str) -> None:
    try:
        parse(text)
    except UserError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017 - what it says, not that it is raised


SECTIONS = (Config, DataConfig, ModelConfig, TrainConfig, RuntimeConfig)
KEYS = st.sampled_from([name for section in SECTIONS for name in section.model_fields])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates() | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(KEYS, VALUES | st.dictionaries(KEYS, VALUES, max_size=5), max_size=4))
def test_any_yaml_document_is_a_config_or_a_user_error(document: dict[str, Any]) -> None:
    for how in (parse, lambda text: parse_config(yaml.safe_load(text), "header")):
        try:
            how(yaml.safe_dump(document))
        except UserError as error:
            assert len(str(error).splitlines()) == 1  # noqa: PT017


# ---------------------------------------------------------------------------------------------- precedence, --set, back


def test_the_file_beats_the_defaults_and_set_beats_the_file(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("train: {max_iters: 10, batch_size: 8}\nmodel: {n_layer: 1}\n")
    overrides = [parse_override("train.max_iters=20"), ("out_dir", "elsewhere"), parse_override("train.max_iters=30")]
    config = load_config(str(tmp_path / "my.yaml"), overrides)
    assert config.train.max_iters == 30  # the last --set
    assert config.train.batch_size == 8  # the file
    assert config.model.n_layer == 1
    assert config.train.seed == Config().train.seed  # the default
    assert config.out_dir == "elsewhere"  # a named flag
    assert load_config(str(tmp_path / "my.yaml")).train.max_iters == 10


def test_without_a_file_set_works_on_the_defaults() -> None:
    assert load_config(None) == Config()
    assert load_config(None, [parse_override("model.tie_weights=true")]).model.tie_weights is True


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("train.max_iters=100", "train.max_iters", 100),
        ("train.learning_rate=1e-3", "train.learning_rate", 1e-3),
        ("train.patience=null", "train.patience", None),
        ("train.patience=", "train.patience", None),
        ("train.patience= 5 ", "train.patience", 5),
        ("runtime.compile=false", "runtime.compile", False),
        ("runtime.compile=off", "runtime.compile", False),
        ("model.bias=Yes", "model.bias", True),
        ("out_dir=a=b", "out_dir", "a=b"),
        (" out_dir =x", "out_dir", "x"),
    ],
)
def test_set_is_read_by_the_type_of_its_setting(text: str, key: str, value: object) -> None:
    assert parse_override(text)[0] == key
    read: Any = load_config(None, [parse_override(text)])
    for name in key.split("."):
        read = getattr(read, name)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("text", ["train.max_iters", "", "=5", "  =5"])
def test_a_set_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--set") as caught:
        parse_override(text)
    assert_readable(caught)


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("train.max_itres", "did you mean max_iters"),
        ("max_iters", "it belongs at train.max_iters"),
        ("train.max_iters.x", "max_iters"),
        ("train.max_iters.x.y", "max_iters"),
        ("out_dir.x", "out_dir"),
        ("train", "section"),
        ("train.", "key"),
        (".max_iters", "key"),
        (".", "key"),
    ],
)
@pytest.mark.parametrize("config", [None, "gpt"])
def test_a_set_of_an_unknown_key_is_refused(config: str | None, key: str, named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        load_config(config, [(key, 5)])
    assert_readable(caught)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("train.weight_decay", "atuo", "should be a valid number or 'auto', not 'atuo'"),
        ("train.weight_decay", -1, "should be greater than or equal to 0 or 'auto', not -1"),
        ("train.max_iters", "many", "should be a valid integer or 'auto', not 'many'"),
        ("runtime.compile", 3, "should be 'auto' or a valid boolean, not 3"),
        ("out_dir", "", "string should have at least 1 character, not ''"),
    ],
)
def test_what_may_be_one_thing_or_another_is_complained_of_once(key: str, value: object, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, [(key, value)])
    assert str(caught.value) == f"--set: {key}: {said}"


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_every_shipped_config_builds(name: str) -> None:
    assert load_config(name) == load_config(str(shipped_configs()[name]))


def test_the_seeds_configs_are_shipped() -> None:
    assert {"gpt", "v2", "bigram"} <= set(shipped_configs())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gpt", {"batch_size": 64, "max_iters": 5000, "learning_rate": 3e-4, "eval_interval": 500}),
        ("v2", {"batch_size": 100, "max_iters": 5000, "learning_rate": 3e-4, "eval_interval": 500}),
        ("bigram", {"batch_size": 32, "max_iters": 3000, "learning_rate": 1e-2, "eval_interval": 300}),
    ],
)
def test_a_seed_config_trains_as_its_script_did(name: str, settings: dict[str, Any]) -> None:
    """And with what `torch.optim.AdamW` does when nobody says otherwise, on every parameter."""
    train = load_config(name).train
    adamw = {"weight_decay": 0.01, "decay": "all", "beta1": 0.9, "beta2": 0.999, "grad_clip": None, "seed": 1337}
    expected = settings | adamw | {"warmup_iters": 0, "lr_schedule": "constant", "micro_batch_size": None}
    assert {key: getattr(train, key) for key in expected} == expected


def test_v2_has_the_shape_of_gpt_but_for_its_beginning_and_one_dropout() -> None:
    gpt, v2 = load_config("gpt"), load_config("v2")
    assert (v2.model.init, gpt.model.init) == ("torch", "normal")
    assert (v2.model.dropout, v2.model.dropout_proj) == (0.2, 0.0)
    assert (gpt.model.dropout, gpt.model.dropout_proj) == (0.2, None)
    changed = set(config_difference(gpt, v2))
    assert changed == {"model.init", "model.dropout_proj", "train.batch_size"}


def test_the_difference_of_two_configs_is_by_dotted_key() -> None:
    old, new = Config(), load_config(None, [("train.seed", 1), ("out_dir", "x")])
    assert config_difference(old, new) == {"train.seed": (1337, 1), "out_dir": ("checkpoints", "x")}
    assert config_difference(old, old) == {}


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, exclude_min=low == 0 and high > 1)


LOOKS_LIKE_YAML = [
    "1e-3",
    "5e4",
    "08",
    "1:30",
    "yes",
    "null",
    "~",
    "2001-01-01",
    "=",
    "<<",
    "-",
    "*a",
    "&a",
    "# a",
    "a: b",
]
PATHS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30) | st.sampled_from(LOOKS_LIKE_YAML)
RATE = st.none() | st.floats(0, 1, exclude_max=True)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    heads, layers = draw(st.integers(1, 16)), draw(st.integers(0, 100))
    batch = draw(st.integers(1, 512))
    rate = draw(numbers(1e-300, 1e300))
    model = st.builds(
        ModelConfig, n_layer=st.just(layers), n_head=st.just(heads), n_embd=st.integers(1, 64).map(lambda n: n * heads),
        block_size=st.integers(1, 1 << 20), dropout=st.floats(0, 1, exclude_max=True),
        dropout_attn=RATE, dropout_proj=RATE, dropout_mlp=RATE,
    )  # fmt: skip
    train = st.builds(
        TrainConfig, batch_size=st.just(batch), learning_rate=st.just(rate), min_lr=st.floats(0, rate),
        micro_batch_size=st.none() | st.sampled_from([d for d in range(1, batch + 1) if batch % d == 0]),
    )  # fmt: skip
    runtime = st.builds(RuntimeConfig, device=st.sampled_from(["auto", "cpu", "mps", "cuda", "cuda:0", "cuda:15"]))
    data = st.builds(DataConfig, path=PATHS)
    return draw(st.builds(Config, data=data, model=model, train=train, runtime=runtime, out_dir=PATHS))


@given(config=configs())
def test_a_resolved_config_reads_back_as_itself(config: Config, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert parse(config.to_yaml()) == config
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(str(path)) == config


def test_a_resolved_config_spells_out_every_key() -> None:
    document = yaml.safe_load(Config().to_yaml())
    assert list(document) == list(Config.model_fields)
    for section in ("data", "model", "train", "runtime"):
        assert list(document[section]) == list(type(getattr(Config(), section)).model_fields)
