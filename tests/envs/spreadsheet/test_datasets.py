"""Task sets: generated ones are lazy, files become tasks or a reason, and nothing is dropped in silence."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset
from espalier.configs.load import load as load_config
from espalier.configs.schema import RunConfig
from espalier.envs.spreadsheet import datasets as module
from espalier.envs.spreadsheet.datasets import ALREADY_PASSES, DatasetError, load_tasks
from espalier.envs.spreadsheet.env import SpreadsheetEnv
from espalier.envs.spreadsheet.families import generate, solution_package
from espalier.trainer.display import plain_line
from espalier.trainer.evaluate import EvalReport, Untouched, _load_data
from espalier.trainer.loop import train
from espalier.trainer.report import write_report

SMALL = ("38985", "17251", "37609", "57105", "32255", "31202", "290-27", "79-7")
"""Of the 20 real tasks, some whose workbooks are small."""


@pytest.fixture(scope="module")
def bench() -> Path:
    home = os.environ.get("ESPALIER_BENCH_DATA")
    if not home:
        pytest.skip("ESPALIER_BENCH_DATA is not set: the 20 real SpreadsheetBench tasks are not at hand")
    folder = Path(home) / "spreadsheetbench-20"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small data set in the v1 layout, made of generated tasks with cached answers."""
    return write_bench(tmp_path_factory.mktemp("bench") / "small", "input", "answer")


def write_bench(folder: Path, start: str, answer: str, cases: int = 3) -> Path:
    rows = []
    for index, family in enumerate(("total", "stat", "share", "lookup")):
        task = generate(3, index, "train", family=family)
        id = ("0-total", 1, "2-share", 9)[index]  # 9 is on the held-out side
        home = folder / "spreadsheet" / str(id)
        home.mkdir(parents=True)
        for case in range(cases):
            (home / f"{case + 1}_{id}_{start}.xlsx").write_bytes(task.cases[case].package)
            (home / f"{case + 1}_{id}_{answer}.xlsx").write_bytes(solved(task, case))
        rows.append(
            {
                "id": id,
                "instruction": task.instruction,
                "spreadsheet_path": f"spreadsheet/{id}",
                "instruction_type": "Cell-Level Manipulation" if index else "Sheet-Level Manipulation",
                "answer_position": task.answer_position,
            }
        )
    (folder / "dataset.json").write_text(json.dumps(rows))
    return folder


def solved(task, case: int) -> bytes:
    """The solution workbook with cached values, as a spreadsheet program would save it."""
    import formualizer

    return formualizer.recalculate_xlsx_bytes(solution_package(task, case))["bytes"]


# --- generated -------------------------------------------------------------------------------------------------------


def test_generated_tasks_are_made_when_asked_for(monkeypatch):
    made = []
    monkeypatch.setattr(module, "generate", lambda *at: made.append(at) or generate(*at))
    tasks = load_tasks("generated", split="train", seed=4, count=10**4)
    assert len(tasks) == 10**4 and made == []
    assert tasks[7] == generate(4, 7, "train") and tasks[-1].id == tasks.ids[-1]
    assert tasks[7] is tasks[7] and len(made) == 2
    assert [task.id for task in tasks[3:6]] == list(tasks.ids[3:6])
    with pytest.raises(IndexError):
        tasks[10**4]


def test_what_is_kept_of_generated_tasks_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "KEEP_GENERATED", 3)
    tasks = load_tasks("generated", split="test", seed=4, count=6)
    first = tasks[0]
    assert list(tasks) == [generate(4, index, "test") for index in range(6)]
    assert tasks[0] == first and tasks[0] is not first


def test_the_digest_of_generated_tasks_tells_them_apart():
    def digest(**change):
        return load_tasks("generated", **{"split": "train", "seed": 1, "count": 20, **change}).sha256

    assert digest() == digest()
    assert len({digest(), digest(seed=2), digest(count=21), digest(split="test")}) == 4


# --- SpreadsheetBench ------------------------------------------------------------------------------------------------


def test_v1_and_verified_layouts_give_the_same_first_cases(folder, tmp_path):
    v1 = load_tasks(folder, split="all", seed=0, count=100)
    verified = load_tasks(write_bench(tmp_path / "v", "init", "golden", cases=1), split="all", seed=0, count=100)
    assert [len(task.cases) for task in v1] == [3] * 4 and [len(task.cases) for task in verified] == [1] * 4
    assert [task.cases[0] for task in v1] == [task.cases[0] for task in verified]
    assert v1.ids == ("0-total", "1", "2-share", "9")
    assert [task.family for task in v1] == ["sheet-level", *["cell-level"] * 3]
    assert v1.sha256 != verified.sha256 and v1.dropped == ()


