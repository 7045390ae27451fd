"""The model card: read back by huggingface_hub, its figures those of the records, its words no stronger."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from lorasmith.files.atomic import read_record, write_record
from lorasmith.files.digests import digest_folder
from lorasmith.hub.cache import cache_of
from lorasmith.packaging.card import write_card
from lorasmith.packaging.pack import pack
from lorasmith.packaging.unpack import unpack
from lorasmith.packaging.verify import verify
from lorasmith.records.base import Finding
from lorasmith.records.merging import MergeRecord
from lorasmith.records.proof import ComparisonRecord, WeightProof
from lorasmith.records.scoring import TaskMetric, TaskResult, ValidationResult
from tests.records_for_tests import identity
from tests.samples import SECRET, SETTINGS, sample_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return sample_run(tmp_path / "run", count=40)


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """Base and adapter as far as a card looks at them."""
    base, adapter = tmp_path / "small-1b", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "acme/small-1b"}))
    return {"base": base, "adapter": adapter}


def card(run: Path) -> ModelCard:
    return ModelCard.load(run / "merged" / "README.md")


def answers(run: Path, role: str, value: float | None) -> None:
    result = read_record(run / "validation" / f"{role}.json", ValidationResult)
    metric = TaskMetric(
        benchmark="MATH", metric="accuracy", method="generation", examples=8, scored=8 if value else 0,
        unscored=0 if value else 8, value=value,
    )  # fmt: skip
    record = TaskResult(
        model=identity(role), test_set=result.test_set, settings=SETTINGS, metrics=[metric],
        per_example=result.per_example,
    )  # fmt: skip
    write_record(run / "validation" / f"{role}_tasks.json", record)


def test_the_index_holds_the_merged_models_figures_with_their_sets(
    run: Path, models: dict[str, Path]
) -> None:
    answers(run, "merged", 0.75)
    write_card(run, **models)
    data = card(run).data
    assert data.base_model == "acme/small-1b"
    assert data["base_model_relation"] == "finetune"
    assert data.model_name == "small-1b-merged"
    merged = read_record(run / "validation" / "merged.json", ValidationResult)
    found = {(e.dataset_type, e.metric_type): e for e in data.eval_results or []}
    overall = found["lorasmith-test-set", "perplexity"]
    assert overall.metric_value == merged.overall.perplexity
    assert overall.dataset_args == {
        "examples": 40,
        "tokens": merged.overall.tokens,
        "loss_on": "response",
        "template": "chat",
        "test_set_sha256": merged.test_set.sha256,
    }
    assert found["cais/mmlu", "loss"].metric_value == merged.groups["source"]["MMLU"].loss
    assert found["HuggingFaceH4/MATH-500", "accuracy"].metric_value == 0.75
    assert len(found) == 2 * (1 + 5) + 1


def test_an_unscored_benchmark_is_in_no_index(run: Path, models: dict[str, Path]) -> None:
    answers(run, "merged", None)
    write_card(run, **models)
    assert "accuracy" not in {entry.metric_type for entry in card(run).data.eval_results or []}
    assert "unscored" in card(run).text


def test_the_card_gives_no_text_of_the_test_set_and_no_paths(
    run: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    write_card(run, **models)
    text = str(card(run))
    assert SECRET not in text
    assert str(tmp_path) not in text
    assert "ACME-9000" not in text


@pytest.mark.parametrize(
    ("named", "expected"),
    [("/home/me/models/base", None), ("models/base/bf16", None), ("", None), (None, None)],
)
def test_a_path_is_no_name_of_a_base(
    run: Path, models: dict[str, Path], named: str | None, expected: str | None
) -> None:
    (models["adapter"] / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": named}))
    write_card(run, **models)
    assert card(run).data.base_model is expected
    assert "the base model with digest" in card(run).text
    write_card(run, **models, base_model="org/base", name="mine")
    assert (card(run).data.base_model, card(run).data.model_name) == ("org/base", "mine")


@pytest.mark.parametrize(
    ("folder", "config_name", "claimed"),
    [
        ("base", None, None),
        ("other-2b", None, None),
        ("small-1b-it", None, None),
        ("SMALL-1B", None, "acme/small-1b"),
        ("base", "acme/small-1b", "acme/small-1b"),
        ("base", "acme/small-1b-it", None),
    ],
)
def test_the_card_claims_no_base_that_nothing_but_the_adapter_names(
    run: Path, models: dict[str, Path], folder: str, config_name: str | None, claimed: str | None
) -> None:
    base = models["base"].rename(models["base"].with_name(folder))
    if config_name:
        (base / "config.json").write_text(json.dumps({"_name_or_path": config_name}))
    write_card(run, base=base, adapter=models["adapter"])
    assert card(run).data.base_model == claimed
    assert ("acme/small-1b" in card(run).text) == (claimed is not None)


def test_the_card_of_another_base_than_the_adapters_says_so(run: Path, models: dict[str, Path]) -> None:
    path = run / "merged" / "lorasmith_merge.json"
    told = "the adapter was trained on 'b', not on 'a'"
    warning = Finding(severity="warning", code="base-name", message=told)
    merge = read_record(path, MergeRecord)
    write_record(path, merge.model_copy(update={"findings": [warning]}))
    write_card(run, **models)
    limits = card(run).text.partition("## Limits")[2]
    assert "The adapter was trained on 'b', not on 'a'." in limits


def test_a_base_in_the_hubs_cache_is_known_by_its_place(run: Path, models: dict[str, Path]) -> None:
    (models["adapter"] / "adapter_config.json").write_text("{}")
    base = Path("/anywhere/hub") / cache_of("org/base").name / "snapshots" / ("a" * 40)
    place = run.parent / base.relative_to("/")
    place.mkdir(parents=True)
    write_card(run, base=place, adapter=models["adapter"])
    assert card(run).data.base_model == "org/base"


@pytest.mark.parametrize(
    ("files", "licence", "says"),
    [
        ({"README.md": "---\nlicense: apache-2.0\n---\n# x\n"}, "apache-2.0", "apache-2.0 (from the base"),
        ({"LICENSE.txt": "All rights reserved"}, "other", "from the base's LICENSE.txt"),
        ({"README.md": "no front matter", "LICENSE": "x"}, "other", "from the base's LICENSE"),
        ({"README.md": "---\nlicense: [a\n---\n"}, None, "names no licence"),
        ({}, None, "names no licence"),
    ],
    ids=["card", "file", "card without front matter", "broken card", "nothing"],
)  # fmt: skip
def test_the_licence_is_the_bases(
    run: Path, models: dict[str, Path], files: dict[str, str], licence: str | None, says: str
) -> None:
    for name, content in files.items():
        (models["base"] / name).write_text(content)
    write_card(run, **models)
    assert card(run).data.license == licence
    assert says in card(run).text


def test_a_named_licence_keeps_its_link(run: Path, models: dict[str, Path]) -> None:
    (models["base"] / "README.md").write_text(
        "---\nlicense: other\nlicense_name: acme\nlicense_link: https://acme.example/terms\n---\n"
    )
    write_card(run, **models)
    data = card(run).data
    assert (data.license, data.license_name, data.license_link) == (
        "other",
        "acme",
        "https://acme.example/terms",
    )


def test_claims_are_those_of_the_records_and_identical_is_never_said(
    run: Path, models: dict[str, Path]
) -> None:
    write_card(run, **models)
    text = card(run).text
    assert "**Weights: exact**" in text
    assert "**Behaviour: drifted**" in text
    assert "The merged model is not the adapter: mean KL 6.8e-04" in text
    assert "Gate merge loss Δ: fail." in text
    assert "identical" not in text
    proof = read_record(run / "proof" / "weights.json", WeightProof)
    write_record(run / "proof" / "weights.json", proof.model_copy(update={"grade": "different"}))
    write_card(run, **models)
    assert "NOT this merge" in card(run).text


def test_what_was_not_measured_says_so(run: Path, models: dict[str, Path]) -> None:
    for name in ("proof/weights.json", "proof/behaviour.json", "proof/comparison.json", "gates.json"):
        (run / name).unlink()
    (run / "testset" / "contamination.json").unlink()
    write_card(run, **models)
    text = card(run).text
    assert text.count("not measured") == 3
    assert "was not compared with the training data" in text


def test_a_hurt_group_is_a_limit(run: Path, models: dict[str, Path]) -> None:
    record = read_record(run / "proof" / "comparison.json", ComparisonRecord)
    groups = {kind: dict(found) for kind, found in record.adapter_effect_groups.items()}
    groups["source"]["MATH"] = groups["source"]["MATH"].model_copy(update={"verdict": "hurts"})
    changed = record.model_copy(update={"adapter_effect_groups": groups})
    write_record(run / "proof" / "comparison.json", changed)
    write_card(run, **models)
    assert "The adapter hurts on source MATH" in card(run).text


def test_names_cannot_become_markup(run: Path, models: dict[str, Path]) -> None:
    path = run / "validation" / "merged.json"
    record = read_record(path, ValidationResult)
    evil = "x | y\n## <script>alert(1)</script> [a](javascript:b)"
    groups = {"source": {evil: record.overall}}
    write_record(path, record.model_copy(update={"groups": groups}))
    write_card(run, **models)
    text = card(run).text
    assert "<script" not in text
    assert "\n## &#" not in text
    (row,) = [line for line in text.splitlines() if "alert" in line]
    assert row.count("|") == 7
    assert "](javascript" not in text
    assert evil.split("\n")[0] in str(card(run).data.eval_results)


def test_the_recipe_is_the_merges(run: Path, models: dict[str, Path]) -> None:
    write_card(run, **models)
    merge = read_record(run / "merged" / "lorasmith_merge.json", MergeRecord)
    text = card(run).text
    assert f"{merge.swallowed_fraction:.2%} of {merge.elements_updated:,}" in text
    for sha in (merge.base_sha256, *merge.adapter_sha256):
        assert f"`{sha}`" in text


def test_the_card_is_no_part_of_the_models_digest_but_travels_with_it(
    run: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    before = digest_folder(run / "merged")
    write_card(run, **models)
    assert digest_folder(run / "merged") == before
    manifest = pack(run, tmp_path / "out")
    assert "merged_model/README.md" in {file.path for file in manifest.contents["merged_model.tar.gz"]}
    unpack([tmp_path / "out"], tmp_path / "there")
    assert (tmp_path / "there" / "merged_model" / "README.md").read_bytes() == (
        run / "merged" / "README.md"
    ).read_bytes()
    assert digest_folder(tmp_path / "there" / "merged_model") == before
    card_file = tmp_path / "there" / "merged_model" / "README.md"
    card_file.write_text(card_file.read_text() + "better than anything")
    assert any("README.md" in (finding.where or "") for finding in verify(tmp_path / "there"))


def test_the_same_records_give_the_same_bytes(run: Path, models: dict[str, Path]) -> None:
    write_card(run, **models)
    first = (run / "merged" / "README.md").read_bytes()
    write_card(run, **models)
    assert (run / "merged" / "README.md").read_bytes() == first
