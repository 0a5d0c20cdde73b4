"""Problems from data sets on disk in each format, by the real library; columns by name and by expression."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from pydantic import ValidationError

from rmx.config import Config, ProblemsConfig, ProblemSource
from rmx.config_file import load_config
from rmx.errors import RmxError
from rmx.grading.data import DataError, expression, read_dataset
from rmx.grading.problems import build_problems, fingerprints

ROWS = [
    {"id": n, "problem": f"What is {n} + {n}?", "solution": f"{n} + {n} = {2 * n}\n#### {2 * n:,}", "kind": "ab"[n % 2]}
    for n in range(997, 1003)
]
READ = {"question": "problem", "answer": "solution: after ####"}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def written(folder: Path, suffix: str) -> Path:
    path, table = folder / f"sums{suffix}", datasets.Dataset.from_list(ROWS)
    if suffix == ".parquet":
        table.to_parquet(path)
    elif suffix in (".json", ".jsonl"):
        table.to_json(path)
    else:
        table.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".json", ".jsonl", ".csv", ".tsv"])
def test_files(suffix: str, tmp_path: Path) -> None:
    source = ProblemSource(dataset=str(written(tmp_path, suffix)), category="kind", **READ)
    found = read_dataset(source, 0)
    assert [(p.problem_id, p.question, p.answer, p.category) for p in found] == [
        (f"sums-{i}", row["problem"], str(2 * int(str(row["id"]))), row["kind"]) for i, row in enumerate(ROWS, start=1)
    ]


def test_a_directory_with_splits(tmp_path: Path) -> None:
    for split, rows in (("train", ROWS[:4]), ("test", ROWS[4:])):
        datasets.Dataset.from_list(rows).to_json(tmp_path / f"{split}.jsonl")
    source = {"dataset": str(tmp_path), "dataset_config": "main", **READ}
    assert len(read_dataset(ProblemSource(**source), 0)) == 4
    (first, _) = read_dataset(ProblemSource(**source, dataset_split="test"), 0)
    assert first.question == ROWS[4]["problem"] and first.category == tmp_path.name
    with pytest.raises(DataError, match=r"cannot be loaded.*nosuch"):
        read_dataset(ProblemSource(**source, dataset_split="nosuch"), 0)


@pytest.mark.parametrize("streaming", [None, True])
def test_a_limit_takes_rows_by_the_seed(streaming: bool | None, tmp_path: Path) -> None:
    path = str(written(tmp_path, ".jsonl"))

    def taken(seed: int) -> list[str]:
        source = ProblemSource(dataset=path, limit=3, streaming=streaming, **READ)
        return [p.question for p in read_dataset(source, seed)]

    assert taken(1) == taken(1) and len(taken(1)) == 3
    assert len({tuple(taken(seed)) for seed in range(6)}) > 1


@pytest.mark.parametrize(
    ("read", "row", "expected"),
    [
        ("a", {"a": " text "}, "text"),
        ("a", {"a": 3.5}, "3.5"),
        ("a", {"a": ["1", 2]}, "1, 2"),
        ("a", {"a": [{"role": "user", "content": "How many?"}]}, "How many?"),
        ("a: after ####", {"a": "#### 1 and then #### -1,234.5"}, "-1234.5"),
        ("a: after =", {"a": "x = (1, 2)"}, "(1, 2)"),
        ("a: boxed", {"a": r"so it is \boxed{\frac12}"}, r"\frac12"),
        ("{a}\n{b c}", {"a": "Ann has 3.", "b c": 4}, "Ann has 3.\n4"),
    ],
)
def test_expressions(read: str, row: dict[str, Any], expected: str) -> None:
    assert expression(read)(row) == expected


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        ("answr", {"answer": "1", "question": "q"}, r"no column 'answr'; columns: 'answer', 'question'; did you mean"),
        ("{nope}", {"a": "1"}, "no column 'nope'"),
        ("a", {"a": None}, "a: expected text or a number, got None"),
        ("a", {"a": True}, "got True"),
        ("a", {"a": "  "}, "expected text"),
        ("a: after ####", {"a": "no mark"}, "expected '####' and an answer after it"),
        ("a: boxed", {"a": "I do not know"}, "expected a solution with an answer"),
        ("a", {"a": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]}, r"the roles system, user"),
        ("a", {"a": [{"role": "user", "content": ""}]}, "a: content: expected text"),
    ],
)
def test_what_a_row_does_not_hold(read: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expression(read)(row)


@pytest.mark.parametrize("text", ["a: before x", "a:", "a: after "])
def test_unknown_expressions(text: str) -> None:
    with pytest.raises(DataError, match="expected a column"):
        expression(text)


def test_a_wrong_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {**ROWS[0], "solution": "none"}]))
    with pytest.raises(DataError, match=r"sums\.jsonl train, row 7: solution: expected '####'"):
        read_dataset(ProblemSource(dataset=str(path), **READ), 0)
    path.write_text(json.dumps({**ROWS[0], "kind": "reasoning_gym:gcd"}) + "\n")
    with pytest.raises(DataError, match="the prefix reasoning_gym"):
        read_dataset(ProblemSource(dataset=str(path), category="kind", **READ), 0)


def test_what_is_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sums.txt").write_text("1 + 1")
    with pytest.raises(DataError, match=r"expected a file that ends with \.parquet"):
        read_dataset(ProblemSource(dataset=str(tmp_path / "sums.txt")), 0)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'rmx\[benchmarks\]'"):
        read_dataset(ProblemSource(dataset="openai/gsm8k"), 0)


def test_the_hub_gets_name_configuration_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def load(*args: Any, **options: Any) -> Any:
        seen.append((args, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = ProblemSource(dataset="openai/gsm8k", dataset_config="main", revision="abc", **READ)
    assert read_dataset(source, 0)[0].category == "gsm8k"
    assert seen == [(("openai/gsm8k", "main"), {"split": "train", "streaming": False, "revision": "abc"})]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "a", "task": "gcd"}, "exactly one of jsonl, task and dataset"),
        ({"task": "gcd", "answer": "x"}, "answer is a setting of a dataset"),
        ({"jsonl": "x", "streaming": True}, "streaming is a setting of a dataset"),
        ({"dataset": "a", "streaming": True}, "streaming needs a limit"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ProblemSource(**settings)


def test_a_run_takes_them_and_notices_a_change(tmp_path: Path) -> None:
    path = written(tmp_path, ".csv")
    source = {"dataset": path.name, **READ}
    config = tmp_path / "config.yaml"
    settings = {"sources": [source], "train_count": 3, "evaluate_count": 2}
    config.write_text(json.dumps({"run_dir": "run", "model": {"name": "none"}, "problems": settings}))
    loaded: Config = load_config(config)
    problems = build_problems(loaded.problems, 0, loaded.path)
    assert [p.split for p in problems] == ["train"] * 3 + ["evaluate"] * 2
    before = fingerprints(loaded.problems, loaded.path)
    assert list(before) == [path.name]
    path.write_text(path.read_text().replace("1,994", "1,995"))
    assert fingerprints(loaded.problems, loaded.path) != before
    hub = ProblemsConfig(sources=[ProblemSource(dataset="openai/gsm8k")])
    assert fingerprints(hub) == {}


def test_mistakes_are_the_users_to_see() -> None:
    assert issubclass(DataError, RmxError)