def test_golden_values_are_those_of_the_generator(folder):
    tasks = load_tasks(folder, split="all", seed=0, count=100)
    for index, family in enumerate(("total", "stat", "share", "lookup")):
        made = generate(3, index, "train", family=family)
        assert [dict(case.golden) for case in tasks[index].cases] == [dict(case.golden) for case in made.cases[:3]]


def test_train_and_test_are_disjoint_and_complete(folder):
    parts = {split: set(load_tasks(folder, split=split, seed=0, count=9).ids) for split in ("all", "train", "test")}
    assert not parts["train"] & parts["test"]
    assert parts["train"] | parts["test"] == parts["all"] and parts["test"] == {"9"}


def test_a_side_without_tasks_is_an_error_that_says_so(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copy")
    edit_rows(copied, lambda rows: rows.pop())
    with pytest.raises(DatasetError, match="held-out side of copy is empty: it has only 3 tasks"):
        load_tasks(copied, split="test", seed=0, count=9)


def test_the_seed_draws_which_tasks_when_there_are_more(folder):
    drawn = {load_tasks(folder, split="all", seed=seed, count=2).ids for seed in range(8)}
    assert all(len(ids) == 2 for ids in drawn) and len(drawn) > 1
    assert load_tasks(folder, split="all", seed=3, count=2).ids == load_tasks(folder, split="all", seed=3, count=2).ids


def test_tasks_that_pass_already_are_left_out_of_training_only(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copy")
    train = load_tasks(copied, split="train", seed=0, count=9).ids
    victim = train[0]
    for case in (1, 2, 3):
        home = copied / "spreadsheet" / victim
        shutil.copy(home / f"{case}_{victim}_answer.xlsx", home / f"{case}_{victim}_input.xlsx")
    after = load_tasks(copied, split="train", seed=0, count=9)
    assert after.dropped == ((victim, ALREADY_PASSES),) and after.ids == train[1:]
    assert victim in load_tasks(copied, split="all", seed=0, count=9).ids
    # one case that does not pass is enough to keep it
    shutil.copy(folder / "spreadsheet" / victim / f"2_{victim}_input.xlsx", copied / "spreadsheet" / victim)
    assert victim in load_tasks(copied, split="train", seed=0, count=9).ids


def with_macros(package: bytes) -> bytes:
    out = io.BytesIO(package)
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr("xl/vbaProject.bin", b"macro")
    return out.getvalue()


def test_what_is_taken_out_of_a_workbook_is_said(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copy")
    for name in ("1_1_input.xlsx", "2_1_answer.xlsx"):
        file = copied / "spreadsheet" / "1" / name
        file.write_bytes(with_macros(file.read_bytes()))
    tasks = load_tasks(copied, split="all", seed=0, count=9)
    said = ("1_1_input.xlsx: macros were removed", "2_1_answer.xlsx: macros were removed")
    assert tasks.dropped == () and tasks.notes == tuple(("1", note) for note in said)
    assert load_tasks(folder, split="all", seed=0, count=9).notes == ()
    found = _load_data(RunConfig(), str(copied))
    report = EvalReport(
        "set", "0" * 64, 4, 12, found.dropped, found.noted, {}, "solution_once_apply_3",
        {"base": "b", "version": 0, "digest": "d"}, {}, Untouched(0, 0.0, 0.0, 0), (),
    )  # fmt: skip
    assert report.to_json()["noted"] == {"1": "; ".join(said)}
    assert f"noted      1 tasks\n             1: {'; '.join(said)}" in report.text()


def test_a_run_says_which_tasks_it_leaves_out_and_why(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copy")
    file = copied / "spreadsheet" / "1" / "1_1_input.xlsx"
    file.write_bytes(file.read_bytes()[:1000])
    words = ["--env.tasks", str(copied), "--out", str(tmp_path), "--name", "run", "--tracking.wandb", "off"]
    small = ["--trainer.steps", "1", "--trainer.groups", "2", "--trainer.group_size", "2", "--trainer.max_refills", "0"]
    said = []
    train(load_config("spreadsheet-tiny", [*words, *small, "--eval.tasks", "1"]), on_event=said.append)
    [row] = [row for row in said if row["kind"] == "tasks"]
    assert (row["train"], row["held_out"], list(row["dropped"])) == (2, 1, ["1"])
    page = write_report(tmp_path / "run").read_text()
    for text in (plain_line(row, 1), page):
        assert "1_1_input.xlsx: " in text, text
    assert plain_line({**row, "dropped": {}, "noted": {}}, 1) == "2 tasks to train on, 1 held out"


def test_an_environment_says_what_was_taken_out_of_a_task_s_workbook(folder):
    task = load_tasks(folder, split="all", seed=0, count=9)[0]
    case = replace(task.cases[0], package=with_macros(task.cases[0].package))
    for one, said in ((task, None), (replace(task, cases=(case,)), ["macros were removed"])):
        _, info = SpreadsheetEnv([one], tools=["submit"]).reset(seed=0)
        assert info.get("workbook_notes") == said


def edit_rows(folder: Path, change) -> None:
    path = folder / "dataset.json"
    rows = json.loads(path.read_text())
    change(rows)
    path.write_text(json.dumps(rows))


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda home: (home / "2_1_answer.xlsx").unlink(), "2_1_answer.xlsx is missing"),
        (lambda home: (home / "3_1_input.xlsx").write_bytes(b"PK no zip"), "3_1_input.xlsx: "),
        (lambda home: (home / "1_1_answer.xlsx").write_bytes(b""), "1_1_answer.xlsx: "),
        (lambda home: [path.unlink() for path in home.iterdir()], "no workbooks such as 1_1_input.xlsx"),
        (lambda home: edit_rows(home.parents[1], lambda r: r[1].update(answer_position="B!!2")), "answer position"),
        (lambda home: edit_rows(home.parents[1], lambda r: r[1].update(answer_position=None)), "no answer_position"),
        (lambda home: edit_rows(home.parents[1], lambda r: r[1].pop("instruction")), "no instruction"),
        (lambda home: edit_rows(home.parents[1], lambda r: r[1].update(spreadsheet_path="../..")), "leads out"),
        (lambda home: edit_rows(home.parents[1], lambda r: r[1].update(spreadsheet_path="/etc")), "leads out"),
    ],
)
def test_a_broken_task_is_left_out_with_the_reason(folder, tmp_path, harm, reason):
    copied = shutil.copytree(folder, tmp_path / "copy")
    harm(copied / "spreadsheet" / "1")
    tasks = load_tasks(copied, split="all", seed=0, count=9)
    assert tasks.ids == ("0-total", "2-share", "9")
    ((id, why),) = tasks.dropped
    assert id == "1" and reason in why and str(tmp_path) not in why


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "list of tasks"),
        ('{"id": 1}', "list of tasks"),
        ('[{"id": 1}, {"id": "1"}]', "more than once"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_broken_dataset_json_is_one_clear_sentence(tmp_path, text, message):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(DatasetError, match=message):
        load_tasks(tmp_path, split="all", seed=0, count=1)


def test_nothing_usable_is_an_error_that_says_why(folder, tmp_path):
    (tmp_path / "dataset.json").write_text((folder / "dataset.json").read_text())
    with pytest.raises(DatasetError, match=r"none of the 4 tasks of .* can be used; the first: 0-total: no w"):
        load_tasks(tmp_path, split="all", seed=0, count=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "/nowhere/at/all"}, "there is nothing at"),
        ({"source": __file__}, "neither a SpreadsheetBench folder nor a .parquet file"),
        ({"source": str(Path(__file__).parent)}, "no dataset.json"),
        ({"source": "generated", "split": "dev"}, "choose train, test or all"),
        ({"source": "generated", "split": "all"}, "no split 'all'"),
        ({"source": "generated", "count": 0}, "at least 1"),
    ],
)
def test_a_wrong_request_is_one_clear_sentence(options, message):
    with pytest.raises(DatasetError, match=message):
        load_tasks(**{"split": "train", "seed": 0, "count": 1, **options})


