"""The config of a run: file, flags, errors, and a printed form that can be read again."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasmith.errors import UsageError
from lorasmith.gates import GUIDE_GATES
from lorasmith.runs.config import load_config, resolved_gates, to_toml

FLAGS = {"base": Path("b"), "adapter": Path("a"), "test_set": Path("t.jsonl"), "output": Path("run")}


def write(folder: Path, text: str) -> Path:
    file = folder / "run.toml"
    file.write_text(text)
    return file


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, 'seed = 7\nprecision = "float16"\n')
    config = load_config(file, {**FLAGS, "seed": 8, "precision": None})
    assert (config.seed, config.precision, config.rounding) == (8, "float16", "auto")


def test_paths_in_the_file_are_relative_to_it(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        'base = "m/base"\nadapter = "/abs/a"\ntest_set = "t.jsonl"\noutput = "r"\ntrain = ["x.jsonl"]\n',
    )
    (tmp_path / "m" / "base").mkdir(parents=True)  # else it may be the name of a model on the hub
    config = load_config(file, {})
    assert config.base == tmp_path / "m/base"
    assert config.adapter == Path("/abs/a")
    assert config.train == (tmp_path / "x.jsonl",)


def test_the_printed_config_gives_the_same_config_again(tmp_path: Path) -> None:
    file = write(tmp_path, '[[gates]]\nname = "loss"\nmetric = "adapter.loss"\nthreshold = 0.5\n')
    config = load_config(file, FLAGS)
    again = load_config(write(tmp_path, to_toml(config)), FLAGS)
    assert resolved_gates(again) == resolved_gates(config)
    assert again.model_dump(exclude={"gates", "gate_defaults"}) == config.model_dump(
        exclude={"gates", "gate_defaults"}
    )


def test_a_gate_replaces_the_default_of_its_name_and_others_are_added(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        '[[gates]]\nname = "loss"\nmetric = "adapter.loss"\nthreshold = 0.5\n'
        '[[gates]]\nname = "kl"\nmetric = "merge.kl_mean"\nthreshold = 1e-4\n',
    )
    gates = resolved_gates(load_config(file, FLAGS))
    assert [gate.name for gate in gates] == [*(gate.name for gate in GUIDE_GATES), "kl"]
    assert next(gate.threshold for gate in gates if gate.name == "loss") == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sede = 1\n", "no option 'sede'"),
        ('seed = "x"\n', "--seed"),
        ('precision = "int8"\n', "--precision"),
        ("batch_tokens = 0\n", "--batch-tokens"),
        ("seed = \n", "not TOML"),
        ('[[gates]]\nname = "loss"\n', "gates"),
    ],
)
def test_a_wrong_file_is_one_message(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(UsageError, match=message) as raised:
        load_config(file, FLAGS)
    assert str(file) in str(raised.value)


def test_a_missing_option_is_named_as_a_flag() -> None:
    with pytest.raises(UsageError, match="--test-set is missing"):
        load_config(None, {key: value for key, value in FLAGS.items() if key != "test_set"})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"absent\.toml"):
        load_config(tmp_path / "absent.toml", FLAGS)