# --- the 20 real tasks -----------------------------------------------------------------------------------------------


def subset(bench: Path, target: Path, names: tuple[str, str], cases: range) -> Path:
    """Some of the real tasks in a layout of choice."""
    rows = [row for row in json.loads((bench / "dataset.json").read_text()) if str(row["id"]) in SMALL]
    for row in rows:
        home = target / row["spreadsheet_path"]
        home.mkdir(parents=True)
        for case in cases:
            for old, new in zip(("input", "answer"), names, strict=True):
                name = f"{case}_{row['id']}"
                shutil.copy(bench / row["spreadsheet_path"] / f"{name}_{old}.xlsx", home / f"{name}_{new}.xlsx")
    (target / "dataset.json").write_text(json.dumps(rows))
    return target


def test_real_tasks_load_in_both_layouts(bench, tmp_path):
    v1 = load_tasks(subset(bench, tmp_path / "v1", ("input", "answer"), range(1, 4)), split="all", seed=0, count=99)
    verified = load_tasks(subset(bench, tmp_path / "v", ("init", "golden"), range(1, 2)), split="all", seed=0, count=99)
    assert set(v1.ids) == set(verified.ids) == set(SMALL) and v1.dropped == verified.dropped == ()
    for one, other in zip(v1, verified, strict=True):
        assert (len(one.cases), len(other.cases)) == (3, 1)
        assert one.cases[0].package == other.cases[0].package and one.cases[0].golden


@pytest.mark.long
def test_all_20_real_tasks_load(bench):
    tasks = load_tasks(bench, split="all", seed=0, count=99)
    assert len(tasks) + len(tasks.dropped) == 20 and len(tasks) >= 19


# --- Spreadsheet-RL --------------------------------------------------------------------------------------------------


@pytest.fixture
def parquet(tmp_path) -> Path:
    """Four rows as Spreadsheet-RL writes them; the second says its instruction only in the prompt."""
    rows = []
    for index in range(4):
        task = generate(6, index, "train")
        thread = f"excelforum/{index:04d}"
        home = tmp_path / ("spreadsheets" if index % 2 else ".") / thread
        home.mkdir(parents=True)
        (home / "output.xlsx").write_bytes(task.cases[0].package)
        (home / "target.xlsx").write_bytes(solved(task, 0))
        said = {"answer_position": task.answer_position} | ({"instruction": task.instruction} if index != 1 else {})
        (home / "instruction.json").write_text(json.dumps(said))
        rows.append(
            {
                "data_source": "sheet_arena",
                "prompt": [
                    {"role": "system", "content": "You edit workbooks."},
                    {"role": "user", "content": task.instruction},
                ],
                "reward_model": {"style": "rule", "ground_truth": thread},
                "extra_info": {"index": index, "split": "train"},
            }
        )
    path = tmp_path / "train.parquet"
    Dataset.from_list(rows).to_parquet(str(path))
    return path


def test_a_parquet_gives_the_tasks_of_its_folders(parquet):
    tasks = load_tasks(parquet, split="all", seed=0, count=9)
    assert tasks.ids == tuple(f"excelforum/{index:04d}" for index in range(4)) and tasks.dropped == ()
    for index, task in enumerate(tasks):
        made = generate(6, index, "train")
        assert task.instruction == made.instruction and task.family == "excelforum"
        assert dict(task.cases[0].golden) == dict(made.cases[0].golden)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda home: (home / "target.xlsx").unlink(), "target.xlsx is missing"),
        (lambda home: (home / "output.xlsx").unlink(), "neither output.xlsx nor input.xlsx"),
        (lambda home: (home / "instruction.json").write_text("{"), "answer_position"),
        (lambda home: shutil.rmtree(home), "no folder excelforum/0000"),
    ],
)
def test_a_thread_that_lacks_something_is_left_out_with_the_reason(parquet, harm, reason):
    harm(parquet.parent / "excelforum" / "0000")
    tasks = load_tasks(parquet, split="all", seed=0, count=9)
    ((id, why),) = tasks.dropped
    assert id == "excelforum/0000" and reason in why and len(tasks) == 3


def test_a_thread_that_is_named_twice_counts_once(parquet):
    rows = Dataset.from_parquet(str(parquet), keep_in_memory=True).to_list()
    Dataset.from_list([*rows, rows[2]]).to_parquet(str(parquet))
    tasks = load_tasks(parquet, split="all", seed=0, count=9)
    assert len(set(tasks.ids)) == 4
    assert tasks.dropped == (("excelforum/0002 (row 4)", "a row before it has excelforum/0002 too"),)


def test_input_stands_in_where_there_is_no_output(parquet):
    home = parquet.parent / "excelforum" / "0000"
    (home / "output.xlsx").rename(home / "input.xlsx")
    assert len(load_tasks(parquet, split="all", seed=0, count=9)) == 4


def test_a_thread_cannot_lead_out_of_the_data_set(parquet, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    shutil.copytree(parquet.parent / "excelforum" / "0000", outside / "task")
    rows = Dataset.from_parquet(str(parquet), keep_in_memory=True).to_list()
    rows[0]["reward_model"]["ground_truth"] = os.path.relpath(outside / "task", parquet.parent)
    Dataset.from_list(rows).to_parquet(str(parquet))
    tasks = load_tasks(parquet, split="all", seed=0, count=9)
    assert len(tasks) == 3 and "there is no folder" in tasks.dropped[0][1]


def test_a_parquet_of_something_else_is_refused(tmp_path):
    Dataset.from_list([{"text": "hello"}]).to_parquet(str(tmp_path / "other.parquet"))
    with pytest.raises(DatasetError, match="no column prompt or reward_model"):
        load_tasks(tmp_path / "other.parquet", split="all", seed=0, count=1)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DatasetError, match="cannot be read as parquet"):
        load_tasks(tmp_path / "broken.parquet", split="all", seed=0, count=1)
